"""The numbers of the presets, and configurations that describe no model."""

import dataclasses

import pytest

from ldm.config import UNetConfig
from ldm.presets import PRESETS, RELATIVES, SD15, SD21, SDXL_BASE, SDXL_REFINER


def test_channels_that_groups_or_heads_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="20 channels are not divisible by 8 norm_groups"):
        UNetConfig(channels=(20,), depth=(1,), heads=(2,), norm_groups=8)
    with pytest.raises(ValueError, match="16 channels are not divisible by 0 heads"):
        UNetConfig(channels=(16,), depth=(1,), heads=(0,), norm_groups=8)
    with pytest.raises(ValueError, match="16 channels are not divisible by 3 heads"):
        UNetConfig(channels=(16,), depth=(1,), heads=(3,), norm_groups=8)
    with pytest.raises(ValueError, match="one entry per level"):
        UNetConfig(channels=(16, 32), depth=(1,), heads=(2,), norm_groups=8)


def test_one_architecture_is_one_value_however_it_is_written():
    written = UNetConfig(depth=((1, 1), 1, (1, 1), 0), up_depth=(0, (1, 1, 1), 1, 1))
    assert written == UNetConfig()
    assert hash(written) == hash(UNetConfig())
    assert UNetConfig(mid="none", mid_depth=3) == UNetConfig(mid="none")
    assert UNetConfig(mid="residual") != UNetConfig(mid="none") != UNetConfig()
    assert UNetConfig(up_depth=(0, 1, 1, (1, 1, 2))) != UNetConfig()


def test_the_depths_of_all_residual_blocks_are_those_of_their_levels_or_their_own():
    assert UNetConfig(res_blocks=1).depths() == ([(1,), (1,), (1,), (0,)], [(0, 0), (1, 1), (1, 1), (1, 1)])
    assert RELATIVES["SSD-1B"].depths() == ([(0, 0), (2, 2), (4, 4)], [(4, 4, 10), (2, 1, 1), (0, 0, 0)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": (1, (1, 2, 1), 1, 0)}, r"depth needs .* 2 residual blocks, got \(1, 2, 1\)"),
        ({"depth": (1, (), 1, 0)}, r"depth needs .*, got \(\)"),
        ({"depth": (1, (1, 2), 1, 0)}, r"up_depth needs .* 3 residual blocks, got \(1, 2\)"),
        ({"up_depth": (1, (1, 2), 1, 0)}, r"up_depth needs .* 3 residual blocks, got \(1, 2\)"),
        ({"up_depth": (1, 1, 1)}, "up_depth and heads need one entry per level"),
        ({"depth": (1, -1, 1, 0)}, "depth needs a number from 0"),
        ({"mid_depth": 0}, "mid_depth must be 1 or more in a full middle, got 0"),
        ({"guidance_dim": 3}, "guidance_dim must be even and 4 or more, got 3"),
    ],
)
def test_depths_that_no_network_has_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**change)


def test_the_text_towers_make_the_context_and_the_vector_that_the_unet_expects():
    for preset in PRESETS.values():
        assert sum(tower.width for tower in preset.text) == preset.unet.context_dim
        pooled = [tower.projection for tower in preset.text if tower.projection]
        sizes = 256 * len(preset.micro_conditioning)  # each scalar as a sinusoid of 256
        assert preset.unet.vector_dim == (pooled[-1] + sizes if pooled else None)


def test_what_the_official_models_differ_in():
    assert (SD15.diffusion.prediction, SD21.diffusion.prediction) == ("eps", "v")
    assert (SD15.vae.scaling_factor, SDXL_BASE.vae.scaling_factor) == (0.18215, 0.13025)
    assert [tower.pad_id for tower in SDXL_BASE.text] == [49407, 0]
    assert SDXL_REFINER.unet.channels == (384, 768, 1536, 1536)
    assert dataclasses.replace(SD21, name="x").image_size == 768
