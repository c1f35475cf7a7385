"""The objects of the scenes: emoji in two styles, as RGBA squares.

"flat" objects are glyphs of the font Noto Color Emoji. "3D" objects are the pictures of Microsoft's Fluent set, read
from the archive that `npm pack @lobehub/fluent-emoji-3d` writes. Neither is part of this project.
"""

import io
import tarfile
import unicodedata
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

Sprites = Mapping[str, Mapping[str, Image.Image]]  # style -> name -> RGBA square


def name_of(character: str) -> str:
    """Return the English name of an emoji: "frog" for FROG FACE."""
    if character in WORDS:
        return WORDS[character][0]
    return unicodedata.name(character, "unknown").lower().removesuffix(" face")


NAMES = {name_of(character): WORDS.get(character, ())[1:] for character in OBJECTS + UNSEEN}  # -> synonyms


def plural(name: str) -> str:
    """Return the plural of an object's name: "foxes" for "fox"."""
    irregular = {"snowman": "snowmen", "maple leaf": "maple leaves", "sheep": "sheep", "fish": "fish"}
    if name in irregular:
        return irregular[name]
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "x", "ch", "sh", "tomato")) else "s")


def emoji_sprites(
    font: Path = FONT, fluent: Path = FLUENT, characters: str = OBJECTS
) -> dict[str, dict[str, Image.Image]]:
    """Return the objects in both styles.

    Raises ValueError if a file is missing or cannot be used, or has no picture of a character.
    """
    return {"3D": fluent_sprites(fluent, characters), "flat": font_sprites(font, characters)}


def every_character(fluent: Path = FLUENT) -> str:
    """Return all emoji of one character in the archive, except those in `UNSEEN`. They are more than 1,300.

    Raises ValueError if the archive is missing or cannot be read.
    """
    names = [name for name in _members(fluent) if "-" not in name]
    characters = [chr(int(name, 16)) for name in names if int(name, 16) >= 0x2190]  # without letters and digits
    return "".join(c for c in characters if c not in UNSEEN)


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
    members, sprites = _members(archive), {}
    for character in characters:
        if f"{ord(character):x}" not in members:
            raise ValueError(f"the archive {archive} has no picture of {character} ({name_of(character)})")
        with Image.open(io.BytesIO(members[f"{ord(character):x}"])) as picture:
            sprites[name_of(character)] = _square(picture.convert("RGBA"))
    return sprites


def _members(archive: Path) -> dict[str, bytes]:
    """Return the pictures' files by code point, such as "1f438"."""
    if not archive.is_file():
        raise ValueError(
            f"there is no archive of 3D emoji at {archive}: get it with `npm pack @lobehub/fluent-emoji-3d@1.1.0`, or "
            "give its path with --fluent"
        )
    try:
        with tarfile.open(archive) as files:
            pictures = [member for member in files if member.name.endswith(".webp")]
            return {
                Path(member.name).stem.removesuffix("-fe0f"): files.extractfile(member).read()  # type: ignore[union-attr]
                for member in pictures
            }
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{archive} is not the archive that npm pack writes ({error})") from error


def _square(image: Image.Image) -> Image.Image:
    """Cut the transparent border off, and center the rest in a square."""
    image = image.crop(image.getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
