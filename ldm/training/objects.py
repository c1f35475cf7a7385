"""The objects of the scenes: emoji in two styles, as RGBA squares.

"flat" objects are glyphs of the font Noto Color Emoji. "3D" objects are the pictures of Microsoft's Fluent set, read
from the archive that `npm pack @lobehub/fluent-emoji-3d` writes. Neither is part of this project.
"""

import gzip
import io
import re
import tarfile
import unicodedata
import zlib
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FLUENT = Path("lobehub-fluent-emoji-3d-1.1.0.tgz")
STYLES = ("3D", "flat")
OBJECTS = (
    "🐸🐘🦋🐱🦊🐼🐢🐝🐧🐷🐙🐶🐰🐻🐨🐯🦁🐮🐵🐔🦆🦉🐳🐬🐟🦀🐌🐞🦒🦓🐴🦄🦩🦜🦔🐑🦕"
    "🍎🍌🍇🍓🍉🍊🍋🍍🍒🍐🥕🍅🥑🥦🍕🍔🍟🍩🍪🎂🧁🍦🧀🌲🌵🌴🌻🌷🌹🍄🍁"
    "🚗🚀⛵🚌🚂🚜🚁✈🚢🛸🚕🏠🎈🎸👑⛄🎃🎁🔔💎💡☂⚽🏀🎩📷🫖🧸🎻🥁🪁🏰⛺👟🔥⭐🌙❄🤖👻"
)
UNSEEN = "🦚🐿🦢🦖🍯🏆🥨🎒🎀🧊"  # kept out of all training, to teach them later
# The name, and synonyms from CLDR's keywords. Other objects have Unicode's name without " face" and no synonym.
WORDS: dict[str, tuple[str, ...]] = {
    "🐱": ("cat", "kitten"),
    "🐶": ("dog", "puppy"),
    "🐰": ("rabbit", "bunny"),
    "🐔": ("chicken", "hen"),
    "🐝": ("bee", "honeybee"),
    "🐳": ("whale",),
    "🐞": ("ladybug", "ladybird"),
    "🦕": ("dinosaur",),
    "🦖": ("T-rex",),
    "🐿": ("squirrel", "chipmunk"),
    "🍎": ("apple", "red apple"),
    "🍊": ("orange", "tangerine"),
    "🥕": ("carrot",),
    "🍕": ("pizza", "slice of pizza"),
    "🍔": ("hamburger", "burger"),
    "🍟": ("fries", "french fries"),
    "🍩": ("doughnut", "donut"),
    "🍪": ("cookie", "biscuit"),
    "🎂": ("cake", "birthday cake"),
    "🍦": ("ice cream",),
    "🧀": ("cheese",),
    "🌲": ("tree", "pine tree", "evergreen tree"),
    "🍄": ("mushroom", "toadstool"),
    "🍁": ("maple leaf",),
    "🚗": ("car", "automobile"),
    "🚀": ("rocket", "spaceship"),
    "⛵": ("sailboat", "boat"),
    "🚂": ("train", "locomotive"),
    "✈": ("airplane", "plane"),
    "🛸": ("UFO", "flying saucer"),
    "🚕": ("taxi", "cab"),
    "🏠": ("house", "home"),
    "⛄": ("snowman",),
    "🎃": ("pumpkin", "jack-o-lantern"),
    "🎁": ("gift", "present"),
    "💎": ("diamond", "gem"),
    "💡": ("light bulb", "lamp"),
    "☂": ("umbrella",),
    "⚽": ("soccer ball", "football"),
    "🏀": ("basketball",),
    "🧸": ("teddy bear", "teddy"),
    "🥁": ("drum",),
    "🏰": ("castle",),
    "👟": ("shoe", "sneaker"),
    "🔥": ("fire", "flame"),
    "⭐": ("star",),
    "🌙": ("moon", "crescent moon"),
    "🤖": ("robot",),
    "🏆": ("trophy",),
    "🎒": ("backpack",),
    "🎀": ("bow", "ribbon"),
}
MANY = frozenset({"grapes", "cherries", "fries", "french fries"})  # plural names: no article and no number
MASS = frozenset({"cheese", "fire", "ice cream"})  # no number
IRREGULAR = {
    "snowman": "snowmen",
    "maple leaf": "maple leaves",
    "slice of pizza": "slices of pizza",
    "sheep": "sheep",
    "fish": "fish",
}

Sprites = Mapping[str, Mapping[str, Image.Image]]  # style -> name -> RGBA square; all styles have the same names


def name_of(character: str) -> str:
    """Return the English name of an emoji: "frog" for FROG FACE, "U+1FADF" where Python's Unicode is too old."""
    if character in WORDS:
        return WORDS[character][0]
    return unicodedata.name(character, "").lower().removesuffix(" face") or f"U+{ord(character):X}"


NAMES = {name_of(character): WORDS.get(character, ())[1:] for character in OBJECTS + UNSEEN}  # -> synonyms


def plural(name: str) -> str:
    """Return the plural of an object's name: "foxes" for "fox"."""
    if name in MANY:
        return name
    if name in IRREGULAR:
        return IRREGULAR[name]
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "x", "ch", "sh", "tomato")) else "s")


def emoji_sprites(
    font: Path = FONT, fluent: Path = FLUENT, characters: str = OBJECTS
) -> dict[str, dict[str, Image.Image]]:
    """Return the objects in both styles.

    Raises ValueError if a file is missing or cannot be used, or has no picture of a character.
    """
    flat = font_sprites(font, characters)
    return {"3D": fluent_sprites(fluent, characters), "flat": flat}


def every_character(fluent: Path = FLUENT) -> str:
    """Return all emoji of one character in the archive, except those in `UNSEEN`. They are more than 1,300.

    Raises ValueError if the archive is missing or cannot be read.
    """
    return "".join(c for c in _pictures(fluent) if c >= "\u2190" and c not in UNSEEN)  # without letters and digits


def font_sprites(font: Path = FONT, characters: str = OBJECTS) -> dict[str, Image.Image]:
    """Draw characters with the font Noto Color Emoji. The keys are the English names.

    Raises ValueError if the font is missing or cannot be used, or has no color picture of a character.
    """
    if not font.is_file():
        raise ValueError(
            f"there is no emoji font at {font}: install it (apt-get install fonts-noto-color-emoji), or give the path "
            "of a NotoColorEmoji.ttf with --font"
        )
    try:
        face = ImageFont.truetype(str(font), 109)  # the only size of the bitmaps in NotoColorEmoji.ttf
    except OSError as error:
        raise ValueError(
            f"{font} is not a font with color bitmaps of 109 pixels ({error}): give the path of a NotoColorEmoji.ttf"
        ) from error
    sprites = {}
    for character in characters:
        image = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(image).text((0, 0), character, font=face, fill="magenta", embedded_color=True)
        if not image.getchannel("G").getbbox():  # no glyph, or one without colors, drawn in magenta
            raise ValueError(f"the font {font} has no color picture of {character} ({name_of(character)})")
        sprites[name_of(character)] = _square(image)
    return sprites


def fluent_sprites(archive: Path = FLUENT, characters: str = OBJECTS) -> dict[str, Image.Image]:
    """Read pictures of 256 pixels of the Fluent set from its npm archive. The keys are the English names.

    Raises ValueError if the archive is missing or cannot be read, or has no picture of a character.
    """
    pictures, sprites = _pictures(archive), {}
    for character in characters:
        if character not in pictures:
            raise ValueError(f"the archive {archive} has no picture of {character} ({name_of(character)})")
        with Image.open(io.BytesIO(pictures[character]), formats=["WEBP"]) as picture:
            sprites[name_of(character)] = _square(picture.convert("RGBA"))
    return sprites


def _pictures(archive: Path) -> dict[str, bytes]:
    """Return the WebP files of all emoji of one character, by this character: of 1f438.webp for the frog.

    The variation selector U+FE0F does not count as a character.
    """
    fetch = "get the archive with `npm pack @lobehub/fluent-emoji-3d@1.1.0`, or give its path with --fluent"
    if not archive.is_file():
        raise ValueError(f"there is no archive of 3D emoji at {archive}: {fetch}")
    pictures = {}
    try:
        unpacked = io.BytesIO(gzip.decompress(archive.read_bytes()))  # checks the checksum, which tarfile does not
        with tarfile.open(fileobj=unpacked, mode="r:") as files:
            for member in files:
                name = re.fullmatch(r"(?:.*/)?([0-9a-f]{4,5})(?:-fe0f)?\.webp", member.name)
                if name and (file := files.extractfile(member)):
                    pictures[chr(int(name[1], 16))] = file.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"{archive} cannot be read ({error}): {fetch}") from error
    if not pictures:
        raise ValueError(f"{archive} has no pictures with names such as 1f438.webp: {fetch}")
    return pictures


def _square(image: Image.Image) -> Image.Image:
    """Cut the transparent border off, and center the rest in a square."""
    image = image.crop(image.getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
