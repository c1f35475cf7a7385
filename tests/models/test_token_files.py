"""Tokenizers in folders of all ages, with the tokens that a folder adds, against transformers' CLIPTokenizer."""

import json

import pytest
from tokenizers import AddedToken
from transformers import CLIPTokenizer

from ldm.models.token_files import read_tokenizer, save_tokenizer
from ldm.models.tokens import BOS, EOS, Tokenizer
from tests.models.test_tokens import GOLDEN, ids_of
from tests.tiny import byte_tokenizer

# As textual inversion and people add them: with and without flags, in capitals, of letters only.
ADDED = [
    AddedToken("<cat-toy>"),
    AddedToken("<Frida>", normalized=False),
    AddedToken("Blue Door", single_word=True),
    AddedToken("<wide>", lstrip=True, rstrip=True),
    AddedToken("<end>", special=True),
]
PROMPTS = [
    "a photo of a <cat-toy> on a table",
    "<CAT-TOY><cat-toy>s, <Frida> and <frida>",
    "a blue door, a BLUE DOOR, bluedoors, blue doors, Blue  Door",
    "left   <wide>   right<wide>!",
    "an <end> of <End><|endoftext|> it <|ENDOFTEXT|>",
    "mars! !! a!b",
]


def edit(path, **changes):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def flags(token):
    return {name: getattr(token, name) for name in ("normalized", "lstrip", "rstrip", "single_word")}


@pytest.mark.parametrize("pad", [49407, 0])
def test_a_saved_tokenizer_reads_back_the_same_and_transformers_reads_it_too(pad, tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path, 77, pad)
    (again, pad_id), theirs = read_tokenizer(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
    assert pad_id == theirs.pad_token_id == pad
    assert (again.vocab, again.merges) == (tokenizer.vocab, tokenizer.merges)
    assert theirs.model_max_length == 77
    for text, ids in GOLDEN.items():
        assert again.encode(text) == ids
        read = [0 if i == 256 else i for i in ids] if pad == 0 else ids  # they take every "!" for padding then
        assert theirs(text)["input_ids"] == [49406, *read, 49407]


@pytest.mark.parametrize("pad", [EOS, "!"])
@pytest.mark.parametrize("files", ["tokenizer.json", "added_tokens_decoder", "both"])
def test_added_tokens_have_the_ids_that_transformers_gives_them(tmp_path, tokenizer, pad, files):
    theirs = CLIPTokenizer(vocab=tokenizer.vocab, merges=tokenizer.merges, pad_token=pad)
    theirs.add_tokens(ADDED)
    theirs.save_pretrained(tmp_path)  # today's form: tokenizer.json alone
    if files != "tokenizer.json":  # transformers 4.34 to 4.57 wrote this one
        table = {i: flags(t) | {"content": t.content} for i, t in theirs.added_tokens_decoder.items()}
        edit(tmp_path / "tokenizer_config.json", added_tokens_decoder=table)
        (tmp_path / "vocab.json").write_text(json.dumps(tokenizer.vocab))
        (tmp_path / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in tokenizer.merges))
    if files == "added_tokens_decoder":
        (tmp_path / "tokenizer.json").unlink()
    ours = read_tokenizer(tmp_path)[0]
    assert len(ours.vocab) == max(ours.vocab.values()) + 1 == 49408 + len(ADDED)
    found = set()
    for text in PROMPTS:
        # transformers cuts its padding out of words; nobody else does
        expected = [256 if i == 0 else i for i in ids_of(theirs, text.replace("!!", "! !"))]
        assert ours.encode(text.replace("!!", "! !")) == expected, text
        found |= set(expected)
    assert found >= set(range(49408, 49413))


def test_added_tokens_json_lists_plain_ones(tmp_path, tokenizer):
    save_tokenizer(tokenizer, tmp_path, 77)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    edit(tmp_path / "added_tokens.json", **{"<Frida>": 49408, "<cat-toy>": 49409})
    ours, theirs = read_tokenizer(tmp_path)[0], CLIPTokenizer.from_pretrained(tmp_path)
    for text in PROMPTS:
        assert ours.encode(text) == ids_of(theirs, text), text
    assert ours.encode("<FRIDA> <Cat-Toy>") == [49408, 49409]


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json"])
def test_a_list_of_tokens_that_the_vocabulary_has_adds_none(tmp_path, tokenizer, name):
    save_tokenizer(tokenizer, tmp_path, 77, pad_id=0)
    listed = {"!": 0, BOS: 49406, EOS: 49407}
    config = {"pad_token": "!"}
    if name == "tokenizer_config.json":
        special = {"special": True, "normalized": False}
        config["added_tokens_decoder"] = {i: special | {"content": t} for t, i in listed.items()}
    else:
        edit(tmp_path / "added_tokens.json", **listed)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = read_tokenizer(tmp_path)[0]
    assert ours.vocab == tokenizer.vocab
    for text in [*GOLDEN, *PROMPTS]:
        assert ours.encode(text) == tokenizer.encode(text), text
    assert ours.encode("mars!") == [7496, 256]


def test_added_tokens_are_saved_for_us_and_for_transformers(tmp_path, tokenizer):
    listed = {49408 + i: token for i, token in enumerate(ADDED)}
    ours = Tokenizer(tokenizer.vocab, tokenizer.merges, listed)
    save_tokenizer(ours, tmp_path, 77)
    again, theirs = read_tokenizer(tmp_path)[0], CLIPTokenizer.from_pretrained(tmp_path)
    assert again.vocab == ours.vocab == theirs.get_vocab()
    assert again.base == tokenizer.vocab
    for text in PROMPTS:
        assert again.encode(text) == ours.encode(text) == ids_of(theirs, text), text
    save_tokenizer(again, tmp_path / "again", 77)
    for file in tmp_path.glob("*.*"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_an_added_token_keeps_the_id_of_its_row_where_ids_leave_a_gap(tmp_path, tokenizer):
    save_tokenizer(tokenizer, tmp_path, 77)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    edit(tmp_path / "added_tokens.json", **{"<late>": 49500})
    ours = read_tokenizer(tmp_path)[0]
    assert ours.encode("a <late> cat") == [320, 49500, 2368]
    assert max(ours.vocab.values()) == 49500


def test_a_folder_with_only_tokenizer_json_works(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    assert read_tokenizer(tmp_path)[0].encode("on mars!") == GOLDEN["on mars!"]


def test_merges_may_be_lines_or_pairs(tokenizer, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    table["model"]["merges"] = [f"{a} {b}" for a, b in tokenizer.merges]  # before tokenizers 0.20
    edit(tmp_path / "tokenizer.json", model=table["model"])
    assert read_tokenizer(tmp_path)[0].merges == tokenizer.merges


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer: need vocab\.json and merges\.txt"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", "{", r"vocab\.json is not valid JSON"),
        ("vocab.json", "[" * 10**5, r"vocab\.json is not valid JSON"),
        ("vocab.json", b"\xff{}", r"vocab\.json is not UTF-8 text"),
        ("vocab.json", "[]", r"vocab\.json: expected a JSON object, got \[\]"),
        ("vocab.json", '{"a": "0"}', r"vocab\.json: the id of 'a' must be a whole number, got '0'"),
        ("vocab.json", '{"a": -1}', r"vocab\.json: the id of 'a' must be"),
        ("vocab.json", '{"a": true}', r"vocab\.json: the id of 'a' must be"),
        ("vocab.json", '{"a": 4294967296}', r"vocab\.json: the id of 'a' must be"),
        ("vocab.json", '{"a": 0}', r"holds no tokenizer of CLIP: the vocabulary lacks <\|s"),
        ("merges.txt", "#version: 0.2\na b c\n", r"merges\.txt: a merge must be two tokens, got 'a"),
        ("merges.txt", "a\n", r"merges\.txt: a merge must be two tokens, got 'a'"),
        ("merges.txt", "zebra a\n", r"of CLIP: the vocabulary and the merges do not go"),
        ("merges.txt", b"\xff", r"merges\.txt is not UTF-8 text"),
        ("added_tokens.json", '{"<a>": "1"}', r"added_tokens\.json: the id of '<a>' must be"),
        ("added_tokens.json", '{"<a>": 3}', r"of CLIP: the vocabulary has '\$' as 3"),
        ("added_tokens.json", '{"ab": 514, "a</w>": 515}', r"the vocabulary has 'a</w>' as 320"),
        ("tokenizer_config.json", "nonsense", r"tokenizer_config\.json is not valid JSON"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": [1]}',
            r"tokenizer_config\.json: expected a JSON object, got \[1\]",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": {"content": "<a>"}}}',
            r"tokenizer_config\.json: the added token 'x' is malformed",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"514": {"content": "<a>", "lstrip": 1}}}',
            r"tokenizer_config\.json: the added token '514' is malformed",
        ),
        ("tokenizer.json", '{"added_tokens": 5}', r"tokenizer\.json: added_tokens must be a list"),
        (
            "tokenizer.json",
            '{"added_tokens": [{"content": "<a>"}]}',
            r"tokenizer\.json: the added token None is malformed",
        ),
        (
            "tokenizer.json",
            '{"added_tokens": [{"id": 514}]}',
            r"tokenizer\.json: the added token 514 is malformed: KeyError\('content'\)",
        ),
    ],
)
def test_a_malformed_file_is_named(tmp_path, name, content, message):
    save_tokenizer(byte_tokenizer(), tmp_path, 32)
    if name != "tokenizer_config.json":
        (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"tokenizer\.json: expected a JSON object, got \[\]"),
        ('{"model": 1}', r"tokenizer\.json: expected a JSON object, got 1"),
        ('{"model": {"type": "Unigram", "vocab": []}}', r"tokenizer\.json: the model has no list of m"),
        ('{"model": {"merges": [], "vocab": []}}', r"tokenizer\.json: expected a JSON object, got \["),
        ('{"model": {"merges": [["a"]], "vocab": {}}}', r"tokenizer\.json: a merge must be two tok"),
        ('{"model": {"merges": [[1, 2]], "vocab": {}}}', r"tokenizer\.json: a merge must be two tok"),
    ],
)
def test_a_malformed_tokenizer_json_alone_is_named(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_tokenizer(tmp_path)
