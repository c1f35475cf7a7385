"""Inpainting: a denoiser that keeps a part of the latents, and a network with the channels of an inpainting model."""

import torch
from torch import Tensor

from ldm.conditioning import Condition
from ldm.diffusion.denoiser import Bind, Denoiser, Network


def keep(denoise: Denoiser, known: Tensor, mask: Tensor, *, noise: Tensor, sigmas: Tensor) -> Denoiser:
    """Make a denoiser that repaints the latents where the mask is 1, and keeps the known latents where it is 0.

    Where latents are kept, x0 is `known`, and the network sees known + sigma noise instead of the sampler's x. The
    noise is the initial noise at every step. For these latents diffusers' inpainting pipelines replace x after each
    step by the same sum. All samplers compute each latent from its own x and x0 alone, so both forms repaint alike.
    At sigmas[0] the network sees x itself, as in diffusers: pure noise if all steps run.

    A mask between 0 and 1 is differential inpainting (Levin & Fried 2023, algorithm 1). The latents are kept in the
    first 1 - mask of the steps, and repainted in the others. A mask of 0.6 is image to image with strength 0.6. In the
    authors' code such latents join one step earlier.

    The last x of the kept latents is known + sigma noise too. So with DDIM, which ends at sigma 0.03, they have noise
    of this level, as the repainted ones do. diffusers returns the known latents without noise.

    known: clean latents, b c h w. mask: b 1 h w or 1 1 h w, in [0, 1]. noise: b c h w, from which x started.
    sigmas: the levels of all steps, see `NoiseSchedule.steps`. sigma: one level for all images.
    """
    levels = sigmas.tolist()

    def inpaint(x: Tensor, sigma: Tensor) -> Tensor:
        level = float(sigma)
        done = sum(high > level for high in levels) / (len(levels) - 1)  # the share of the steps before this one
        kept = mask < 1 - done
        if done:
            x = torch.where(kept, known + level * noise, x)
        return torch.where(kept, known, denoise(x, sigma))

    return inpaint


def with_channels(bind: Bind, channels: Tensor) -> Bind:
    """Make a `bind` whose networks get `channels` after the latents, b (c + n) h w, the same at every step.

    channels: b n h w. For an inpainting model: the mask, and the latents of the picture with its masked part in gray.
    """

    def bind_with_channels(condition: Condition) -> Network:
        network = bind(condition)

        def predict(z: Tensor, timesteps: Tensor) -> Tensor:
            repeated = channels.repeat(len(z) // len(channels), 1, 1, 1).to(z)  # one copy for each condition
            return network(torch.cat([z, repeated], dim=1), timesteps)

        return predict

    return bind_with_channels
