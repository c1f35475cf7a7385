"""The small vocabulary is CLIP's in form: the same order of ids, readable by transformers, complete for any text."""

import json
import re

import pytest
from transformers import CLIPTokenizer

from ldm.models.token_files import save_tokenizer
from ldm.models.tokens import BOS, EOS, Tokenizer, byte_alphabet
from ldm.training.objects import OBJECTS, name_of
from ldm.training.scenes import Scenes
from ldm.training.vocabulary import build_vocabulary


@pytest.fixture(scope="module")
def captions():
    """Captions of scenes with all objects."""
    names = dict.fromkeys(map(name_of, OBJECTS))
    scenes = Scenes({"3D": names, "flat": names})
    return [scenes.caption(i) for i in range(2000)]


def test_the_ids_are_in_clips_order(captions):
    vocab, merges = build_vocabulary(captions, 700)
    tokens = list(vocab)
    alphabet = byte_alphabet()
    assert list(vocab.values()) == list(range(len(vocab)))
    assert tokens[:256] == alphabet
    assert tokens[256:512] == [c + "</w>" for c in alphabet]
    assert tokens[512:-2] == [a + b for a, b in merges]
    assert tokens[-2:] == [BOS, EOS]


def test_words_of_the_captions_become_single_tokens(captions):
    tokenizer = Tokenizer(*build_vocabulary(captions, 1536))
    for caption in captions[:200]:
        words = re.findall(r"[a-z]+|[0-9]|[-,]", caption.lower())  # CLIP takes "3D" as two words, "3" and "d"
        assert len(tokenizer.encode(caption)) == len(words)


def test_every_caption_of_the_scenes_fits_into_the_32_tokens_of_the_recipe(captions):
    tokenizer = Tokenizer(*build_vocabulary(captions, 1536))
    assert max(len(tokenizer.encode(caption)) for caption in captions) <= 30  # with the begin and the end token


def test_the_size_is_kept_and_few_captions_give_fewer_tokens(captions):
    assert len(build_vocabulary(captions, 530)[0]) == 530
    assert 514 < len(build_vocabulary(["a frog"], 5000)[0]) < 520


def test_the_most_frequent_pair_is_merged_first():
    _, merges = build_vocabulary(["low low low lot"], 600)
    assert merges[0] == ("l", "o")  # 4 times; ("o", "w</w>") 3 times
    assert merges[1] == ("lo", "w</w>")


def test_any_text_survives_encoding(captions):
    tokenizer = Tokenizer(*build_vocabulary(captions, 700))
    for text in ("an ünïcode 🐸 and 123!", "日本語", "completely unknown words"):
        assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == text.replace(" ", "")


def test_a_saved_vocabulary_loads_in_transformers_with_the_same_ids(tmp_path, captions):
    tokenizer = Tokenizer(*build_vocabulary(captions, 700))
    save_tokenizer(tokenizer, tmp_path, 32)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == 32
    for caption in captions[:20]:
        ids = theirs(caption)["input_ids"]
        assert ids == [tokenizer.bos_id, *tokenizer.encode(caption), tokenizer.eos_id]
    assert json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8")) == tokenizer.vocab


def test_a_size_without_room_for_the_bytes_is_an_error():
    with pytest.raises(ValueError, match="at least 514 tokens, got 513"):
        build_vocabulary(["a"], 513)
