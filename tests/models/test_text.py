"""Tokens, padding, the choice of a layer and the pooled output."""

import dataclasses
import warnings

import pytest
import torch

from ldm.config import TextConfig
from ldm.models.text import TextEncoder, TextTower, Tokenizer, byte_alphabet

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
SMALL = TextConfig(width=16, layers=3, heads=2, mlp=32, vocab_size=49408)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.official()


def tower(config, tokenizer):
    torch.manual_seed(0)
    return TextTower(config, tokenizer).eval()


@pytest.mark.parametrize("text", GOLDEN)
def test_the_bundled_vocabulary_gives_openais_ids(text, tokenizer):
    assert tokenizer.encode(text) == GOLDEN[text]


def test_the_byte_alphabet_has_256_distinct_printable_characters():
    alphabet = byte_alphabet()
    assert len(set(alphabet)) == 256
    assert alphabet[0] == "!"
    assert not any(c.isspace() for c in alphabet)


def test_a_saved_tokenizer_reads_back_the_same_and_transformers_reads_it_too(tokenizer, tmp_path):
    from transformers import CLIPTokenizer

    tokenizer.save(tmp_path, 77)
    again = Tokenizer.from_folder(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    assert (again.vocab, again.merges) == (tokenizer.vocab, tokenizer.merges)
    assert theirs.model_max_length == 77
    for text, ids in GOLDEN.items():
        assert again.encode(text) == ids
        assert theirs(text)["input_ids"] == [49406, *ids, 49407]


def test_a_folder_with_only_tokenizer_json_works(tokenizer, tmp_path):
    tokenizer._bpe.save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    assert Tokenizer.from_folder(tmp_path).encode("on mars!") == GOLDEN["on mars!"]


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer: need vocab\.json and merges\.txt"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("pad", [49407, 0])
def test_texts_are_begun_ended_and_padded_with_the_towers_own_id(pad, tokenizer):
    ids = tower(dataclasses.replace(SMALL, pad_id=pad), tokenizer).tokenize(["on mars!", ""])
    assert ids.shape == (2, 77)
    assert ids[0].tolist() == [49406, 525, 7496, 256, 49407] + [pad] * 72
    assert ids[1].tolist() == [49406, 49407] + [pad] * 75


def test_a_text_that_fills_the_window_is_whole_and_a_longer_one_says_what_is_cut(tokenizer):
    t = tower(SMALL, tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert t.tokenize(["cat " * 75])[0].tolist() == [49406] + [2368] * 75 + [49407]
    with pytest.warns(UserWarning, match=r"77 tokens and the text encoder reads 75.*'dog bird'"):
        cut = t.tokenize(["cat " * 75 + "dog bird"])
    assert torch.equal(cut, t.tokenize(["cat " * 75]))


def test_the_layer_and_the_final_norm_are_chosen_by_the_config(tokenizer):
    full = tower(SMALL, tokenizer)
    ids = full.tokenize(["a cat"])
    hidden = full.model(input_ids=ids, output_hidden_states=True).hidden_states
    norm = getattr(full.model, "text_model", full.model).final_layer_norm
    for layer in (-1, -2):
        for final in (True, False):
            config = dataclasses.replace(SMALL, output_layer=layer, final_norm=final)
            expected = norm(hidden[layer]) if final else hidden[layer]
            assert torch.equal(tower(config, tokenizer)(ids).context, expected)


def test_the_pooled_output_is_projected_from_the_first_end_token_whatever_the_padding(tokenizer):
    pooled = []
    for pad in (49407, 0):  # after the end, so a causal tower cannot see it
        t = tower(dataclasses.replace(SMALL, pad_id=pad, projection=6), tokenizer)
        ids = t.tokenize(["a cat"])
        pooled.append(t(ids).vector)
        last = t.model(input_ids=ids).last_hidden_state[:, 3]
        torch.testing.assert_close(pooled[-1], t.projection(last))
    torch.testing.assert_close(*pooled)


def test_an_encoder_joins_its_towers_and_takes_the_last_pooled_projection(tokenizer):
    torch.manual_seed(0)
    configs = (SMALL, dataclasses.replace(SMALL, width=24, projection=6, pad_id=0))
    encoder = TextEncoder(configs, (tokenizer, tokenizer)).eval()
    context, vector = encoder.encode(["a cat", "a dog on mars!"])
    assert context.shape == (2, 77, 40)
    assert vector.shape == (2, 6)
    alone = encoder.encode(["a dog on mars!"])
    torch.testing.assert_close(context[1:], alone.context, rtol=1e-4, atol=1e-5)
    assert TextEncoder((SMALL,), (tokenizer,)).encode(["x"]).vector is None


def test_a_tower_built_on_meta_keeps_real_position_ids(tokenizer):
    with torch.device("meta"):
        t = TextTower(SMALL, tokenizer)
    assert not [name for name, buffer in t.named_buffers() if buffer.is_meta]
