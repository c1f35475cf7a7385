"""One spelling for many: letters that look alike, hidden characters, digits for letters, and spaced words.

Unicode Technical Standard 39 (security mechanisms) describes the look-alikes; this table has those of small letters.
"""

import re
import unicodedata
from functools import cache

_LOOK_ALIKES = {
    **dict(zip("авсԁеѕһіјкӏмноорԛгтуѵԝхпи", "abcdeshijklmhoopqrtyvwxnu", strict=True)),
    **dict(zip("αβγεηικνορτυχωμ", "abyenikvoptuxwu", strict=True)),  # Greek
    **dict(zip("ոօսհցզ", "nouhgq", strict=True)),  # noqa: RUF001  Armenian
}
_LATIN = re.compile(r"(?:LATIN|NEGATIVE|REGIONAL|SQUARED|CIRCLED)[A-Z ]* ([A-Z])(?: WITH .*)?")
_FILLERS = "\u034f\u115f\u1160\u3164\uffa0"  # empty characters that are not of the category of hidden ones
_LETTERS = {"a": "a4@", "b": "b8", "e": "e3", "g": "g9", "i": "i1!|", "l": "l1|", "o": "o0", "s": "s5$", "t": "t7+"}
_UNSPACED = "\u3040"  # from here on: the letters of Japanese, Chinese and Korean, with no spaces between words
_BREAK = r"[\W_]"
_SPACED = re.compile(rf"(?<![^\W_])[^\W_]({_BREAK}{{1,3}})(?:[^\W_]\1)+[^\W_](?![^\W_])")


def visible(text: str) -> str:
    """Return `text` in Unicode's form NFKC without hidden characters, and with the digits of all scripts as 0 to 9."""
    text = unicodedata.normalize("NFKC", text)
    kept = (c for c in text if unicodedata.category(c) != "Cf" and c not in _FILLERS)
    return "".join(str(unicodedata.decimal(c, c)) for c in kept)


def fold(text: str) -> str:
    """Return `text` in small letters without accents, with look-alikes of other scripts as Latin letters.

    Words that are spelled letter by letter, as in "w o r d", follow once more in one piece.
    """
    text = unicodedata.normalize("NFKD", visible(text).casefold())
    text = "".join(_latin(c) for c in text if unicodedata.category(c) not in ("Mn", "Me"))
    spaced = (match[0].replace(match[1], "") for match in _SPACED.finditer(text))
    return " . ".join([text, *spaced])


def pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern that finds any of `words` as whole words in a folded text; in Chinese or Japanese, anywhere.

    A letter may be a digit or sign that looks like the letter, or stand three times or more often. Between two words
    may stand any signs. An s may follow. A * stands for any letters and digits at the end of a word.
    Raises ValueError for a word without a letter or digit.
    """
    return re.compile("|".join(map(_word, words)) or r"(?!)")


def _word(word: str) -> str:
    parts = re.findall(r"[^\W_]+\*?", fold(word).split(" . ")[0])
    if not parts:
        raise ValueError(f"a word of a policy needs a letter or digit, got {word!r}")
    spelled = rf"{_BREAK}+".join("".join(map(_letter, part)) for part in parts)
    return spelled if parts[0][0] >= _UNSPACED else rf"(?<![^\W_]){spelled}s?(?![^\W_])"


def _letter(letter: str) -> str:
    if letter == "*":
        return r"[^\W_]*"
    found = f"[{re.escape(_LETTERS.get(letter, letter))}]"
    return f"{found}(?:{found}{{2,}})?"


@cache
def _latin(letter: str) -> str:
    """Return the Latin letter that `letter` looks like, or else `letter`."""
    if letter.isascii():
        return letter
    match = _LATIN.fullmatch(unicodedata.name(letter, ""))
    return _LOOK_ALIKES.get(letter) or (match[1].lower() if match else letter)
