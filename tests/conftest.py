"""Fixtures for all tests: no network, one thread, and a tiny random model."""

import os
import socket
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers or diffusers are imported

import pytest
import torch

import ldm
from ldm import cli
from ldm.checkpoint.files import save
from ldm.checkpoint.parts import Model
from tests.tiny import TINY_RANDOM, random_networks


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> None:
    """Fail whatever tries to reach the network: nothing here may need it."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX:
            raise OSError(f"tests must not use the network, tried to reach {address}")
        connect(self, address)

    def refuse_name(host: object, *_: object, **__: object) -> None:
        raise OSError(f"tests must not use the network, tried to look up {host}")

    socket.socket.connect = socket.socket.connect_ex = refuse
    socket.getaddrinfo = refuse_name


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Compute on one thread: the models are too small for more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny random model, for reading only."""
    folder = tmp_path_factory.mktemp("models") / "random"
    save(Model(TINY_RANDOM, *random_networks()), folder)
    return folder


@pytest.fixture(scope="session")
def pipe(model_folder: Path) -> ldm.Pipeline:
    """The tiny random model, loaded on the CPU."""
    return ldm.load(model_folder, ldm.Placement(device="cpu"))


@pytest.fixture
def run(model_folder, capsys):
    """Run `ldm` with the tiny random model; returns exit code, stdout and what went wrong on stderr."""

    def run(*words):
        given = [] if "--from" in words else ["--model", str(model_folder), "--device", "cpu"]
        code = cli.main([*words, *given])
        out, err = capsys.readouterr()
        return code, out, "".join(x for x in err.splitlines(keepends=True) if not x.startswith(f"ldm: {model_folder}"))

    return run
