"""Image prompts give the numbers and pictures of diffusers: plain and Plus IP-Adapters, alone and together."""

from functools import cache

import pytest
import torch

import ldm
from ldm.checkpoint.ip_adapters import load_ip_adapter
from ldm.conditioning import Condition
from ldm.models.ip_adapter import Applied, ImagePrompted
from tests.parity import compare, ip_adapters, tenants, test_parity
from tests.parity.ip_adapters import CASES, EMBEDDING, FAMILIES, WIDTH
from tests.parity.tenants import request
from tests.parity.test_parity import LEVELS

pytestmark = test_parity.pytestmark


@pytest.fixture(scope="session")
def saved(both, tmp_path_factory):
    """The folder of two IP-Adapters and a vision tower for a family."""
    return cache(lambda name: ip_adapters.build(tmp_path_factory.mktemp(f"{name}-ip"), both(name)[1]))


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "plus"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_networks_equal_those_of_diffusers(name, kind, both, saved):
    ours, theirs = both(name)
    prompt = ldm.ImagePrompt(saved(name) / f"{kind}.safetensors", "no.png", saved(name) / "image_encoder", 0.8)
    adapter = load_ip_adapter(prompt.model, unet=ours.unet)
    torch.manual_seed(0)
    features = torch.randn(2, EMBEDDING) if kind == "plain" else torch.randn(2, 17, WIDTH)
    config, vector, added = ours.config.unet, None, {}
    z, context, timesteps = torch.randn(2, 4, 8, 8), torch.randn(2, 77, config.context_dim), torch.tensor([700, 10])
    if config.vector_dim:
        pooled, sizes = torch.randn(2, config.vector_dim - 6 * 256), torch.tensor([[512.0, 640, 0, 8, 512, 512]] * 2)
        embedded = ldm.conditioning.timestep_embedding(sizes.flatten(), 256).reshape(2, -1)
        vector, added = torch.cat([pooled, embedded], 1), {"text_embeds": pooled, "time_ids": sizes}
    with ip_adapters.loaded(theirs, [prompt]) as own:
        (projection,) = own.unet.encoder_hid_proj.image_projection_layers
        expected_tokens = projection(features)
        added |= {"image_embeds": [features[:, None]]}
        expected = own.unet(z, timesteps, context, added_cond_kwargs=added, return_dict=False)[0]
    tokens = adapter.image_proj(features)
    prompted = ImagePrompted(ours.unet, [Applied(adapter, tokens, tokens, 0.8)])
    got = prompted.bind(Condition(context, vector))(z, timesteps)
    worst = [compare.relative(*pair) for pair in ((tokens, expected_tokens), (got, expected))]
    print(name, kind, *(f"{each:.1e}" for each in worst))
    assert max(worst) <= 1e-5
    plain = ours.unet(z, timesteps, context, vector)
    assert compare.relative(plain, expected) > 1e-2  # the picture counts


QUICK = {("sd15", "both"), ("sdxl-base", "plus")}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, marks=() if (name, case) in QUICK else pytest.mark.slow)
        for name in FAMILIES
        for case in CASES
    ],
)
def test_a_picture_with_an_image_prompt_equals_that_of_diffusers(name, case, both, saved):
    assert_equal(both, name, request("euler", 6, image_prompts=ip_adapters.prompts(saved(name), case)))


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"images": 2}, {"sampler": "dpmpp_2m_sde"}, {"guidance_scale": 1.0}], ids=str)
def test_they_stay_equal_whatever_is_asked(change, both, saved):
    prompts = ip_adapters.prompts(saved("sd15"), "plus")
    assert_equal(both, "sd15", request(**({"sampler": "euler", "steps": 8, "image_prompts": prompts} | change)))


def assert_equal(both, name, request):
    ours, theirs = both(name)
    expected, made = ip_adapters.theirs(theirs, request), tenants.ours(ours, request)[0]
    difference = compare.levels(made, expected)
    print(f"{name}: {difference} of 255 levels")
    assert made.shape == expected.shape
    assert expected.std() > 20  # flat pictures would be equal whatever the networks did
    assert difference <= LEVELS
