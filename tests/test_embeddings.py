"""Textual inversion: files of every kind, names in prompts, vectors in the towers, the command and its record."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import ldm
from ldm.checkpoint.embeddings import load_embeddings, read_embedding, words_used
from ldm.checkpoint.pickles import TORCH_NEEDED
from ldm.cli import main
from ldm.conditioning import condition
from ldm.models.text import TextEncoder
from ldm.models.textual_inversion import add_embedding
from ldm.prompts import Emphasized, chunks
from tests.tiny import TINY_RANDOM, TINY_REFINER, TINY_SDXL, byte_tokenizer

VECTORS = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
A1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "wrong", "step": 5}
CONTENTS = {  # by file name: what it holds, and the name and vectors that are read
    "easy.pt": (A1111, "easy", [VECTORS]),
    "old.pt": (A1111 | {"string_to_param": nn.ParameterDict({"*": nn.Parameter(VECTORS)})}, "old", [VECTORS]),
    "easy.safetensors": ({"emb_params": VECTORS.half()}, "easy", [VECTORS.half().float()]),
    "learned_embeds.safetensors": ({"<cat-toy>": VECTORS[0].clone()}, "<cat-toy>", [VECTORS[:1]]),
    "learned_embeds.bin": ({"<cat-toy>": VECTORS}, "<cat-toy>", [VECTORS]),
    "xl.safetensors": ({"clip_g": VECTORS, "clip_l": VECTORS[:, :16].clone()}, "xl", [VECTORS[:, :16], VECTORS]),
    "pivotal.safetensors": (
        {"text_encoders_0": VECTORS[:, :16].clone(), "text_encoders_1": VECTORS},
        "pivotal",
        [VECTORS[:, :16], VECTORS],
    ),
}
pickles = pytest.mark.skipif(torch.__version__ < TORCH_NEEDED, reason="no pickle is read with this torch")


def write(path, content):
    (save_file if path.suffix == ".safetensors" else torch.save)(content, path)
    return path


def encoder(config=TINY_RANDOM):
    torch.manual_seed(0)
    return TextEncoder(config.text, [byte_tokenizer()] * len(config.text)).eval()


def tokens(text_encoder, text):
    return text_encoder.towers[0].tokenizer.encode(text)


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("name", [n if n.endswith("rs") else pytest.param(n, marks=pickles) for n in CONTENTS])
def test_each_kind_of_file_gives_its_name_and_its_vectors(name, tmp_path):
    content, word, vectors = CONTENTS[name]
    found, read = read_embedding(write(tmp_path / name, content))
    assert found == word
    assert [each.dtype for each in read] == [torch.float32] * len(vectors)
    assert all(torch.equal(*pair) for pair in zip(read, vectors, strict=True))


@pickles
def test_the_code_in_a_pickle_does_not_run(tmp_path):
    class Program:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    write(tmp_path / "bad.pt", A1111 | {"name": Program()})
    with pytest.raises(ValueError, match=r"bad\.pt names code that has no place among weights, so it is not opened"):
        read_embedding(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a.lora_A.weight": VECTORS, "b": VECTORS.clone()}, "is a LoRA with a.lora_A.weight, b: give a file of one "),
        (
            {"<a>": VECTORS, "<b>": VECTORS.clone()},
            "is a textual-inversion embedding with <a>, <b>: give a file of one",
        ),
        (
            {"emb_params": VECTORS[None].clone()},
            "is a textual-inversion embedding with emb_params: give a file of one ",
        ),
        ({"<a>": torch.arange(5)}, "is a textual-inversion embedding with <a>: give a file of one embedding"),
        ({"<a>": torch.empty(0, 32)}, "is a textual-inversion embedding with <a>: give a file of one embedding"),
    ],
    ids=["lora", "two", "three dimensions", "integers", "empty"],
)
def test_a_file_of_something_else_says_what_it_is(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_embedding(write(tmp_path / "x.safetensors", content))


def test_an_embedding_for_another_model_names_both_widths(tmp_path):
    write(tmp_path / "sd.safetensors", {"emb_params": torch.ones(2, 768)})
    with pytest.raises(
        ValueError,
        match=r"sd\.safetensors, an embedding for Stable Diffusion 1\.x: the embedding is 768 "
        r"wide, and the text encoder of the model 16 \+ 16: give one made for this model",
    ):
        load_embeddings(encoder(TINY_SDXL), [(None, tmp_path / "sd.safetensors")])
    with pytest.raises(ValueError, match=r"the embedding is 16 \+ 32 wide, and the text encoder of the model 16: "):
        add_embedding(encoder(TINY_REFINER), "x", [torch.ones(2, 16), torch.ones(2, 32)])
    with pytest.raises(ValueError, match="needs 1 to 30 vectors, as many for each text encoder, got 31"):
        add_embedding(encoder(), "x", [torch.ones(31, 32)])
    with pytest.raises(ValueError, match="as many for each text encoder, got 2 and 3"):
        add_embedding(encoder(TINY_SDXL), "x", [torch.ones(2, 16), torch.ones(3, 16)])


# ------------------------------------------------------------------ names in a text


@pytest.fixture
def named():
    """A text encoder with "<cat>", one vector, "Easy", three, and "easy negative", two, from the id 514 on."""
    found = encoder()
    for name, count in (("<cat>", 1), ("Easy", 3), ("easy negative", 2)):
        add_embedding(found, name, [VECTORS[:count] + count])
    return found


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a <cat>, cat", ["a ", [514], ", cat"]),
        ("a<CAT>b", ["a", [514], "b"]),
        ("EASY easy", [[515, 516, 517], [515, 516, 517]]),
        ("easy  negative, easy", [[518, 519], ",", [515, 516, 517]]),
        ("uneasy easygoing easy_1", ["uneasy easygoing easy_1"]),
        ("(easy:1.2)", ["(", [515, 516, 517], ":1.2)"]),
    ],
)
def test_names_are_found_in_any_case_the_longest_first_and_not_inside_of_words(text, ids, named):
    expected = [i for part in ids for i in (byte_tokenizer().encode(part) if isinstance(part, str) else part)]
    assert tokens(named, text) == expected


def test_ids_become_names_once_again(named):
    tokenizer = named.towers[0].tokenizer
    assert tokenizer.decode(tokens(named, "a easy easy <cat> b")) == "a easy easy <cat> b"
    assert tokenizer.decode(tokens(named, "a easy b")[2:]) == "easy b"
    assert words_used(named, ["<cat> on easy", "uneasy"]) == {"<cat>": 1, "easy": 3}


def test_a_name_that_is_a_word_replaces_the_word():
    found = encoder()
    before = found.encode(["a cat"]).context
    add_embedding(found, "cat", [VECTORS[:1]])
    assert tokens(found, "a cat") == [*byte_tokenizer().encode("a "), 514]
    assert not torch.equal(found.encode(["a cat"]).context, before)


@pytest.mark.parametrize(("name", "message"), [("CAT ", "have the name 'cat': write NAME=FILE"), (" ", "is not blank")])
def test_a_name_that_is_taken_or_blank_is_refused_and_changes_nothing(name, message):
    found = encoder()
    add_embedding(found, "cat", [VECTORS[:1]])
    with pytest.raises(ValueError, match=message):
        add_embedding(found, name, [VECTORS])
    assert tokens(found, "cat cat") == [514, 514]
    assert found.towers[0].token_embedding.vectors.shape == (1, 32)


def test_a_chunk_of_a_long_prompt_keeps_the_vectors_of_a_name_together(named):
    tokenizer = named.towers[0].tokenizer
    for letters in range(10):
        found = chunks("x" * letters + " easy" * 5, tokenizer, room=10)
        ids = [[i for i, _ in chunk] for chunk in found]
        assert [i for chunk in ids for i in chunk] == tokens(named, "x" * letters + " easy" * 5)
        assert all(len(chunk) <= 10 and chunk[0] not in (516, 517) and chunk[-1] not in (515, 516) for chunk in ids)


# ------------------------------------------------------------------ the towers


def by_hand(config, text, at, vectors):
    """The condition of a text whose tokens from `at` on were replaced: an independent form, through a larger table."""
    larger = encoder(config)
    for tower, part in zip(larger.towers, vectors, strict=True):
        table = torch.cat([tower.token_embedding.weight.data, part])
        tower.token_embedding = nn.Embedding.from_pretrained(table)
    outputs = []
    for tower in larger.towers:
        ids = tower.tokenize([text])
        ids[0, at : at + len(vectors[0])] = torch.arange(514, 514 + len(vectors[0]))
        outputs.append(tower(ids))
    return torch.cat([out.context for out in outputs], -1), outputs[-1].vector


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY_RANDOM, TINY_SDXL], ids=lambda config: config.name)
def test_the_vectors_stand_in_the_place_of_the_name_in_every_tower(config):
    text_encoder, width = encoder(config), config.text[0].width
    vectors = [VECTORS[:, :width] * (i + 1) for i in range(len(config.text))]
    add_embedding(text_encoder, "abc", vectors)  # three letters, three tokens
    plain = encoder(config).encode(["red abc dog", "red"])
    got = text_encoder.encode(["red abc dog", "red"])
    context, vector = by_hand(config, "red abc dog", 4, vectors)
    assert torch.equal(got.context[:1], context)
    assert torch.equal(got.context[1], plain.context[1])  # a text without a name is as before
    assert not torch.allclose(got.context[0], plain.context[0], atol=1e-3)
    if vector is not None:
        assert torch.allclose(got.vector[:1], vector, rtol=0, atol=1e-5)  # sums of another batch
    weighted = Emphasized(text_encoder, "a1111").encode(["red (abc:1.5) dog"]).context
    assert not torch.allclose(weighted, context, atol=1e-3)
    assert torch.equal(Emphasized(text_encoder, "a1111").encode(["red abc dog"]).context, context)
    assert torch.equal(condition(text_encoder, ["red abc dog"]).context, context)


def test_the_refiner_takes_the_vectors_of_sdxls_second_tower():
    refiner, parts = encoder(TINY_REFINER), [torch.zeros(2, 8), VECTORS[:2, :16]]
    add_embedding(refiner, "x", parts)
    assert torch.equal(refiner.towers[0].token_embedding.vectors, parts[1])


@pickles
def test_saving_writes_the_same_bytes_as_without_embeddings(model_folder, tmp_path):
    write(tmp_path / "easy.pt", A1111)
    pipe = ldm.load(model_folder, ldm.Placement("cpu"), embeddings=[tmp_path / "easy.pt"])
    assert tokens(pipe.text_encoder, "Easy") == [514, 515, 516]
    pipe.save(tmp_path / "saved")
    files = [path.relative_to(model_folder) for path in model_folder.rglob("*") if path.is_file()]
    assert [f for f in files if (tmp_path / "saved" / f).read_bytes() != (model_folder / f).read_bytes()] == []
    assert sorted(files) == sorted(
        p.relative_to(tmp_path / "saved") for p in (tmp_path / "saved").rglob("*") if p.is_file()
    )


# ------------------------------------------------------------------ the command


@pytest.fixture
def run(model_folder, capsys, tmp_path, monkeypatch):
    """Run `ldm txt2img` in a folder with two embeddings; returns exit code, stdout, and stderr without the model's."""
    monkeypatch.chdir(tmp_path)
    write(Path("one.safetensors"), {"emb_params": 5 * VECTORS})
    write(Path("two.safetensors"), {"<two>": VECTORS[0].clone()})

    def run(*words):
        given = [] if "--from" in words else ["--model", str(model_folder), "--device", "cpu", "--steps", "1"]
        code = main(["txt2img", *given, *words])
        out, err = capsys.readouterr()
        return code, out, [line for line in err.splitlines() if line.startswith(("ldm: emb", "ldm: err"))]

    return run


def test_the_command_lists_the_embeddings_of_the_prompts_and_the_record_repeats_the_picture(run):
    both = ("--embedding", "one.safetensors", "--embedding", "cat=two.safetensors")
    code, out, err = run("a cat", "--negative", "ONE", *both, "--out", "a.png", "--json")
    assert (code, err) == (0, ["ldm: embeddings in the prompts: 'one' (3 vectors), 'cat' (1 vector)"])
    settings = json.loads(out)["settings"]
    assert settings["model"]["embeddings"] == ["one.safetensors", "cat=two.safetensors"]
    assert {"embedding_1", "embedding_2"} <= settings["sha256"].keys()
    assert run("--from", "a.png", "--out", "b.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert run("a cat", "--negative", "ONE", "--out", "c.png")[2] == []
    assert Image.open("a.png").tobytes() != Image.open("c.png").tobytes()
    write(Path("one.safetensors"), {"emb_params": VECTORS})
    message = (
        "one.safetensors is not the embedding that made the picture; to use it all the same, name it with --embedding"
    )
    assert run("--from", "a.png", "--out", "d.png")[::2] == (2, [*err, f"ldm: error: {message}"])
    assert run("a dog", "--from", "a.png", "--embedding", "one.safetensors", "--out", "d.png")[::2] == (
        0,
        ["ldm: embeddings in the prompts: 'one' (3 vectors)"],
    )
    assert run("a dog", "--embedding", "one.safetensors")[2] == ["ldm: embeddings in the prompts: none"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("none.pt", "none.pt does not exist: give the file of an embedding, such as a .pt or .safetensors file"),
        (
            "wide.safetensors",
            "wide.safetensors, an embedding for Stable Diffusion 2.x: the embedding is 1024 wide, and ",
        ),
        (" =one.safetensors", "one.safetensors: an embedding needs a name that is not blank: write NAME=FILE"),
    ],
)
def test_a_wrong_embedding_is_one_sentence_and_no_picture(word, message, run):
    write(Path("wide.safetensors"), {"emb_params": torch.ones(1, 1024)})
    code, out, err = run("a cat", "--embedding", word)
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith(f"ldm: error: {message}")
    assert not Path("out.png").exists()


def test_a_file_whose_name_holds_an_equals_sign_needs_no_name(tmp_path, model_folder):
    path = write(tmp_path / "a=b.safetensors", {"emb_params": VECTORS})
    pipe = ldm.load(model_folder, ldm.Placement("cpu"), embeddings=[str(path)])
    assert list(pipe.text_encoder.towers[0].tokenizer.names) == ["a=b"]
    with pytest.raises(ValueError, match="an embedding is given as FILE or 'NAME=FILE', got 5"):
        ldm.load(model_folder, embeddings=[5])
