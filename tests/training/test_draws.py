"""The random numbers of a batch are the same for any number of processes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.models import text
from ldm.training.draws import SharedDraws, for_the_whole_batch
from ldm.training.recompute import recompute_blocks
from tests.tiny import TINY_RANDOM

IMAGES = torch.zeros(6, 3, 5, 4)


@for_the_whole_batch
def spread(count, limit):
    """Evenly spread values, as a batch of timesteps may have."""
    return (torch.randint(limit, ()) + torch.arange(count) * limit // count) % limit


DRAWS = {
    "rand": lambda x: torch.rand(len(x)),
    "a size in one argument": lambda x: torch.rand((len(x), 3)),
    "a size by name": lambda x: torch.randn(size=(len(x), 2, 2)),
    "many numbers": lambda x: torch.randn(len(x), 7, 9),
    "randint": lambda x: torch.randint(1000, (len(x),)),
    "randint with a lower limit": lambda x: torch.randint(5, 1000, (len(x), 2), dtype=torch.int32),
    "randn_like": lambda x: torch.randn_like(x),
    "randn_like, channels last": lambda x: torch.randn_like(x.contiguous(memory_format=torch.channels_last)),
    "randn_like of a part": lambda x: torch.randn_like(x[:, :, :1, :1]),
    "rand_like": lambda x: torch.rand_like(x, dtype=torch.float64),
    "randint_like": lambda x: torch.randint_like(x, 9),
    "multinomial": lambda x: torch.multinomial(torch.arange(1.0, 9), len(x), replacement=True),
    "dropout": lambda x: F.dropout(x + 1, 0.4),
    "a module of dropout": lambda x: nn.Dropout(0.4)(x + 1),
    "a function of the whole batch": lambda x: spread(len(x), 1000),
}


def drawn(draw, ranks):
    """Two draws with a number for the whole batch between them, as the parts of all processes side by side."""
    parts = []
    for rank, images in enumerate(IMAGES.chunk(ranks)):
        torch.manual_seed(5)
        with SharedDraws(len(images), rank, ranks):
            parts.append((draw(images), torch.rand(1), draw(images)))
    return [torch.cat(each) for each in zip(*parts, strict=True)]


@pytest.mark.parametrize("name", DRAWS)
def test_parts_of_processes_make_the_numbers_of_one_process_bit_for_bit(name):
    torch.manual_seed(5)
    first, scalar, second = DRAWS[name](IMAGES), torch.rand(1), DRAWS[name](IMAGES)
    assert not torch.equal(first, second)
    for ranks in (2, 3):
        ours = drawn(DRAWS[name], ranks)
        assert torch.equal(ours[0], first), ranks
        assert torch.equal(ours[2], second), ranks
        assert (ours[1] == scalar).all(), ranks  # a number for the whole batch is the same in each process


def test_a_generator_of_its_own_and_evaluation_are_left_alone():
    generator = torch.Generator().manual_seed(1)
    expected = torch.randn(3, 2, generator=generator)
    with SharedDraws(3, 1, 2):
        assert torch.equal(torch.randn(3, 2, generator=generator.manual_seed(1)), expected)
        assert torch.equal(F.dropout(IMAGES[:3] + 1, 0.5, training=False), IMAGES[:3] + 1)
    assert SharedDraws.active is None


def test_dropout_in_a_block_that_is_computed_again_has_the_same_mask():
    """Else the gradient would belong to another function than the loss."""

    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        block = text.Block(TINY_RANDOM.text[0])
        block.norm1 = nn.Sequential(block.norm1, nn.Dropout(0.5))
        if again:
            recompute_blocks(block)
        torch.manual_seed(1)
        x = torch.randn(2, 5, TINY_RANDOM.text[0].width)
        with SharedDraws(2, 1, 2):
            loss = block(x).square().mean()
        loss.backward()
        gradients.append([p.grad for p in block.parameters()])
    assert all(map(torch.equal, *gradients))
