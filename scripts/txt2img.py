"""Text to image without the `Pipeline`: every stage between a prompt and a PNG, to read, change and take parts from.

python scripts/txt2img.py "a frog on the grass" --model weights/tiny --out frog.png

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
from ldm.diffusion.schedule import NoiseSchedule, to_ve
from ldm.images import to_pil
from ldm.pictures import save_png
from ldm.request import Request

parser = argparse.ArgumentParser(description="Make a picture from a prompt.")
parser.add_argument("prompt")
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

    # The request, with the model's defaults: the texts, the sizes of SDXL, the number of steps, the guidance scale.
    request = Request(args.prompt, args.negative, args.steps, args.guidance, sampler="dpmpp_2m", seed=args.seed)
    plan = request.resolved(config)

    # The conditions: of the prompt, and for guidance of the negative prompt. Context 1 n d, and for SDXL vector 1 p.
    conditions = condition(text_encoder, plan.texts, plan.scalars).rows()

    # The noise schedule of the training, and the noise levels of this run: steps + 1, falling to 0.
    schedule = NoiseSchedule.from_config(config.diffusion)
    sigmas = schedule.steps(plan.steps, plan.spacing, offset=config.diffusion.offset)

    # Noise of the first level. It is drawn on the CPU, so that a seed gives the same noise on every device.
    noise = seeded_noise([args.seed], plan.latent_shape)
    x = to_ve(noise(), sigmas[0]).to(args.device)  # 1 c h w, fp32

    # The UNet with its conditions, then guided: (z, timesteps) -> eps or v. Then the denoiser: (x, sigma) -> x0.
    network = guided(unet.bind, conditions, classifier_free(plan.guidance_scale))
    denoise = parametrize(network, schedule, config.diffusion.prediction, dtype=dtype)

    # The loop. Another sampler of ldm.diffusion.samplers can stand here; ldm.diffusion.samplers.start makes its x.
    for step in tqdm(dpmpp_2m(denoise, x, sigmas, noise=noise), total=plan.steps, disable=None):
        x = step.x
    save_png(to_pil(vae.decode(x))[0], args.out)


main()
