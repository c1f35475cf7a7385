"""The same weights, seeds and settings give the same numbers and pictures as diffusers, in every official family."""

import dataclasses

import pytest
import torch

import ldm
from ldm.checkpoint.files import identify
from tests.parity import compare, reference
from tests.parity.reference import FAMILIES
from tests.sparse import sparse


def slow_if_as_another(name):
    """Mark the families whose networks are those of another one."""
    return pytest.mark.slow if "turbo" in name or name in ("sd21-base", "sd15-instruct-pix2pix") else ()


pytestmark = [  # of diffusers' own making
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning"),
]
RELATIVE = 1e-5  # of the largest value, in fp32: both may sum in their own order
LEVELS = 1  # a value that lies on the boundary of two levels may be rounded to either


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow_if_as_another(name)) for name in FAMILIES])
def test_every_network_computes_what_diffusers_computes(name, both):
    ours, theirs = both(name)
    given = compare.draw(reference.small(FAMILIES[name]), 0, 64)
    got, expected = compare.of_ours(ours, given), compare.of_diffusers(theirs, given)
    assert got.keys() == expected.keys()
    differences = {what: compare.relative(got[what], expected[what]) for what in expected}
    print(name, {what: f"{value:.1e}" for what, value in differences.items()})
    assert max(differences.values()) < RELATIVE, differences


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl-base"])  # plain; upcast; two towers
def test_bf16_costs_every_network_no_more_than_it_costs_diffusers(name, both):
    given = compare.draw(reference.small(FAMILIES[name]), 0, 64)
    exact = compare.of_diffusers(both(name)[1], given)
    low = both(name, torch.bfloat16)
    got, rounded = compare.of_ours(low[0], given), compare.of_diffusers(low[1], given)
    for what, value in exact.items():
        # 1 %: of a few thousand rounding errors; the UNet of sd21 rounds in other places, since it attends in fp32
        ours, theirs = (compare.errors(x, value).mean() for x in (got[what], rounded[what]))
        assert ours < 1.01 * theirs, what


def assert_equal_pictures(ours, theirs, request):
    (made, _), (expected, _) = compare.pictures(ours, request), reference.pictures(theirs, request)
    assert expected.std() > 20  # flat pictures would be equal whatever the networks did
    assert compare.levels(made, expected) <= LEVELS


@pytest.mark.parametrize(
    ("name", "label"),
    [
        pytest.param(name, label, marks=slow_if_as_another(name) or (pytest.mark.slow if i % 3 else ()))
        for name in FAMILIES
        for i, label in enumerate(compare.requests(name))
    ],
)
def test_pictures_equal_those_of_diffusers(name, label, both):
    request = compare.requests(name, images=1)[label]
    fewer = {10: 4, 8: 5}.get(request.steps, request.steps)  # on whole timesteps, or not, as before
    assert_equal_pictures(*both(name), dataclasses.replace(request, steps=fewer))


@pytest.mark.parametrize("sampler", sparse(["ddim", "euler"], 2))
@pytest.mark.parametrize(
    "change",
    [
        {"steps": 2},  # a single step starts at the top here, at the bottom there
        {"steps": 7},  # does not divide 1000
        {"guidance_scale": 1.0},
        {"guidance_scale": 12.0, "guidance_rescale": 0.7},
        {"seed": 2**32 - 1, "images": 2},
        {"width": 72, "height": 40},  # 9x5 latents, which the levels do not divide
    ],
    ids=str,
)
@pytest.mark.slow
def test_they_stay_equal_whatever_is_asked(sampler, change, both):
    request = compare.requests("sd15", images=1)[f"10 {sampler} leading"]
    assert_equal_pictures(*both("sd15"), dataclasses.replace(request, **({"steps": 4} | change)))


@torch.no_grad()
@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip_is_two_more_than_that_of_diffusers_for_sdxl(skip, both):
    # Their code for SD 1 fails with transformers 5; tests/models/test_text.py compares its layers.
    ours, theirs = both("sdxl-base")
    encoded = ours.text_encoder.encode(reference.PROMPTS, clip_skip=skip)
    context, vector = encoded.context, encoded.vector
    for i, text in enumerate(reference.PROMPTS):
        expected, _, pooled, _ = theirs.encode_prompt(
            text, device="cpu", do_classifier_free_guidance=False, clip_skip=skip - 2
        )
        difference = compare.relative(context[i : i + 1], expected)
        print(f"clip_skip {skip}: largest difference {difference:.1e}")
        assert max(difference, compare.relative(vector[i : i + 1], pooled)) < RELATIVE


@pytest.mark.parametrize("name", ["sd15", "sdxl-base"])
@pytest.mark.slow
def test_a_picture_follows_clip_skip(name, both):
    ours = both(name)[0]
    request = compare.requests("sd15", images=1)["10 euler leading"]
    own = 2 if name == "sdxl-base" else 1
    plain, same, other = (
        compare.pictures(ours, dataclasses.replace(request, clip_skip=skip))[0] for skip in (None, own, 3)
    )
    assert compare.levels(plain, same) == 0
    assert compare.levels(plain, other) > 3 * LEVELS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sd15", {"prompt": "a dog"}),
        ("sd15", {"negative_prompt": ""}),
        ("sdxl-base", {"negative_prompt": ""}),
        ("sdxl-base", {"negative_prompt": None}),
        ("sdxl-base", {"sizes": ldm.Sizes(original_width=512, original_height=300)}),
        ("sdxl-base", {"sizes": ldm.Sizes(crop_top=8, crop_left=40)}),
        ("sdxl-refiner", {"sizes": ldm.Sizes(aesthetic_score=2.0)}),
        ("sdxl-refiner", {"sizes": ldm.Sizes(negative_aesthetic_score=6.0)}),
    ],
    ids=str,
)
def test_what_is_asked_changes_the_picture_so_that_these_tests_would_see_it_ignored(name, change, both):
    request = compare.requests("sd15", images=1)["10 euler leading"]
    plain, changed = (compare.pictures(both(name)[0], r)[0] for r in (request, dataclasses.replace(request, **change)))
    assert compare.levels(plain, changed) > 3 * LEVELS


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if "turbo" not in name])  # as their base
def test_what_we_save_in_either_layout_diffusers_reads_bit_for_bit(name, both, folder):
    read = compare.saved(name, folder(name), *both(name))
    assert len(read) == 3
    for how, (equal, tensors) in read.items():
        assert equal == tensors > 900, how


@pytest.mark.full
@pytest.mark.parametrize("name", compare.FULL_SIZE)
def test_the_full_size_equals_diffusers(name, tmp_path):
    reference.build(tmp_path, FAMILIES[name])
    assert identify(tmp_path).preset == name
    task = compare.full_size(name, images=1)
    for row in compare.measure(name, tmp_path, task):
        assert row.largest <= LEVELS if row.what in task.asked else row.relative < RELATIVE, row
