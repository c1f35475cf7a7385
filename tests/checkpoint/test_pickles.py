"""Pickles: read without running what is in them, and what is wrong with one, each by its name."""

import collections
import os
import random
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.serialization import safe_globals
from torch.torch_version import TorchVersion

from ldm.checkpoint.pickles import INERT, TORCH_NEEDED, PickledTensors, is_pickle
from ldm.checkpoint.tensors import DTYPES, Tensors

MAPS = Path("/proc/self/maps")  # on Linux, the files that this process has mapped
WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([7, 8])}


@pytest.fixture(autouse=True)
def _a_torch_that_reads_pickles(request: pytest.FixtureRequest) -> None:
    """Skip with an older one, but for the test that it refuses."""
    refusal = test_torch_versions_that_pickles_can_attack_open_none
    if torch.__version__ < TORCH_NEEDED and request.function is not refusal:
        pytest.skip("no pickle is read with this torch")


def saved(tmp_path: Path, content: object, *, legacy: bool = False, protocol: int = 2) -> Path:
    path = tmp_path / "model.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    return path


def with_program(path: Path, change) -> Path:
    """Rewrite the file with `change` applied to its data.pkl."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return path


def foreign(monkeypatch, full_name: str) -> type:
    """A class that pickles under `full_name` as long as `monkeypatch` is not undone, and fails when it is made."""
    *packages, name = full_name.split(".")
    found = type(name, (), {"__module__": ".".join(packages)})
    for i in range(len(packages)):
        module = types.ModuleType(".".join(packages[: i + 1]))
        if module.__name__ not in sys.modules:
            monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys.modules[".".join(packages)], name, found, raising=False)
    return found


class Malicious:
    """Runs a function with arguments when it is unpickled."""

    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_tensors_are_those_that_were_saved(legacy, tmp_path):
    dtypes = {name: dtype for name, dtype in DTYPES.items() if not legacy or "8_" not in name}
    values = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in dtypes.items()}
    tensors: Tensors = PickledTensors(saved(tmp_path, values, legacy=legacy))
    assert tensors.dtypes == {name: name for name in dtypes}
    assert tensors.shapes == dict.fromkeys(dtypes, (2, 3))
    assert tensors.paths == (tmp_path / "model.ckpt",)
    assert str(tensors) == str(tmp_path / "model.ckpt")
    assert tensors.metadata == {}
    for mapped in (True, False):
        read = dict(tensors.read(["F16", "I64"], mapped=mapped))
        assert list(read) == ["F16", "I64"]
        assert all(torch.equal(read[name], values[name]) for name in read)
        assert all(read[name].dtype == values[name].dtype for name in read)


def test_zip_files_are_memory_mapped_and_copied_on_request(tmp_path):
    path = saved(tmp_path, WEIGHTS)
    tensors = PickledTensors(path)
    (_, mapped), (_, again) = *tensors.read(["a"]), *tensors.read(["a"])
    assert mapped.data_ptr() == again.data_ptr()
    ((_, copy),) = tensors.read(["a"], mapped=False)
    assert copy.data_ptr() != mapped.data_ptr()
    if MAPS.exists():
        assert str(path) in MAPS.read_text()


def test_views_parameters_and_shared_storages_become_contiguous_tensors_of_their_own_shape(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    content = {"whole": whole, "t": whole.T, "row": whole[1], "p": nn.Parameter(whole)}
    tensors = PickledTensors(saved(tmp_path, content))
    for name, value in tensors.read(content):
        assert value.is_contiguous()
        assert not value.requires_grad
        assert type(value) is torch.Tensor
        assert torch.equal(value, content[name])


def test_lightning_checkpoints_are_read_without_lightning(tmp_path, monkeypatch):
    callback = foreign(monkeypatch, INERT[0])
    state = callback()
    state.best_model_path = "somewhere"
    content = {
        "epoch": 3,
        "global_step": 875000,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {callback: {"best": np.float64(0.5), "callback": state}},
        "optimizer_states": [{"lr": 1e-4}],
        "state_dict": dict(WEIGHTS),
    }
    path = saved(tmp_path, content)
    monkeypatch.undo()
    tensors = PickledTensors(path)
    assert tensors.shapes == {"a": (2, 3), "b": (2,)}
    assert tensors.metadata == {"global_step": "875000"}
    assert "pytorch_lightning" not in sys.modules


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", INERT)
def test_what_is_allowed_beside_tensors_is_never_imported_or_made(name, legacy, tmp_path, monkeypatch):
    def fail(*args):
        raise AssertionError("ran")

    found = foreign(monkeypatch, name)
    with_state = found()
    with_state.x = 1
    content = {**WEIGHTS, "as a class": found, "made": Malicious(found), "state": with_state}
    found.__new__ = fail
    path = saved(tmp_path, content, legacy=legacy)
    tensors = PickledTensors(path)
    assert list(tensors.shapes) == ["a", "b"]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("forced", ["0", "1"])
def test_code_does_not_run_and_is_named(forced, legacy, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)  # torch's way to allow it
    ran = tmp_path / "ran"
    content = {**WEIGHTS, "x": Malicious(os.system, f"touch {ran}")}
    path = saved(tmp_path, content, legacy=legacy)
    with pytest.raises(
        ValueError,
        match=rf"model\.ckpt names code that has no place among weights, so it is not opened: {os.name}\.system; "
        r"give the model's \.safetensors file",
    ) as caught:
        PickledTensors(path)
    assert "weights_only" not in str(caught.value)  # nor is it advised how to run it
    assert not ran.exists()
    torch.load(path, weights_only=False)
    assert ran.exists()  # it would have run


def test_all_that_a_zip_file_asks_for_is_named(tmp_path):
    content = {"x": Malicious(eval, "1"), "y": [Path("a")], "z": Malicious(print, "\x1b[31m")}
    with pytest.raises(
        ValueError, match=r"opened: (builtins|__builtin__)\.eval, (builtins|__builtin__)\.print"
    ) as caught:
        PickledTensors(saved(tmp_path, content))
    assert "pathlib" in str(caught.value)


def test_newer_pickle_instructions_are_refused(tmp_path):
    path = saved(tmp_path, {"x": Malicious(os.system, "true")}, protocol=4)
    with pytest.raises(ValueError, match=r"damaged or no checkpoint: .*Unsupported operand \d+; fetch"):
        PickledTensors(path)


@pytest.mark.parametrize(
    "nest",
    [
        lambda x: {"state_dict": x},
        lambda x: {"model": x, "optimizer": {}},
        lambda x: {"module": x},
        lambda x: {"model": {"state_dict": collections.OrderedDict(x)}},
        lambda x: {f"module.{name}": value for name, value in x.items()},
        lambda x: {f"module._orig_mod.{name}": value for name, value in x.items()},
        lambda x: {"state_dict": {f"_orig_mod.module.{n}": value for n, value in x.items()}},
    ],
)
def test_tensors_are_found_where_training_loops_put_them(nest, tmp_path):
    tensors = PickledTensors(saved(tmp_path, nest(WEIGHTS)))
    assert tensors.shapes == {"a": (2, 3), "b": (2,)}


def test_names_that_only_contain_a_wrapper_stay(tmp_path):
    content = {"model.module.a": WEIGHTS["a"], "modules.b": WEIGHTS["b"]}
    assert list(PickledTensors(saved(tmp_path, content)).shapes) == list(content)


def test_a_name_with_and_without_its_wrapper_is_an_error(tmp_path):
    content = {"module.a": WEIGHTS["a"], "a": WEIGHTS["a"]}
    with pytest.raises(ValueError, match="holds 'a' twice, with and without a wrapper's prefix"):
        PickledTensors(saved(tmp_path, content))


def test_what_contains_itself_ends(tmp_path):
    content: dict[str, object] = {}
    content["state_dict"] = content
    with pytest.raises(ValueError, match="holds a dict and no tensors by name"):
        PickledTensors(saved(tmp_path, content))


class Subclass(torch.Tensor):
    pass


def with_attribute() -> torch.Tensor:
    value = torch.ones(2)
    value.numel = torch.Size  # type: ignore[assignment]
    return value


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: torch.eye(3).to_sparse(), r"torch\.sparse_coo"),
        (lambda: torch.eye(3).to_sparse_csr(), r"torch\.sparse_csr"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), r"torch\.qint8"),
        (lambda: torch.ones(2, dtype=torch.complex64), r"torch\.complex64"),
        (lambda: torch.ones(2, device="meta"), "on meta"),
    ],
    ids=["sparse", "csr", "quantized", "complex", "meta"],
)
@pytest.mark.filterwarnings("ignore")  # of torch, about sparse and quantized tensors
def test_tensors_that_are_not_plain_are_named(make, what, tmp_path):
    path = saved(tmp_path, {**WEIGHTS, "odd": make()})
    with (
        safe_globals([Subclass]),
        pytest.raises(  # as an application might
            ValueError, match=rf"'odd' in .*model\.ckpt is no plain tensor but one of .*{what}.*allowed are dense"
        ),
    ):
        PickledTensors(path)


@pytest.mark.filterwarnings("ignore")  # of torch, about nested tensors
def test_nested_tensors_are_refused(tmp_path):
    path = saved(tmp_path, {**WEIGHTS, "odd": torch.nested.nested_tensor([torch.ones(2)])})
    plain, unknown = "'odd' in .* is no plain tensor", "_rebuild_nested_tensor'"  # to torch 2.15
    with pytest.raises(ValueError, match=f"{plain}|{unknown}"):
        PickledTensors(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("which", [1, -1], ids=["size only", "size and storage"])
def test_sizes_that_are_written_wrong_are_refused(which, legacy, tmp_path):
    def enlarged(content: bytes) -> bytes:  # 251 as one byte becomes 65535 as two
        head, sep, tail = content.rpartition(b"K\xfb")
        assert head.count(sep) == 1
        head = head if which == 1 else head.replace(sep, b"M\xff\xff")
        return head + b"M\xff\xff" + tail

    path = saved(tmp_path, {"a": torch.ones(251)}, legacy=legacy)
    if legacy:
        path.write_bytes(enlarged(path.read_bytes()))
    else:
        with_program(path, enlarged)
    with pytest.raises(ValueError, match="is damaged or no checkpoint: RuntimeError"):
        PickledTensors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (WEIGHTS["a"], "holds a Tensor and no tensors by name"),
        ([WEIGHTS], "holds a list and no tensors by name"),
        ({}, "holds no tensors by name"),
        ({"string_to_param": nn.ParameterDict({"*": torch.ones(2)})}, "holds tensors under 'string_to_param'; only "),
        ({i: i for i in range(20)}, "holds no tensors by name"),
        ({"objective": WEIGHTS, "step": 3}, "holds tensors under 'objective'; only those at the top or under"),
    ],
    ids=["tensor", "list", "nothing", "embedding", "many", "training"],
)
def test_what_holds_no_tensors_by_name_says_what_it_holds(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        PickledTensors(saved(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: fetch it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"hello, world", "starts with b'hello, world'"),
        (b"\x80\x02}q\x00.", "is damaged or no checkpoint: RuntimeError Invalid magic number"),
        (b"\x80\x02", "is damaged or no checkpoint"),
        (b"PK\x03\x04" + bytes(30), "is damaged or no checkpoint: .*central directory.*; fetch it again"),
    ],
)
def test_what_is_no_pickle_is_called_by_its_name(content, message, tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        PickledTensors(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.ckpt does not exist"):
        PickledTensors(tmp_path / "nowhere.ckpt")
    assert not is_pickle(tmp_path / "nowhere.ckpt")
    assert not is_pickle(tmp_path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.99])
def test_truncated_files_are_refused(kept, legacy, tmp_path):
    path = saved(tmp_path, {"a": torch.ones(1000)}, legacy=legacy)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"model\.ckpt is (truncated or )?damaged"):
        PickledTensors(path)


def test_other_zip_files_are_refused(tmp_path):
    path = tmp_path / "model.ckpt"
    for name, content in (("word/document.xml", b"x"), ("archive/data.pkl", bytes(10_000))):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, content)
        with pytest.raises(ValueError, match=r"model\.ckpt is damaged or no checkpoint"):
            PickledTensors(path)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"damaged or no checkpoint: .*torchscript"):
        PickledTensors(tmp_path / "model.pt")


def test_the_content_decides_what_is_a_pickle_and_not_the_name(tmp_path):
    path = tmp_path / "model.ckpt"
    save_file(WEIGHTS, path)
    assert not is_pickle(path)
    with pytest.raises(ValueError, match=r"model\.ckpt is a safetensors file and no pickle"):
        PickledTensors(path)
    path = saved(tmp_path, WEIGHTS).rename(tmp_path / "model.safetensors")
    assert is_pickle(path)
    with pytest.raises(ValueError, match=r"is a pickle in spite of its name: rename it to \.ckpt"):
        PickledTensors(path)
    assert is_pickle(saved(tmp_path, WEIGHTS, legacy=True))


@pytest.mark.parametrize("length", [0x280, 0x380, 0x4034B50])
def test_a_safetensors_file_whose_length_begins_like_a_pickle_is_none(length, tmp_path):
    (tmp_path / "file").write_bytes(length.to_bytes(8, "little") + b"{")
    assert not is_pickle(tmp_path / "file")


@pytest.mark.parametrize("version", ["2.6.0", "2.9.1+cu126", "2.10.0a0"])
def test_torch_versions_that_pickles_can_attack_open_none(version, tmp_path, monkeypatch):
    path = saved(tmp_path, WEIGHTS)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    with pytest.raises(ValueError, match=r"reads safely from 2\.10 on \(CVE-2026-24747\), this is 2"):
        PickledTensors(path)


@pytest.mark.filterwarnings("ignore")  # of torch, about a protocol number that is damaged
def test_damage_anywhere_is_a_value_error(tmp_path):
    content = {"state_dict": collections.OrderedDict(WEIGHTS), "global_step": 5}
    chance = random.Random(0)
    for legacy in (False, True):
        whole = saved(tmp_path, content, legacy=legacy).read_bytes()
        refused = 0
        for i in range(150):
            damaged = bytearray(whole)
            for _ in range(1 + i % 3):
                damaged[chance.randrange(len(whole))] = chance.randrange(256)
            (tmp_path / "damaged.ckpt").write_bytes(damaged)
            try:
                PickledTensors(tmp_path / "damaged.ckpt")
            except ValueError:
                refused += 1
        assert refused > 15  # of the others the changed bytes are data, padding or names
