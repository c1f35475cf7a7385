"""Fixtures for all tests: no network, one thread, and a tiny random model."""

import os
import socket

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers or diffusers are imported

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> None:
    """Fail whatever tries to reach the network: nothing here may need it."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX:
            raise OSError(f"tests must not use the network, tried to reach {address}")
        connect(self, address)

    socket.socket.connect = socket.socket.connect_ex = refuse


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Compute on one thread: the models are too small for more, and results cannot depend on it."""
    torch.set_num_threads(1)
