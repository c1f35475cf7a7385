"""Damaged and crafted files: each loads or is refused in a sentence that names it, soon, and in little memory."""

import copy
import dataclasses
import gc
import json
import math
import os
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ldm.checkpoint.strict_json import MAX_BYTES, MAX_VALUES
from safetensors.torch import load_file, save_file

from ldm.checkpoint.files import Identity, identify, load, save
from ldm.checkpoint.parts import Model
from ldm.checkpoint.single import METADATA_KEY, ldm_tensors
from ldm.checkpoint.tensors import TensorFiles
from ldm.cli.inspect import Report, inspect
from ldm.config import ModelConfig
from ldm.models.text import Tokenizer
from ldm.presets import PRESETS
from tests.checkpoint.growth import MB, growth, in_fresh_process, measurable
from tests.checkpoint.standin import BITS, hollow_model, write_hollow
from tests.tiny import TINY_RANDOM, TINY_SDXL, random_networks

pytestmark = pytest.mark.filterwarnings("error")  # what is wrong is said once, by an error

SECONDS = 5.0  # of the processor, that no file may take
LONGEST = 1500  # characters of a message
MEMORY = 80 * MB  # more than before, that no file may take which is refused

Table = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name


@pytest.fixture(autouse=True)
def _one_tokenizer(monkeypatch, tokenizer):
    """Build CLIP's tokenizer once; it takes longer than all the rest of loading a hollow file."""
    monkeypatch.setattr(Tokenizer, "official", lambda: tokenizer)


def load_as_it_is(path: Path) -> Model:
    return load(path, dtype=None)


def load_cast(path: Path) -> Model:
    return load(path, dtype=torch.bfloat16)


def attempt(act: Callable[[Path], Any], path: Path) -> Any:
    """Call `act`, which does what it is for or raises an error that says in a sentence what is wrong with `path`."""
    started = time.process_time()
    try:
        result = act(path)
    except (ValueError, FileNotFoundError) as error:
        result, message = None, str(error)
        assert str(path) in message
        assert message.isprintable()
        assert len(message) < LONGEST
    assert time.process_time() - started < SECONDS
    if isinstance(result, Model):
        values = [v for network in result[1:4] for v in [*network.parameters(), *network.buffers()]]
        assert not any(value.is_meta for value in values)
    if isinstance(result, Identity):
        assert (result.preset + result.why).isprintable()
    if isinstance(result, Report):
        assert all(line.isprintable() for line in str(result).split("\n"))
    return result


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
    *(GONE, None, True, False, 0, 1, -1, 3, 7, 64, 10**9, 10**12, -(10**9), 2**31, 2**63, 2**64),
    *(10**400, 0.5, 1e308, -0.0, math.nan, math.inf, "", "x", "32", "eps", "\ud800", "a\x00b\x1b[2J"),
    *("../../etc/passwd", "x" * 5000, [], [1], [0, 0], [1, 2, 3], [-32, 64], [None], ["x"], [[]]),
    *([10**9, 10**9], [0.5, math.nan], [32] * 300, {}, {"a": 1}, {"content": []}, [{}]),
)


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
    "a name of a million letters": packed({"a" * 10**6: entry([0], 0, 0)}),
    "a dtype of a million letters": packed({"a": entry([0], 0, 0, dtype="F" * 10**6)}),
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
    "200,000 entries": packed(b"{%s}" % b",".join(b'"%d":%s' % (i, EMPTY) for i in range(200_000))),
    "NaN": packed(b'{"a":NaN}'),
    "two objects": packed(b"{}{}"),
    "UTF-16": packed('{"a":1}'.encode("utf-16-le")),
    "a length of nothing": packed(b"{}", length=0),
    "a length of all": packed(SOUND, bytes(32), length=2**64 - 1),
    "a length in the data": packed(SOUND, bytes(32), length=len(json.dumps(SOUND)) + 9),
    "a length of a gigabyte": packed(SOUND, bytes(32), length=10**9),
    "unaligned data": packed(json.dumps(SOUND).encode() + b" ", bytes(32)),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_header_is_refused_in_a_sentence(name, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(CRAFTED[name])
    for act in (lambda p: TensorFiles([p]), identify, inspect):
        attempt(act, path)
    assert attempt(load_as_it_is, path) is None


@pytest.mark.parametrize("count", [1000, pytest.param(50_000, marks=pytest.mark.full)])
def test_a_mutated_header_is_refused_in_a_sentence(count, tmp_path):
    path, opened = tmp_path / "model.safetensors", 0
    for seed in range(count):
        r = random.Random(seed)
        header, done = operated(r, SOUND) if seed % 2 else (SOUND, "")
        content = packed(header, bytes(32))
        path.write_bytes(content if seed % 2 else broken(r, content))
        with told("seed", seed, done):
            tensors = attempt(lambda p: TensorFiles([p]), path)
            if tensors is not None:
                opened += 1
                values = dict(tensors.read(n for n, d in tensors.dtypes.items() if d != "F4"))
                assert all(tuple(v.shape) == tensors.shapes[name] for name, v in values.items())
            attempt(inspect, path)
            assert attempt(load_as_it_is, path) is None
    assert 0 < opened < count / 2  # otherwise they were all harmless, or all hopeless


# Tables of names, dtypes and shapes, of complete models with few blocks.


def narrowed(preset: str) -> ModelConfig:
    """`preset` with one level and few blocks; it keeps the widths by which a file without a configuration is known."""
    config = PRESETS[preset]
    unet = dataclasses.replace(
        config.unet, channels=(320,), res_blocks=1, depth=(1,), mid_depth=1, heads=config.unet.heads[:1]
    )
    vae = dataclasses.replace(config.vae, channels=(32,), res_blocks=1)
    text = tuple(dataclasses.replace(tower, layers=2, mlp=64) for tower in config.text)
    return dataclasses.replace(config, name="small", unet=unet, vae=vae, text=text)


KINDS = {name: narrowed(name) for name in ("sd15", "sd21-base", "sdxl-base")}


@pytest.fixture(scope="module")
def tables() -> dict[str, Table]:
    """The official tables of KINDS."""
    tensors = {kind: ldm_tensors(hollow_model(config)) for kind, config in KINDS.items()}
    return {kind: {n: ("F16", tuple(value.shape)) for n, value in found.items()} for kind, found in tensors.items()}


def metadata_of(config: object) -> dict[str, str]:
    return {METADATA_KEY: json.dumps(config)}


def plain(config: ModelConfig) -> dict[str, Any]:
    return json.loads(json.dumps(_without_none(dataclasses.asdict(config))))


def write_table(path: Path, table: Table, metadata: dict[str, str] | None) -> Path:
    path.unlink(missing_ok=True)
    shapes = {name: shape for name, (_, shape) in table.items()}
    return write_hollow(path, shapes, metadata, {name: dtype for name, (dtype, _) in table.items()})


PREFIXES = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.0.")
EXTRAS = (  # names that mean something
    *("v_pred", "edm_mean", "ztsnr", "lora_unet_x", "scaled_fp8", "model_ema.decay", "betas", "conv_in.weight"),
    *("token_embedding.weight", "x.embeddings.token_embedding.weight", "input_hint_block.0.weight"),
    *("down_blocks.0.resnets.0.norm1.weight", "encoder.down_blocks.0.resnets.0.conv1.weight"),
    *("encoder.down.0.block.0.conv1.weight", "model.diffusion_model.label_emb.0.0.weight"),
    *("text_projection", "cond_stage_model.model.text_projection", "emb_params", "__metadata__x"),
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias",
)


def others(r: random.Random, table: Table, *counts: int) -> list[str]:
    """Some names of a table, as many as one of `counts` or as there are."""
    return r.sample(sorted(table), min(r.choice(counts), len(table)))


def drop(r: random.Random, table: Table, name: str) -> None:
    for other in {name, *others(r, table, 0, 1, 5, len(table) - 1)}:
        del table[other]


def rename(r: random.Random, table: Table, name: str) -> None:
    new = (name + "x", "unet." + name, name.partition(".")[2], name.replace("0", "1", 1), "." + name)
    table[r.choice((*new, "", ".", name.upper(), name.replace("0", "9" * 40)))] = table.pop(name)


def swap(r: random.Random, table: Table, name: str) -> None:
    other = r.choice(sorted(table))
    table[name], table[other] = table[other], table[name]


def permute(r: random.Random, table: Table, name: str) -> None:
    for other in (name, *others(r, table, 0, 20)):
        dtype, shape = table[other]
        table[other] = dtype, shape[::-1]


def change_rank(r: random.Random, table: Table, name: str) -> None:
    dtype, shape = table[name]
    shapes = (shape + (1,), (1, *shape), shape[1:], shape[:-1], (), (math.prod(shape),))
    table[name] = (dtype, r.choice((*shapes, (1, 1, *shape, 1, 1), (*shape, 0), (0,), (0,) * len(shape))))


def resize(r: random.Random, table: Table, name: str) -> None:
    dtype, shape = table[name]
    factor = r.choice((0, 2, 3))
    empty = (0, r.choice((2**20, 2**31, 2**40)))  # as large as it is allowed to be
    table[name] = dtype, r.choice((empty, tuple(factor * n for n in shape), (*shape[:-1], 7)))


def mix_prefixes(r: random.Random, table: Table, name: str) -> None:
    old, new = r.choice(PREFIXES), r.choice((*PREFIXES, "", "unet.", "vae.", "model."))
    moved = r.choice((0.5, 0.99, 1.0))
    for other in [n for n in table if n.startswith(old) and r.random() < moved]:
        table[new + other.removeprefix(old)] = table.pop(other)


def change_dtype(r: random.Random, table: Table, name: str) -> None:
    dtype = r.choice(sorted(BITS))
    for other in {name, *others(r, table, 0, 3, len(table))}:
        size = math.prod(table[other][1]) * BITS[dtype]
        table[other] = dtype if size % 8 == 0 else "U8", table[other][1]


def add(r: random.Random, table: Table, name: str) -> None:
    shape = r.choice(((), (0,), (3,), (4, 4), (1, 1, 1, 1), (0, 2**40)))
    table[r.choice(EXTRAS)] = r.choice(("F32", "F16", "I64", "BOOL", "C64")), shape


def multiply(r: random.Random, table: Table, name: str) -> None:
    for i in range(r.choice((3, 100, 3000))):
        table[name.replace("0", str(i), 1) if "0" in name else f"{name}{i}"] = table[name]


MUTATIONS = (drop, rename, swap, permute, change_rank, resize, mix_prefixes, change_dtype, add, multiply)


def mutated(r: random.Random, table: Table) -> tuple[Table, str]:
    table, done = dict(table), []
    for mutate in r.choices(MUTATIONS, k=r.choice((1, 1, 2, 3))):
        if table:
            name = r.choice(sorted(table))
            mutate(r, table, name)
            done.append(f"{mutate.__name__} {name}")
    return table, ", ".join(done)


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_that_are_mutated_load_before(kind, tables, tmp_path):
    for metadata in (None, metadata_of(plain(KINDS[kind]))):
        model = attempt(load_as_it_is, write_table(tmp_path / "model", tables[kind], metadata))
        assert model.config.unet == KINDS[kind].unet


@pytest.mark.parametrize("count", [25, pytest.param(1500, marks=pytest.mark.full)])
@pytest.mark.parametrize("with_metadata", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_table_loads_or_is_refused_in_a_sentence(kind, with_metadata, count, tables, tmp_path):
    metadata = metadata_of(plain(KINDS[kind])) if with_metadata else None
    for seed in range(count):
        table, done = mutated(random.Random(seed), tables[kind])
        path = write_table(tmp_path / "model", table, metadata)
        with told("seed", seed, done):
            attempt(inspect if seed % 4 == 3 else load_as_it_is, path)


@pytest.mark.parametrize("count", [100, pytest.param(5000, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ["sd15", "sdxl-base"])
def test_a_mutated_configuration_in_the_metadata_loads_or_is_refused_in_a_sentence(kind, count, tables, tmp_path):
    for seed in range(count):
        config, done = operated(random.Random(seed), plain(KINDS[kind]))
        path = write_table(tmp_path / "model", tables[kind], metadata_of(config))
        with told("seed", seed, done):
            attempt(identify, path)
            attempt(load_as_it_is, path)


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


def operate_file(r: random.Random, folder: Path) -> str:
    path = r.choice(sorted(folder.rglob("*.json")))
    value, done = operated(r, json.loads(path.read_text()))
    replace_file(path, json.dumps(value).encode())
    return f"{path.relative_to(folder)}: {done}"


def break_file(r: random.Random, folder: Path) -> str:
    path = r.choice([p for p in sorted(folder.rglob("*")) if p.is_file()])
    replace_file(path, broken(r, path.read_bytes()))
    return f"{path.relative_to(folder)} broken"


def mix_files(r: random.Random, folder: Path) -> str:
    one, other = r.sample([p for p in sorted(folder.rglob("*")) if p.is_file()], 2)
    replace_file(one, other.read_bytes())
    return f"{one.relative_to(folder)} replaced by {other.relative_to(folder)}"


def drop_file(r: random.Random, folder: Path) -> str:
    path = r.choice(sorted(folder.rglob("*")))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return f"{path.relative_to(folder)} dropped"


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_the_folders_that_are_mutated_load_before(kind, folders):
    assert attempt(load_as_it_is, folders[kind]) is not None


@pytest.mark.parametrize("count", [40, pytest.param(3000, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_a_mutated_folder_loads_or_is_refused_in_a_sentence(kind, count, folders, tmp_path):
    folder = tmp_path / "model"
    for seed in range(count):
        r = random.Random(seed)
        shutil.copytree(folders[kind], folder, copy_function=os.link)
        done = r.choice((operate_file, operate_file, operate_file, break_file, mix_files, drop_file))(r, folder)
        with told("seed", seed, done):
            attempt(inspect if seed % 4 == 3 else load_as_it_is, folder)
        shutil.rmtree(folder)


# Memory.


def repeated(start: bytes, unit: bytes, end: bytes, values: int | None = None) -> bytes:
    """JSON in which `unit`, numbered where it has a %, is repeated up to as many bytes or `values` as are parsed."""
    length = len(unit % 10**6 if b"%" in unit else unit)
    count = (MAX_BYTES - len(start) - len(end)) // length if values is None else values
    units = b"".join(unit % (10**6 + i) for i in range(count)) if b"%" in unit else unit * count
    return start + units + end


def absurd_headers() -> Iterator[tuple[str, bytes]]:
    """Headers of every kind that grows when it is parsed: of as many bytes, and of as many values, as are parsed."""
    for values in (None, MAX_VALUES // 2 - 10):
        often = "bytes" if values is None else "values"
        yield f"{often} of lists", repeated(b'{"a":[', b"[],", b"[]]}", values)
        yield f"{often} of objects", repeated(b'{"a":[', b"{},", b"{}]}", values)
        yield f"{often} of small objects", repeated(b'{"a":[', b'{"b":0},', b"0]}", values)
        yield f"{often} of numbers", repeated(b'{"a":[', b"1.5,", b"0]}", values)
        yield f"{often} of dimensions", repeated(b'{"a":{"shape":[', b"1,", b"0]}}", values)
        yield f"{often} of names", repeated(b"{", b'"%d":0,', b'"a":0}', values)
        yield (f"{often} of metadata", repeated(b'{"__metadata__":{', b'"%d":"",', b'"a":""}}', values))
        many = None if values is None else values // 5
        yield (f"{often} of tensors", repeated(b"{", b'"%d":' + EMPTY + b",", b'"a":%s}' % EMPTY, many))
    for name, letter in (("a name", b"a"), ("wide letters", "\U0001f600".encode())):
        yield f"bytes of {name}", repeated(b'{"', letter, b'":0}')
        yield f"bytes of metadata in {name}", repeated(b'{"__metadata__":{"a":"', letter, b'"}}')


def absurd_files(folder: Path, tables: dict[str, Table], sound: Path) -> Iterator[Path]:
    """Write files and folders that say that they are large."""
    for name, header in absurd_headers():
        (folder / name).write_bytes(packed(header))
        yield folder / name
    table = tables["sd21-base"]
    huge = ("F32", (2**34,))  # 64 GB of a file that is hollow
    probed = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    yield write_table(folder / "a huge tensor of no model", {"a": huge}, None)
    yield write_table(folder / "a huge tensor beside a model", table | {"a": huge}, None)
    yield write_table(folder / "a huge tensor for a bias", table | {probed: huge}, None)
    yield write_table(
        folder / "a huge vocabulary",
        table | {"cond_stage_model.model.token_embedding.weight": ("F16", (2**25, 1024))},
        None,
    )
    lists = repeated(b"[", b"[],", b"[]]").decode()
    yield write_table(folder / "lists in our metadata", table, {METADATA_KEY: lists})
    for place, value in ABSURD:
        config = plain(KINDS["sd15"])
        for step in place[:-1]:
            config = config[step]
        config[place[-1]] = value
        name = "".join(f"{step} " for step in place) + str(value)[:20]
        yield write_table(folder / name, tables["sd15"], metadata_of(config))
    for file in ("unet/config.json", "model_index.json", "tokenizer/vocab.json", "ldm.json"):
        copy = folder / file.replace("/", " ")
        shutil.copytree(sound, copy)
        (copy / file).write_bytes(repeated(b'{"a":[', b"[],", b"[]]}"))
        yield copy


ABSURD: tuple[tuple[tuple[Any, ...], Any], ...] = (
    *(((network, "channels"), [10**9]) for network in ("unet", "vae")),
    *(((network, "channels"), [32] * 100_000) for network in ("unet", "vae")),
    *(((network, "res_blocks"), n) for network in ("unet", "vae") for n in (10**4, 10**9)),
    *((("unet", name), 10**9) for name in ("mid_depth", "context_dim", "in_channels", "vector_dim")),
    *((("text", 0, name), 10**9) for name in ("width", "layers", "mlp", "vocab_size", "max_length")),
    (("unet", "depth"), [10**9]),
    (("vae", "latent_channels"), 10**9),
    (("text", 0, "max_length"), 10**12),
    (("text",), [{}] * 10_000),
    (("diffusion", "timesteps"), 10**12),
)


def grow(paths: Sequence[Path], sound: Path) -> list[int]:
    """By how many bytes the process grows while it tries to load each of `paths`."""
    torch.set_num_threads(1)
    load(sound)  # imports everything
    gc.freeze()  # what is there stays, and need not be looked through each time
    limit = 16 * 2**30  # a mistake must not take the machine down
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    return [growth(lambda path=path: attempt(load_cast, path)) for path in paths]


@pytest.mark.skipif(not measurable(), reason="needs /proc of Linux")
def test_what_says_that_it_is_large_takes_little_memory(tables, folders, small_file, tmp_path):
    paths = list(absurd_files(tmp_path, tables, folders["sd15"]))
    grown = dict(zip(paths, in_fresh_process(grow, paths, small_file), strict=True))
    for path in sorted(grown, key=grown.__getitem__)[-8:]:
        print(f"\n{path.name}: {grown[path] / MB:.0f} MB", end="")
    assert max(grown.values()) < MEMORY
