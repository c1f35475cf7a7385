"""Compile a network block by block with `torch.compile`."""

from torch import nn

from ldm.models.layers import ResBlock
from ldm.models.transformer import TransformerBlock


def compile_blocks(network: nn.Module, *, backend: str = "inductor") -> None:
    """Compile each kind and size of block once, when the block is first called.

    The blocks do nearly all of the work, and compiling them takes a small part of the time that the whole network
    would take. Other prompts, seeds, steps and guidance scales compile nothing new. Other picture sizes compile the
    blocks again, at most twice.
    """
    import torch._dynamo  # takes seconds

    # This limit counts all sizes of a class in the process. SD 1.5 has 12 sizes of ResBlock, more than the default 8.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    for part in network.modules():
        if isinstance(part, ResBlock | TransformerBlock):
            part.compile(fullgraph=True, backend=backend)
