"""CLIP's byte-pair encoding against OpenAI's own ids and against transformers' CLIPTokenizer."""

import random
import unicodedata

import pytest

from ldm.models.tokens import EOS, byte_alphabet

# ids without begin and end, from OpenAI's own tokenizer
GOLDEN = {
    "": [],
    "a photo of an astronaut riding a horse on mars": [
        320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496,
    ],
    "on mars!": [525, 7496, 256],  # transformers with pad token "!" says 0 instead of 256
    "café naïve résumé": [15304, 1097, 35689, 563, 29106, 7054, 4166],
    "日本語の猫": [39121, 44353, 34002, 252, 21575, 163, 234, 360],
    "🙂 a cat 👩‍🚀 emoji": [14860, 320, 2368, 26304, 13542, 16327],
    "123456 2023": [272, 273, 274, 275, 276, 277, 273, 271, 273, 274],
    "supercalifragilisticexpialidocious": [1642, 2857, 13093, 2076, 5868, 26850, 835, 639, 38466],
    "I'm we're they'll it's O'Neil": [328, 880, 649, 982, 889, 1342, 585, 568, 334, 262, 8030],
}  # fmt: skip


def ids_of(theirs, text):
    return theirs(text, add_special_tokens=False, verbose=False)["input_ids"]


@pytest.mark.parametrize("text", GOLDEN)
def test_the_bundled_vocabulary_gives_openais_ids(text, tokenizer):
    assert tokenizer.encode(text) == GOLDEN[text]


def test_the_byte_alphabet_has_256_distinct_printable_characters():
    alphabet = byte_alphabet()
    assert len(set(alphabet)) == 256
    assert alphabet[0] == "!"
    assert not any(c.isspace() for c in alphabet)


def test_random_unicode_text_has_the_ids_and_the_decoding_of_transformers(tokenizer, theirs):
    drawn = random.Random(0)
    assigned = [chr(c) for c in range(0x30000) if unicodedata.category(chr(c)) not in ("Cs", "Cn")]
    plain = [*"abcdefgh ABCDEF  '!0123.,-\t\n", "'s", "<|endoftext|>", "<|startoftext|>", "é", "é"]
    different = set()
    for i in range(3000):
        letters = (assigned, plain, assigned[:0x2000])[i % 3]
        text = "".join(drawn.choices(letters, k=drawn.randrange(1, 40)))
        ids = tokenizer.encode(text)
        assert ids == ids_of(theirs, text), ascii(text)
        assert tokenizer.decode(ids) == theirs.decode(ids).strip(), ascii(text)
        different.add(tuple(ids))
    assert len(different) > 2900


def test_an_end_token_typed_in_a_prompt_is_one(tokenizer):
    assert tokenizer.encode(f"a {EOS} b") == [320, 49407, 321]
