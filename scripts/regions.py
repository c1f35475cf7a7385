"""Text to image with prompts for regions, without the `Pipeline` (MultiDiffusion, Bar-Tal et al. 2023).

python scripts/regions.py "a frog on the grass" --region left=0,width=0.5 "a fox in the snow" --out frog.png

The picture equals that of `ldm.Pipeline` with the sampler dpmpp_2m, bit for bit.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint.files import load
from ldm.conditioning import condition
from ldm.diffusion.denoiser import classifier_free, guided, parametrize
from ldm.diffusion.samplers import dpmpp_2m, seeded_noise, start
from ldm.diffusion.schedule import NoiseSchedule
from ldm.images import to_pil
from ldm.pictures import save_png
from ldm.regions import RegionalPrompt
from ldm.request import Request

parser = argparse.ArgumentParser(description="Make a picture from prompts for its regions.")
parser.add_argument("prompt", help="for what the regions leave")
parser.add_argument("--region", nargs=2, action="append", required=True, metavar=("MASK", "PROMPT"))
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
    schedule, regions = NoiseSchedule.from_config(config.diffusion), [RegionalPrompt(*each) for each in args.region]

    # A denoiser (x, sigma) -> x0 for each prompt: that of the request first. Each has its own guidance.
    denoisers = []
    for prompt in (args.prompt, *(region.prompt for region in regions)):
        plan = Request(prompt, args.negative, args.steps, args.guidance, sampler="dpmpp_2m").resolved(config)
        conditions = condition(text_encoder, plan.texts, plan.scalars).rows()
        network = guided(unet.bind, conditions, classifier_free(plan.guidance_scale))
        denoisers.append(parametrize(network, schedule, config.diffusion.prediction, dtype=dtype))

    # The share of each prompt in each pixel of the latents: n h/f w/f. The first prompt fills what the masks leave.
    masks = torch.stack([region.on(*plan.latent_shape[1:]) for region in regions])
    weights = torch.cat([(1 - masks.sum(dim=0)).clamp(min=0)[None], masks])
    shares = (weights / weights.sum(dim=0))[:, None, None].to(args.device)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        estimates = torch.stack([each(x, sigma) for each in denoisers])  # n 1 c h/f w/f
        return (shares * estimates).sum(dim=0)

    # The noise levels, x at the first of them, and the loop. Another sampler of ldm.diffusion.samplers can stand here.
    sigmas = schedule.steps(plan.steps, plan.spacing, offset=config.diffusion.offset)
    noise = seeded_noise([args.seed], plan.latent_shape)
    x = start(noise().to(args.device), sigmas[0], sampler="dpmpp_2m", spacing=plan.spacing)  # 1 c h/f w/f
    for step in tqdm(dpmpp_2m(denoise, x, sigmas, noise=noise), total=len(sigmas) - 1, disable=None):
        x = step.x
    save_png(to_pil(vae.decode(x))[0], args.out)


main()
