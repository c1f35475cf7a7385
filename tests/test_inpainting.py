"""Inpainting: what is kept and what is repainted, gray masks, added sides, crops, and models with nine channels."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import ldm
from ldm.diffusion.inpainting import keep
from ldm.diffusion.samplers import SAMPLERS, seeded_noise
from ldm.images import to_tensor
from ldm.models.unet import UNet
from tests.tiny import TINY_RANDOM, random_networks

_GRADIENT = Image.linear_gradient("L").resize((32, 32))
PICTURE = Image.merge("RGB", (_GRADIENT, _GRADIENT.rotate(90), _GRADIENT.rotate(180)))
BOX = (8, 4, 20, 24)  # whole latents of 4 pixels


def painted(level=255, size=(32, 32), box=BOX):
    """A mask with one box of one level of gray."""
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=level)
    return mask


def inpaint(image=None, picture=PICTURE, steps=4, strength=None, sampler=None, **mask):
    mask = ldm.Mask(painted() if image is None and not mask else image, **mask)
    return ldm.Request("a frog", steps=steps, seed=3, sampler=sampler, source=ldm.Source(picture, strength, mask=mask))


def inside(array, box=BOX):
    return array[..., box[1] : box[3], box[0] : box[2]]


# ------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddim", "ddpm", "lcm"])
def test_kept_pixels_come_back_bit_for_bit_and_the_others_change(pipe, sampler, strength):
    (made,) = pipe.generate(inpaint(sampler=sampler, strength=strength))
    same = (np.asarray(made) == np.asarray(PICTURE)).all(axis=-1)
    black = np.asarray(painted()) == 0
    assert same[black].all()
    assert not same[~black].all()
    assert (np.asarray(made).astype(int) - np.asarray(PICTURE))[~black].std() > 5


def test_inpainting_runs_all_steps_from_noise_unless_a_strength_is_given(pipe):
    plan = pipe.plan(inpaint(steps=10))
    assert (plan.request.source.strength, len(plan.sigmas)) == (1.0, 11)
    others = [dataclasses.replace(plan.request, source=ldm.Source(PICTURE.rotate(90), mask=ldm.Mask(painted())))]
    assert torch.equal(pipe.start(plan), pipe.start(pipe.plan(others[0])))  # no trace of the picture
    assert len(pipe.plan(inpaint(steps=10, strength=0.6)).sigmas) == 7


def test_image_i_of_a_batch_is_the_image_of_its_seed(pipe):
    request = inpaint(sampler="ddpm")
    first, second = pipe.generate(dataclasses.replace(request, images=2))
    assert np.array_equal(second, pipe.generate(dataclasses.replace(request, seed=4))[0])
    assert not np.array_equal(first, second)


def by_levin_and_fried(denoise, x, sigmas, known, mask, noise):
    """Algorithm 1 of the paper with Euler's method: after each step, x is put together from the known and the new."""
    steps = len(sigmas) - 1
    for i, (sigma, target) in enumerate(pairwise(sigmas.tolist())):
        moved = x + (target - sigma) * (x - denoise(x, sigmas[i])) / sigma
        x = torch.where(1 - mask > i / steps, known + target * noise, moved)
    return x


def test_the_denoiser_of_a_gray_mask_is_differential_diffusion():
    generator = torch.Generator().manual_seed(0)
    known, noise = torch.randn(2, 2, 3, 8, 8, generator=generator)
    mask = torch.rand(1, 1, 8, 8, generator=generator).double()
    mask[..., :2], mask[..., 2:4] = 0, 1
    sigmas = torch.tensor([9.0, 5.0, 2.0, 1.0, 0.4, 0.0], dtype=torch.float64)

    def denoise(x, sigma):  # a blur, so that each latent sees its neighbors
        return torch.nn.functional.avg_pool2d(x, 3, 1, 1) / (1 + float(sigma) ** 2)

    known, noise = known.double(), noise.double()
    x = known + sigmas[0] * noise
    expected = by_levin_and_fried(denoise, x, sigmas, known, mask, noise)
    kept = keep(denoise, known, mask, noise=noise, sigmas=sigmas)
    for name in ("euler", "ddim"):
        *_, last = SAMPLERS[name](kept, x, sigmas)
        assert torch.allclose(last.x, expected, rtol=0, atol=1e-12)
    # so that a mask that is ignored, or rounded to 0 and 1, would be seen
    for other in (torch.ones_like(mask), mask.round()):
        assert not torch.allclose(by_levin_and_fried(denoise, x, sigmas, known, other, noise), expected, atol=1e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_network_sees_kept_latents_with_the_initial_noise_at_every_level(sampler):
    known, noise = torch.ones(1, 1, 4, 4, dtype=torch.float64), seeded_noise([0], (1, 4, 4))().double()
    mask = torch.zeros_like(known)
    mask[..., 2:] = 1
    sigmas, seen = torch.tensor([8.0, 3.0, 1.0, 0.0], dtype=torch.float64), []

    def denoise(x, sigma):
        seen.append((x, float(sigma)))
        return 0.5 * x

    start = 8.0 * noise
    options = {} if sampler in ("euler", "heun", "dpmpp_2m") else {"noise": seeded_noise([1], (1, 4, 4))}
    steps = SAMPLERS[sampler](keep(denoise, known, mask, noise=noise, sigmas=sigmas), start, sigmas, **options)
    *_, last = steps
    assert torch.equal(seen[0][0], start)
    for x, sigma in seen[1:]:
        assert torch.equal(x[..., :2], (known + sigma * noise)[..., :2])
        assert not torch.equal(x[..., 2:], (known + sigma * noise)[..., 2:])
    assert torch.equal(last.x[..., :2], known[..., :2])


def test_a_gray_part_is_kept_for_its_share_of_the_steps_and_then_repainted(pipe):
    steps = [inside(step.x0, [n // 4 for n in BOX]) for step in pipe.stream(inpaint(painted(102), steps=10))]
    unchanged = [torch.equal(x0, steps[0]) for x0 in steps]
    assert unchanged == [True] * 6 + [False] * 4  # 102 is 0.4 of 255: the last 4 of 10 steps
    black = [step.x0[..., -1] for step in pipe.stream(inpaint(painted(102), steps=10))]
    assert all(torch.equal(x0, black[0]) for x0 in black)


def test_one_gray_everywhere_is_image_to_image_with_its_strength(pipe):
    gray = inpaint(Image.new("L", (32, 32), 153), steps=10, sampler="euler")  # 0.6 of 255
    image_to_image = dataclasses.replace(gray, source=ldm.Source(PICTURE, 0.6))
    (*_, made), (*_, expected) = pipe.stream(gray), pipe.stream(image_to_image)
    assert torch.allclose(made.x, expected.x, rtol=0, atol=1e-3)  # fp32, and x from a higher level
    assert not torch.allclose(made.x, list(pipe.stream(inpaint(steps=10, sampler="euler")))[-1].x, rtol=0, atol=0.1)


def test_one_white_pixel_repaints_its_latent_and_no_other_pixel(pipe):
    mask = painted(box=(13, 9, 14, 10))
    first, *_, last = pipe.stream(inpaint(mask))
    changed = (last.x0 != first.x0).any(dim=1)[0]
    assert changed.nonzero().tolist() == [[2, 3]]
    (made,) = pipe.generate(inpaint(mask))
    differing = (np.asarray(made) != np.asarray(PICTURE)).any(axis=-1)
    assert differing[9, 13]
    assert differing.sum() == 1


# ------------------------------------------------------------------ masks and regions, without a model


def region(image=None, picture=PICTURE, width=None, height=None, **mask):
    source = ldm.Source(picture, mask=ldm.Mask(image, **mask))
    return ldm.Request("a frog", width=width, height=height, source=source).region


def cutout():
    """The picture, transparent where the mask is white."""
    clear = PICTURE.convert("RGBA")
    clear.putalpha(painted().point(lambda level: 255 - level))
    return clear


def test_white_and_transparent_parts_are_repainted_by_choice(tmp_path):
    strokes = Image.new("RGBA", (32, 32), (255, 255, 255, 0))  # white on nothing, as a drawing program saves it
    strokes.paste((255, 255, 255, 255), BOX)
    clear = cutout()
    clear.save(tmp_path / "cutout.png")
    for mask in (
        region(painted()),
        region(painted().convert("RGB")),
        region(strokes),
        region(clear, repaint="transparent"),
        region(tmp_path / "cutout.png", repaint="transparent"),
        region(picture=tmp_path / "cutout.png", repaint="transparent"),  # the picture is its own mask
    ):
        assert np.array_equal(mask.mask, painted())


def test_a_camera_turns_picture_and_mask_alike(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, image in (("picture.png", PICTURE.resize((24, 32))), ("mask.png", painted(size=(24, 32)))):
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / name, exif=exif)
    turned = region(tmp_path / "mask.png", picture=tmp_path / "picture.png")
    assert turned.canvas.size == (24, 32)
    assert np.array_equal(turned.mask, painted(size=(24, 32)))


def test_added_sides_are_painted_and_the_picture_stays_bit_for_bit(pipe):
    request = inpaint(extend="left=8, bottom=4")
    assert request.region.canvas.size == (40, 36)
    (made,) = pipe.generate(request)
    assert made.size == (40, 36)
    assert np.array_equal(made.crop((8, 0, 40, 32)), PICTURE)
    assert not np.array_equal(made.crop((0, 0, 8, 36)), request.region.canvas.crop((0, 0, 8, 36)))
    both = region(painted(), extend="top=3")
    assert both.mask.getpixel((0, 0)) == 255
    assert np.array_equal(both.mask.crop((0, 3, 32, 35)), painted())


def test_a_large_picture_keeps_its_size_and_the_model_works_at_its_own(pipe):
    large = PICTURE.resize((96, 64))
    request = inpaint(painted(size=(96, 64)), large)
    assert pipe.plan(request).latent_shape == (4, 7, 10)  # the area of 32 x 32 at 3 to 2
    (made,) = pipe.generate(request)
    same = (np.asarray(made) == np.asarray(large)).all(axis=-1)
    assert same[np.asarray(painted(size=(96, 64))) == 0].all()
    assert not same.all()


def test_a_crop_gives_the_model_the_masked_part_alone(pipe):
    large, mask = PICTURE.resize((96, 64)), painted(size=(96, 64), box=(80, 8, 88, 20))
    request = inpaint(mask, large, crop=2)
    assert request.region.box == (76, 6, 92, 22)  # 12 by 16 pixels with those around, made a square
    plan = pipe.plan(request)
    assert (plan.width, plan.height) == (32, 32)
    (made,) = pipe.generate(request)
    same = (np.asarray(made) == np.asarray(large)).all(axis=-1)
    assert same[np.asarray(mask) == 0].all()
    assert not same[np.asarray(mask) > 0].all()
    assert pipe.encode_image(request.region.picture(32, 32)).shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    ("box", "more", "expected"),
    [
        ((0, 0, 4, 4), {"crop": 0}, (0, 0, 4, 4)),
        ((0, 28, 4, 32), {"crop": 3}, (0, 25, 7, 32)),  # cut off at the sides
        ((10, 10, 12, 20), {"crop": 0}, (6, 10, 16, 20)),
        ((30, 10, 32, 20), {"crop": 0}, (22, 10, 32, 20)),  # moved inside
        ((10, 10, 12, 20), {"crop": 1, "feather": 4}, (2, 6, 20, 24)),  # as far as the feather reaches
        ((10, 10, 20, 20), {"crop": 0, "width": 64, "height": 32}, (5, 10, 25, 20)),
        ((4, 4, 8, 30), {"crop": 9}, (0, 0, 32, 32)),
    ],
)
def test_the_box_of_a_crop(box, more, expected):
    assert region(painted(box=box), **more).box == expected


def test_a_feather_blends_the_pixels_around_the_mask_and_keeps_those_further_away():
    white, black = Image.new("RGB", (32, 32), "white"), Image.new("RGB", (32, 32), "black")
    (hard,) = region(painted(box=(0, 0, 16, 32)), black).paste([white])
    (soft,) = region(painted(box=(0, 0, 16, 32)), black, feather=4).paste([white])
    assert np.array_equal(np.asarray(hard)[5, :, 0], [255] * 16 + [0] * 16)
    row = np.asarray(soft)[5, :, 0].astype(int)
    assert (row[:16] == 255).all()
    assert (row[20:] == 0).all()
    assert (np.diff(row[15:21]) < 0).all()


# ------------------------------------------------------------------ wrong masks


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({}, "inpainting needs a mask, sides to extend, or a picture whose transparent part is repainted"),
        ({"image": painted(size=(32, 30))}, "the size of the picture, 32 x 32 pixels, got 32 x 30: resize one"),
        ({"image": Image.new("L", (32, 32))}, "the mask has no white part, so there is nothing to repaint"),
        ({"image": Image.new("L", (0, 0))}, "the size of the picture, 32 x 32 pixels, got 0 x 0"),
        ({"image": painted(), "repaint": "transparent"}, "the mask has no transparent part"),
        ({"repaint": "transparent"}, "the mask has no transparent part, so there is nothing to repaint"),
        ({"image": "nowhere.png"}, r"the picture nowhere\.png cannot be read: No such file"),
        ({"extend": "left=0"}, "extend needs 1 pixel or more for one or more of left, top, right, bottom, such as"),
        ({"extend": "left=-4"}, "got 'left=-4'"),
        ({"extend": "left=4,left=8"}, "got 'left=4,left=8'"),
        ({"extend": "up=4"}, "got 'up=4'"),
        ({"extend": "64"}, "got '64'"),
        ({"extend": ""}, "got ''"),
        ({"extend": "left=99999999"}, r"the extended picture has 100000031 x 32 pixels, of at most 134,217,728"),
    ],
)
def test_a_wrong_mask_is_refused_before_any_model_is_needed(mask, message):
    with pytest.raises(ValueError, match=message):
        _ = region(**mask)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ldm.Source(PICTURE, mask="mask.png"), r"mask must be an ldm\.Mask, such as ldm\.Mask\('mask\.png'\)"),
        (lambda: ldm.Mask(5), "the mask must be the path of a picture or a PIL picture, got 5"),
        (lambda: ldm.Mask(painted(), feather=-1), "feather must be a whole number from 0 to 65536, got -1"),
        (lambda: ldm.Mask(painted(), crop=1.5), "crop must be a whole number from 0 to 65536, got 1.5"),
        (lambda: ldm.Mask(painted(), repaint="black"), "repaint must be one of white, transparent, got 'black'"),
    ],
)
def test_a_wrong_value_is_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------ models with nine channels


@pytest.fixture(scope="module")
def nine():
    """A random inpainting model: its UNet takes latents, a mask and the latents of a masked picture."""
    config = dataclasses.replace(TINY_RANDOM, unet=dataclasses.replace(TINY_RANDOM.unet, in_channels=9))
    torch.manual_seed(0)
    return ldm.Pipeline(config, UNet(config.unet).eval(), *random_networks()[1:])


def test_an_inpainting_model_is_given_the_mask_and_the_masked_picture(nine):
    seen = []
    hook = nine.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    request = dataclasses.replace(inpaint(), images=2, guidance_scale=3.0)
    (first, second) = nine.generate(request)
    hook.remove()
    gray = PICTURE.copy()
    gray.paste((0, 0, 0), BOX)
    hidden = to_tensor(gray)
    inside(hidden)[:] = 0
    mean, std = nine.vae.encode(hidden)
    noise = nine.plan(request).initial_noise()
    noise()  # at strength 1 the initial noise comes first
    latents = mean + std * noise()
    mask = torch.zeros(2, 1, 8, 8)
    inside(mask, [n // 4 for n in BOX])[:] = 1
    assert len(seen) == 4
    for z in seen:
        assert z.shape == (4, 9, 8, 8)  # both pictures with the negative prompt, then with the prompt
        assert torch.equal(z[:, 4:5], mask.repeat(2, 1, 1, 1))
        assert torch.allclose(z[:, 5:], latents.repeat(2, 1, 1, 1), rtol=0, atol=1e-5)
    black = np.asarray(painted()) == 0
    assert np.array_equal(np.asarray(first)[black], np.asarray(PICTURE)[black])
    assert not np.array_equal(np.asarray(first)[~black], np.asarray(second)[~black])


def test_an_inpainting_model_without_a_mask_and_an_editing_model_with_one_are_refused(nine):
    for request in (ldm.Request("a frog"), ldm.Request("a frog", source=ldm.Source(PICTURE))):
        with pytest.raises(ValueError, match=r"takes 9 channels, .* has 4: give a source with a mask, as ldm inpaint"):
            nine.plan(request)
    config = dataclasses.replace(TINY_RANDOM, unet=dataclasses.replace(TINY_RANDOM.unet, in_channels=8))
    editing = ldm.Pipeline(config, nine.unet, nine.vae, nine.text_encoder)
    with pytest.raises(ValueError, match="takes 8 channels, and text to image has 4: it edits pictures; give a pict"):
        editing.plan(inpaint())


def test_inpainting_with_a_refiner_is_refused(pipe):
    with pytest.raises(ValueError, match="inpainting runs on one model: leave out the refiner, or the mask"):
        ldm.refine(pipe, pipe, inpaint())
