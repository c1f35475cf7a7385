"""Scenes: what is drawn is what is said, in the shares that the code says, and each scene follows from its number."""

import itertools
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.training.grounds import GROUNDS
from ldm.training.objects import MANY, MASS, NAMES, OBJECTS, UNSEEN, name_of, plural
from ldm.training.scenes import COUNTS, PLACES, RELATIONS, SIZES, Painter, Scene, Scenes, held_out, with_article
from tests.training.drawn import drawn_sprites

SPRITES = drawn_sprites()
CONCEPTS = tuple(name_of(character) for character in OBJECTS)
FLOORS = [name for name, ground in GROUNDS.items() if ground.floor]


@pytest.fixture(scope="module")
def many():
    """8,000 random scenes of all objects, which are not drawn."""
    scenes = Scenes({style: dict.fromkeys(CONCEPTS) for style in ("3D", "flat")})
    return [scenes.scene(np.random.default_rng((0, i))) for i in range(8000)]


def check_shares(values, expected):
    """Compare how often each value occurs with its expected share, within 4.5 standard deviations."""
    counts, total = Counter(values), len(values)
    assert counts.keys() <= expected.keys()
    for value, share in expected.items():
        spread = (share * (1 - share) / total) ** 0.5
        assert abs(counts[value] / total - share) <= 4.5 * spread, value


def evenly(choices):
    return dict.fromkeys(choices, 1 / len(choices))


# Captions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (Scene(("frog",), "grass"), "a frog on the grass"),
        (Scene(("frog",), "grass", "3D"), "a 3D frog on the grass"),
        (Scene(("apple",), "night", size="big"), "a big apple at night"),
        (Scene(("apple",), "space", "flat"), "a flat apple in space"),
        (Scene(("owl",), "sea", "3D", "small", "at the top"), "a small 3D owl in the sea, at the top"),
        (Scene(("frog", "apple"), "beach", relation="left of"), "a frog left of an apple on the beach"),
        (Scene(("bee", "owl"), "sky", "3D", relation="above"), "a 3D bee above a 3D owl in the sky"),
        (Scene(("apple",), "red", place="on the left"), "an apple on a red background, on the left"),
        (Scene(("grapes",), "table"), "grapes on a wooden table"),
        (Scene(("cheese",), "snow", "flat", "big"), "big flat cheese in the snow"),
        (Scene(("fox",), "city", count="three"), "three foxes in the city"),
        (Scene(("tomato",), "forest", "3D", count="two"), "two 3D tomatoes in the forest"),
    ],
)
def test_captions_are_english(scene, caption):
    assert scene.caption == caption
    assert scene.caption == caption  # the same words each time


def test_articles_follow_the_sound_of_the_next_word():
    articles = {"an apple", "an elephant", "an octopus", "an owl", "an orange", "an avocado", "an umbrella"}
    for thing in articles | {"a UFO", "a unicorn", "a frog", "a house", "a 3D apple", "a flat owl", "a big orange"}:
        assert with_article(thing.split(" ", 1)[1]) == thing


VARIED = Scene(("cat",), "grass", "flat", "small", "on the left")
PARTS = re.compile(
    r"(?P<first>on the left, )?(?P<article>a )?(?P<size>small|little|tiny) flat (?P<noun>cat|kitten)"
    r"(?P<ground> on the grass| in a meadow)?(?P<last>, on the left)?"
)


def test_captions_vary_in_the_shares_that_the_code_says():
    rng = np.random.default_rng(0)
    parts = [PARTS.fullmatch(VARIED.describe(rng)) for _ in range(6000)]
    assert all(parts)  # the style is never left out
    check_shares([part["noun"] for part in parts], {"cat": 7 / 8, "kitten": 1 / 8})
    check_shares([part["size"] for part in parts], {"small": 5 / 6, "little": 1 / 12, "tiny": 1 / 12})
    check_shares([part["article"] is None for part in parts], {True: 0.1, False: 0.9})
    grounds = {" on the grass": 0.95 * 7 / 8, " in a meadow": 0.95 / 8, None: 0.05}
    check_shares([part["ground"] for part in parts], grounds)
    places = [(part["first"] is not None, part["last"] is not None) for part in parts]
    check_shares(places, {(False, False): 0.05, (True, False): 0.95 * 0.15, (False, True): 0.95 * 0.85})


def test_both_objects_lose_their_articles_together():
    rng = np.random.default_rng(0)
    scene = Scene(("fox", "owl"), "sea", "3D", relation="below")
    captions = {scene.describe(rng).removesuffix(" in the sea").removesuffix(" on the ocean") for _ in range(300)}
    assert captions == {"a 3D fox below a 3D owl", "3D fox below 3D owl"}


def test_counted_objects_keep_their_number_and_their_plural():
    rng = np.random.default_rng(0)
    scene = Scene(("rabbit",), "white", count="four")
    captions = {scene.describe(rng).removesuffix(" on a white background") for _ in range(300)}
    assert captions == {"four rabbits", "four bunnies"}


@pytest.mark.parametrize("word", ["grapes", "cheese"])
def test_plural_names_and_masses_get_no_article(word):
    rng = np.random.default_rng(0)
    captions = {Scene((word,), "city", size="small").describe(rng).split(f" {word}")[0] for _ in range(200)}
    assert captions == {"small", "little", "tiny"}


# The data set -------------------------------------------------------------------------------------


def test_every_kind_of_scene_occurs_as_often_as_it_should(many):
    kept = 0.9  # of the scenes with one object
    both = 0.81 * 0.9  # of the scenes with two objects: neither is held out with the ground, nor are they as a pair
    countable = 1 - sum(name in MANY | MASS for name in CONCEPTS) / len(CONCEPTS)
    pairs, counts = 0.45 * both, 0.1 * countable * kept
    total = pairs + 0.55 * kept
    kinds = ["pair" if scene.relation else "count" if scene.count else "single" for scene in many]
    shares = {"pair": pairs / total, "count": counts / total}
    check_shares(kinds, shares | {"single": 1 - sum(shares.values())})
    assert 0.38 < shares["pair"] < 0.42
    assert 0.09 < shares["count"] < 0.11  # a tenth


def test_every_choice_occurs_as_often_as_it_should(many):
    single = [scene for scene in many if not scene.relation and not scene.count]
    check_shares([scene.style for scene in many], {"": 0.15, "3D": 0.425, "flat": 0.425})
    check_shares([scene.ground for scene in many], evenly(GROUNDS))
    check_shares([scene.relation for scene in many if scene.relation], evenly(RELATIONS))
    check_shares([scene.count for scene in many if scene.count], evenly(COUNTS))
    check_shares([scene.size for scene in single], {"small": 0.5, "": 0.25, "big": 0.25})
    check_shares([scene.size for scene in many if scene.relation], {"small": 0.5, "": 0.5})
    places = dict.fromkeys(PLACES, 0.6 / 5) | {"": 0.4 + 0.6 / 5}
    check_shares([scene.place for scene in single if scene.size != "big"], places)
    assert not any(scene.place for scene in single if scene.size == "big")  # it fills the picture
    check_shares([scene.objects[0] for scene in many], evenly(CONCEPTS))
    assert {scene.objects[1] for scene in many if scene.relation} == set(CONCEPTS)


def test_a_scene_has_one_object_or_two_different_ones_and_counts_what_can_be_counted(many):
    for scene in many:
        assert len(set(scene.objects)) == len(scene.objects) == (2 if scene.relation else 1)
        assert not (scene.relation or scene.count) or scene.place == ""
        assert not scene.count or scene.size == ""
        assert not scene.count or scene.objects[0] not in MANY | MASS


def test_training_never_shows_a_held_out_combination(many):
    assert not any(held_out(CONCEPTS, scene) for scene in many)
    shown = {(name, scene.ground) for scene in many for name in scene.objects}
    apart = {pair for pair in itertools.product(CONCEPTS, GROUNDS) if held_out(CONCEPTS, Scene(pair[:1], pair[1]))}
    assert not shown & apart
    assert len(shown) > 0.95 * (len(CONCEPTS) * len(GROUNDS) - len(apart))


def test_a_tenth_is_held_out_of_every_object_and_of_every_ground():
    def share(scenes):
        return np.mean([held_out(CONCEPTS, scene) for scene in scenes])

    singles = [Scene((name,), ground) for name in CONCEPTS for ground in GROUNDS]
    assert 0.09 < share(singles) < 0.11
    for name in CONCEPTS:
        assert 0 < share(scene for scene in singles if scene.objects == (name,)) < 0.12
    for ground in GROUNDS:
        assert 0.09 < share(scene for scene in singles if scene.ground == ground) < 0.11
    pairs = []
    for a, b in itertools.combinations(CONCEPTS, 2):
        ground = next(g for g in GROUNDS if not any(held_out(CONCEPTS, Scene((name,), g)) for name in (a, b)))
        pairs.append(Scene((a, b), ground, relation="above"))
        assert held_out(CONCEPTS, pairs[-1]) == held_out(CONCEPTS, Scene((b, a), ground, relation="left of"))
    assert 0.09 < share(pairs) < 0.11


def test_the_examples_of_the_readme_are_shown_in_training():
    root = Path(__file__).parent.parent.parent
    prompts = re.findall(r'"([^"]+)"', (root / "README.md").read_text(encoding="utf-8"))
    phrases = {phrase: name for name, ground in GROUNDS.items() for phrase in ground.phrases}
    examples = [Scene(("frog",), "grass")]
    for prompt in prompts:
        names = [name for name in CONCEPTS if re.search(rf"\b({name}|{plural(name)})\b", prompt)]
        grounds = [ground for phrase, ground in phrases.items() if prompt.endswith(phrase)]
        examples += [Scene((name,), ground) for name in names for ground in grounds]
    assert not any(held_out(CONCEPTS, scene) for scene in examples)
    assert len(examples) > 1  # the README has some


def test_the_unseen_objects_occur_in_no_caption():
    assert not set(OBJECTS) & set(UNSEEN)
    assert (len(OBJECTS), len(UNSEEN)) == (108, 10)
    scenes = Scenes({"flat": dict.fromkeys(CONCEPTS)})
    text = " ".join(scenes.caption(i) for i in range(4000))
    unseen = [word for name in map(name_of, UNSEEN) for word in (name, *NAMES[name])]
    assert not re.search(rf"\b({'|'.join(unseen)})(e?s)?\b", text)
    assert all(re.search(rf"\b({name}|{plural(name)})\b", text) for name in CONCEPTS)


def test_scene_i_depends_on_the_seed_and_i_alone():
    first, again = Scenes(SPRITES, 64, seed=1), Scenes(SPRITES, 64, seed=1)
    again[5]  # other scenes do not matter
    image, caption = first[77]
    assert torch.equal(image, again[77][0])
    assert caption == again[77][1]
    assert not torch.equal(image, Scenes(SPRITES, 64, seed=2)[77][0])


def test_a_caption_is_returned_without_drawing_its_scene():
    scenes = Scenes(SPRITES, 32, seed=1)
    expected = [scenes[i][1] for i in range(50)]
    scenes.painter.paint = None
    assert [scenes.caption(i) for i in range(50)] == expected
    assert len(scenes) == 1_000_000


def test_captions_without_layout_name_neither_sizes_nor_places():
    words = re.compile(r"small|little|tiny|big|large|huge|on the left|on the right|at the top|at the bottom")
    named, unnamed = (Scenes(SPRITES, 32, layout=layout) for layout in (True, False))
    assert sum(bool(words.search(named.caption(i))) for i in range(200)) > 80
    assert not [unnamed.caption(i) for i in range(200) if words.search(unnamed.caption(i))]
    assert unnamed[3][1] == unnamed.caption(3)


@pytest.mark.parametrize("side", [32, 50, 64, 128])
def test_scenes_of_every_size_are_bytes_in_channels_first_order(side):
    image, _ = Scenes(SPRITES, side)[0]
    assert image.shape == (3, side, side)
    assert image.dtype == torch.uint8


# Pictures -----------------------------------------------------------------------------------------


def draw(scene, sprites=SPRITES, side=64, seed=0):
    return Painter(sprites, side).paint(scene, np.random.default_rng(seed)).astype(np.float32)


def ground_alone(scene, side=64, seed=0):
    """The ground that `draw` paints with the same seed, if the scene has a style. Else a style is chosen before."""
    return np.clip(GROUNDS[scene.ground].paint(side, np.random.default_rng(seed)), 0, 255)


def mask_of(scene, name=None):
    """Where the objects of a scene are, or only those called `name`. The ground must have no shadows."""
    blank = Image.new("RGBA", (96, 96))
    sprites = {
        style: {key: picture if name in (None, key) else blank for key, picture in pictures.items()}
        for style, pictures in SPRITES.items()
    }
    return np.abs(draw(scene, sprites) - ground_alone(scene)).max(-1) > 3


def box(mask):
    """The center and the size of the smallest rectangle around a mask, as shares of the side."""
    y, x = np.nonzero(mask)
    center = (x.min() + x.max() + 1) / 2 / len(mask), (y.min() + y.max() + 1) / 2 / len(mask)
    return center, ((x.max() + 1 - x.min()) / len(mask), (y.max() + 1 - y.min()) / len(mask))


def test_places_and_counts_are_what_their_words_say():
    x, y = (dict(zip(PLACES, line, strict=True)) for line in zip(*PLACES.values(), strict=True))
    assert x["on the left"] < x[""] < x["on the right"]
    assert y["at the top"] < y[""] < y["at the bottom"]
    for count, centers in COUNTS.items():
        assert len(centers) == {"two": 2, "three": 3, "four": 4}[count]
        assert all(max(abs(a - c), abs(b - d)) > 0.4 for (a, b), (c, d) in itertools.combinations(centers, 2))


def assert_near(center, expected):
    assert np.abs(np.subtract(center, expected)).max() < 0.075  # jitter is 0.04 and half a cell 0.03


@pytest.mark.parametrize("style", SPRITES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", ["small", ""])
def test_an_object_is_where_its_place_says(style, place, size):
    center, _ = box(mask_of(Scene(("apple",), "sky", style, size, place)))
    assert_near(center, PLACES[place])


@pytest.mark.parametrize("style", SPRITES)
@pytest.mark.parametrize("size", SIZES)
def test_an_object_is_as_large_as_its_size_says(style, size):
    _, sides = box(mask_of(Scene(("apple",), "sky", style, size)))
    for side in sides:
        assert 0.9 < side / (SIZES[size] * 88 / 96) < 1.15  # the apple fills 88 of 96 pixels; soft edges


@pytest.mark.parametrize("style", SPRITES)
@pytest.mark.parametrize("relation", RELATIONS)
def test_two_objects_stand_as_their_relation_says(style, relation):
    scene = Scene(("apple", "box"), "sky", style, relation=relation)
    (x1, y1), (x2, y2) = centers = [box(mask_of(scene, name))[0] for name in scene.objects]
    apart = {"left of": x2 - x1, "right of": x1 - x2, "above": y2 - y1, "below": y1 - y2}
    assert apart[relation] > 0.4
    for center, expected in zip(centers, RELATIONS[relation], strict=True):
        assert_near(center, expected)


@pytest.mark.parametrize("style", SPRITES)
@pytest.mark.parametrize("count", COUNTS)
def test_as_many_objects_are_drawn_as_the_count_says(style, count):
    mask = mask_of(Scene(("apple",), "sky", style, count=count))
    x, y = (np.arange(64) + 0.5) / 64, (np.arange(64)[:, None] + 0.5) / 64
    nearest = np.argmin([(x - cx) ** 2 + (y - cy) ** 2 for cx, cy in COUNTS[count]], axis=0)
    for i, expected in enumerate(COUNTS[count]):
        center, sides = box(mask & (nearest == i))
        assert_near(center, expected)
        side = SIZES["small" if count == "four" else ""] * 88 / 96
        assert all(0.8 < found / side < 1.4 for found in sides)  # parts of a neighbor may count, too


def test_a_style_that_is_not_given_is_chosen_at_random():
    plain = {style: {"box": Image.new("RGBA", (8, 8), style)} for style in ("red", "blue")}
    red = [draw(Scene(("box",), "white"), plain, 32, seed)[16, 16, 0] > 128 for seed in range(200)]
    check_shares(red, {True: 0.5, False: 0.5})
    for style, expected in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        assert all(tuple(draw(Scene(("box",), "white", style), plain, 32, i)[16, 16]) == expected for i in range(10))


def test_two_objects_have_one_style():
    plain = {style: dict.fromkeys("ab", Image.new("RGBA", (8, 8), style)) for style in ("red", "blue")}
    for seed in range(20):
        pixels = draw(Scene(("a", "b"), "white", relation="left of"), plain, 32, seed)
        assert (pixels[16, 8] == pixels[16, 24]).all()


@pytest.mark.parametrize("ground", GROUNDS)
def test_objects_have_a_shadow_on_floors_alone(ground):
    """A white object makes no pixel darker."""
    scene = Scene(("box",), ground, "flat", "small")
    white = {"flat": {"box": Image.new("RGBA", (8, 8), "white")}}
    darker = ground_alone(scene) - draw(scene, white)
    if ground not in FLOORS:
        assert darker.max() <= 0.5
        return
    rows, columns = np.nonzero(darker.max(-1) > 8)
    assert rows.mean() > 32 + 0.3 * SIZES["small"] * 64  # at the foot
    assert columns.mean() > 32  # the light comes from the left
    assert len(rows) > 20


def test_shadows_lie_below_all_objects():
    """The upper object's shadow falls onto the lower object."""
    white = {"flat": dict.fromkeys("ab", Image.new("RGBA", (8, 8), "white"))}
    scene = Scene(("a", "b"), "grass", "flat", relation="above")
    assert (draw(scene, white)[42:52, 28:36] == 255).all()


def test_soft_edges_are_mixed_with_the_ground():
    half = {"flat": {"veil": Image.new("RGBA", (8, 8), (255, 255, 255, 128))}}
    scene = Scene(("veil",), "underwater", "flat", "big")
    inside = (slice(24, 40), slice(24, 40))
    expected = ground_alone(scene) * (127 / 255) + 128
    assert np.abs(draw(scene, half) - expected)[inside].max() <= 1
