"""Text to image, unrolled: everything between a prompt and a PNG, to read, change and take parts from.

python scripts/txt2img.py "a frog on the grass" --model weights/tiny --out frog.png

The same numbers as `ldm.Pipeline` with the sampler dpmpp_2m, bit for bit.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from ldm.checkpoint.files import load
from ldm.conditioning import timestep_embedding
from ldm.diffusion.denoiser import guided, parametrise
from ldm.diffusion.samplers import dpmpp_2m, seeded_noise
from ldm.diffusion.schedule import NoiseSchedule, to_ve
from ldm.images import to_pil
from ldm.pictures import save_png
from ldm.request import Request

parser = argparse.ArgumentParser(description="Make a picture from a prompt.")
parser.add_argument("prompt")
parser.add_argument("--negative", help='none is not "" for SDXL base')
parser.add_argument("--model", default=Path(__file__).parents[1] / "weights/tiny", type=Path)
parser.add_argument("--steps", type=int, help="default: the model's own")
parser.add_argument("--guidance", type=float, help="default: the model's own")
parser.add_argument("--seed", default=0, type=int)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--out", default="out.png", type=Path)
args = parser.parse_args()


@torch.no_grad()
def main() -> None:
    # Three networks and their configuration. The VAE stays in fp32, where fp16 could overflow.
    dtype = torch.float32 if args.device == "cpu" else torch.float16
    model = load(args.model, dtype=dtype, vae_dtype=torch.float32, device=args.device)
    config, unet, vae, text_encoder = model[:4]
    request = Request(args.prompt, args.negative, args.steps, args.guidance, seed=args.seed)
    request = request.resolved(config)  # the model's own choices in place of None

    # The prompt, and what guidance steers away from: context b n d, and vector b p for models that take one.
    texts = [request.prompt]
    if request.guidance_scale > 1:
        texts.append(request.negative_prompt or "")
    outputs = text_encoder.encode(texts)
    encoded = [part for part in (outputs.context, outputs.vector) if part is not None]
    if request.negative_prompt is None:  # SDXL base: zeros, not the empty text
        for part in encoded:
            part[1:] = 0
    if config.micro_conditioning:  # SDXL: sizes and crop, embedded as timesteps are
        scalars = torch.tensor(request.scalars(config)[: len(texts)])  # b n
        embedded = timestep_embedding(scalars.flatten(), 256).to(encoded[1])  # (b n) 256
        encoded[1] = torch.cat([encoded[1], embedded.reshape(len(texts), -1)], dim=1)
    cond, *uncond = zip(*(part.chunk(len(texts)) for part in encoded), strict=True)

    # How the model was trained, and the noise levels of this run: steps + 1, falling to 0.
    process = config.diffusion
    schedule = NoiseSchedule(
        betas=process.betas, beta_start=process.beta_start, beta_end=process.beta_end,
        timesteps=process.timesteps, zero_terminal_snr=process.zero_terminal_snr,
    )  # fmt: skip
    sigmas = schedule.steps(request.steps, process.spacing, offset=process.offset)

    # Pure noise of the first level, drawn on the CPU so that a seed means the same everywhere.
    side = config.image_size // vae.config.factor
    noise = seeded_noise([args.seed], (vae.config.latent_channels, side, side))
    x = to_ve(noise(), sigmas[0]).to(args.device)  # 1 c h w, fp32

    # From a network that predicts eps or v, to a guided one, to a function from x and sigma to x0.
    predict = guided(unet, cond, uncond[0] if uncond else None, request.guidance_scale)
    denoise = parametrise(predict, schedule, process.prediction, dtype=dtype)

    # The loop. Any other sampler of ldm.diffusion.samplers goes here; some `start` from sigma noise.
    for step in tqdm(dpmpp_2m(denoise, x, sigmas, noise=noise), total=request.steps, disable=None):
        x = step.x
    save_png(to_pil(vae.decode(x))[0], args.out)


main()
