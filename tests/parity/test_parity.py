"""The same weights, seeds and settings give the same numbers and pictures as diffusers."""

import pytest

import ldm
from tests.parity import measure, reference

LEVELS = 1  # a value that lies on the boundary of two levels may be rounded to either


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A small random SD 1.5 that diffusers built and saved, loaded by us and by diffusers."""
    folder = tmp_path_factory.mktemp("parity")
    reference.build(folder, reference.SMALL, 64)
    return ldm.load(folder, ldm.Placement("cpu")), reference.load(folder)


def test_every_network_computes_what_diffusers_computes(both):
    differences = measure.networks(*both, side=64)
    assert len(differences) == 5
    assert max(differences.values()) < 1e-5, differences  # fp32, summed in another order


@pytest.mark.parametrize(("sampler", "spacing"), measure.STEP_LISTS)
def test_pictures_equal_those_of_diffusers(both, sampler, spacing):
    levels, deviation = measure.pictures(*both, sampler, spacing, steps=8)
    assert deviation > 20  # flat pictures would be equal whatever the networks did
    assert levels <= LEVELS


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize(
    "change",
    [
        {"steps": 2},  # a single step starts at the top here, at the bottom there
        {"steps": 7},  # does not divide 1000
        {"guidance_scale": 1.0},
        {"guidance_scale": 12.0, "guidance_rescale": 0.7},
        {"seeds": (2**32 - 1, 2**32)},
        {"size": (72, 40)},  # 9x5 latents, which the levels do not divide
    ],
    ids=str,
)
def test_they_stay_equal_whatever_is_asked(both, sampler, change):
    levels, _ = measure.pictures(*both, sampler, "leading", **({"steps": 4} | change))
    assert levels <= LEVELS


@pytest.mark.full
def test_the_full_size_sd15_equals_diffusers(tmp_path):
    reference.build(tmp_path, reference.FULL, 512)
    both = ldm.load(tmp_path, ldm.Placement("cpu")), reference.load(tmp_path)
    assert both[0].config == ldm.SD15
    assert max(measure.networks(*both, side=128).values()) < 1e-5  # fp32, summed in another order
    assert measure.pictures(*both, "ddim", "leading", steps=4, size=(128, 128))[0] <= LEVELS
