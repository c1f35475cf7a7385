"""Editing a picture by an instruction: what the network is given, equation 3, and the requests that are refused."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import ldm
from ldm import editing
from ldm.conditioning import Condition, join
from ldm.diffusion.denoiser import classifier_free
from ldm.diffusion.samplers import seeded_noise
from ldm.editing import taking_pictures, two_scales, with_picture
from ldm.images import to_tensor
from ldm.models.unet import UNet
from tests.tiny import TINY_RANDOM, random_networks

PICTURE = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
EIGHT = dataclasses.replace(TINY_RANDOM, unet=dataclasses.replace(TINY_RANDOM.unet, in_channels=8), name="random-edit")


@pytest.fixture(scope="module")
def eight():
    """A random editing model: its UNet takes latents, and the latents of the picture."""
    torch.manual_seed(0)
    return ldm.Pipeline(EIGHT, UNet(EIGHT.unet).eval(), *random_networks()[1:])


def edit(image_guidance=1.5, **more):
    source = ldm.Source(PICTURE, image_guidance=image_guidance, **more.pop("source", {}))
    return ldm.Request("make it snowy", steps=2, source=source, sampler="euler", **more)


@pytest.mark.parametrize("guidance", ["batched", "sequential"])
def test_the_network_is_given_the_unscaled_mode_twice_and_zeros_for_no_picture(eight, guidance):
    seen = []
    pipe = ldm.Pipeline(EIGHT, eight.unet, eight.vae, eight.text_encoder, placement=ldm.Placement(guidance=guidance))
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pipe.generate(edit(images=2))
    hook.remove()
    with torch.no_grad():
        picture = pipe.vae.quant_conv(pipe.vae.encoder(to_tensor(PICTURE)))[:, :4]  # before the scaling
    batch = 6 if guidance == "batched" else 2
    assert [len(z) for z in seen] == [batch] * (12 // batch)
    z = torch.cat(seen[: 6 // batch]).reshape(3, 2, 8, 8, 8)
    order = [2, 1, 0] if guidance == "batched" else [0, 1, 2]  # in a batch the prompt comes last
    assert torch.allclose(z[order[0], :, 4:], picture.expand(2, -1, -1, -1), rtol=0, atol=1e-5)
    assert torch.equal(z[order[0], :, 4:], z[order[1], :, 4:])
    assert not z[order[2], :, 4:].any()
    noise = seeded_noise([0, 1], (4, 8, 8))()  # the first draw, as in text to image and in diffusers
    assert torch.allclose(z[0, :, :4], noise, rtol=0, atol=1e-4)


def test_the_conditions_are_the_instruction_then_the_negative_prompt_with_and_without_the_picture(eight):
    plan = eight.plan(edit(negative_prompt="dark"))
    three, _, _ = taken = editing.edit(eight, plan, eight.conditions(plan), eight.binding())
    assert len(taken) == len(three) == 3
    texts = eight.text_encoder.encode(["make it snowy", "dark", "dark"]).context
    for given, text, has_picture in zip(three, texts, (True, True, False), strict=True):
        assert torch.allclose(given.context, text[None], rtol=0, atol=1e-5)
        assert given.picture.any() == has_picture


def test_two_scales_are_equation_3_and_contain_classifier_free_guidance():
    both, picture, neither = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64)
    got = two_scales(7.5, 1.5)([both, picture, neither])
    expected = (1 - 1.5) * neither + (1.5 - 7.5) * picture + 7.5 * both  # sorted by prediction
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)
    # With an image scale of 1 the third prediction has no influence.
    assert torch.allclose(
        two_scales(7.5, 1.0, 0.7)([both, picture, neither]), classifier_free(7.5, 0.7)([both, picture])
    )
    assert torch.allclose(two_scales(7.5, 1.5, 1.0)([both, picture, neither]).std((1, 2, 3)), both.std((1, 2, 3)))


def test_each_image_keeps_its_own_picture_when_conditions_are_joined():
    pictures = torch.randn(2, 4, 8, 8)
    given = [with_picture(Condition(torch.zeros(1, 3, 5)), picture[None]) for picture in pictures]
    bind = taking_pictures(lambda condition: lambda z, timesteps: z)
    seen = bind(join(given))(torch.zeros(2, 4, 8, 8), torch.zeros(2))
    assert torch.equal(seen[:, 4:], pictures)


def test_instruction_picture_and_both_scales_change_the_result(eight):
    def latents(request):
        *_, last = eight.stream(request)
        return last.latents

    base = latents(edit())
    for other in (
        edit(image_guidance=1.0),
        edit(guidance_scale=1.0),
        edit(negative_prompt="dark"),
        edit(guidance_rescale=0.7),
        edit(source={"strength": 0.5}),
        dataclasses.replace(edit(), prompt="make it dark"),
        dataclasses.replace(edit(), source=ldm.Source(ImageOps.invert(PICTURE), image_guidance=1.5)),
    ):
        assert (latents(other) - base).abs().max() > 0.01


def test_guidance_of_1_follows_the_instruction_and_still_weighs_the_picture(eight):
    """diffusers leaves out the image guidance if guidance_scale is 1."""
    plan = eight.plan(edit(guidance_scale=1.0))
    assert len(eight.conditions(plan)) == 2


def test_image_i_equals_the_single_image_of_its_seed(eight):
    pair = eight.generate(edit(images=2, seed=5))
    alone = eight.generate(edit(seed=6))
    assert np.abs(np.asarray(pair[1]).astype(int) - np.asarray(alone[0])).max() <= 1


def test_a_picture_of_another_shape_decides_the_size(eight):
    wide = dataclasses.replace(edit(), source=ldm.Source(PICTURE.resize((64, 16)), image_guidance=1.5))
    assert eight.generate(wide)[0].size == (64, 16)


def test_models_and_requests_that_do_not_fit_are_refused_in_one_sentence(eight, pipe):
    with pytest.raises(ValueError, match="takes 4 channels, and editing needs 8: use an instruct-pix2pix model, or"):
        pipe.stream(edit())
    for request in (ldm.Request("a frog"), ldm.Request("a frog", source=ldm.Source(PICTURE))):
        with pytest.raises(ValueError, match="takes 8 channels, and text to image has 4: it edits pictures; give a"):
            eight.stream(request)
    with pytest.raises(ValueError, match="editing repaints the whole picture: leave out the mask, or image_guidance"):
        ldm.Source(PICTURE, image_guidance=1.5, mask=ldm.Mask(PICTURE))
    with pytest.raises(ValueError, match=r"image_guidance must be a finite number, 0 or more, got -1"):
        ldm.Source(PICTURE, image_guidance=-1)
