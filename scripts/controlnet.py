"""Text to image with a ControlNet, without the `Pipeline`: every stage between a prompt, a hint and a PNG.

python scripts/controlnet.py "a frog" control_v11p_sd15_canny.safetensors edges.png --model weights/sd15.safetensors

The picture equals that of `ldm.Pipeline` with the sampler dpmpp_2m, bit for bit.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from ldm.checkpoint.controlnets import load_controlnet
from ldm.checkpoint.files import load
from ldm.conditioning import condition
from ldm.diffusion.denoiser import classifier_free, guided, parametrize
from ldm.diffusion.samplers import dpmpp_2m, seeded_noise, start
from ldm.diffusion.schedule import NoiseSchedule
from ldm.geometry import fit
from ldm.images import to_pil, to_tensor
from ldm.models.controlnet import Applied, Controlled
from ldm.pictures import read_picture, save_png
from ldm.request import Request

parser = argparse.ArgumentParser(description="Make a picture from a prompt that follows another picture.")
parser.add_argument("prompt")
parser.add_argument("controlnet", type=Path)
parser.add_argument("hint", type=Path, help="such as edges, a depth map or a pose, as the ControlNet was trained with")
parser.add_argument("--weight", default=1.0, type=float, help="factor of what the ControlNet adds to the UNet")
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
    model = load(args.model, dtype=dtype, vae_dtype=torch.float32, device=args.device)
    config, unet, vae, text_encoder = model[:4]
    controlnet = load_controlnet(args.controlnet, unet=unet, dtype=dtype, device=args.device)

    # The request, with the model's defaults.
    plan = Request(args.prompt, args.negative, args.steps, args.guidance, sampler="dpmpp_2m").resolved(config)

    # The conditions: of the prompt, and for guidance of the negative prompt. Context 1 n d, and for SDXL vector 1 p.
    conditions = condition(text_encoder, plan.texts, plan.scalars).rows()

    # The hint, in [0, 1]: the picture, scaled until it covers the size of the new one, and its middle.
    hint = (to_tensor(fit(read_picture(args.hint), plan.width, plan.height)) + 1) / 2  # 1 3 h w
    controlled = Controlled(unet, [Applied(controlnet, hint.to(args.device, dtype), args.weight)])

    # The noise levels, and x at the first of them.
    schedule = NoiseSchedule.from_config(config.diffusion)
    sigmas = schedule.steps(plan.steps, plan.spacing, offset=config.diffusion.offset)
    noise = seeded_noise([args.seed], plan.latent_shape)
    x = start(noise().to(args.device), sigmas[0], sampler="dpmpp_2m", spacing=plan.spacing)  # 1 c h/f w/f

    # The UNet with its conditions and the ControlNet, then guided: (z, timesteps) -> eps or v. Then the denoiser.
    network = guided(controlled.bind, conditions, classifier_free(plan.guidance_scale))
    denoise = parametrize(network, schedule, config.diffusion.prediction, dtype=dtype)

    # The loop. Another sampler of ldm.diffusion.samplers can stand here.
    for step in tqdm(dpmpp_2m(denoise, x, sigmas, noise=noise), total=len(sigmas) - 1, disable=None):
        x = step.x
    save_png(to_pil(vae.decode(x))[0], args.out)


main()
