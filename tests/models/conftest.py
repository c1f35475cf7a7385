"""Fixtures for the tests of tokens: CLIP's tokenizer, ours and that of transformers."""

import pytest
from transformers import CLIPTokenizer

from ldm.models.tokens import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.official()


@pytest.fixture(scope="module")
def theirs(tokenizer):
    return CLIPTokenizer(vocab=tokenizer.vocab, merges=tokenizer.merges)
