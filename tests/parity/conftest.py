"""Fixtures for the parity tests: the small random models of all families, in both libraries."""

from functools import cache

import pytest
import torch

import ldm
from tests.parity import reference
from tests.parity.reference import FAMILIES, LCM


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder where diffusers saved a small random model of the family of that name."""

    @cache
    def build(name):
        folder = tmp_path_factory.mktemp(name)
        reference.build(folder, reference.small((FAMILIES | {"LCM": LCM})[name]))
        return folder

    return build


@pytest.fixture(scope="session")
def both(folder):
    """That model, loaded by us and by diffusers."""
    return cache(
        lambda name, dtype=torch.float32: (
            ldm.load(folder(name), ldm.Placement("cpu", dtype=dtype, vae_dtype=dtype)),
            reference.load(folder(name), dtype),
        )
    )
