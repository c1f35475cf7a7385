"""Attention that one run watches or changes, while other threads use the same UNet.

watched = with_attention(pipe.unet, lambda name, attend: ...)
denoise = pipe.denoiser(plan, conditions, bind=watched.bind)
"""

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from ldm.models.attention import Attend

Network = TypeVar("Network", bound=nn.Module)


def with_attention(network: Network, choose: Callable[[str, Attend], Attend]) -> Network:
    """Return a copy of `network` with the same weights, whose attention layers attend as `choose` says.

    choose: called once for each layer with its name in `network.named_modules` and the function of the original, see
      `ldm.models.attention`. It returns the function of the copy. In a UNet, the names of self-attention end with
      "attn1", those of cross-attention with "attn2"; "down.", "mid." and "up." are their first parts.
    The modules are copied, and the parameters and buffers are shared. So the copy takes almost no memory, and a change
    of a weight in place changes both. Gradients go through the copy where the function of the layer supports them.
    A layer with image prompts calls its function once more for each of them.
    """
    shared = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
    own = copy.deepcopy(network, shared)
    for name, layer in own.named_modules():
        if hasattr(layer, "attend"):
            layer.attend = choose(name, layer.attend)
    return own
