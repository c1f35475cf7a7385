"""Inpainting without the `Pipeline`: every stage between a picture, a mask, a prompt and a PNG.

python scripts/inpaint.py frog.png mask.png "a fox on the grass" --feather 8 --model weights/tiny --out fox.png

White parts of the mask are repainted, black parts are kept, and gray parts join later: the darker, the later. The
picture equals that of `ldm.Pipeline` with the sampler dpmpp_2m and a text-to-image model, bit for bit.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from ldm.checkpoint.files import load
from ldm.conditioning import condition
from ldm.diffusion.denoiser import classifier_free, guided, parametrize
from ldm.diffusion.inpainting import keep
from ldm.diffusion.samplers import dpmpp_2m, seeded_noise
from ldm.diffusion.schedule import NoiseSchedule, to_ve
from ldm.images import to_pil, to_tensor
from ldm.inpainting import fit_mask
from ldm.pictures import save_png
from ldm.request import Request
from ldm.source import Mask, Source

parser = argparse.ArgumentParser(description="Repaint a part of a picture.")
parser.add_argument("picture", type=Path)
parser.add_argument("mask", type=Path, help="of the same size; white is repainted")
parser.add_argument("prompt")
parser.add_argument("--strength", default=1.0, type=float, help="above 0 to 1: how much of the steps run")
parser.add_argument("--feather", default=0, type=int, help="pixels around the repainted part to blend")
parser.add_argument("--negative", help="what the picture should not show")
parser.add_argument("--model", default=Path(__file__).parents[1] / "weights/tiny", type=Path)
parser.add_argument("--steps", type=int, help="default: the model's")
parser.add_argument("--seed", default=0, type=int)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--out", default="out.png", type=Path)
args = parser.parse_args()


@torch.no_grad()
def main() -> None:
    # The three networks and their configuration. The VAE stays in fp32, because fp16 can overflow.
    dtype = torch.float32 if args.device == "cpu" else torch.float16
    model = load(args.model, dtype=dtype, vae_dtype=torch.float32, device=args.device)
    config, unet, vae, text_encoder = model[:4]

    # The request, with the model's defaults, and the conditions of the prompt and of the negative prompt.
    source = Source(args.picture, args.strength, mask=Mask(args.mask, feather=args.feather))
    request = Request(args.prompt, args.negative, args.steps, sampler="dpmpp_2m", seed=args.seed, source=source)
    plan, region = request.resolved(config), request.region
    conditions = condition(text_encoder, plan.texts, plan.scalars).rows()

    # The known latents of the picture, and the mask at their size: 1 c h/f w/f and 1 1 h/f w/f.
    draw = seeded_noise([args.seed], plan.latent_shape)
    image = to_tensor(region.picture(plan.width, plan.height)).to(args.device)  # 1 3 h w
    known = vae.encode(image).sample(draw().to(args.device))
    mask = fit_mask(region, *plan.latent_shape[1:]).to(args.device)

    # The start: the picture and noise of the first level. At strength 1 it is noise alone, except for gray parts.
    noise, _ = draw().to(args.device), draw()  # inpainting models use the second draw
    schedule, sigmas = NoiseSchedule.from_config(config.diffusion), plan.sigmas
    x = known + float(sigmas[0]) * noise
    if args.strength == 1:
        x = torch.where((mask > 0) & (mask < 1), x, to_ve(noise, sigmas[0]))

    # The UNet with its conditions, guided, as a denoiser (x, sigma) -> x0, which keeps the known latents.
    network = guided(unet.bind, conditions, classifier_free(plan.guidance_scale))
    denoise = parametrize(network, schedule, config.diffusion.prediction, dtype=dtype)
    denoise = keep(denoise, known, mask, noise=noise, sigmas=sigmas)
    for step in tqdm(dpmpp_2m(denoise, x, sigmas, noise=draw), total=len(sigmas) - 1, disable=None):
        x = step.x

    # The new pixels, where the mask repaints, on the old picture.
    save_png(region.paste(to_pil(vae.decode(x.contiguous())))[0], args.out)


main()
