"""From a network that predicts eps, v or x0 to the function that samplers call.

A sampler asks one question: what are the clean latents x0, given x and the noise level sigma? A `Denoiser` answers it.
A guided denoiser is made of a UNet in two steps:

    network = guided(unet.bind, [with_prompt, without], classifier_free(7.5))   # conditions to one Network
    denoise = parametrize(network, schedule, "eps")                             # a Network to a Denoiser
    for step in euler(denoise, x, sigmas): ...

Without guidance the network is `unet.bind(condition)`, or any other function of (z, timesteps).
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ldm.conditioning import Condition, join
from ldm.diffusion.schedule import NoiseSchedule, factor, to_vp

# (x, sigma) -> x0. x: b c h w, x0 + sigma noise. sigma: 0-d, or one per image: b. Samplers call it.
Denoiser = Callable[[Tensor, Tensor], Tensor]
# (z, timesteps) -> eps, v or x0. z: b c h w of unit variance. timesteps: b. Training trains it.
Network = Callable[[Tensor, Tensor], Tensor]
Bind = Callable[[Condition], Network]  # such as `UNet.bind`
Rule = Callable[[Sequence[Tensor]], Tensor]  # the predictions of several conditions -> one prediction
Prediction = Literal["eps", "v", "x0"]


def to_x0(prediction: Tensor, x: Tensor, sigma: float | Tensor, kind: Prediction) -> Tensor:
    """Turn the network's prediction for x = x0 + sigma noise into an estimate of x0.

    eps: x - sigma eps   (Ho et al. 2020, eq. 15, in sigma space)
    v:   x / (1 + sigma^2) - v sigma / sqrt(1 + sigma^2)   (Salimans & Ho 2022, appendix D)
    x0:  the prediction itself
    sigma: one level, or one per image: b.
    Raises ValueError for another kind.
    """
    s = factor(sigma, x)
    if kind == "eps":
        return x - s * prediction
    if kind == "v":
        return x / (1 + s**2) - prediction * (s / (1 + s**2) ** 0.5)
    if kind == "x0":
        return prediction
    raise ValueError(f"prediction must be one of {get_args(Prediction)}, got {kind!r}")


def parametrize(
    network: Network, schedule: NoiseSchedule, prediction: Prediction = "eps", *, dtype: torch.dtype | None = None
) -> Denoiser:
    """Make a Denoiser of a network that predicts `prediction`.

    dtype: the dtype of the network (default: that of x). The latents are cast to it and the prediction is cast back,
      so that the sampler keeps the precision of x. Timesteps keep the dtype of x, because bf16 cannot hold 999.
    Raises ValueError for another prediction, and for eps at zero terminal SNR: there the first latents are pure noise,
    and their eps says nothing about x0.
    """
    if prediction not in get_args(Prediction):
        raise ValueError(f"prediction must be one of {get_args(Prediction)}, got {prediction!r}")
    if prediction == "eps" and schedule.zero_terminal_snr:
        raise ValueError(
            "a zero-terminal-SNR schedule needs a network that predicts v or x0, got 'eps'; "
            "name the network's real prediction, or set zero_terminal_snr=False"
        )

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        t = schedule.timestep(sigma)
        # One timestep for all images is filled in on the device: a copy from the CPU would wait for the device.
        timesteps = t.to(x) if t.ndim else x.new_full((len(x),), float(t))
        predicted = network(to_vp(x, sigma).to(dtype or x.dtype), timesteps)
        return to_x0(predicted.to(x.dtype), x, sigma, prediction)

    return denoise


def guided(bind: Bind, conditions: Sequence[Condition], rule: Rule, *, batched: bool = True) -> Network:
    """Combine the predictions of several conditions by `rule`; with one condition, predict without the rule.

    bind: makes the network of a condition, once for all steps, such as `UNet.bind`.
    rule: takes the predictions in the order of the conditions, in fp32 or better, such as `classifier_free`.
    batched: call the network once on all conditions, n * b. False calls it n times on b, which is slower and needs
      less memory for activations.
    Raises ValueError for no condition, and for conditions of different shapes in one batch.
    """
    if not conditions:
        raise ValueError("guidance needs one condition or more, got none")
    if len(conditions) == 1:
        return bind(conditions[0])
    n = len(conditions)
    # The prompt comes last in the batch, as in diffusers: the results are the same bits.
    networks = [bind(join(conditions[::-1]))] if batched else [bind(condition) for condition in conditions]

    def predict(z: Tensor, timesteps: Tensor) -> Tensor:
        if batched:
            (network,) = networks
            predictions = network(torch.cat([z] * n), torch.cat([timesteps] * n)).chunk(n)[::-1]  # n b c h w
        else:
            predictions = tuple(network(z, timesteps) for network in networks)
        # Guidance multiplies the rounding errors of a difference.
        return rule([p.to(torch.promote_types(p.dtype, torch.float32)) for p in predictions])

    return predict


def classifier_free(scale: float, rescale: float = 0.0) -> Rule:
    """Make the rule of classifier-free guidance, for two conditions: the prompt, and the negative or empty prompt.

    prediction = uncond + scale (cond - uncond)   (Ho & Salimans 2022, eq. 6, with scale = 1 + w)

    rescale: 0 to 1, how much of the way the result is scaled to the standard deviation of the conditional prediction
      (Lin et al. 2023, section 3.4). Use 0.7 for zero terminal SNR.
    Raises ValueError for a negative scale and a rescale outside 0 .. 1.
    """
    if not scale >= 0:
        raise ValueError(f"the guidance scale must be 0 or more, got {scale}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale must lie in 0 .. 1, got {rescale}")

    def rule(predictions: Sequence[Tensor]) -> Tensor:
        cond, uncond = predictions
        result = uncond + scale * (cond - uncond)
        if rescale:
            ratio = _std(cond) / _std(result)
            result = result * (rescale * ratio + 1 - rescale)
        return result

    return rule


def within(interval: tuple[float, float], inside: Denoiser, outside: Denoiser) -> Denoiser:
    """Call `inside` at noise levels low < sigma <= high of `interval`, and `outside` at all others.

    With a guided denoiser inside and an unguided one outside, this is guidance in a limited interval (Kynkaanniemi et
    al. 2024). Each level outside costs one prediction instead of two.
    Raises ValueError unless 0 <= low < high.
    """
    low, high = interval
    if not 0 <= low < high:
        raise ValueError(f"the interval must satisfy 0 <= low < high, got {low} and {high}")
    return lambda x, sigma: (inside if low < float(sigma) <= high else outside)(x, sigma)


def consistency(
    denoise: Denoiser, schedule: NoiseSchedule, *, sigma_data: float = 0.5, timestep_scaling: float = 10.0
) -> Denoiser:
    """Apply the boundary scalings of latent consistency models to their denoiser, for the sampler `lcm`.

    f(z, t) = c_skip z + c_out x0, which is z at t = 0 (Luo et al. 2023, eq. 9 and section 4.3), with
    c_skip = d^2 / (s^2 + d^2), c_out = s / sqrt(s^2 + d^2), s = timestep_scaling t, d = sigma_data.
    """

    def skip_and_out(x: Tensor, sigma: Tensor) -> Tensor:
        scaled = timestep_scaling * factor(schedule.timestep(sigma), x)
        c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
        c_out = scaled / (scaled**2 + sigma_data**2) ** 0.5
        return c_skip * to_vp(x, sigma) + c_out * denoise(x, sigma)

    return skip_and_out


def _std(prediction: Tensor) -> Tensor:
    """Return the standard deviation of each image, b 1 1 1."""
    return prediction.std(dim=tuple(range(1, prediction.ndim)), keepdim=True)
