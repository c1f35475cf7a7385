"""InstructPix2Pix without the `Pipeline`: every stage between a picture, an instruction and a PNG.

python scripts/edit.py mountain.png "make it snowy" --model instruct-pix2pix-00-22000.safetensors --out snow.png

The picture equals that of `ldm.Pipeline` with the sampler dpmpp_2m, bit for bit.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from ldm.checkpoint.files import load
from ldm.conditioning import condition
from ldm.diffusion.denoiser import guided, parametrize
from ldm.diffusion.samplers import dpmpp_2m, seeded_noise
from ldm.diffusion.schedule import NoiseSchedule, to_ve
from ldm.editing import taking_pictures, two_scales, with_picture
from ldm.geometry import fit
from ldm.images import to_pil, to_tensor
from ldm.pictures import read_picture, save_png
from ldm.request import Request
from ldm.source import Source

parser = argparse.ArgumentParser(description="Edit a picture by an instruction.")
parser.add_argument("picture", type=Path)
parser.add_argument("instruction")
parser.add_argument("--model", required=True, type=Path, help="an instruct-pix2pix model")
parser.add_argument("--guidance", type=float, help="how closely to follow the instruction; default: the model's")
parser.add_argument("--image-guidance", default=1.5, type=float, help="how closely to follow the picture")
parser.add_argument("--negative", help="what the picture should not show")
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

    # The request, with the model's defaults and the size of the picture: its aspect ratio at the area of the model.
    source = Source(read_picture(args.picture), image_guidance=args.image_guidance)
    request = Request(args.instruction, args.negative, args.steps, args.guidance, sampler="dpmpp_2m", source=source)
    plan = request.resolved(config)

    # The picture's latents, 1 c h/f w/f: the mode of the VAE's distribution, without the scaling factor.
    image = to_tensor(fit(source.picture, plan.width, plan.height)).to(args.device)  # 1 3 h w
    picture = vae.encode(image).mode() / config.vae.scaling_factor

    # Three conditions: instruction and picture, the picture alone, and neither.
    instruction, negative = condition(text_encoder, plan.texts, plan.scalars).rows()
    both, alone = with_picture(instruction, picture), with_picture(negative, picture)
    conditions = [both, alone, with_picture(negative, torch.zeros_like(picture))]

    # Pure noise of the first level: unlike in image to image, the picture enters through the network only.
    schedule, sigmas = NoiseSchedule.from_config(config.diffusion), plan.sigmas
    noise = seeded_noise([args.seed], plan.latent_shape)
    x = to_ve(noise(), sigmas[0]).to(args.device)

    # The UNet with its conditions, combined by two scales (equation 3), as a denoiser (x, sigma) -> x0.
    rule = two_scales(plan.guidance_scale, args.image_guidance)
    network = guided(taking_pictures(unet.bind), conditions, rule)
    denoise = parametrize(network, schedule, config.diffusion.prediction, dtype=dtype)

    # The loop. Another sampler of ldm.diffusion.samplers can stand here.
    for step in tqdm(dpmpp_2m(denoise, x, sigmas, noise=noise), total=len(sigmas) - 1, disable=None):
        x = step.x
    save_png(to_pil(vae.decode(x))[0], args.out)


main()
