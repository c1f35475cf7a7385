"""What a file is, told from its first bytes, and what can be wrong with a safetensors file."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoint.files import identify, load
from ldm.checkpoint.tensors import TensorFiles
from tests.checkpoint.standin import write_hollow


def packed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: object, *offsets: object, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


WHOLE = packed({"a": entry([2], 0, 8)}, bytes(8))


def test_shards_are_one_set_of_tensors_read_one_at_a_time(tmp_path):
    values = {name: torch.randn(3, 2) for name in "abc"}
    save_file({"a": values["a"], "b": values["b"]}, tmp_path / "1", metadata={"format": "pt"})
    save_file({"c": values["c"]}, tmp_path / "2")
    tensors = TensorFiles([tmp_path / "1", tmp_path / "2"])
    assert tensors.shapes == dict.fromkeys("abc", (3, 2))
    assert tensors.metadata == {"format": "pt"}
    read = dict(tensors.read(["c", "a"]))
    assert read.keys() == {"a", "c"}
    assert all(torch.equal(read[name], values[name]) for name in read)


def test_a_name_in_two_shards_is_an_error(tmp_path):
    for name in "12":
        (tmp_path / name).write_bytes(WHOLE)
    with pytest.raises(ValueError, match=r"'a' is in both .*1 and .*2"):
        TensorFiles([tmp_path / "1", tmp_path / "2"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: fetch it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer .*`git lfs pull`"),
        (b"<!DOCTYPE html><html><body>Please log in", "is a web page.*a login may be needed"),
        (b"\n  <html>", "is a web page"),
        (b"PK\x03\x04" + bytes(30), "is a PyTorch pickle, which can run code"),
        (b"\x80\x02}q\x00.", "is a PyTorch pickle, which can run code"),
        (b'{"error": "not found"}', "is a JSON file and holds no tensors"),
        (b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
        (b"\x89PNG\r\n\x1a\n", "is a picture and not a model"),
        (b"just some text, long enough", "is not a safetensors file: it starts with b'just some text, '"),
        (b"abc", "is not a safetensors file: it starts with b'abc'"),
        (struct.pack("<Q", 10**9) + b"{", "is not a safetensors file"),
        (WHOLE[:20], "is truncated: its header promises .* bytes, it has 20; fetch it again"),
        (WHOLE[:-1], f"is truncated: its header promises {len(WHOLE)} bytes, it has {len(WHOLE) - 1}"),
        (WHOLE + b"x", "(?i)is damaged: .*incomplete"),
        (packed(b"{nonsense}"), "is damaged: Error while deserializing header"),
        (packed(b'{"a": "\xff"}'), "is damaged: Error while deserializing header"),
        (packed({"a": 1}), "is damaged: Error while deserializing header"),
        (packed({"a": entry([2], 0)}), "is damaged: Error while deserializing header"),
        (packed({"a": entry([-2], 0, 8)}), "is damaged: Error while deserializing header"),
        (packed({"a": entry(2, 0, 8)}), "is damaged: Error while deserializing header"),
        (packed({"a": entry([2], 0, 4)}, bytes(4)), "(?i)is damaged: .*invalid"),
        (packed({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)), "(?i)is damaged: .*invalid ?offset"),
        (packed(b'{"a":' + b"[" * 100_000), "is damaged: Error while deserializing header"),
        (packed([1, 2]), "is not a safetensors file"),
    ],
)
def test_what_is_no_whole_safetensors_file_is_called_by_its_name(content, message, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_path_and_a_device_are_named():
    with pytest.raises(ValueError, match=r"nowhere\.safetensors does not exist: give a model folder or"):
        identify("nowhere.safetensors")
    with pytest.raises(ValueError, match="/dev/null is not a regular file"):
        identify(Path("/dev/null"))


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480])
def test_a_header_whose_length_begins_like_a_pickle_is_no_pickle(length, tmp_path):
    text = json.dumps({"a": entry([2], 0, 8)}).encode().ljust(length)
    (tmp_path / "file").write_bytes(packed(text, bytes(8)))
    assert TensorFiles([tmp_path / "file"]).shapes == {"a": (2,)}


def test_a_header_is_understood_without_reading_what_it_promises(tmp_path):
    path = write_hollow(tmp_path / "hollow", {"a": (2**15, 2**15)})  # 2 GiB of nothing
    assert TensorFiles([path]).shapes == {"a": (2**15, 2**15)}
