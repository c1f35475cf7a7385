"""Dataclasses are read strictly: a reader accepts no key and no value that its dataclass does not have."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from ldm.config import UNetConfig
from ldm.strict import from_dict, read_toml


@dataclass(frozen=True)
class Inner:
    size: int = 3
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=Inner)
    where: Path | None = None
    flag: bool = False


def read(tmp_path, text, kind=Outer):
    path = tmp_path / "x.toml"
    path.write_text(text)
    return from_dict(read_toml(path), kind, where=str(path))


def test_a_toml_file_becomes_nested_dataclasses(tmp_path):
    got = read(tmp_path, 'name = "n"\nkind = "b"\nwhere = "a/b"\n[inner]\nsize = 7\nrates = [1, 0.5]\n')
    assert got == Outer("n", "b", Inner(7, (1.0, 0.5)), Path("a/b"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "n"\nsise = 1', r"unknown 'sise'; valid keys: name, kind, inner, where, flag"),
        ('name = "n"\n[inner]\nsise = 1', r"inner: unknown 'sise'; valid keys: size, rates"),
        ('kind = "a"', " lacks name"),
        ('name = "n"\nkind = "c"', r"kind must be one of 'a', 'b', got 'c'"),
        ("name = 1", r"name must be str, got 1"),
        ('name = "n"\nflag = 1', r"flag must be bool, got 1"),
        ('name = "n"\n[inner]\nsize = 1.5', r"inner: size must be int, got 1\.5"),
        ('name = "n"\n[inner]\nsize = true', r"inner: size must be int, got True"),
        ("name = ", r"is not valid TOML"),
    ],
)
def test_a_mistake_in_a_toml_file_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_a_depth_is_read_from_a_file_per_level_and_per_block(tmp_path):
    config = read(tmp_path, "depth = [[1, 2], 1, 1, 0]\nup_depth = [0, 1, 1, [1, 2, 1]]\n", UNetConfig)
    assert config == UNetConfig(depth=((1, 2), 1, 1, 0), up_depth=(0, 1, 1, (1, 2, 1)))
    for wrong in ("[[1, 2.0], 1, 1, 0]", '["1", 1, 1, 0]', "[[[1]], 1, 1, 0]", "1", "[true, 1, 1, 0]"):
        with pytest.raises(ValueError, match=r"depth must be (int|tuple), got"):
            read(tmp_path, f"depth = {wrong}\n", UNetConfig)
