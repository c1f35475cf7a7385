"""Damaged and crafted files: each is refused in a sentence that names it, or read as the file says.

A changed weight or a changed value of a configuration may be another model, as far as a loader can know. The loaded
model must then hold the very numbers of the changed file, which are read here without the loader.
"""

import copy
import dataclasses
import json
import math
import os
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoint import configs, tables
from ldm.checkpoint.files import identify, load, save
from ldm.checkpoint.parts import TOWERS, Model, collect
from ldm.checkpoint.single import METADATA_KEY, ldm_tensors
from ldm.checkpoint.tensors import TensorFiles
from ldm.cli.inspect import inspect
from ldm.config import UNetConfig
from ldm.models.tokens import EOS, Tokenizer
from tests.checkpoint.families import official_tensors, small_model
from tests.tiny import TINY_RANDOM, TINY_SDXL, random_networks

slow = pytest.mark.slow
LONGEST = 6000  # characters of a message; safetensors quotes the values that it refuses


@pytest.fixture(autouse=True)
def _one_tokenizer(monkeypatch, tokenizer):
    """Build CLIP's tokenizer once; it takes longer than all the rest of loading a small file."""
    monkeypatch.setattr(Tokenizer, "official", lambda: tokenizer)


def load_as_it_is(path: Path) -> Model:
    return load(path, dtype=None)


def load_copied(path: Path) -> Model:
    """Load in another dtype, which holds the numbers exactly: the tensors are then read one by one, not mapped."""
    return load(path, dtype=torch.float64)


def attempt(act: Callable[[Path], Any], path: Path) -> Any:
    """Call `act`, which does what it is for or raises an error that says in a sentence what is wrong with `path`."""
    try:
        return act(path)
    except ValueError as error:
        message = str(error)
    assert str(path) in message
    assert len(message) < LONGEST
    return None


def check_same(found: Model, wanted: Model) -> None:
    """Hold a loaded model to the one that was saved: its configuration and its tokenizers."""
    assert found.config == wanted.config
    for ours, theirs in zip(found.text_encoder.tokenizers, wanted.text_encoder.tokenizers, strict=True):
        assert (ours.vocab, ours.merges, flags(ours)) == (theirs.vocab, theirs.merges, flags(theirs))


def flags(tokenizer: Tokenizer) -> dict[int, tuple[Any, ...]]:
    """The contents and the flags of the added tokens."""
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {i: tuple(getattr(token, name) for name in names) for i, token in tokenizer.added.items()}


def check_holds(found: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]) -> None:
    """Hold the tensors of a loaded network, under their stored names, to those that its file holds."""
    for name, value in found.items():
        assert not value.is_meta, name
        assert torch.equal(value, stored[name].reshape(value.shape).to(value.dtype)), name


@contextmanager
def told(*what: object) -> Iterator[None]:
    """Say with a failure which file it was."""
    try:
        yield
    except BaseException as error:
        error.add_note(" ".join(map(str, what)))
        raise


# Values, and how they get into JSON.

GONE = object()
ODD = (
    GONE, None, True, False, 0, 1, -1, 3, 7, 64, 10**9, 10**12, -(10**9), 2**31, 2**63, 2**64,
    10**400, 0.5, 1e308, -0.0, math.nan, math.inf, "", "x", "32", "eps", "\ud800", "a\x00b\x1b[2J",
    "../../etc/passwd", "x" * 5000, [], [1], [0, 0], [1, 2, 3], [-32, 64], [None], ["x"], [[]],
    [10**9, 10**9], [0.5, math.nan], [32] * 300, {}, {"a": 1}, {"content": []}, [{}],
)  # fmt: skip


def places(value: object, above: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path to everything in `value`, as keys and indices."""
    items: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value[:4])
    for key, inner in items:
        yield (*above, key)
        yield from places(inner, (*above, key))


def operated(r: random.Random, value: Any) -> tuple[Any, str]:
    """A copy of JSON in which one place or two hold something odd, and which."""
    value, done = json.loads(json.dumps(value)), []
    for _ in range(r.choice((1, 1, 2))):
        found = [place for place in places(value) if place]
        if not found:
            break
        *above, key = r.choice(found)
        holder, odd = value, r.choice(ODD)
        for step in above:
            holder = holder[step]
        if odd is GONE:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(odd)
        done.append(f"{'.'.join(map(str, [*above, key]))} = {'gone' if odd is GONE else repr(odd)[:50]}")
    return value, ", ".join(done)


def broken(r: random.Random, whole: bytes) -> bytes:
    """A copy of a file with some bytes other than they were."""
    data = bytearray(whole)
    at = r.randrange(min(len(data), 2000)) if data else 0
    length = r.choice((1, 2, 8, 100))
    kind = r.randrange(6)
    if kind == 0:
        for _ in range(r.choice((1, 3, 30))):
            data[r.randrange(min(len(data), 2000))] ^= 1 << r.randrange(8)
    elif kind == 1:
        del data[r.randrange(len(data)) :]
    elif kind == 2:
        data[at:at] = r.randbytes(length)
    elif kind == 3:
        del data[at : at + length]
    elif kind == 4:
        data[at:at] = data[at : at + length] * r.choice((1, 2, 50))
    else:
        data[at : at + length] = r.choice((b"9", b"-", b'"', b"[", b"{", b"\\u0000", b"\xff")) * length
    return bytes(data)


# Headers.


def packed(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: object, *offsets: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


SOUND = {
    "__metadata__": {"format": "pt", "modelspec.prediction_type": "v", "a\r\x1b[2J": "\x1b[2J\n"},
    "model.diffusion_model.input_blocks.0.0.weight": entry([2, 2, 1, 1], 0, 8, dtype="F16"),
    "token_embedding.weight": entry([2, 3], 8, 32),
    "first_stage_model.encoder.down.0.block.0.conv1.weight": entry([0], 32, 32, dtype="BF16"),
}
EMPTY = json.dumps(entry([0], 0, 0)).encode()
CRAFTED = {
    "no entries": packed({}),
    "null for metadata": packed({"__metadata__": None, "a": entry([0], 0, 0)}),
    "metadata that is no text": packed({"__metadata__": {"a": 1}}),
    "metadata that is a list": packed({"__metadata__": ["a"]}),
    "metadata twice": packed(b'{"__metadata__":{},"__metadata__":{}}'),
    "an escaped name twice": packed(b'{"a":%s,"\\u0061":%s}' % (EMPTY, EMPTY)),
    "a field twice": packed(b'{"a":{"dtype":"F32","dtype":"F16","shape":[0],"data_offsets":[0,0]}}'),
    "a field too many": packed({"a": entry([0], 0, 0) | {"x": 1}}),
    "half a surrogate": packed(b'{"\\ud800":%s}' % EMPTY),
    "a terminal's command": packed({"\x1b[2J": entry([0], 0, 0)}),
    "a line break": packed({"a\nb": entry([0], 0, 0)}),
    "an empty name": packed({"": entry([0], 0, 0)}),
    "a hole": packed({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "a hole before all": packed({"a": entry([1], 4, 8)}, bytes(8)),
    "an overlap": packed({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "offsets backwards": packed({"a": entry([2], 8, 0)}, bytes(8)),
    "offsets that are true": packed({"a": entry([1], False, True, dtype="U8")}, bytes(1)),
    "fractional sizes": packed({"a": entry([2.0], 0.0, 8.0)}, bytes(8)),
    "a size below zero": packed({"a": entry([-1, -2], 0, 8)}, bytes(8)),
    "a product beyond 64 bits": packed({"a": entry([2**32, 2**32], 0, 0)}),
    "a size beyond 64 bits": packed({"a": entry([2**64], 0, 8)}, bytes(8)),
    "an offset beyond 64 bits": packed({"a": entry([0], 0, 2**64)}),
    "an offset of 4,299 digits": packed(b'{"a":%s}' % EMPTY.replace(b"0]", b"9" * 4299 + b"]")),
    "an offset of 9,999 digits": packed(b'{"a":%s}' % EMPTY.replace(b"0]", b"9" * 9999 + b"]")),
    "nothing of absurd sizes": packed({"token_embedding.weight": entry([0, 2**62, 2**62], 0, 0)}),
    "a thousand dimensions": packed({"a": entry([1] * 1000, 0, 4)}, bytes(4)),
    "huge dimensions of nothing": packed({"a": entry([2**62] * 1000 + [0], 0, 0)}),
    "half-bytes": packed({"a": entry([3], 0, 2, dtype="F4")}, bytes(2)),
    "complex numbers": packed({"a": entry([1], 0, 8, dtype="C64")}, bytes(8)),
    "a dtype of no one's": packed({"a": entry([1], 0, 4, dtype="F33")}, bytes(4)),
    "deep lists": packed(b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
    "deep objects": packed(b'{"a":' * 10**5 + b"1" + b"}" * 10**5),
    "20,000 entries": packed(b"{%s}" % b",".join(b'"%d":%s' % (i, EMPTY) for i in range(20_000))),
    "NaN": packed(b'{"a":NaN}'),
    "two objects": packed(b"{}{}"),
    "UTF-16": packed('{"a":1}'.encode("utf-16-le")),
    "a length of nothing": packed(b"{}", length=0),
    "a length of all": packed(SOUND, bytes(32), length=2**64 - 1),
    "a length in the data": packed(SOUND, bytes(32), length=len(json.dumps(SOUND)) + 9),
    "a length of a gigabyte": packed(SOUND, bytes(32), length=10**9),
    "unaligned data": packed(json.dumps(SOUND).encode() + b" ", bytes(32)),
}


def bytes_of(path: Path) -> dict[str, bytes]:
    """The bytes of each tensor of a safetensors file, by its header alone."""
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8:start])
    entries.pop("__metadata__", None)
    return {name: content[start:][slice(*entry["data_offsets"])] for name, entry in entries.items()}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_header_is_refused_in_a_sentence(name, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(CRAFTED[name])
    for act in (lambda p: TensorFiles([p]), inspect):
        attempt(act, path)
    assert attempt(load_as_it_is, path) is None


@slow
def test_a_mutated_header_is_refused_in_a_sentence(tmp_path):
    path, opened, count = tmp_path / "model.safetensors", 0, 3000
    for seed in range(count):
        r = random.Random(seed)
        header, done = operated(r, SOUND) if seed % 2 else (SOUND, "")
        content = packed(header, bytes(range(1, 33)))
        path.write_bytes(content if seed % 2 else broken(r, content))
        with told("seed", seed, done):
            tensors = attempt(lambda p: TensorFiles([p]), path)
            if tensors is not None:
                opened += 1
                stored, names = bytes_of(path), [n for n, d in tensors.dtypes.items() if d != "F4"]
                assert stored.keys() == tensors.shapes.keys()
                for mapped in (True, False):
                    for name, value in tensors.read(names, mapped=mapped):
                        assert tuple(value.shape) == tensors.shapes[name]
                        assert value.flatten().view(torch.uint8).numpy().tobytes() == stored[name]
            assert attempt(load_as_it_is, path) is None
    assert 0 < opened < count / 2  # otherwise they were all harmless, or all hopeless


# Tables of names, dtypes and shapes, of small models with their configuration.

PREFIXES = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.0.")
MOVED = (*PREFIXES, "", "unet.", "vae.", "model.")
MADE_UP = re.compile(r"(logit_scale|text_projection|resblocks\.2\..*)$")  # the small towers use two blocks
EXTRAS = (  # names that mean something
    "v_pred", "edm_mean", "ztsnr", "lora_unet_x", "scaled_fp8", "model_ema.decay", "betas", "conv_in.weight",
    "token_embedding.weight", "x.embeddings.token_embedding.weight", "input_hint_block.0.weight",
    "down_blocks.0.resnets.0.norm1.weight", "encoder.down_blocks.0.resnets.0.conv1.weight",
    "encoder.down.0.block.0.conv1.weight", "model.diffusion_model.label_emb.0.0.weight",
    "text_projection", "cond_stage_model.model.text_projection", "emb_params", "__metadata__x",
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias",
)  # fmt: skip
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)
Table = dict[str, torch.Tensor]


def drop(r: random.Random, table: Table, name: str) -> None:
    for other in {name, *r.sample(sorted(table), min(r.choice((0, 1, 5)), len(table)))}:
        del table[other]


def rename(r: random.Random, table: Table, name: str) -> None:
    new = (name + "x", "unet." + name, name.partition(".")[2], name.replace("0", "1", 1), "." + name)
    table[r.choice((*new, "x", ".", name.upper(), name.replace("0", "9" * 40)))] = table.pop(name)


def swap(r: random.Random, table: Table, name: str) -> None:
    """Half of the time with a tensor of the same shape, which gives another model, as far as can be known."""
    same = r.random() < 0.5
    others = [other for other in sorted(table) if (table[other].shape == table[name].shape) is same]
    other = r.choice(others or [name])
    table[name], table[other] = table[other], table[name]


def permute(r: random.Random, table: Table, name: str) -> None:
    table[name] = table[name].permute(*reversed(range(table[name].dim())))


def change_rank(r: random.Random, table: Table, name: str) -> None:
    value = table[name]
    shape = tuple(value.shape)
    shapes = ((*shape, 1), (*shape, 1, 1), (1, *shape), (math.prod(shape),), (1, 1, *shape, 1, 1))
    table[name] = value.reshape(r.choice(shapes))


def resize(r: random.Random, table: Table, name: str) -> None:
    value = table[name]
    table[name] = r.choice(
        (value[:0] if value.dim() else value[None], value.repeat(*(2,) * max(value.dim(), 1)), value[None][:, 1:])
    )


def mix_prefixes(r: random.Random, table: Table, name: str) -> None:
    old, new = r.choice(PREFIXES), r.choice(MOVED)
    moved = r.choice((0.5, 0.99, 1.0))
    for other in [n for n in table if n.startswith(old) and r.random() < moved]:
        table[new + other.removeprefix(old)] = table.pop(other)


def change_dtype(r: random.Random, table: Table, name: str) -> None:
    dtype = r.choice(DTYPES)
    for other in {name, *r.sample(sorted(table), min(r.choice((0, 3, len(table))), len(table)))}:
        table[other] = table[other].to(dtype)


def add(r: random.Random, table: Table, name: str) -> None:
    shape = r.choice(((), (0,), (3,), (4, 4), (1, 1, 1, 1)))
    table.setdefault(r.choice(EXTRAS), torch.ones(shape, dtype=r.choice((torch.float32, torch.int64))))


def multiply(r: random.Random, table: Table, name: str) -> None:
    for i in range(r.choice((3, 100))):
        table.setdefault(name.replace("0", str(i), 1) if "0" in name else f"{name}{i}", table[name].clone())


def as_used(model: Model, table: Table, sound: Table) -> tuple[Table, Table]:
    """The tensors of `model` under official names, and those of the file `table` for them.

    sound: the file before its mutation. Without tensors that saving makes up, because the file has none to keep.
    """
    found, stored = {}, {}
    for name, value in ldm_tensors(model).items():
        places = [name, *(new + name.removeprefix(old) for old in PREFIXES if name.startswith(old) for new in MOVED)]
        place = next((place for place in places if place in table), None)
        if name.endswith("position_ids") or (place is None and MADE_UP.search(name)):
            continue
        found[name], stored[name] = value, sound[name] if place is None else table[place]
    return found, stored


MUTATIONS = (drop, rename, swap, permute, change_rank, resize, mix_prefixes, change_dtype, add, multiply)


@slow
@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl-base", "sdxl-refiner"])
def test_a_mutated_table_is_loaded_number_for_number_or_refused(kind, tmp_path):
    model = small_model(kind)
    sound, metadata = official_tensors(model), {METADATA_KEY: json.dumps(dataclasses.asdict(model.config))}
    path, loaded = tmp_path / "model", 0
    save_file(sound, path, metadata)
    wanted = load_as_it_is(path)
    for seed in range(40):
        r, table, done = random.Random(seed), dict(sound), []
        for mutate in r.choices(MUTATIONS, k=r.choice((1, 1, 2, 3))):
            name = r.choice(sorted(table))
            mutate(r, table, name)
            done.append(f"{mutate.__name__} {name}")
        save_file({name: value.contiguous().clone() for name, value in table.items()}, path, metadata)
        with told("seed", seed, done):
            for act in (load_as_it_is, load_copied):
                found = attempt(act, path)
                if found is not None:
                    loaded += 1
                    check_same(found, wanted)
                    check_holds(*as_used(found, table, sound))
    assert 4 < loaded < 60  # otherwise they were all harmless, or all hopeless


@slow
@pytest.mark.parametrize("kind", ["sd15", "sdxl-base"])
def test_a_mutated_configuration_in_the_metadata_is_followed_to_the_letter_or_refused(kind, tmp_path):
    model = small_model(kind)
    path, sound = tmp_path / "model", official_tensors(model)
    for seed in range(100):
        config, done = operated(random.Random(seed), json.loads(json.dumps(dataclasses.asdict(model.config))))
        save_file(sound, path, {METADATA_KEY: json.dumps(config)})
        with told("seed", seed, done):
            found = attempt(load_as_it_is, path)
            if found is not None:
                check_holds(*as_used(found, sound, sound))
                check_said(config, json.loads(json.dumps(dataclasses.asdict(found.config))))


def check_said(said: Any, found: Any) -> None:
    """Hold a configuration to what its file says. Depths are written in several ways, and old padding is mended."""
    if isinstance(said, dict):
        if "depth" in said:
            one, other = (UNetConfig(**frozen(config)) for config in (said, found))
            assert one == other
        if (said.get("activation"), said.get("pad_id"), said.get("vocab_size")) == ("gelu", 49407, 49408):
            said = said | {"pad_id": 0}
        for key in said.keys() - {"depth", "up_depth", "mid_depth"}:
            check_said(said[key], found[key])
    elif isinstance(said, list):
        assert len(said) == len(found)
        for one, other in zip(said, found, strict=True):
            check_said(one, other)
    else:
        assert said == found


def frozen(value: Any) -> Any:
    """`value` with tuples in place of its lists."""
    if isinstance(value, dict):
        return {key: frozen(inner) for key, inner in value.items()}
    return tuple(map(frozen, value)) if isinstance(value, list) else value


ABSURD = (
    *((("unet", name), 10**9) for name in ("res_blocks", "mid_depth", "context_dim", "in_channels", "vector_dim")),
    *((("text", 0, name), 10**9) for name in ("width", "layers", "mlp", "vocab_size", "max_length")),
    *((("vae", name), 10**9) for name in ("res_blocks", "latent_channels")),
    *(((network, "channels"), [10**9] * 4) for network in ("unet", "vae")),
    *(((network, "channels"), [32] * 100_000) for network in ("unet", "vae")),
    (("unet", "depth"), [10**9] * 4),
    (("unet", "depth"), [[1, 10**9], 1, 1, 0]),
    (("text",), [{}] * 10_000),
)


@pytest.fixture(scope="module")
def small_sd15():
    model = small_model("sd15")
    return model, official_tensors(model)


@pytest.mark.slow
@pytest.mark.parametrize(("place", "value"), ABSURD, ids=lambda x: str(x)[:30])
def test_absurd_numbers_in_a_configuration_are_refused_and_do_not_hang(place, value, small_sd15, tmp_path):
    model, tensors = small_sd15
    config = json.loads(json.dumps(dataclasses.asdict(model.config)))
    holder = config
    for step in place[:-1]:
        holder = holder[step]
    holder[place[-1]] = value
    save_file(tensors, tmp_path / "model", {METADATA_KEY: json.dumps(config)})
    assert attempt(identify, tmp_path / "model") is None


@pytest.mark.parametrize(
    ("name", "value", "dtype", "message"),
    [
        ("nan", math.nan, torch.float32, "holds NaN or infinity"),
        ("infinity", math.inf, torch.float32, "holds NaN or infinity"),
        ("minus infinity", -math.inf, torch.bfloat16, "holds NaN or infinity"),
        ("more than fp16 has", 1e5, torch.float16, r"holds 1e\+05, too large for float16"),
        ("less than fp16 has", -1e30, torch.float16, r"holds 1e\+30, too large for float16"),
        ("more than fp32 has", 1e300, torch.float32, r"holds 1e\+300, too large for float32"),
    ],
)
def test_numbers_that_are_cast_to_no_number_are_refused(name, value, dtype, message, tmp_path):
    folder = tmp_path / name
    save(Model(TINY_RANDOM, *random_networks()), folder)
    r = random.Random(name)
    file = r.choice(sorted(folder.rglob("*.safetensors")))
    tensors = load_file(file)
    key = r.choice(sorted(tensors))
    tensors[key] = tensors[key].double() if abs(value) < math.inf else tensors[key].half()
    tensors[key].view(-1)[r.randrange(tensors[key].numel())] = value
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder, dtype=dtype)
    assert str(caught.value).startswith(f"{key} in {file} holds")


# Folders.


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Small models in diffusers' layout, by kind; the UNet of the second is in two shards."""
    sd2 = dataclasses.replace(
        TINY_RANDOM,
        unet=dataclasses.replace(TINY_RANDOM.unet, linear_projection=True, upcast_attention=True),
        text=(dataclasses.replace(TINY_RANDOM.text[0], activation="gelu", pad_id=0),),
        diffusion=dataclasses.replace(TINY_RANDOM.diffusion, prediction="v"),
    )
    above, found = tmp_path_factory.mktemp("folders"), {}
    for kind, config in {"sd15": TINY_RANDOM, "sd21": sd2, "sdxl": TINY_SDXL}.items():
        found[kind] = above / kind
        save(Model(config, *random_networks(config)), found[kind])
    whole = found["sd21"] / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        shard = whole.with_name(f"diffusion_pytorch_model-{i:05}-of-00002.safetensors")
        save_file({name: tensors[name] for name in part}, shard)
        weight_map |= dict.fromkeys(part, shard.name)
    whole.unlink()
    whole.with_name(f"{whole.name}.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    return found


def replace_file(path: Path, content: bytes) -> None:
    path.unlink()  # it is a link to the file of the sound folder
    path.write_bytes(content)


def operate_file(r: random.Random, folder: Path) -> tuple[str, str]:
    path = r.choice(sorted(folder.rglob("*.json")))
    value, done = operated(r, json.loads(path.read_text()))
    replace_file(path, json.dumps(value).encode())
    return str(path.relative_to(folder)), f"operated {done}"


def break_file(r: random.Random, folder: Path) -> tuple[str, str]:
    path = r.choice([p for p in sorted(folder.rglob("*")) if p.is_file()])
    replace_file(path, broken(r, path.read_bytes()))
    return str(path.relative_to(folder)), "broken"


def mix_files(r: random.Random, folder: Path) -> tuple[str, str]:
    one, other = r.sample([p for p in sorted(folder.rglob("*")) if p.is_file()], 2)
    replace_file(one, other.read_bytes())
    return str(one.relative_to(folder)), f"replaced by {other.relative_to(folder)}"


def drop_file(r: random.Random, folder: Path) -> tuple[str, str]:
    path = r.choice(sorted(folder.rglob("*")))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return str(path.relative_to(folder)), "dropped"


UNKNOWABLE = ("operated", "broken")  # a changed value of a configuration is another configuration
# Without the first, a folder is one of diffusers; without the others, the padding is the default.
OPTIONAL = ("ldm.json", "tokenizer_config.json", "special_tokens_map.json")
NOT_FOLLOWED = {  # keys that are not read, or for which the configuration is not asked alone
    "_class_name", "architectures", "model_type", "sample_size", "projection_dim", "force_upcast", "clip_sample",
    "timestep_spacing", "steps_offset", "set_alpha_to_one", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


def check_is_what_the_folder_says(found: Model, folder: Path) -> None:
    """Hold the weights, the configuration and the vocabularies to the files of `folder`."""
    config, sdxl = found.config, found.config.unet.is_sdxl
    networks = [("unet", found.unet, tables.diffusers_unet(config.unet)), ("vae", found.vae, tables.diffusers_vae())]
    written = {
        "unet": configs.unet_to_json(config.unet, 8),
        "vae": configs.vae_to_json(config.vae, 64),
        "scheduler": configs.diffusion_to_json(config.diffusion, config.sampler),
    }
    for name, tower, text in zip(TOWERS, found.text_encoder.towers, config.text, strict=False):
        networks.append((name, tower, tables.hf_text()))
        written[name] = configs.text_to_json(text, 0, 0, sdxl=sdxl)
        check_tokenizer(tower, folder / name.replace("text_encoder", "tokenizer"))
    for name, network, rules in networks:
        files = sorted((folder / name).glob("*.safetensors"))
        check_holds(collect(network, rules), {n: v for file in files for n, v in load_file(file).items()})
    for name, json_of_ours in written.items():
        said = json.loads((folder / name / f"{'scheduler_' * (name == 'scheduler')}config.json").read_text())
        if isinstance(layers := said.get("transformer_layers_per_block"), list):  # not followed without attention
            attends = ["Cross" in kind for kind in said["down_block_types"]]
            said["transformer_layers_per_block"] = [n if on else 1 for n, on in zip(layers, attends, strict=True)]
        for key in said.keys() & json_of_ours.keys() - NOT_FOLLOWED:
            assert alike(said[key], json_of_ours[key]), (name, key)


def alike(said: Any, ours: Any) -> bool:
    """Whether a value means the same: None and False do, and so does one number for a list of equal ones."""
    if isinstance(ours, list) and not isinstance(said, list):
        return all(alike(said, one) for one in ours)
    if isinstance(ours, list):
        return len(said) == len(ours) and all(map(alike, said, ours))
    return said == ours or (said is None and ours is False)


def check_tokenizer(tower: Any, folder: Path) -> None:
    """Hold the vocabulary, the merges and the padding to the files in `folder`."""
    vocab, merges = folder / "vocab.json", (folder / "merges.txt").read_text(encoding="utf-8")
    assert tower.tokenizer.base == json.loads(vocab.read_text(encoding="utf-8"))
    lines = [line.split() for line in merges.split("\n") if line.strip() and not line.startswith("#version")]
    assert tower.tokenizer.merges == [tuple(line) for line in lines]
    if (folder / "tokenizer_config.json").is_file():
        pad = json.loads((folder / "tokenizer_config.json").read_text()).get("pad_token")
        pad = pad["content"] if isinstance(pad, dict) else pad
        assert tower.config.pad_id == tower.tokenizer.vocab[pad or EOS]


@slow
@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_a_mutated_folder_is_loaded_as_it_says_or_refused(kind, folders, tmp_path):
    folder, loaded = tmp_path / "model", 0
    wanted = load_as_it_is(folders[kind])
    for seed in range(250):
        r = random.Random(seed)
        shutil.copytree(folders[kind], folder, copy_function=os.link)
        file, done = r.choice((operate_file, operate_file, operate_file, break_file, mix_files, drop_file))(r, folder)
        with told("seed", seed, file, done):
            found = attempt(load_as_it_is, folder)
            if found is not None:
                loaded += 1
                check_is_what_the_folder_says(found, folder)
                if not done.startswith(UNKNOWABLE) and not file.endswith(OPTIONAL):
                    check_same(found, wanted)
        shutil.rmtree(folder)
    assert 25 < loaded < 200
