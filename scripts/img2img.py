"""Image to image (SDEdit, Meng et al. 2022) without the `Pipeline`: every stage between a picture, a prompt and a PNG.

python scripts/img2img.py frog.png "a fox on the grass" --strength 0.6 --model weights/tiny --out fox.png

The picture equals that of `ldm.Pipeline` with the sampler dpmpp_2m, bit for bit.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from ldm.checkpoint.files import load
from ldm.conditioning import condition
from ldm.diffusion.denoiser import classifier_free, guided, parametrize
from ldm.diffusion.samplers import dpmpp_2m, seeded_noise
from ldm.diffusion.schedule import NoiseSchedule
from ldm.geometry import fit
from ldm.images import to_pil, to_tensor
from ldm.pictures import read_picture, save_png
from ldm.request import Request
from ldm.source import Source

parser = argparse.ArgumentParser(description="Make a picture from a picture and a prompt.")
parser.add_argument("picture", type=Path)
parser.add_argument("prompt")
parser.add_argument("--strength", default=0.6, type=float, help="above 0 to 1: how much of the steps run")
parser.add_argument("--negative", help="what the picture should not show")
parser.add_argument("--model", default=Path(__file__).parents[1] / "weights/tiny", type=Path)
parser.add_argument("--steps", type=int, help="default: the model's")
parser.add_argument("--guidance", type=float, help="default: the model's")
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

    # The request, with the model's defaults and the size of the picture: its aspect ratio at the area of the model.
    picture = read_picture(args.picture)
    source = Source(picture, args.strength)
    request = Request(args.prompt, args.negative, args.steps, args.guidance, sampler="dpmpp_2m", source=source)
    plan = request.resolved(config)

    # The conditions: of the prompt, and for guidance of the negative prompt. Context 1 n d, and for SDXL vector 1 p.
    conditions = condition(text_encoder, plan.texts, plan.scalars).rows()

    # The last part of the noise levels. Strength 0.6 of 20 steps runs 12 of them.
    schedule = NoiseSchedule.from_config(config.diffusion)
    sigmas = schedule.steps(plan.steps, plan.spacing, offset=config.diffusion.offset)
    sigmas = sigmas[plan.steps - int(plan.steps * args.strength) :]

    # The picture's latents, a sample of the VAE's distribution, and noise of the first level on them.
    noise = seeded_noise([args.seed], plan.latent_shape)
    image = to_tensor(fit(picture, plan.width, plan.height)).to(args.device)  # 1 3 h w
    latents = vae.encode(image).sample(noise().to(args.device))  # 1 c h/f w/f
    x = latents + float(sigmas[0]) * noise().to(args.device)

    # The UNet with its conditions, then guided: (z, timesteps) -> eps or v. Then the denoiser: (x, sigma) -> x0.
    network = guided(unet.bind, conditions, classifier_free(plan.guidance_scale))
    denoise = parametrize(network, schedule, config.diffusion.prediction, dtype=dtype)

    # The loop. Another sampler of ldm.diffusion.samplers can stand here.
    for step in tqdm(dpmpp_2m(denoise, x, sigmas, noise=noise), total=len(sigmas) - 1, disable=None):
        x = step.x
    save_png(to_pil(vae.decode(x))[0], args.out)


main()
