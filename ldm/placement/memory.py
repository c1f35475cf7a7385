"""Where a model lives and how it computes, as one value that is applied once."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

from ldm.config import ModelConfig, VAEConfig
from ldm.models.attention import Attend, math_attention, sdpa, set_attention, sliced_attention
from ldm.models.int8 import can_quantize, quantize
from ldm.models.layers import ResBlock
from ldm.models.transformer import TransformerBlock
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.placement.offload import Moved, Streamed, pin, tensors_of
from ldm.placement.packing import can_pack, pack
from ldm.placement.slabs import decode_slabs
from ldm.placement.tiles import decode_tiles

ATTENTION: dict[str, Attend] = {"sdpa": sdpa, "sliced": sliced_attention, "math": math_attention}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DECODE: dict[str, Callable[[VAE, Tensor], Tensor]] = {
    "whole": lambda vae, latents: vae.decode(latents),
    "slabs": lambda vae, latents: decode_slabs(vae, latents, budget=slab_budget(vae, latents)),
    "tiles": decode_tiles,
}
GUIDANCE = ("batched", "sequential")
OFFLOAD = ("model", "blocks")


@dataclass(frozen=True)
class Placement:
    """Device, precision and memory of a model. Samplers and schedules stay in fp32 and fp64 whatever is chosen.

    Where a choice changes numbers, this says so; the others change time and memory only.

    device: such as "cpu" or "cuda:1"; None takes the GPU if there is one.
    dtype: of the UNet and the text encoder; None takes fp16 on CUDA and fp32 elsewhere.
    vae_dtype: of the VAE; None takes `dtype`. But SDXL's VAE overflows in fp16: it takes bf16 then (a quarter of one of
      256 brightness levels on average, measured on the bundled VAE), and fp32 on a GPU without bf16.
    attention: "sdpa" (PyTorch's fused kernels), "sliced" (a part of the scores at a time, little memory) or "math" (the
      formula), equal but for rounding. None takes sdpa where its kernels never hold all scores, which is on any CPU
      and, for the dtypes that a GPU knows, on any GPU of this decade; elsewhere sliced.
    guidance: "batched" (one call of the UNet for both conditions) or "sequential" (two calls, slower, half of the
      activations), equal but for rounding.
    vae_memory: how a picture is decoded: "whole", in "slabs" of rows (exact but for rounding, in the memory that
      `slab_budget` gives, up to four times slower), or in "tiles" (0.4 GiB in fp16, little slower, approximate).
    offload: where weights wait while another network works. None: all stay on the device. "model": in host memory, a
      whole network at a time is on the device. "blocks": so, and of the UNet two stages at a time.
    cuda_graph: on CUDA and without offload, record the UNet's calls and replay them. It holds the activations of one
      call for as long as the pipeline lives.
    compile: compile the blocks of UNet and VAE at their first call (minutes). Rounds otherwise.
    packed: on a CPU, hold the weights of UNet and VAE in the order that oneDNN computes in, for inference: they are no
      parameters then, see `ldm.placement.packing`. 1.2 to 1.4 times as fast at 256 pixels. Rounds otherwise.
    int8: hold the weights of the UNet's linear layers in eight bits, which are most of SDXL's; approximate. It needs
      torchao, and such weights stay where they are: without offload.
    """

    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    vae_dtype: torch.dtype | None = None
    attention: str | None = None
    guidance: str = "batched"
    vae_memory: str = "whole"
    offload: str | None = None
    cuda_graph: bool = False
    compile: bool = False
    packed: bool = False
    int8: bool = False

    def resolve(self, config: ModelConfig | None = None) -> "Placement":
        """Fill in what is None, as far as it does not depend on the model or `config` is given, and check it.

        Raises ValueError for a device that is unknown or absent, a dtype that is no fp32, fp16 or bf16, fp16 on a CPU,
        a word that is none of those above, offload without CUDA, packed weights off a CPU or in compiled blocks, and
        weights in int8 without torchao, or offloaded, or packed.
        """
        _check("attention", self.attention or "sdpa", tuple(ATTENTION))
        _check("guidance", self.guidance, GUIDANCE)
        _check("vae_memory", self.vae_memory, tuple(DECODE))
        _check("offload", self.offload or "model", OFFLOAD)
        device = find_device(self.device)
        dtype = self.dtype or (torch.float16 if device.type == "cuda" else torch.float32)
        vae_dtype, attention = self.vae_dtype, self.attention
        if config is not None:
            vae_dtype = vae_dtype or _vae_dtype(config.vae, dtype, device)
            attention = attention or _attention(config, dtype, vae_dtype, device)
        for name, choice in (("dtype", dtype), ("vae_dtype", vae_dtype or dtype)):
            if choice not in DTYPES:
                allowed = ", ".join(map(str, DTYPES))
                raise ValueError(f"{name} must be one of {allowed}, got {choice!r}")
            if choice == torch.float16 and device.type == "cpu":
                raise ValueError(
                    f"{name} float16 is up to 200 times slower than float32 on a CPU; use float32 or bfloat16"
                )
        if self.offload is not None and device.type != "cuda":
            raise ValueError(
                f"offload {self.offload!r} keeps weights out of a CUDA device's memory, and the device is {device}; "
                "leave it out"
            )
        if self.int8 and not can_quantize():
            raise ValueError("weights in int8 need torchao: pip install torchao, or leave it out")
        if self.int8 and (self.offload or self.packed):
            other = f"offload {self.offload!r}" if self.offload else "packed weights"
            raise ValueError(f"weights in int8 go with no {other}: leave one of them out")
        if self.packed and not self.packable:
            raise ValueError(
                "packed weights need a CPU, a PyTorch with oneDNN, for bfloat16 a processor that oneDNN supports, and "
                f"blocks that are not compiled; the device is {device}: leave it out"
            )
        return dataclasses.replace(self, device=device, dtype=dtype, vae_dtype=vae_dtype, attention=attention)

    @classmethod
    def fast(cls, **chosen: Any) -> "Placement":
        """Return the placement that the `ldm` command takes: the fastest one with the `chosen` fields.

        On a CPU it is 1.3 to 1.6 times as fast as the default: weights are packed, and in bf16 attention is sliced.
        Only the last bits of the numbers change, and in bf16 scores of attention are rounded to bf16. Packed weights
        are no parameters: before training, merging or quantizing, plain layers must come back by
        `ldm.placement.packing.unpack(pipe.unet)`. On other devices, and for a CPU without oneDNN, it is the default.
        Raises what `resolve` raises, and TypeError for an unknown field.
        """
        placement = cls(**chosen)
        resolved = placement.resolve()
        cpu = find_device(placement.device).type == "cpu"
        slices = cpu and resolved.dtype == torch.bfloat16 and can_pack(torch.bfloat16)
        return dataclasses.replace(
            placement,
            attention=placement.attention or ("sliced" if slices else None),
            packed=chosen.get("packed", placement.packable),
        )

    @property
    def packable(self) -> bool:
        """Whether weights can be packed where all else is as it is here."""
        cpu = find_device(self.device).type == "cpu"
        known = can_pack(self.dtype) and can_pack(self.vae_dtype)
        return cpu and known and not self.compile and not self.int8

    def encoder(self) -> Any:
        from ldm.placement.slabs import encode_slabs
        from ldm.placement.tiles import encode_tiles

        return {
            "whole": lambda vae, images: vae.encode(images),
            "slabs": lambda vae, images: encode_slabs(vae, images, budget=2**29),
            "tiles": encode_tiles,
        }[self.vae_memory]

    def decoder(self) -> Any:
        return DECODE[self.vae_memory]

    def apply(self, networks: Any) -> None:
        """Set up three networks as this resolved placement says, where they are; once."""
        assert self.attention is not None
        unet, vae, text_encoder = networks["unet"], networks["vae"], networks["text_encoder"]
        cuda = find_device(self.device).type == "cuda"
        vae.to(dtype=self.vae_dtype)
        for network in (unet, vae):
            set_attention(network, ATTENTION[self.attention])
            if cuda and next(network.parameters()).dtype != torch.float32:
                # Tensor cores want the channels last; elsewhere cuDNN reorders around each convolution.
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if self.int8 and network is unet:
                quantize(unet)
            if self.compile:
                compile_blocks(network)
            if self.packed:
                pack(network)
        if self.offload is not None and cuda:
            for network in (unet, vae, text_encoder):
                pin(network)

    def at_work(self, network: nn.Module) -> AbstractContextManager[object]:
        """Return a context manager inside which `network` is on the device."""
        if self.offload is None:
            return nullcontext()
        device = find_device(self.device)
        if self.offload == "blocks" and isinstance(network, UNet):
            return Streamed(network, device)
        return Moved(tensors_of(network), device)


def compile_blocks(network: nn.Module, *, backend: str = "inductor") -> None:
    """Have the blocks of a network compiled, each kind and size of them once, when it is first called.

    That is nearly all of its work, at a part of the time that compiling all of it would take. Other prompts, seeds,
    steps and guidance need nothing new; other picture sizes do, twice at most.
    """
    import torch._dynamo  # seconds to import

    # It counts all sizes of a class together, up to a limit for the process: 12 of SD 1.5's ResBlocks are too many.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    for part in network.modules():
        if isinstance(part, ResBlock | TransformerBlock):
            part.compile(fullgraph=True, backend=backend)


def slab_budget(vae: VAE, latents: Tensor) -> int:
    """Bytes for a picture in slabs: a quarter of what the whole takes, but 384 MiB if that is less, and 1 GiB at most.

    latents: b c h w, of which one picture is meant.
    """
    pixels = latents[0, 0].numel() * vae.config.factor**2
    whole = 768 * latents.element_size() * pixels  # SD's decoder: 256 channels of full size three times
    return min(max(whole // 4, 384 * 2**20), 2**30)


def find_device(wanted: str | torch.device | None) -> torch.device:
    """Return the torch device of that name, or the best there is for None.

    Raises ValueError if there is none of that name.
    """
    if wanted is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda, cuda:N or mps, got {wanted!r}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(
                f"device {device} is not available: PyTorch {torch.__version__} sees {count} CUDA devices; use cpu"
            )
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError(f"device mps is not available to PyTorch {torch.__version__} here; use cpu")
    elif device.type != "cpu":
        raise ValueError(f"device must be cpu, cuda, cuda:N or mps, got {wanted!r}")
    return device


def _vae_dtype(config: VAEConfig, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the VAE computes in beside a UNet in `dtype`."""
    if dtype != torch.float16 or not config.overflows_fp16:
        return dtype
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32


def _attention(config: ModelConfig, dtype: torch.dtype, vae_dtype: torch.dtype, device: torch.device) -> str:
    """The attention that holds no full matrix of scores on this device."""
    unet, vae = config.unet, config.vae
    upcast = unet.upcast_attention and dtype == torch.float16
    down, up = unet.depths()
    attends = [any(level + above) for level, above in zip(down, reversed(up), strict=True)]
    attends[-1] |= unet.mid == "full"
    widths = {c // h for c, h, some in zip(unet.channels, unet.heads, attends, strict=True) if some}
    heads = [(width, torch.float32 if upcast else dtype) for width in widths]
    heads.append((vae.channels[-1], vae_dtype))
    return "sdpa" if all(_is_fused(width, dtype, device) for width, dtype in heads) else "sliced"


def _is_fused(width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether SDPA has a kernel for heads of that width, instead of the formula."""
    if device.type != "cuda":
        return device.type == "cpu"
    q = torch.empty(1, 1, 64, width, dtype=dtype, device=device)
    params = SDPAParams(q, q, q, None, 0.0, False, False)
    return can_use_flash_attention(params) or can_use_efficient_attention(params)


def _check(name: str, word: str, allowed: tuple[str, ...]) -> None:
    if word not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {word!r}")
