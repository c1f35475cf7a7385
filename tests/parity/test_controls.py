"""ControlNets give the numbers and pictures of diffusers: several, in guess mode, and of the shuffle kind."""

from functools import cache

import diffusers
import pytest
import torch

import ldm
from ldm.checkpoint.controlnets import load_controlnet
from tests.parity import compare, controls, tenants, test_parity
from tests.parity.controls import CASES, FAMILIES
from tests.parity.tenants import from_picture, request
from tests.parity.test_parity import LEVELS

pytestmark = test_parity.pytestmark


@pytest.fixture(scope="session")
def nets(both, tmp_path_factory):
    """Two ControlNets of a family, and one of the shuffle kind, saved by diffusers."""

    @cache
    def build(name):
        return controls.three(tmp_path_factory.mktemp(f"{name}-controls"), both(name)[1])

    return build


def slow_but(names, quick):
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("kind", [0, 2], ids=["plain", "shuffle"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_residuals_equal_those_of_diffusers(name, kind, nets):
    ours, theirs = load_controlnet(nets(name)[kind]), diffusers.ControlNetModel.from_pretrained(nets(name)[kind])
    torch.manual_seed(0)
    config = ours.config
    z, context, hint = torch.randn(2, 4, 8, 8), torch.randn(2, 77, config.context_dim), torch.rand(2, 3, 64, 64)
    timesteps, vector, added = torch.tensor([700, 10]), None, None
    if config.vector_dim:
        pooled, sizes = torch.randn(2, config.vector_dim - 6 * 256), torch.tensor([[512.0, 640, 0, 8, 512, 512]] * 2)
        embedded = ldm.conditioning.timestep_embedding(sizes.flatten(), 256).reshape(2, -1)
        vector, added = torch.cat([pooled, embedded], 1), {"text_embeds": pooled, "time_ids": sizes}
    down, mid = theirs(z, timesteps, context, hint, added_cond_kwargs=added, return_dict=False)
    worst = 0.0
    for own, other in zip(ours(z, timesteps, context, hint, vector), [*down, mid], strict=True):
        assert own.shape == other.shape
        assert other.std() > 0.01
        worst = max(worst, float((own - other).abs().max()))
    print(f"{name}: {worst:.1e}")
    assert worst <= 1e-5


def assert_equal(both, name, request):
    ours, theirs = both(name)
    expected, made = controls.theirs(theirs, request), tenants.ours(ours, request)[0]
    difference = compare.levels(made, expected)
    print(f"{name}: {difference} of 255 levels")
    assert made.shape == expected.shape
    assert expected.std() > 20  # flat pictures would be equal whatever the networks did
    assert difference <= LEVELS


QUICK = {("sd15", "two")}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, marks=() if (name, case) in QUICK else pytest.mark.slow)
        for name in FAMILIES
        for case in CASES
    ],
)
def test_a_controlled_picture_equals_that_of_diffusers(name, case, both, nets):
    made = CASES[case](nets(name), controls.hints(2))
    assert_equal(both, name, request("euler", 8, controls=made))


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"images": 2}, {"sampler": "ddim"}, {"sampler": "dpmpp_2m_sde"}], ids=str)
def test_they_stay_equal_whatever_is_asked(change, both, nets):
    made = [ldm.Control(nets("sd15")[0], controls.hints(1)[0])]
    assert_equal(both, "sd15", request(**({"sampler": "euler", "steps": 8, "controls": made} | change)))


@pytest.mark.slow
def test_a_controlled_picture_from_a_picture_equals_that_of_diffusers(both, nets):
    made = [ldm.Control(nets("sd15")[0], controls.hints(1)[0], end=0.7)]
    assert_equal(both, "sd15", from_picture("euler", steps=10, controls=made))
