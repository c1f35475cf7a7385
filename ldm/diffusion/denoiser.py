"""From a network that predicts eps, v or x0 to the function that samplers call.

A sampler calls a `Denoiser`: a function that estimates the clean latents x0 from x and its noise level sigma.
Two steps make a guided denoiser from a UNet:

    network = guided(unet.bind, [prompt, negative], classifier_free(7.5))   # UNet and conditions -> Network
    denoise = parametrize(network, schedule, "eps")                         # Network -> Denoiser
    for step in euler(denoise, x, sigmas): ...

Without guidance the network is `unet.bind(condition)`, or any other function of (z, timesteps).
`ldm.diffusion.schedule` explains the two forms of noisy latents, x and z.
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ldm.conditioning import Condition, join
from ldm.diffusion.schedule import NoiseSchedule, factor, to_vp

# (x, sigma) -> x0. x = x0 + sigma noise: b c h w. sigma: 0-d, or b for one noise level per image.
Denoiser = Callable[[Tensor, Tensor], Tensor]
# (z, timesteps) -> eps, v or x0. z: b c h w of unit variance. timesteps: b. This is the function that is trained.
Network = Callable[[Tensor, Tensor], Tensor]
Bind = Callable[[Condition], Network]  # condition -> the network with this condition, such as `UNet.bind`
Rule = Callable[[Sequence[Tensor]], Tensor]  # the predictions for several conditions -> one prediction
Prediction = Literal["eps", "v", "x0"]


def to_x0(prediction: Tensor, x: Tensor, sigma: float | Tensor, kind: Prediction) -> Tensor:
    """Turn the network's prediction for x = x0 + sigma noise into an estimate of x0.

    eps: x - sigma eps   (Ho et al. 2020, eq. 15, in sigma space)
    v:   x / (1 + sigma^2) - v sigma / sqrt(1 + sigma^2)   (Salimans & Ho 2022, appendix D)
    x0:  the prediction itself
    sigma: one level, or one per image: b.
    Raises ValueError for an unknown kind.
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
    """Make a Denoiser from a network that predicts eps, v or x0, as `prediction` says.

    dtype: the dtype of the network (default: the dtype of x). The latents are cast to it and the prediction is cast
      back, so that the sampler keeps the precision of x. Timesteps keep the dtype of x, because bf16 cannot hold 999.
    Raises ValueError for an unknown prediction. Raises it for eps at zero terminal SNR: the first x is pure noise, so
    that eps tells nothing about x0.
    """
    if prediction not in get_args(Prediction):
        raise ValueError(f"prediction must be one of {get_args(Prediction)}, got {prediction!r}")
    if prediction == "eps" and schedule.zero_terminal_snr:
        raise ValueError(
            "a zero-terminal-SNR schedule needs a network that predicts v or x0, got 'eps'; "
            "pass the prediction that the network was trained for, or set zero_terminal_snr=False"
        )

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        t = schedule.timestep(sigma)
        # A single timestep is written on the device: a copy from the CPU would wait for the device.
        timesteps = t.to(x) if t.ndim else x.new_full((len(x),), float(t))
        predicted = network(to_vp(x, sigma).to(dtype or x.dtype), timesteps)
        return to_x0(predicted.to(x.dtype), x, sigma, prediction)

    return denoise


def guided(bind: Bind, conditions: Sequence[Condition], rule: Rule, *, batched: bool = True) -> Network:
    """Make a network that combines the predictions for several conditions by `rule`. One condition needs no rule.

    bind: turns a condition into a network, such as `UNet.bind`. It is called here, once for all steps.
    rule: combines the predictions, such as `classifier_free(7.5)`. They come in the order of the conditions, in fp32 or
      fp64.
    batched: run the network once on a batch of all n conditions, n * b. False runs it n times on batches of b, which is
      slower and needs less memory for activations.
    Raises ValueError for no condition, and for conditions of different shapes in one batch.
    """
    if not conditions:
        raise ValueError("guidance needs one condition or more, got none")
    if len(conditions) == 1:
        return bind(conditions[0])
    n = len(conditions)
    # As in diffusers, the prompt comes last in the batch, so that the results are equal bit for bit.
    networks = [bind(join(conditions[::-1]))] if batched else [bind(condition) for condition in conditions]

    def predict(z: Tensor, timesteps: Tensor) -> Tensor:
        if batched:
            (network,) = networks
            predictions = network(torch.cat([z] * n), torch.cat([timesteps] * n)).chunk(n)[::-1]  # n b c h w
        else:
            predictions = tuple(network(z, timesteps) for network in networks)
        # In fp32 at least, because guidance multiplies the rounding error of the difference cond - uncond.
        return rule([p.to(torch.promote_types(p.dtype, torch.float32)) for p in predictions])

    return predict


def classifier_free(scale: float, rescale: float = 0.0) -> Rule:
    """Make the rule of classifier-free guidance, for two conditions: the prompt, and the negative or empty prompt.

    prediction = uncond + scale (cond - uncond)   (Ho & Salimans 2022, eq. 6, with scale = 1 + w)

    rescale: from 0, no change, to 1, which scales the result to the standard deviation of the conditional prediction
      (Lin et al. 2023, section 3.4). The paper uses 0.7 with zero terminal SNR.
    Raises ValueError for a negative scale and a rescale outside 0 .. 1.
    """
    if not scale >= 0:
        raise ValueError(f"the guidance scale must be 0 or more, got {scale}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale must lie in 0 .. 1, got {rescale}")

    def rule(predictions: Sequence[Tensor]) -> Tensor:
        if len(predictions) != 2:
            raise ValueError(
                f"classifier-free guidance combines 2 conditions, not {len(predictions)}: give another rule"
            )
        cond, uncond = predictions
        return rescaled(uncond + scale * (cond - uncond), cond, rescale)

    return rule


def rescaled(prediction: Tensor, cond: Tensor, rescale: float) -> Tensor:
    """Move the standard deviation of each guided prediction towards that of `cond`, by `rescale` from 0 to 1."""
    if not rescale:
        return prediction
    dims = tuple(range(1, cond.ndim))
    ratio = cond.std(dim=dims, keepdim=True) / prediction.std(dim=dims, keepdim=True)
    return prediction * (rescale * ratio + 1 - rescale)


def within(interval: tuple[float, float], inside: Denoiser, outside: Denoiser) -> Denoiser:
    """Make a denoiser that calls `inside` at noise levels low < sigma <= high, and `outside` at all other levels.

    With a guided denoiser inside and an unguided one outside, this is guidance in a limited interval (Kynkaanniemi et
    al. 2024). A step outside of the interval costs one prediction instead of two. sigma: one level for all images.
    Raises ValueError unless 0 <= low < high.
    """
    low, high = interval
    if not 0 <= low < high:
        raise ValueError(f"the interval must satisfy 0 <= low < high, got {low} and {high}")
    return lambda x, sigma: (inside if low < float(sigma) <= high else outside)(x, sigma)
