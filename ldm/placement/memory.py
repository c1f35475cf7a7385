"""`Placement`: the device, precision and memory of a model as one value.

Each optional mode has its own module in this folder, which is imported when the mode is chosen.
"""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.config import ModelConfig, check_fields, option
from ldm.models.attention import math_attention, sdpa, set_attention, sliced_attention
from ldm.models.vae import VAE, Gaussian

ATTENTION = {"sdpa": sdpa, "sliced": sliced_attention, "math": math_attention}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Placement:
    """The device, precision and memory of the networks. Samplers and schedules always compute in fp32 and fp64.

    `ldm.placement.choice.choose` fills in fields that are None. Dtypes may be given by name: "bfloat16".
    All fields change time and memory. Some also change the numbers:
    - dtype, vae_dtype and vae_memory="tiles" change the precision;
    - attention, guidance, vae_memory="slabs", compile and packed change the last bits, because sums have another order;
    - device changes the last bits, offload and cuda_graph change nothing.
    Raises ValueError for a dtype or a word that is not allowed.
    """

    device: str | torch.device | None = option(None, "cpu, cuda, cuda:N or mps (default: the GPU if there is one)")
    dtype: torch.dtype | None = option(
        None, f"dtype of the UNet and text encoder: {', '.join(DTYPES)} (default: float16 on CUDA, else float32)"
    )
    vae_dtype: torch.dtype | None = option(
        None, "dtype of the VAE (default: as --dtype; bfloat16 or float32 for SDXL, which overflows in float16)"
    )
    attention: Literal["sdpa", "sliced", "math"] | None = option(
        None, "sdpa: fused kernels, sliced: little memory, math: the formula (default: sdpa if a kernel exists)"
    )
    guidance: Literal["batched", "sequential"] = option(
        "batched",
        "batched: one call of the UNet with and without the prompt; sequential: two calls, half of the memory",
        "--guidance-passes",
    )
    vae_memory: Literal["whole", "slabs", "tiles"] = option(
        "whole", "how the VAE works: whole, in slabs (exact, slower, a quarter of the memory) or in tiles (inexact)"
    )
    offload: Literal["model", "blocks"] | None = option(
        None, "model: the GPU holds only the network that works; blocks: and of the UNet only two stages (default: off)"
    )
    cuda_graph: bool = option(False, "record the calls of the UNet on CUDA and replay them")
    compile: bool = option(False, "compile the blocks of UNet and VAE at their first call, which takes minutes")
    packed: bool = option(False, "keep weights in the order that a CPU computes in: faster (default: yes on a CPU)")

    def __post_init__(self) -> None:
        """Turn the names of dtypes into dtypes, and check the words."""
        for name in ("dtype", "vae_dtype"):
            given = getattr(self, name)
            word = str(given).removeprefix("torch.")
            if given is not None and word not in DTYPES:
                raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {word!r}")
            object.__setattr__(self, name, DTYPES.get(word))
        check_fields(self)

    def resolve(self, config: ModelConfig | None = None) -> "Placement":
        """Fill in the fields that are None, and check that this machine can follow.

        config: without it, vae_dtype and attention stay None.
        Raises ValueError for an unknown or absent device, fp16 on a CPU, and for modes that exclude each other.
        """
        from ldm.placement.choice import choose, packable

        chosen = choose(self, config)
        device, dtype, vae_dtype = chosen["device"], chosen["dtype"], chosen["vae_dtype"]
        for name, given in (("dtype", dtype), ("vae_dtype", vae_dtype)):
            if given == torch.float16 and device.type == "cpu":
                raise ValueError(f"{name} float16 is up to 200 times slower than float32 on a CPU; use another dtype")
        for name in ("offload", "cuda_graph"):
            if getattr(self, name) and device.type != "cuda":
                raise ValueError(f"{name} needs a CUDA device, and the device is {device}: leave out {name}")
        if self.offload and self.cuda_graph:
            raise ValueError("a CUDA graph needs weights that stay where they are: leave out offload or cuda_graph")
        if self.packed and not packable(device, dtype, vae_dtype, self.compile):
            raise ValueError(
                "packed weights need a CPU, a PyTorch with oneDNN, for bfloat16 a processor that oneDNN supports, and "
                f"blocks that are not compiled; the device is {device}: leave out packed"
            )
        return dataclasses.replace(self, **chosen)

    @classmethod
    def fast(cls, **chosen: Any) -> "Placement":
        """Return the placement of the `ldm` command: the `chosen` fields, and the fastest values for the others."""
        from ldm.placement.choice import choose

        return cls(**(choose(cls(**chosen), fast=True) | chosen)).resolve()

    def apply(self, networks: Mapping[str, nn.Module]) -> None:
        """Set up the networks of a model as this resolved placement says, on the device where they are, once.

        networks: by name, "unet", "vae", "text_encoder" and others such as a ControlNet; a text encoder is only pinned.
        The order is fixed: LoRA weights are merged before this call; then attention and memory format, compile, pack,
        pin for offload. CUDA graphs are recorded last, while sampling.
        """
        cuda = torch.device(self.device or "cpu").type == "cuda"
        if "vae" in networks:
            networks["vae"].to(dtype=self.vae_dtype)
        for network in (network for name, network in networks.items() if name != "text_encoder"):
            if self.attention is not None:
                set_attention(network, ATTENTION[self.attention])
            if cuda and next(network.parameters()).dtype != torch.float32:
                # Tensor cores compute in channels last. From other formats cuDNN reorders for each convolution.
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if self.compile:
                from ldm.placement.compiled import compile_blocks

                compile_blocks(network)
            if self.packed:
                from ldm.placement.packing import pack

                pack(network)
        if self.offload is not None and cuda:
            from ldm.placement.offload import pin

            for network in networks.values():
                pin(network)

    def at_work(self, network: nn.Module) -> AbstractContextManager[object]:
        """Return a context manager that keeps `network` on the device, with all weights that it has on entering.

        It may be entered several times and left in any order. The network leaves the device with the last exit.
        """
        if self.offload is None:
            return nullcontext()
        from ldm.placement.offload import Moved, Streamed

        by_stages = self.offload == "blocks" and hasattr(network, "stages")  # a UNet or a ControlNet
        return (Streamed if by_stages else Moved)(network, self.device or "cuda")

    def decoder(self) -> Callable[[VAE, Tensor], Tensor]:
        """Return the function that `vae_memory` names: (vae, latents: b c h w) -> images: b 3 h*f w*f."""
        if self.vae_memory == "whole":
            return lambda vae, latents: vae.decode(latents)
        from ldm.placement import slabs, tiles

        return slabs.decode_slabs if self.vae_memory == "slabs" else tiles.decode_tiles

    def encoder(self) -> Callable[[VAE, Tensor], Gaussian]:
        """Return the function that `vae_memory` names: (vae, images: b 3 h w) -> distribution of b c h/f w/f."""
        if self.vae_memory == "whole":
            return lambda vae, images: vae.encode(images)
        from ldm.placement import slabs, tiles

        return slabs.encode_slabs if self.vae_memory == "slabs" else tiles.encode_tiles
