"""A prompt and a picture to image with an IP-Adapter, without the `Pipeline`: every stage on the way to a PNG.

python scripts/ip_adapter.py "a frog" ip-adapter_sd15.safetensors image_encoder fox.png --model sd15.safetensors

The picture equals that of `ldm.Pipeline` with the sampler dpmpp_2m, bit for bit.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from ldm.checkpoint.files import load
from ldm.checkpoint.ip_adapters import load_image_encoder, load_ip_adapter
from ldm.conditioning import condition
from ldm.diffusion.denoiser import classifier_free, guided, parametrize
from ldm.diffusion.samplers import dpmpp_2m, seeded_noise, start
from ldm.diffusion.schedule import NoiseSchedule
from ldm.image_prompt import image_tokens
from ldm.images import to_pil
from ldm.models.ip_adapter import Applied, ImagePrompted
from ldm.pictures import read_picture, save_png
from ldm.request import Request

parser = argparse.ArgumentParser(description="Make a picture from a prompt and another picture.")
parser.add_argument("prompt")
parser.add_argument("adapter", type=Path)
parser.add_argument("encoder", type=Path, help="CLIP's vision tower: a folder or file")
parser.add_argument("picture", type=Path)
parser.add_argument("--weight", default=1.0, type=float, help="factor of what the picture adds to the text")
parser.add_argument("--negative", help="what the picture should not show")
parser.add_argument("--model", required=True, type=Path)
parser.add_argument("--steps", type=int, help="default: the model's")
parser.add_argument("--guidance", type=float, help="default: the model's")
parser.add_argument("--seed", default=0, type=int)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--out", default="out.png", type=Path)
args = parser.parse_args()


@torch.no_grad()
def main() -> None:
    # The networks and their configuration. The VAE stays in fp32, because fp16 can overflow.
    dtype = torch.float32 if args.device == "cpu" else torch.float16
    config, unet, vae, text_encoder = load(args.model, dtype=dtype, vae_dtype=torch.float32, device=args.device)[:4]
    adapter = load_ip_adapter(args.adapter, unet=unet, dtype=dtype, device=args.device)
    encoder = load_image_encoder(args.encoder, dtype=dtype, device=args.device)

    # The request, with the model's defaults.
    plan = Request(args.prompt, args.negative, args.steps, args.guidance, sampler="dpmpp_2m").resolved(config)

    # The conditions: of the prompt, and for guidance of the negative prompt. Context 1 n d, and for SDXL vector 1 p.
    conditions = condition(text_encoder, plan.texts, plan.scalars).rows()

    # The image tokens: of the picture for the prompt, of no picture for the negative prompt. 1 m d each.
    tokens = image_tokens(adapter, encoder, read_picture(args.picture))
    conditions = [replace(c, is_prompt=torch.tensor([i == 0], device=args.device)) for i, c in enumerate(conditions)]
    prompted = ImagePrompted(unet, [Applied(adapter, *tokens, args.weight)])

    # The noise levels, and x at the first of them.
    schedule = NoiseSchedule.from_config(config.diffusion)
    sigmas = schedule.steps(plan.steps, plan.spacing, offset=config.diffusion.offset)
    noise = seeded_noise([args.seed], plan.latent_shape)
    x = start(noise().to(args.device), sigmas[0], sampler="dpmpp_2m", spacing=plan.spacing)  # 1 c h/f w/f

    # The UNet with both prompts, then guided: (z, timesteps) -> eps or v. Then the denoiser.
    network = guided(prompted.bind, conditions, classifier_free(plan.guidance_scale))
    denoise = parametrize(network, schedule, config.diffusion.prediction, dtype=dtype)

    # The loop. Another sampler of ldm.diffusion.samplers can stand here.
    for step in tqdm(dpmpp_2m(denoise, x, sigmas, noise=noise), total=len(sigmas) - 1, disable=None):
        x = step.x
    save_png(to_pil(vae.decode(x))[0], args.out)


main()
