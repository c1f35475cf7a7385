"""Models of the SD 1.5 architecture with random weights, built, saved and run by diffusers alone."""

import logging
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.models.text import official_vocabulary

PROMPTS = ["a red apple on a wooden table, 35mm", "blurry, low contrast"]  # and negative

# What is smaller than in SD 1.5, per component; an empty size is SD 1.5 itself.
SMALL: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 32},
    "vae": {"block_out_channels": (32, 32, 64, 64)},
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}
FULL: dict[str, dict[str, Any]] = {"unet": {}, "vae": {}, "text_encoder": {}}


def build(folder: Path, size: dict[str, dict[str, Any]], image_size: int) -> None:
    """Save a StableDiffusionPipeline to `folder`, seeded, whose pictures are neither flat nor a matter of luck."""
    torch.manual_seed(0)
    unet_config = {
        "sample_size": image_size // 8,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }
    vae_config = {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "sample_size": image_size,
    }
    text_config = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 49408,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
    }
    unet = diffusers.UNet2DConditionModel(**(unet_config | size["unet"]))
    vae = diffusers.AutoencoderKL(**(vae_config | size["vae"]))
    text_encoder = CLIPTextModel(CLIPTextConfig(**(text_config | size["text_encoder"])))
    vocab, merges = official_vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(**SD15_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    side = min(image_size // 8, 16)
    _fit(pipe, side)
    _scale(vae, side)
    pipe.save_pretrained(folder)


SD15_SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}


def load(folder: Path) -> diffusers.StableDiffusionPipeline:
    """Load the pipeline in `folder` with diffusers."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(
    pipe: diffusers.StableDiffusionPipeline,
    *,
    sampler: str,
    spacing: str,
    seeds: list[int],
    size: tuple[int, int],
    steps: int,
    guidance_scale: float,
    guidance_rescale: float,
) -> np.ndarray:
    """Make pictures with diffusers, one CPU generator each; returns b h w 3 bytes."""
    options = {"timestep_spacing": spacing}
    if spacing == "karras":
        options = {"use_karras_sigmas": True, "timestep_spacing": "linspace"}
    config = {k: v for k, v in SD15_SCHEDULER.items() if k != "clip_sample" or sampler == "ddim"}
    if sampler != "ddim":
        del config["set_alpha_to_one"]
    pipe.scheduler = SCHEDULERS[sampler](**config, **options)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    latents = None
    if sampler == "euler" and spacing != "leading":
        # Here diffusers starts from sigma noise; as everywhere else we start from sqrt(1 + sigma^2) noise.
        pipe.scheduler.set_timesteps(steps)
        scale = (1 + 1 / pipe.scheduler.init_noise_sigma**2) ** 0.5
        shape = (1, 4, size[1] // 8, size[0] // 8)
        latents = torch.cat([torch.randn(shape, generator=g) for g in generators]) * scale
    prompt, negative_prompt = PROMPTS
    out = pipe(
        latents=latents,
        prompt=[prompt] * len(seeds),
        negative_prompt=[negative_prompt] * len(seeds),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        width=size[0],
        height=size[1],
        generator=generators,
    )
    return np.stack([np.asarray(picture) for picture in out.images])


@torch.no_grad()
def _fit(pipe: diffusers.StableDiffusionPipeline, side: int) -> None:
    """Choose the UNet's last layer by least squares so that it predicts the noise in smooth random latents.

    Sampling with an arbitrary network is a chaotic walk: at a guidance scale of 7.5 it grew the last bit ten
    thousandfold, into another picture. With a trained one it contracts, and this is the shortest training that makes
    the difference, on branches damped so that the noise itself is among what the last layer sees.
    """
    for name, weight in pipe.unet.named_parameters():
        if name.endswith(("conv2.weight", "proj_out.weight")):
            weight *= 0.3
    layer = pipe.unet.conv_out
    count = max(8, 8192 // side**2)
    t = torch.linspace(0, 999, count).round().long()
    x0 = torch.randn(count, 4, side // 4, side // 4)
    x0 = x0.repeat_interleave(4, 2).repeat_interleave(4, 3)
    noise = torch.randn_like(x0)
    contexts = torch.cat([pipe.encode_prompt(text, "cpu", 1, False)[0] for text in PROMPTS])
    inputs = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    pipe.unet(pipe.scheduler.add_noise(x0, noise, t), t, contexts.repeat(count // 2, 1, 1))
    hook.remove()
    patches = torch.nn.functional.unfold(inputs[0], 3, padding=1)  # b (c 3 3) (h w)
    features = patches.transpose(1, 2).flatten(0, 1).double()
    targets = noise.flatten(2).transpose(1, 2).flatten(0, 1).double()  # (b h w) 4
    gram = features.T @ features
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.linalg.solve(gram + ridge, features.T @ targets)
    layer.weight.copy_(weights.T.reshape(layer.weight.shape))
    layer.bias.zero_()


@torch.no_grad()
def _scale(vae: diffusers.AutoencoderKL, side: int) -> None:
    """Rescale the last layer so that pictures, a random network's being nearly gray, have a deviation of 0.4."""
    layer = vae.decoder.conv_out
    layer.weight *= 0.4 / vae.decode(torch.randn(1, 4, side, side) / 0.18215).sample.std()
    layer.bias.zero_()
