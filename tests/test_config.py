"""Presets, and a TOML reader that accepts nothing it does not know."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from ldm.config import UNetConfig, from_toml
from ldm.presets import PRESETS, RELATIVES, SD15, SD21, SDXL_BASE, SDXL_REFINER


@dataclass(frozen=True)
class Inner:
    size: int = 3
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=Inner)
    where: Path | None = None
    flag: bool = False


def read(tmp_path, text):
    (tmp_path / "x.toml").write_text(text)
    return from_toml(tmp_path / "x.toml", Outer)


def test_a_toml_file_becomes_nested_dataclasses(tmp_path):
    got = read(tmp_path, 'name = "n"\nkind = "b"\nwhere = "a/b"\n[inner]\nsize = 7\nrates = [1, 0.5]\n')
    assert got == Outer("n", "b", Inner(7, (1.0, 0.5)), Path("a/b"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "n"\nsise = 1', r"unknown 'sise'; valid keys: name, kind, inner, where, flag"),
        ('name = "n"\n[inner]\nsise = 1', r"inner: unknown 'sise'; valid keys: size, rates"),
        ('kind = "a"', " lacks name"),
        ('name = "n"\nkind = "c"', r"kind must be one of 'a', 'b', got 'c'"),
        ("name = 1", r"name must be str, got 1"),
        ('name = "n"\nflag = 1', r"flag must be bool, got 1"),
        ('name = "n"\n[inner]\nsize = 1.5', r"inner: size must be int, got 1\.5"),
        ('name = "n"\n[inner]\nsize = true', r"inner: size must be int, got True"),
        ("name = ", r"is not valid TOML"),
    ],
)
def test_a_mistake_in_a_toml_file_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


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


def test_a_depth_is_read_from_a_file_per_level_and_per_block(tmp_path):
    (tmp_path / "x.toml").write_text("depth = [[1, 2], 1, 1, 0]\nup_depth = [0, 1, 1, [1, 2, 1]]\n")
    config = from_toml(tmp_path / "x.toml", UNetConfig)
    assert config == UNetConfig(depth=((1, 2), 1, 1, 0), up_depth=(0, 1, 1, (1, 2, 1)))
    for wrong in ("[[1, 2.0], 1, 1, 0]", '["1", 1, 1, 0]', "[[[1]], 1, 1, 0]", "1", "[true, 1, 1, 0]"):
        (tmp_path / "x.toml").write_text(f"depth = {wrong}\n")
        with pytest.raises(ValueError, match=r"depth must be (int|tuple), got"):
            from_toml(tmp_path / "x.toml", UNetConfig)


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
