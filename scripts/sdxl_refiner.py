"""SDXL in two stages without the `Pipeline`: the base model runs the first steps, the refiner the last ones.

python scripts/sdxl_refiner.py "a red apple" --base sd_xl_base_1.0.safetensors --refiner sd_xl_refiner_1.0.safetensors

The picture equals that of `ldm.refine` with the sampler euler, bit for bit. One model is in memory at a time.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint.files import load
from ldm.conditioning import condition
from ldm.diffusion.denoiser import classifier_free, guided, parametrize
from ldm.diffusion.samplers import euler, seeded_noise
from ldm.diffusion.schedule import NoiseSchedule, to_ve
from ldm.images import to_pil
from ldm.models.vae import VAE
from ldm.pictures import save_png
from ldm.request import Request

parser = argparse.ArgumentParser(description="Make a picture from a prompt with SDXL and its refiner.")
parser.add_argument("prompt")
parser.add_argument("--base", required=True, type=Path)
parser.add_argument("--refiner", required=True, type=Path)
parser.add_argument("--handover", default=0.8, type=float, help="the share of the timesteps for the base model")
parser.add_argument("--negative", help="what the picture should not show")
parser.add_argument("--steps", default=25, type=int, help="of both together")
parser.add_argument("--guidance", default=5.0, type=float)
parser.add_argument("--size", default=1024, type=int, help="width and height")
parser.add_argument("--seed", default=0, type=int)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--out", default="out.png", type=Path)
args = parser.parse_args()


@torch.no_grad()
def main() -> None:
    # One list of noise levels for both models, cut at the handover: 0.8 is timestep 200 of 1000.
    schedule = NoiseSchedule()  # both models were trained with it
    sigmas = schedule.steps(args.steps, "leading")
    cutoff = round(len(schedule) - args.handover * len(schedule))
    cut = int((schedule.timestep(sigmas[:-1]) >= cutoff).sum())
    x, _ = stage(args.base, schedule, sigmas[: cut + 1])
    x, vae = stage(args.refiner, schedule, sigmas[cut:], x)
    save_png(to_pil(vae.decode(x))[0], args.out)


def stage(path: Path, schedule: NoiseSchedule, sigmas: Tensor, x: Tensor | None = None) -> tuple[Tensor, VAE]:
    # The three networks and their configuration. The VAE stays in fp32, because SDXL's overflows in fp16.
    dtype = torch.float32 if args.device == "cpu" else torch.float16
    config, unet, vae, text_encoder = load(path, dtype=dtype, vae_dtype=torch.float32, device=args.device)[:4]

    # The refiner has one of the base model's two text encoders, and an aesthetic score instead of the target size.
    request = Request(args.prompt, args.negative, args.steps, args.guidance, width=args.size, height=args.size)
    plan = request.resolved(config)
    conditions = condition(text_encoder, plan.texts, plan.scalars).rows()

    # Noise of the first level. It is drawn on the CPU, so that a seed gives the same noise on every device.
    if x is None:
        noise = seeded_noise([args.seed], plan.latent_shape)
        x = to_ve(noise(), sigmas[0]).to(args.device)  # 1 c h w, fp32

    # The UNet with its conditions, then guided: (z, timesteps) -> eps or v. Then the denoiser: (x, sigma) -> x0.
    network = guided(unet.bind, conditions, classifier_free(plan.guidance_scale))
    denoise = parametrize(network, schedule, config.diffusion.prediction, dtype=dtype)
    for step in tqdm(euler(denoise, x, sigmas), total=len(sigmas) - 1, desc=path.stem, disable=None):
        x = step.x
    return x, vae


main()
