"""What a GPU can do: the VAE's dtype and the attention that suit a model there."""

import torch
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

from ldm.config import ModelConfig


def vae_dtype(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype for the VAE beside a UNet in `dtype`.

    SDXL's VAE overflows in fp16. bf16 changes its pictures by a quarter of one of 256 levels on average (measured on
    the bundled VAE). A GPU without bf16 takes fp32.
    """
    if dtype != torch.float16 or not config.vae.overflows_fp16:
        return dtype
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32


def attention(config: ModelConfig, dtype: torch.dtype, vae_dtype: torch.dtype, device: torch.device) -> str:
    """Return "sdpa" if each attention of UNet and VAE has a kernel that never holds all scores, else "sliced"."""
    unet = config.unet
    upcast = unet.upcast_attention and dtype == torch.float16
    down, up = unet.depths()
    attends = [any(level + above) for level, above in zip(down, reversed(up), strict=True)]
    attends[-1] |= unet.mid == "full"
    widths = {c // h for c, h, some in zip(unet.channels, unet.heads, attends, strict=True) if some}
    heads = [(width, torch.float32 if upcast else dtype) for width in widths]
    heads.append((config.vae.channels[-1], vae_dtype))
    return "sdpa" if all(is_fused(width, dtype, device) for width, dtype in heads) else "sliced"


def is_fused(width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch has a fused kernel for heads of that width on this device."""
    if device.type != "cuda":
        return False
    q = torch.empty(1, 1, 64, width, dtype=dtype, device=device)
    params = SDPAParams(q, q, q, None, 0.0, False, False)
    return can_use_flash_attention(params) or can_use_efficient_attention(params)
