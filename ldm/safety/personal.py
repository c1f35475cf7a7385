"""Personal data in a text: e-mail addresses, phone numbers, cards, bank accounts and national numbers.

Numbers with check digits are found only if these are right. Numbers that are nothing but digits also need a word that
says what they are, because a text for a picture may hold any number.
"""

import re
from collections.abc import Callable
from datetime import date
from typing import NamedTuple

from ldm.safety.spelling import visible

Check = Callable[[str], bool]  # of the digits and letters, without separators


class Found(NamedTuple):
    """Personal data in a text: its kind, such as "e-mail address", and the characters."""

    kind: str
    text: str


class Kind(NamedTuple):
    """A kind of personal data. context: a pattern that must match somewhere in the text."""

    name: str
    pattern: str
    check: Check = lambda number: True
    context: str = ""


def find(text: str) -> list[Found]:
    """Return the personal data in `text`, each with the first kind that fits."""
    text = _addresses(visible(text))
    found: list[Found] = []
    for kind, pattern, context in _COMPILED:
        if context is not None and not context.search(text):
            continue
        for match in pattern.finditer(text):
            if kind.check(re.sub(r"[\W_]", "", match[0]).upper()):
                found.append(Found(kind.name, match[0]))
                text = text.replace(match[0], " " * len(match[0]))
    return found


def _addresses(text: str) -> str:
    """Write "name (at) example dot com" as name@example.com."""
    text = re.sub(r"\s*[\[({<]\s*at\s*[\])}>]\s*", "@", text, flags=re.IGNORECASE)
    text = re.sub(r"\s*[\[({<]\s*dot\s*[\])}>]\s*", ".", text, flags=re.IGNORECASE)
    return re.sub(r"(\S{1,64}) at (\S{1,64}) dot ([a-z]{2,6})\b", r"\1@\2.\3", text, flags=re.IGNORECASE)


# ------------------------------------------------------------------ check digits


def luhn(number: str) -> bool:
    """Whether the check digit of `number` is right by Luhn's formula (ISO/IEC 7812-1), and not all digits are equal."""
    twice = [sum(divmod(2 * int(digit), 10)) for digit in number[-2::-2]]
    return (sum(map(int, number[-1::-2])) + sum(twice)) % 10 == 0 and len(set(number)) > 1


def verhoeff(number: str) -> bool:
    """Whether the check digit of `number` is right by Verhoeff's formula: the product in the dihedral group D5 is 0."""
    order, product = list(range(10)), 0
    for digit in reversed(number):
        product = _dihedral(product, order[int(digit)])
        order = [_VERHOEFF[place] for place in order]
    return product == 0


_VERHOEFF = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)


def _dihedral(a: int, b: int) -> int:
    """Multiply two elements of D5: 0 to 4 are rotations, 5 to 9 reflections."""
    if a < 5:
        return (a + b) % 5 if b < 5 else (a + b) % 5 + 5
    return (a - b) % 5 + 5 if b < 5 else (a - b) % 5


def weighted(weights: tuple[int, ...], modulus: int) -> Check:
    """Return a check that the sum of weights times digits is a multiple of `modulus`."""
    return lambda number: (
        sum(w * int(d) for w, d in zip(weights, number, strict=True)) % modulus == 0 and len(set(number)) > 1
    )


def iban(number: str) -> bool:
    """Whether the check digits of an international bank account number are right (ISO 7064, mod 97-10)."""
    return int("".join(str(int(c, 36)) for c in number[4:] + number[:4])) % 97 == 1


def _dni(number: str) -> bool:
    digits = {"X": "0", "Y": "1", "Z": "2"}.get(number[0], number[0]) + number[1:-1]
    return number[-1] == "TRWAGMYFPDXBNJZSQVHLCKE"[int(digits) % 23]


def _nir(number: str) -> bool:
    digits = number.replace("2A", "19").replace("2B", "18")
    return int(digits[:-2]) % 97 + int(digits[-2:]) == 97


def _codice_fiscale(number: str) -> bool:
    odd = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23)
    values = [int(c) if c.isdigit() else ord(c) - 65 for c in number[:15]]
    return (sum(odd[v] for v in values[::2]) + sum(values[1::2])) % 26 == ord(number[15]) - 65


def _idnr(number: str) -> bool:
    product = 10
    for digit in number[:-1]:  # ISO 7064, mod 11,10
        product = ((int(digit) + product) % 10 or 10) * 2 % 11
    return (11 - product) % 10 == int(number[-1])


def _cpf(number: str) -> bool:
    def digit(places: str) -> int:
        return sum(w * int(d) for w, d in zip(range(len(places) + 1, 1, -1), places, strict=True)) * 10 % 11 % 10

    return number[9:] == f"{digit(number[:9])}{digit(number[:10])}" and len(set(number)) > 1


def _china(number: str) -> bool:
    values = [10 if c == "X" else int(c) for c in number]
    return sum(v * 2 ** (17 - i) for i, v in enumerate(values)) % 11 == 1 and _is_date(number[6:14])


def _is_date(digits: str) -> bool:
    try:
        date.fromisoformat(digits)
    except ValueError:
        return False
    return True


def _hetu(number: str) -> bool:
    digits = re.sub(r"(?<=^\d{6})[A-Z](?=\d{3})", "", number)
    return digits[-1] == "0123456789ABCDEFHJKLMNPRSTUVWXY"[int(digits[:-1]) % 31]


def _personnummer(number: str) -> bool:
    return luhn(number[-10:])


def _nric(number: str) -> bool:
    total = sum(w * int(d) for w, d in zip((2, 7, 6, 5, 4, 3, 2), number[1:-1], strict=True))
    letters = "JZIHGFEDCBA" if number[0] in "ST" else "XWUTRQPNMLK"
    return letters[(total + 4 * (number[0] in "TG")) % 11] == number[-1]


def _card(number: str) -> bool:
    return luhn(number) and bool(re.match(r"3[0-9]|4|5[0-9]|6[0-9]|2[2-7]", number))


_PHONE = r"phone|call|tel|mobile|whats ?app|sms|dial|fax|handy|cell"
_ENDINGS = "png|jpe?g|webp|gif|bmp|tiff?|svg"
KINDS = (
    Kind("e-mail address", rf"[\w.+-]{{1,64}}@(?:[\w-]{{1,63}}\.){{1,8}}(?!(?:{_ENDINGS})\b)[a-z]{{2,24}}(?![\w-])"),
    Kind("bank account (IBAN)", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", iban),
    Kind("card number", r"(?<![\d.])\d(?:[ -]?\d){12,18}(?!\d)", _card),
    Kind("Chinese resident number", r"\b[1-9]\d{16}[\dX]\b", _china),
    Kind("French NIR", r"\b[12] ?\d{2} ?\d{2} ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d{2}\b", _nir),
    Kind("Italian codice fiscale", r"\b[A-Z]{6}\d{2}[A-EHLMPR-T]\d{2}[A-Z]\d{3}[A-Z]\b", _codice_fiscale),
    Kind("Spanish DNI or NIE", r"\b(?:\d{8}|[XYZ]-?\d{7})-?[A-Z]\b", _dni),
    Kind("Finnish identity code", r"\b\d{6}[-+A-FU-Y]\d{3}[0-9A-FHJ-NPR-Y](?!\w)", _hetu),
    Kind("Swiss AHV number", r"\b756\.?\d{4}\.?\d{4}\.?\d{2}\b", weighted((1, 3) * 6 + (1,), 10)),
    Kind("Brazilian CPF", r"\b\d{3}\.\d{3}\.\d{3}-\d{2}\b", _cpf),
    Kind("US social security number", r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])"),
    Kind("Swedish personnummer", r"(?<!\d)(?:18|19|20)?\d{6}[-+]\d{4}(?!\d)", _personnummer),
    Kind("Singaporean NRIC", r"\b[STFG]\d{7}[A-Z]\b", _nric),
    Kind("British national insurance number", r"\b(?![DFIQUV])[A-Z](?![DFIOQUV])[A-Z](?: ?\d\d){3} ?[A-D]\b"),
    Kind("Indian Aadhaar", r"(?<!\d)[2-9]\d{3} ?\d{4} ?\d{4}(?!\d)", verhoeff, "aadhaa?r|uidai|india"),
    Kind("British NHS number", r"(?<!\d)\d{3}[ -]?\d{3}[ -]?\d{4}(?!\d)", weighted((*range(10, 0, -1),), 11), "nhs"),
    Kind("Polish PESEL", r"(?<!\d)\d{11}(?!\d)", weighted((1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1), 10), "pesel"),
    Kind("German tax number", r"(?<!\d)[1-9]\d ?\d{3} ?\d{3} ?\d{3}(?!\d)", _idnr, "steuer|tax|id-?nr"),
    Kind("Dutch BSN", r"(?<!\d)\d{9}(?!\d)", weighted((9, 8, 7, 6, 5, 4, 3, 2, -1), 11), "bsn|burgerservice|sofi"),
    Kind("Canadian SIN", r"(?<!\d)\d{3}[- ]\d{3}[- ]\d{3}(?!\d)", luhn, r"\bsin\b|social insurance"),
    Kind(
        "Australian TFN",
        r"(?<!\d)\d{3} ?\d{3} ?\d{3}(?!\d)",
        weighted((1, 4, 3, 7, 5, 8, 6, 9, 10), 11),
        r"\btfn\b|tax file",
    ),
    Kind("phone number", r"(?<![\w+])\+ ?\d(?:[ ().-]{0,2}\d){7,14}(?!\d)"),
    Kind("phone number", r"(?<![\w.-])(?:1[ .-])?\(?[2-9]\d{2}\)?[ .-] ?[2-9]\d{2}[ .-]\d{4}(?![\w-])"),
    Kind("phone number", r"(?<![\w.])\(?0?\d(?:[ ()/.-]{0,2}\d){6,13}(?!\w)", context=rf"\b(?:{_PHONE})"),
)
_FLAGS = re.IGNORECASE | re.ASCII  # without ASCII, [A-Z] also finds letters that no check digit knows
_COMPILED = [
    (kind, re.compile(kind.pattern, _FLAGS), re.compile(kind.context, _FLAGS) if kind.context else None)
    for kind in KINDS
]
