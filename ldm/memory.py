"""Where a model lives and what it computes in, as one value that is applied once."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ldm.models.attention import Attend, math_attention, sdpa, sliced_attention

ATTENTION: dict[str, Attend] = {
    "sdpa": sdpa,
    "sliced": sliced_attention,
    "math": math_attention,
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Resolved(NamedTuple):
    """A `Placement` with nothing left open."""

    device: torch.device
    dtype: torch.dtype
    vae_dtype: torch.dtype
    attend: Attend


@dataclass(frozen=True)
class Placement:
    """Device, precision and attention of a model. Samplers and schedules stay in fp32 and fp64 whatever is chosen.

    device: such as "cpu" or "cuda:1"; None takes the GPU if there is one.
    dtype: of the UNet and the text encoder; None takes fp16 on CUDA and fp32 elsewhere.
    vae_dtype: of the VAE; None takes fp32, because fp16 overflows in SDXL's and bf16 has fewer digits than a picture.
    attention: "sdpa" (PyTorch's fused kernels), "sliced" (a part of the scores at a time, exact, little memory)
      or "math" (the formula).
    """

    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    vae_dtype: torch.dtype | None = None
    attention: str = "sdpa"

    def resolve(self) -> Resolved:
        """Fill in what is None and check that this machine can do it.

        Raises ValueError for a device that is unknown or absent, a dtype that is no fp32, fp16 or bf16, fp16 on a CPU,
        and an unknown attention.
        """
        if self.attention not in ATTENTION:
            raise ValueError(
                f"attention must be one of {', '.join(ATTENTION)}, got {self.attention!r}"
            )
        device = _device(self.device)
        dtype = self.dtype or (torch.float16 if device.type == "cuda" else torch.float32)
        vae_dtype = self.vae_dtype or torch.float32
        for name, choice in (("dtype", dtype), ("vae_dtype", vae_dtype)):
            if choice not in DTYPES:
                allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
                raise ValueError(f"{name} must be one of {allowed}, got {choice}")
            if choice == torch.float16 and device.type == "cpu":
                raise ValueError(
                    f"{name} float16 is up to 200 times slower than float32 on a CPU; use float32 or bfloat16"
                )
        return Resolved(device, dtype, vae_dtype, ATTENTION[self.attention])


def _device(wanted: str | torch.device | None) -> torch.device:
    """The torch device of that name, checked to exist; None: the best there is."""
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
            raise ValueError(
                f"device mps is not available to PyTorch {torch.__version__} here; use cpu"
            )
    elif device.type != "cpu":
        raise ValueError(f"device must be cpu, cuda, cuda:N or mps, got {wanted!r}")
    return device
