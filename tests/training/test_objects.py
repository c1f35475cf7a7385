"""The objects of the scenes: their names, their pictures from the font and from the archive, and the errors."""

import tarfile

import numpy as np
import pytest
from PIL import Image

from ldm.training.objects import (
    FONT,
    MANY,
    MASS,
    NAMES,
    OBJECTS,
    UNSEEN,
    WORDS,
    emoji_sprites,
    every_character,
    fluent_sprites,
    font_sprites,
    name_of,
    plural,
)
from tests.training.drawn import write_archive

needs_font = pytest.mark.skipif(not FONT.is_file(), reason="needs fonts-noto-color-emoji")
NAMED = (
    "frog, elephant, butterfly, cat, fox, panda, turtle, bee, penguin, pig, octopus, dog, rabbit, bear, koala, tiger, "
    "lion, cow, monkey, chicken, duck, owl, whale, dolphin, fish, crab, snail, ladybug, giraffe, zebra, horse, "
    "unicorn, flamingo, parrot, hedgehog, sheep, dinosaur, apple, banana, grapes, strawberry, watermelon, orange, "
    "lemon, pineapple, cherries, pear, carrot, tomato, avocado, broccoli, pizza, hamburger, fries, doughnut, cookie, "
    "cake, cupcake, ice cream, cheese, tree, cactus, palm tree, sunflower, tulip, rose, mushroom, maple leaf, car, "
    "rocket, sailboat, bus, train, tractor, helicopter, airplane, ship, UFO, taxi, house, balloon, guitar, crown, "
    "snowman, pumpkin, gift, bell, diamond, light bulb, umbrella, soccer ball, basketball, top hat, camera, teapot, "
    "teddy bear, violin, drum, kite, castle, tent, shoe, fire, star, moon, snowflake, robot, ghost"
).split(", ")
NAMED_UNSEEN = "peacock, squirrel, swan, T-rex, honey pot, trophy, pretzel, backpack, bow, ice cube".split(", ")
WORDS_FOR_OBJECTS = [*NAMES, *(synonym for synonyms in NAMES.values() for synonym in synonyms)]
RED, GREEN, BLUE = ((200, 40, 40), (40, 200, 40), (40, 40, 200))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A frog, an airplane with a variation selector, and pictures that are no objects of a scene."""
    frog = Image.new("RGBA", (32, 32))
    frog.paste(RED, (4, 10, 24, 20))  # 20 x 10
    names = {
        "1f438": frog,
        "0023-fe0f-20e3": frog,  # keycap
        "00a9-fe0f": frog,  # copyright sign
        "1f99a": frog,  # peacock, one of UNSEEN
        "2708-fe0f": Image.new("RGBA", (8, 8), BLUE),  # airplane
        "1f3f4-e0067_e0062": frog,  # flag
        "1f436": Image.new("RGBA", (8, 8), GREEN),  # dog
    }
    return write_archive(tmp_path_factory.mktemp("archive") / "emoji.tgz", names)


def test_every_object_has_the_name_that_people_say():
    assert [name_of(character) for character in OBJECTS] == NAMED
    assert [name_of(character) for character in UNSEEN] == NAMED_UNSEEN
    assert list(NAMES) == NAMED + NAMED_UNSEEN
    assert WORDS.keys() <= set(OBJECTS + UNSEEN)


def test_characters_without_a_name_have_different_ones():
    assert [name_of(character) for character in "\ue000\ue001"] == ["U+E000", "U+E001"]


def test_no_word_names_two_objects():
    assert len(WORDS_FOR_OBJECTS) == len(set(WORDS_FOR_OBJECTS)) > len(NAMES)
    plurals = [plural(word) for word in WORDS_FOR_OBJECTS]
    assert len(plurals) == len(set(plurals))


def test_synonyms_belong_to_their_objects():
    assert NAMES["cat"] == ("kitten",)
    assert NAMES["tree"] == ("pine tree", "evergreen tree")
    assert NAMES["frog"] == ()


def test_plurals_are_regular_but_for_these():
    exceptions = {
        "butterfly": "butterflies",
        "puppy": "puppies",
        "bunny": "bunnies",
        "strawberry": "strawberries",
        "teddy": "teddies",
        "trophy": "trophies",
        "fox": "foxes",
        "T-rex": "T-rexes",
        "octopus": "octopuses",
        "cactus": "cactuses",
        "bus": "buses",
        "tomato": "tomatoes",
        "fish": "fish",
        "sheep": "sheep",
        "snowman": "snowmen",
        "maple leaf": "maple leaves",
        "slice of pizza": "slices of pizza",
    }
    exceptions |= {word: word for word in MANY}
    assert {word: plural(word) for word in WORDS_FOR_OBJECTS if plural(word) != word + "s"} == exceptions


def test_plural_names_and_masses_are_objects():
    assert set(WORDS_FOR_OBJECTS) >= MANY | MASS
    assert not MANY & MASS
    for name in ("grapes", "cherries", "fries"):
        assert {name, *NAMES[name]} <= MANY  # a synonym of a plural is a plural


def test_pictures_of_the_archive_are_cut_to_their_content_and_squared(archive):
    sprites = fluent_sprites(archive, "🐸✈")
    assert list(sprites) == ["frog", "airplane"]
    frog = np.asarray(sprites["frog"])
    assert frog.shape == (20, 20, 4)
    assert (frog[5:15] == (*RED, 255)).all()
    assert not frog[:5, :, 3].any()
    assert not frog[15:, :, 3].any()
    assert sprites["airplane"].getpixel((3, 3)) == (*BLUE, 255)


def test_every_character_lists_the_emoji_of_one_character_without_the_unseen_ones(archive):
    assert every_character(archive) == "🐸✈🐶"


def test_a_character_that_the_archive_lacks_is_named(archive):
    with pytest.raises(ValueError, match=r"the archive .*emoji\.tgz has no picture of 🐢 \(turtle\)"):
        fluent_sprites(archive, "🐸🐢")


@pytest.mark.parametrize("read", [fluent_sprites, every_character])
def test_a_missing_archive_is_named_with_what_to_do(tmp_path, read):
    message = r"no archive of 3D emoji at .*no\.tgz: get .* `npm pack @lobehub/fluent-emoji-3d@1\.1\.0`, or .* --fluent"
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "no.tgz")
    with pytest.raises(ValueError, match="no archive of 3D emoji"):
        read(tmp_path)


def test_a_file_that_is_no_archive_is_named_with_the_reason(tmp_path):
    path = tmp_path / "text.tgz"
    path.write_text("not an archive")
    with pytest.raises(ValueError, match=r"text\.tgz cannot be read \(Not a gzipped file .*\): get the archive with"):
        fluent_sprites(path)


def test_an_archive_without_the_pictures_is_named(tmp_path):
    (tmp_path / "photo.webp").write_bytes(b"a name that is no code point")
    with tarfile.open(tmp_path / "other.tgz", "w:gz") as archive:
        archive.add(tmp_path / "photo.webp", "package/assets/photo.webp")
    with pytest.raises(ValueError, match=r"other\.tgz has no pictures with names such as 1f438\.webp: get the archive"):
        every_character(tmp_path / "other.tgz")


def test_a_truncated_or_damaged_archive_is_an_error_and_no_smaller_data_set(archive, tmp_path):
    whole = archive.read_bytes()
    middle = len(whole) // 2
    for name, content in {
        "cut": whole[:middle],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        "checksum": whole[:-8] + bytes(8),
        "empty": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} cannot be read \(.*\): get the archive with"):
            every_character(tmp_path / name)


def test_a_missing_font_is_named_with_what_to_do(tmp_path):
    message = r"no emoji font at .*none\.ttf: install it \(apt-get install fonts-noto-color-emoji\), or give .* --font"
    with pytest.raises(ValueError, match=message):
        font_sprites(tmp_path / "none.ttf")


def test_a_file_that_is_no_font_is_named(tmp_path):
    (tmp_path / "no.ttf").write_text("not a font")
    with pytest.raises(
        ValueError, match=r"no\.ttf is not a font with color bitmaps of 109 pixels \(unknown file format\): give"
    ):
        font_sprites(tmp_path / "no.ttf")


@needs_font
def test_a_character_that_the_font_lacks_is_named():
    with pytest.raises(ValueError, match=r"NotoColorEmoji\.ttf has no color picture of a \(latin small letter a\)"):
        font_sprites(characters="🐸a")


@needs_font
def test_the_font_has_a_square_picture_of_every_object():
    sprites = font_sprites(characters=OBJECTS + UNSEEN)
    assert list(sprites) == list(NAMES)
    for picture in sprites.values():
        assert picture.width == picture.height > 64
        assert picture.getchannel("A").getextrema() == (0, 255)


@needs_font
def test_both_styles_have_the_same_names_in_the_same_order(archive):
    sprites = emoji_sprites(fluent=archive, characters="🐶🐸")
    assert list(sprites) == ["3D", "flat"]
    assert list(sprites["3D"]) == list(sprites["flat"]) == ["dog", "frog"]
    assert sprites["3D"]["dog"].getpixel((0, 0)) == (*GREEN, 255)
    assert sprites["flat"]["dog"].width > 64
