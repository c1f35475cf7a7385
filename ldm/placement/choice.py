"""The defaults of a `Placement`: how device, dtypes, attention and packing are chosen."""

from typing import TYPE_CHECKING, Any

import torch
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

from ldm.config import ModelConfig

if TYPE_CHECKING:
    from ldm.placement.memory import Placement


def choose(asked: "Placement", config: ModelConfig | None = None, *, fast: bool = False) -> dict[str, Any]:
    """Return the fields of `asked` with a default for each None. Without `config`, vae_dtype and attention stay None.

    The defaults are:
    - device: the first GPU, else the CPU;
    - dtype: fp16 on CUDA, else fp32;
    - vae_dtype: the same as dtype. For a VAE that overflows in fp16: bf16, or fp32 on a GPU without bf16;
    - attention: sdpa on a CPU, and on a GPU that has a fused kernel for each attention of the model; else sliced.
    fast: two fields differ on a CPU if oneDNN supports the dtypes and blocks are not compiled. `Placement.fast`, and so
    the `ldm` command, use these defaults:
    - packed: True;
    - attention: sliced in bf16. This rounds the attention scores to bf16.
    The command also keeps freed memory for its process, see `ldm.placement.allocator.keep_freed_memory`.
    """
    device = find_device(asked.device)
    dtype = asked.dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    vae_dtype, packed = asked.vae_dtype, asked.packed
    attention: str | None = asked.attention
    if fast:
        packed = packable(device, dtype, vae_dtype, asked.compile)
        if packed and dtype == torch.bfloat16:
            attention = attention or "sliced"
    if config is not None:
        vae_dtype = vae_dtype or _vae_dtype(config, dtype, device)
        attention = attention or _attention(config, dtype, vae_dtype, device)
    return {"device": device, "dtype": dtype, "vae_dtype": vae_dtype, "attention": attention, "packed": packed}


def packable(device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype | None, compiled: bool) -> bool:
    """Return whether the weights of a model can be packed, see `ldm.placement.packing`."""
    if compiled or device.type != "cpu":
        return False
    from ldm.placement.packing import can_pack

    return can_pack(dtype) and can_pack(vae_dtype)


def find_device(wanted: str | torch.device | None) -> torch.device:
    """Return the device with the name `wanted`. None: the first GPU, or the CPU if there is no GPU.

    Raises ValueError for an unknown name and for an absent device.
    """
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    counts = {"cuda": cuda, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if wanted is None:
        return torch.device(next(kind for kind, count in counts.items() if count))
    try:
        device = torch.device(wanted)
        count = counts[device.type]
    except (RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"device must be cpu, cuda, cuda:N or mps, got {wanted!r}") from error
    if (device.index or 0) >= count:
        version = torch.__version__
        raise ValueError(f"device {device} is not available: PyTorch {version} sees {count} of this kind; use cpu")
    return device


def _vae_dtype(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the default dtype of the VAE for a UNet in `dtype`.

    SDXL's VAE overflows in fp16. With the bundled VAE, bf16 changes pixels by 0.25 of 256 levels on average.
    """
    if dtype != torch.float16 or not config.vae.overflows_fp16:
        return dtype
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32


def _attention(config: ModelConfig, dtype: torch.dtype, vae_dtype: torch.dtype, device: torch.device) -> str:
    """Return "sdpa" if it never stores all scores of an attention on this device, else "sliced"."""
    unet = config.unet
    upcast = unet.upcast_attention and dtype == torch.float16
    down, up = unet.depths()
    attends = [any(level + above) for level, above in zip(down, reversed(up), strict=True)]
    attends[-1] |= unet.mid == "full"
    widths = {c // h for c, h, some in zip(unet.channels, unet.heads, attends, strict=True) if some}
    heads = [(width, torch.float32 if upcast else dtype) for width in widths]
    heads.append((config.vae.channels[-1], vae_dtype))
    return "sdpa" if all(_is_fused(width, dtype, device) for width, dtype in heads) else "sliced"


def _is_fused(width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether PyTorch has a fused attention kernel for heads of this width."""
    if device.type != "cuda":
        return device.type == "cpu"
    q = torch.empty(1, 1, 64, width, dtype=dtype, device=device)
    params = SDPAParams(q, q, q, None, 0.0, False, False)
    return can_use_flash_attention(params) or can_use_efficient_attention(params)
