"""Image to image, inpainting, editing and SDXL with its refiner give diffusers' pictures, in as many steps."""

import dataclasses
import functools
import itertools

import pytest

import ldm
from tests.parity import compare, tenants, test_parity
from tests.parity.reference import FAMILIES, SCHEDULERS
from tests.parity.tenants import from_picture, picture, request
from tests.parity.test_parity import LEVELS
from tests.sparse import sparse

pytestmark = test_parity.pytestmark
SAMPLED = [name for name, family in FAMILIES.items() if family.makes_pictures]
QUICK = {  # run by default; all others are slow
    ("sd15", "dpmpp_2m"),
    ("sd21", "ddim"),
    ("sdxl-base", "euler_ancestral"),
}


def assert_equal(made, expected, name):
    (ours, steps), (theirs, their_steps) = made, expected
    difference = compare.levels(ours, theirs)
    print(f"{name}: {difference} of 255 levels, steps {steps}")
    assert steps == their_steps
    assert ours.shape == theirs.shape
    assert theirs.std() > 20  # flat pictures would be equal whatever the networks did
    assert difference <= LEVELS


def assert_equal_from_a_picture(both, name, request):
    ours, theirs = both(name)
    assert_equal(tenants.ours(ours, request), tenants.theirs(theirs, request), name)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        pytest.param(name, sampler, marks=() if (name, sampler) in QUICK else pytest.mark.slow)
        for name in SAMPLED
        for sampler in SCHEDULERS
    ],
)
def test_a_picture_from_a_picture_equals_that_of_diffusers(name, sampler, both):
    request = from_picture(sampler)
    assert tenants.ours(both(name)[0], request)[1] == 12  # of 20, at a strength of 0.6
    assert_equal_from_a_picture(both, name, request)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
def test_a_latent_consistency_model_makes_the_same_picture_from_a_picture(both):
    request = dataclasses.replace(from_picture("lcm", steps=8), negative_prompt=None)
    assert_equal_from_a_picture(both, "LCM", request)


@pytest.mark.parametrize("sampler", [pytest.param("ddim", marks=pytest.mark.slow), "dpmpp_2m_sde"])
@pytest.mark.parametrize(
    "change",
    sparse(
        [
            {"source": ldm.Source(picture(), strength=1.0)},
            {"images": 2, "seed": 2**32 - 1},
            {"source": ldm.Source(picture(100, 47), resize="stretch"), "width": 96, "height": 40},
            {"steps": 7},  # does not divide 1000
            {"spacing": "trailing"},
        ],
        2,
    ),
    ids=["strength 1", "two pictures", "another size", "7 steps", "trailing"],
)
@pytest.mark.slow
def test_from_a_picture_they_stay_equal_whatever_is_asked(sampler, change, both):
    request = dataclasses.replace(from_picture(sampler, steps=10), **change)
    assert_equal_from_a_picture(both, "sd15", request)


@pytest.mark.slow
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "karras"])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_from_a_picture_other_lists_of_steps_are_cut_alike(sampler, spacing, both):
    assert_equal_from_a_picture(both, "sdxl-base", from_picture(sampler, spacing=spacing))


QUICK_WITH_MASK = {("sd15", "dpmpp_2m", 4), ("sd15", "euler_ancestral", 9)}


@pytest.mark.parametrize(
    ("name", "sampler", "channels"),
    [
        pytest.param(*case, marks=() if case in QUICK_WITH_MASK else pytest.mark.slow)
        for case in itertools.product(("sd15", "sd21-base", "sdxl-base"), SCHEDULERS, (4, 9))
    ],
)
@pytest.mark.parametrize("strength", [1.0, pytest.param(0.6, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_picture_with_a_new_part_equals_that_of_diffusers(name, sampler, channels, strength, both, wide):
    ours, theirs = wide(name) if channels == 9 else both(name)
    asked = tenants.with_mask(sampler, strength, steps=5)
    assert_equal(tenants.ours_inpainted(ours, asked), tenants.theirs_inpainted(theirs, asked), f"{name}, {channels}")


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        pytest.param(*case, marks=() if case == ("sd15", "euler_ancestral") else pytest.mark.slow)
        for case in itertools.product(("sd15", "sd21-base"), SCHEDULERS)
    ],
)
def test_an_edited_picture_equals_that_of_diffusers(name, sampler, wide):
    asked = tenants.to_edit(sampler, steps=5, images=2)
    ours, theirs = wide(name, tenants.eight_channels)
    made = tenants.ours(ours, asked)
    assert_equal(made, tenants.theirs_edited(theirs, asked), f"{name}, 8 channels")
    other = dataclasses.replace(asked, source=dataclasses.replace(asked.source, image_guidance=1.0))
    assert compare.levels(made[0], tenants.ours(ours, other)[0]) > LEVELS


@pytest.fixture(scope="module")
def wide(both, tmp_path_factory):
    """The model of that name with a UNet for inpainting or editing, loaded by us and as diffusers has it."""

    @functools.cache
    def build(name, widen=tenants.nine_channels):
        folder = tmp_path_factory.mktemp(f"{name}-{widen.__name__}")
        theirs = widen(both(name)[1], folder)
        return ldm.load(folder, ldm.Placement("cpu")), theirs

    return build


def assert_equal_in_two_stages(both, request, handover):
    ours, theirs = zip(both("sdxl-base"), both("sdxl-refiner"), strict=True)
    expected = tenants.theirs_in_two_stages(*theirs, request, handover)
    made = tenants.ours_in_two_stages(*ours, request, tenants.same_handover(request, handover))
    assert sum(made[1]) == request.steps
    assert_equal(made, expected, f"{request.sampler}, {handover}")


@pytest.mark.parametrize(
    ("sampler", "handover", "steps"),
    [
        pytest.param(*case, marks=() if case in (("euler", 0.8, 10), ("dpmpp_2m", 0.5, 10)) else pytest.mark.slow)
        for case in itertools.product(SCHEDULERS, (0.8, 0.5), (10, 25))
    ],
)
def test_base_and_refiner_equal_those_of_diffusers(sampler, handover, steps, both):
    assert_equal_in_two_stages(both, request(sampler, steps), handover)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"images": 2},
        {"negative_prompt": None},  # zeros for the base model, the empty text for the refiner
        {
            "sizes": ldm.Sizes(
                original_width=512, original_height=300, crop_top=8, crop_left=40, target_width=96, target_height=80
            )
        },
        {"sizes": ldm.Sizes(aesthetic_score=8.0, negative_aesthetic_score=1.0)},
        {"spacing": "trailing"},
        {"spacing": "karras"},
    ],
    ids=str,
)
def test_base_and_refiner_stay_equal_whatever_is_asked(change, both):
    assert_equal_in_two_stages(both, dataclasses.replace(request(steps=10), **change), 0.8)
