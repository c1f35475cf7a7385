"""The largest differences between this package and diffusers on the same weights: `python -m tests.parity.measure`."""

import argparse
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch

import ldm
from tests.parity import reference

# sampler, spacing: wherever both can be told to take the same steps
STEP_LISTS = [
    ("ddim", "leading"),
    ("euler", "leading"),
    ("euler", "linspace"),
    ("euler", "trailing"),
    ("euler", "karras"),
    ("dpmpp_2m", "trailing"),
]


@torch.no_grad()
def networks(
    ours: ldm.Pipeline, theirs: diffusers.StableDiffusionPipeline, side: int
) -> dict[str, float]:
    """Compare the outputs of each network on the same input: max |ours - theirs| / max |theirs|, fp32, CPU.

    side: of the images, in pixels.
    """
    noise = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, side, side, generator=noise) * 2 - 1
    latents = torch.randn(2, 4, side // 8, side // 8, generator=noise)
    scale = ours.config.vae.scaling_factor

    context = torch.cat(
        [theirs.encode_prompt(text, "cpu", 1, False)[0] for text in reference.PROMPTS]
    )
    timesteps = torch.tensor([981, 1])
    posterior, their_posterior = ours.vae.encode(images), theirs.vae.encode(images).latent_dist
    pairs = {
        "text encoder": (ours.text_encoder.encode(reference.PROMPTS).context, context),
        "UNet": (
            ours.unet(latents, timesteps, context),
            theirs.unet(latents, timesteps, context).sample,
        ),
        "VAE encode, mean": (posterior.mean, their_posterior.mean * scale),
        "VAE encode, deviation": (posterior.std, their_posterior.std * scale),
        "VAE decode": (ours.vae.decode(latents), theirs.vae.decode(latents / scale).sample),
    }
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


def pictures(
    ours: ldm.Pipeline,
    theirs: diffusers.StableDiffusionPipeline,
    sampler: str,
    spacing: str,
    *,
    seeds: tuple[int, ...] = (42,),
    size: tuple[int, int] = (64, 64),
    steps: int = 20,
    guidance_scale: float = 7.5,
    guidance_rescale: float = 0.0,
) -> tuple[int, float]:
    """Compare whole pictures at the same seeds (consecutive), steps, guidance and prompts.

    Returns the largest difference in levels of 255, and the standard deviation of diffusers' pictures in levels.
    """
    width, height = size
    request = ldm.Request(
        *reference.PROMPTS,
        sampler=sampler,
        spacing=spacing,
        seed=seeds[0],
        images=len(seeds),
        width=width,
        height=height,
        steps=steps,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
    )
    made = np.stack([np.asarray(picture) for picture in ours.generate(request)])
    expected = reference.pictures(
        theirs,
        sampler=sampler,
        spacing=spacing,
        seeds=list(seeds),
        size=(width, height),
        steps=steps,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
    )
    return int(abs(made.astype(int) - expected.astype(int)).max()), float(expected.std())


def main() -> None:
    """Print both comparisons as a Markdown table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--full", action="store_true", help="SD 1.5's full size: 12 GB, minutes")
    full = parser.parse_args().full
    size, image_size, side = (reference.FULL, 512, 128) if full else (reference.SMALL, 64, 64)
    with tempfile.TemporaryDirectory() as folder:
        reference.build(Path(folder), size, image_size)
        ours, theirs = ldm.load(folder, ldm.Placement("cpu")), reference.load(Path(folder))
        print("| compared with diffusers, fp32, CPU | largest difference |\n| --- | --- |")
        for name, difference in networks(ours, theirs, side).items():
            print(f"| {name} | {difference:.1e} of the largest value |")
        for sampler, spacing in STEP_LISTS:
            levels, _ = pictures(ours, theirs, sampler, spacing, size=(side, side))
            print(f"| picture, 20 steps of {sampler}, {spacing} | {levels} of 255 levels |")


if __name__ == "__main__":
    main()
