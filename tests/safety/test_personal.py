"""Personal data: published examples of each kind, wrong check digits, and numbers that are none."""

import random

import pytest

from ldm.safety.personal import KINDS, find, luhn, verhoeff

EXAMPLES = {  # published examples, most of them those of the tests of python-stdnum 2.2
    "e-mail address": ["jane.doe+x@mail.example.co.uk", "j\u00f6rg@example.de", "jane (at) example (dot) com"],
    "bank account (IBAN)": ["GB82 WEST 1234 5698 7654 32", "DE89370400440532013000", "NL91ABNA0417164300"],
    "card number": ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005", "6011111111111117"],
    "Chinese resident number": ["360426199101010071"],
    "French NIR": ["2 95 10 99 126 111 93", "253072B07300470"],
    "Italian codice fiscale": ["RCCMNL83S18D969H"],
    "Spanish DNI or NIE": ["54362315K", "X-2482300W"],
    "Finnish identity code": ["131052-308T"],
    "Swiss AHV number": ["756.9217.0769.85"],
    "Brazilian CPF": ["390.533.447-05"],
    "US social security number": ["536-90-4399"],
    "Swedish personnummer": ["880320-0016", "19880320-0016"],
    "Singaporean NRIC": ["S0000001I"],
    "British national insurance number": ["AB 12 34 56 C"],
    "Indian Aadhaar": ["aadhaar 2341 2341 2346"],
    "British NHS number": ["NHS 943-476-5870"],
    "Polish PESEL": ["pesel 44051401359"],
    "German tax number": ["Steuer-IdNr 36 574 261 809"],
    "Dutch BSN": ["bsn 111222333"],
    "Canadian SIN": ["SIN 123-456-782"],
    "Australian TFN": ["TFN 123 456 782"],
    "phone number": ["+49 30 12345678", "(415) 555-2671", "tel. 030 123 45 67", "call 030/1234567"],
}
CHECKED = [kind for kind in EXAMPLES if kind not in {"e-mail address", "phone number"}]
CHECKED = [kind for kind in CHECKED if not kind.startswith(("US", "British national"))]  # no check digit

MISSING_SOME = {"Brazilian CPF", "Swedish personnummer"}


def kinds(text):
    return [found.kind for found in find(text)]


def test_each_kind_has_an_example():
    assert {kind.name for kind in KINDS} == EXAMPLES.keys()


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_examples_are_found_once(kind):
    for example in EXAMPLES[kind]:
        assert kinds(f"a sign with {example} on it") == [kind]
        assert kinds(f"{example}, photo") == [kind]


@pytest.mark.parametrize("kind", CHECKED)
def test_a_number_with_another_digit_is_not_of_the_kind(kind):
    """All but two of the formulas find each wrong digit: a CPF reads 10 as 0, a personnummer leaves out 19 and 20."""
    for example in EXAMPLES[kind]:
        places = [i for i, c in enumerate(example) if c.isdigit()]
        changed = [
            example[:i] + digit + example[i + 1 :] for i in places for digit in "0123456789" if digit != example[i]
        ]
        wrong = sum(kind in kinds(text) for text in changed)
        assert wrong <= (0.02 * len(changed) if kind in MISSING_SOME else 0)


@pytest.mark.parametrize("context", ["pesel", "bsn", "SIN", "TFN", "NHS", "aadhaar"])
def test_numbers_of_digits_alone_need_a_word_that_names_them(context):
    text = next(text for texts in EXAMPLES.values() for text in texts if text.startswith(context))
    assert kinds(text)
    assert kinds(text.removeprefix(context)) in ([], ["phone number"])


@pytest.mark.parametrize("check", [luhn, verhoeff])
def test_luhn_and_verhoeff_find_every_wrong_digit_and_verhoeff_every_swap(check):
    draw = random.Random(0)
    for _ in range(20):
        number = "".join(draw.choices("0123456789", k=11))
        (right,) = [number + digit for digit in "0123456789" if check(number + digit)]
        for i in range(12):
            assert not any(check(right[:i] + digit + right[i + 1 :]) for digit in "0123456789" if digit != right[i])
        for i in range(11) if check is verhoeff else ():
            swapped = right[:i] + right[i + 1] + right[i] + right[i + 2 :]
            assert swapped == right or not check(swapped)


@pytest.mark.parametrize(
    "text",
    [
        "1920x1080, seed 1234567890123456",
        "16:9, f/1.8, ISO 100, 85mm",
        "calendar of 2024-12-24 and 24.12.2024",
        "ISBN 978-3-16-148410-0",
        "art by @some_painter, icon@2x.png",
        "pi 3.14159265358979323846",
        "0000 0000 0000 0000",
        "version 1.2.3.4, 10,000,000 stars",
        "1914-1918 and 1939-1945",
        "call of duty, 1944",
    ],
)
def test_other_numbers_are_none(text):
    assert find(text) == []


def test_hidden_characters_and_the_digits_of_other_scripts_hide_nothing():
    assert kinds("j\u200bane@exam\u00adple.com") == ["e-mail address"]
    assert kinds("\uff14\uff11\uff11\uff11 1111 1111 1111") == ["card number"]
    assert kinds("\u0664\u0661\u0661\u0661111111111111") == ["card number"]


def test_any_text_is_taken_and_a_long_one_takes_no_long_time():
    draw = random.Random(0)
    letters = "0123456789 -+.@()ABXYZabKk\u0131\u0130\u017f\u212a\u00b2\u0663"
    for _ in range(300):
        find("nhs bsn pesel tax sin tfn aadhaar call " + "".join(draw.choices(letters, k=40)))
    for part in ("1 ", "a@", "a.", "(at)", "+1 ", "AB12 ", "1-", " at a dot "):
        find(part * 2000)
