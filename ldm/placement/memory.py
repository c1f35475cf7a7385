"""`Placement`: the device, precision and memory use of a model, in one dataclass.

Each optional mode has its own module in this folder, which is imported only if the mode is chosen.
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
    """The device, precision and memory use of the networks. The sampler keeps x in fp32, whatever is chosen here.

    `ldm.placement.choice.choose` fills in fields that are None. Dtypes may be given by name: "bfloat16".
    All fields change speed or memory. They differ in the effect on the results:
    - dtype and vae_dtype change the rounding, and vae_memory="tiles" is an approximation;
    - device, attention, guidance, vae_memory="slabs", compile and packed change the last bits, because the order of
      summation differs;
    - offload and cuda_graph change nothing.
    Raises ValueError for a value that is not allowed.
    """

    device: str | torch.device | None = option(None, "cpu, cuda, cuda:N or mps (default: the GPU if there is one)")
    dtype: torch.dtype | None = option(
        None, f"dtype of the UNet and text encoder: {', '.join(DTYPES)} (default: float16 on CUDA, else float32)"
    )
    vae_dtype: torch.dtype | None = option(
        None, "dtype of the VAE (default: as --dtype, but not float16 for SDXL, whose VAE overflows in float16)"
    )
    attention: Literal["sdpa", "sliced", "math"] | None = option(
        None, "sdpa: fused kernels; sliced: little memory; math: the formula (default: sdpa, sliced if no kernel fits)"
    )
    guidance: Literal["batched", "sequential"] = option(
        "batched",
        "batched: one UNet call for prompt and negative prompt; sequential: one call each, half of the memory",
        "--guidance-passes",
    )
    vae_memory: Literal["whole", "slabs", "tiles"] = option(
        "whole", "how the VAE works: whole; in slabs: exact, slower, a quarter of the memory; in tiles: approximate"
    )
    offload: Literal["model", "blocks"] | None = option(
        None, "model: the GPU holds only the network at work; blocks: also only two stages of the UNet (default: off)"
    )
    cuda_graph: bool = option(False, "record the calls of the UNet on CUDA and replay them")
    compile: bool = option(False, "compile the blocks of UNet and VAE at their first call, which takes minutes")
    packed: bool = option(False, "keep weights in oneDNN's memory format: faster (default of the command on a CPU: on)")

    def __post_init__(self) -> None:
        """Turn the names of dtypes into dtypes, and check all fields."""
        for name in ("dtype", "vae_dtype"):
            given = getattr(self, name)
            word = str(given).removeprefix("torch.")
            if given is not None and word not in DTYPES:
                raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {word!r}")
            object.__setattr__(self, name, DTYPES.get(word))
        check_fields(self)

    def resolve(self, config: ModelConfig | None = None) -> "Placement":
        """Fill in the fields that are None, and check that this machine supports all fields.

        config: the model. vae_dtype and attention depend on the model, and stay None without it.
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
            raise ValueError("a CUDA graph needs weights that stay on the GPU: leave out offload or cuda_graph")
        if self.packed and not packable(device, dtype, vae_dtype, self.compile):
            raise ValueError(
                "packed weights need a CPU, a PyTorch with oneDNN, for bfloat16 a processor that oneDNN supports, and "
                f"compile=False; the device is {device}: leave out packed"
            )
        return dataclasses.replace(self, **chosen)

    @classmethod
    def fast(cls, **chosen: Any) -> "Placement":
        """Return the placement that the `ldm` command uses: the `chosen` fields, and fast defaults for the others."""
        from ldm.placement.choice import choose

        return cls(**(choose(cls(**chosen), fast=True) | chosen)).resolve()

    def apply(self, networks: Mapping[str, nn.Module]) -> None:
        """Apply this resolved placement to the networks of a model, once. It moves no network to another device.

        networks: by name, "unet", "vae", "text_encoder" and others such as a ControlNet.
        The order is fixed: merge LoRA weights before this call. This call sets attention and memory format, compiles,
        packs, and pins memory for offload; a text encoder is only pinned. CUDA graphs are recorded later, in sampling.
        """
        cuda = torch.device(self.device or "cpu").type == "cuda"
        if "vae" in networks:
            networks["vae"].to(dtype=self.vae_dtype)
        for network in (network for name, network in networks.items() if name != "text_encoder"):
            if self.attention is not None:
                set_attention(network, ATTENTION[self.attention])
            if cuda and next(network.parameters()).dtype != torch.float32:
                # Tensor cores need channels last. cuDNN would convert other formats for each convolution.
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
        """Return a context manager that keeps `network` on the device. Weights that are added inside are not moved.

        Several users may enter it and leave in any order. The network leaves the device when the last one leaves.
        """
        if self.offload is None:
            return nullcontext()
        from ldm.placement.offload import Moved, Streamed

        by_stages = self.offload == "blocks" and hasattr(network, "stages")  # a UNet or a ControlNet
        return (Streamed if by_stages else Moved)(network, self.device or "cuda")

    def decoder(self) -> Callable[[VAE, Tensor], Tensor]:
        """Return the decoder that `vae_memory` selects: (vae, latents: b c h w) -> images: b 3 h*f w*f."""
        if self.vae_memory == "whole":
            return lambda vae, latents: vae.decode(latents)
        from ldm.placement import slabs, tiles

        return slabs.decode_slabs if self.vae_memory == "slabs" else tiles.decode_tiles

    def encoder(self) -> Callable[[VAE, Tensor], Gaussian]:
        """Return the encoder that `vae_memory` selects: (vae, images: b 3 h w) -> Gaussian over b c h/f w/f."""
        if self.vae_memory == "whole":
            return lambda vae, images: vae.encode(images)
        from ldm.placement import slabs, tiles

        return slabs.encode_slabs if self.vae_memory == "slabs" else tiles.encode_tiles
