"""From a network that predicts eps, v or x0 to the one function that samplers call.

A sampler asks one question, "which clean latent is this?", and whatever changes the answer wraps
the function that gives it. A guided picture from a UNet is two wrappers, inside out:

    predict = guided(unet, cond, uncond, scale=7.5)             # two conditions, one Network
    denoise = parametrise(predict, schedule, "eps", dtype=...)  # a Network as a Denoiser
    for step in euler(denoise, x, sigmas): ...

Without guidance, `Network` is any function of (z, timesteps), such as a lambda around the UNet.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule, to_vp

# (x, sigma) -> x0. x: b c h w, x0 + sigma noise. sigma: 0-d. What samplers call.
Denoiser = Callable[[Tensor, Tensor], Tensor]
# (z, timesteps) -> eps, v or x0. z: b c h w of unit variance. timesteps: b. What training trains.
Network = Callable[[Tensor, Tensor], Tensor]
Prediction = Literal["eps", "v", "x0"]


def to_x0(prediction: Tensor, x: Tensor, sigma: float | Tensor, kind: Prediction) -> Tensor:
    """Turn what a network predicted for `x` = x0 + sigma noise into its estimate of x0.

    eps: x - sigma eps   (Ho et al. 2020, eq. 15, in sigma space)
    v:   x / (1 + sigma^2) - v sigma / sqrt(1 + sigma^2)   (Salimans & Ho 2022, appendix D)
    x0:  the prediction itself
    Raises ValueError for another kind.
    """
    sigma = float(sigma)
    if kind == "eps":
        return x - sigma * prediction
    if kind == "v":
        return x / (1 + sigma**2) - prediction * (sigma / math.sqrt(1 + sigma**2))
    if kind == "x0":
        return prediction
    raise ValueError(f"prediction must be one of {get_args(Prediction)}, got {kind!r}")


def parametrise(
    network: Network, schedule: NoiseSchedule, prediction: Prediction = "eps", *, dtype: torch.dtype | None = None
) -> Denoiser:
    """Make a Denoiser of a network that predicts `prediction`.

    dtype: what the network computes in (default: the dtype of x). The latents are cast to it once
      and its prediction back once, so that the sampler's own arithmetic keeps the precision of x;
      timesteps stay in the dtype of x, because bf16 cannot hold 999.
    Raises ValueError for another prediction, and for eps at zero terminal SNR, where the first
    latents are pure noise and knowing it says nothing about x0.
    """
    if prediction not in get_args(Prediction):
        raise ValueError(f"prediction must be one of {get_args(Prediction)}, got {prediction!r}")
    if prediction == "eps" and schedule.zero_terminal_snr:
        raise ValueError(
            "a zero-terminal-SNR schedule needs a network that predicts v or x0, got 'eps'; "
            "use that network's own prediction, or zero_terminal_snr=False"
        )

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        # Filled in on the device: a copy from the CPU would wait for all that is queued there.
        timesteps = x.new_full((len(x),), float(schedule.timestep(sigma)))
        predicted = network(to_vp(x, sigma).to(dtype or x.dtype), timesteps)
        return to_x0(predicted.to(x.dtype), x, sigma, prediction)

    return denoise


def guided(
    network: Callable[..., Tensor],
    cond: Sequence[Tensor | None],
    uncond: Sequence[Tensor | None] | None,
    scale: float,
    *,
    rescale: float = 0.0,
    batched: bool = True,
    prepare: Callable[..., Sequence[Any]] | None = None,
) -> Network:
    """Steer `network` from `uncond` towards `cond` with classifier-free guidance.

    prediction = uncond + scale (cond - uncond)   (Ho & Salimans 2022, eq. 6, with scale = 1 + w)

    network: called as network(z, timesteps, *condition), as a UNet is with (context, vector).
    cond, uncond: what follows the timesteps, each entry b ... or None; uncond may be None where
      scale does not need it.
    scale: up to 1 there is no guidance, and one call with `cond` alone.
    rescale: 0 to 1, how far to shrink the result to the standard deviation of the conditional
      prediction (Lin et al. 2023, section 3.4); 0.7 for zero terminal SNR.
    batched: one call on uncond and cond together, 2b; False makes two calls on b, slower but with
      half of the activations in memory.
    prepare: called once with each condition that the network is to see, as prepare(*condition); what
      it returns follows the timesteps instead. `UNet.prepare` does once what all steps share.
    The sum is made in fp32 or better, whatever the network computes in.
    Raises ValueError for a negative scale, a rescale outside 0 .. 1, a missing uncond, and for
    conditions of unlike shapes, which one batch cannot hold.
    """
    if not scale >= 0:
        raise ValueError(f"the guidance scale must be 0 or more, got {scale}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale must lie in 0 .. 1, got {rescale}")
    prepare = prepare or (lambda *condition: condition)
    if scale <= 1:
        alone = prepare(*cond)
        return lambda z, timesteps: network(z, timesteps, *alone)
    if uncond is None:
        raise ValueError(f"a guidance scale of {scale} needs an unconditional condition, got None")
    if batched:
        both = prepare(*[_cat(u, c) for u, c in zip(uncond, cond, strict=True)])
    else:
        each = prepare(*uncond), prepare(*cond)

    def predict(z: Tensor, timesteps: Tensor) -> Tensor:
        if batched:
            zz, tt = torch.cat([z, z]), torch.cat([timesteps, timesteps])  # 2b c h w, 2b
            without, given = _widen(network(zz, tt, *both)).chunk(2)
        else:
            without, given = (_widen(network(z, timesteps, *one)) for one in each)
        steered = without + scale * (given - without)
        if rescale:
            ratio = _std(given) / _std(steered)
            steered = steered * (rescale * ratio + 1 - rescale)
        return steered

    return predict


def within(interval: tuple[float, float], inside: Denoiser, outside: Denoiser) -> Denoiser:
    """Ask `inside` at noise levels low < sigma <= high of `interval`, and `outside` at all others.

    With a guided denoiser inside and the conditional one outside this is guidance in a limited
    interval (Kynkaanniemi et al. 2024), and each level outside costs one pass instead of two.
    Raises ValueError unless 0 <= low < high.
    """
    low, high = interval
    if not 0 <= low < high:
        raise ValueError(f"the interval must satisfy 0 <= low < high, got {low} and {high}")
    return lambda x, sigma: (inside if low < float(sigma) <= high else outside)(x, sigma)


def consistency(
    denoise: Denoiser, schedule: NoiseSchedule, *, sigma_data: float = 0.5, timestep_scaling: float = 10.0
) -> Denoiser:
    """Wrap the denoiser of a latent consistency model in its boundary scalings, for `lcm`.

    f(z, t) = c_skip z + c_out x0, which is z itself at t = 0 (Luo et al. 2023, eq. 9 and section
    4.3), with c_skip = d^2 / (s^2 + d^2), c_out = s / sqrt(s^2 + d^2), s = timestep_scaling t.
    """

    def skip_and_out(x: Tensor, sigma: Tensor) -> Tensor:
        scaled = timestep_scaling * float(schedule.timestep(sigma))
        c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
        c_out = scaled / math.sqrt(scaled**2 + sigma_data**2)
        return c_skip * to_vp(x, sigma) + c_out * denoise(x, sigma)

    return skip_and_out


def _cat(uncond: Tensor | None, cond: Tensor | None) -> Tensor | None:
    """One batch of two conditions, in diffusers' order."""
    if uncond is None and cond is None:
        return None
    if uncond is None or cond is None or uncond.shape != cond.shape:
        shapes = [None if c is None else tuple(c.shape) for c in (cond, uncond)]
        raise ValueError(
            f"batched guidance needs conditions of equal shape, got {shapes[0]} and {shapes[1]} "
            "(unconditional); encode both to the same length or pass batched=False"
        )
    return torch.cat([uncond, cond])  # 2b ...


def _widen(prediction: Tensor) -> Tensor:
    """The prediction in fp32 at least: guidance multiplies the rounding of its difference."""
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32))


def _std(prediction: Tensor) -> Tensor:
    """The standard deviation of each image, b 1 1 1."""
    return prediction.std(dim=tuple(range(1, prediction.ndim)), keepdim=True)
