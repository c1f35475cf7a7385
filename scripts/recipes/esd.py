"""Erased Stable Diffusion (Gandikota et al. 2023): fine-tune the cross-attention until a concept is not drawn (ESD-x).

    python scripts/recipes/esd.py frog

Equation 7 of the paper. The frozen model theta* gives the target of its copy theta at the noisy latents x_t, which
theta itself samples from the prompt c up to a random step:

    eps(x_t, c; theta)  <-  eps(x_t; theta*) - eta (eps(x_t, c; theta*) - eps(x_t; theta*))

This is guidance away from c. It has the same form for eps, v and x0: the loss is that of the model's own prediction.
"""

import argparse
import copy
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

import ldm
from ldm.diffusion.denoiser import guided
from ldm.diffusion.schedule import to_vp
from ldm.geometry import grid
from ldm.models.unet import UNet
from ldm.pictures import save_png


def away(cond: Tensor, uncond: Tensor, eta: float) -> Tensor:
    """Return the target of equation 7 from both predictions of the frozen model."""
    return uncond - eta * (cond - uncond)


def erase(pipe: ldm.Pipeline, prompt: str, steps: int, *, eta: float = 1.0, rate: float = 2e-4) -> UNet:
    """Return a copy of the UNet whose cross-attention is trained away from the prompt of a concept.

    rate: of Adam. The paper trains Stable Diffusion for 1000 steps with the rate 1e-5.
    """
    edited = ldm.Pipeline(pipe.config, copy.deepcopy(pipe.unet), pipe.vae, pipe.text_encoder)
    trained = [weight.requires_grad_() for name, weight in edited.unet.named_parameters() if ".attn2." in name]
    adam = torch.optim.Adam(trained, rate)
    for i in range(steps):
        plan = edited.plan(ldm.Request(prompt, seed=i, steps=10, sampler="ddim"))
        conditions, x = edited.conditions(plan), edited.start(plan)
        stop = int(torch.randint(plan.steps, (), generator=torch.Generator().manual_seed(i)))
        with torch.no_grad():
            for step in islice(edited.walk(plan, edited.denoiser(plan, conditions), x), stop):
                x = step.x
            z, t = to_vp(x, plan.sigmas[stop]), pipe.schedule.timestep(plan.sigmas[stop]).to(x)[None]
            target = guided(pipe.binding(), conditions, lambda both: away(*both, eta))(z, t)
        adam.zero_grad()
        F.mse_loss(edited.unet.bind(conditions[0])(z, t), target).backward()
        adam.step()
    return edited.unet.requires_grad_(False)


@torch.no_grad()
def score(pipe: ldm.Pipeline, latents: Tensor, prompt: str) -> float:
    """Return by how many percent a prompt lowers the denoising error of latents, 1 c h w: the diffusion classifier's
    evidence (Li et al. 2023). It is near 0 for what the picture does not show."""
    plan = pipe.plan(ldm.Request((prompt, ""), seed=7, images=2, guidance_scale=1))
    denoise, noise, errors = pipe.denoiser(plan, pipe.conditions(plan)), plan.noise(), torch.zeros(2)
    for sigma in plan.sigmas[plan.steps // 5 : plan.steps // 2]:
        x0 = denoise((latents + float(sigma) * noise()[:1]).expand(2, -1, -1, -1), sigma)
        errors += ((x0 - latents) / float(sigma)).square().mean(dim=(1, 2, 3)).cpu()
    return 100 * (1 - float(errors[0] / errors[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Erase an object from a model by fine-tuning.")
    parser.add_argument("concept", nargs="?", default="frog")
    parser.add_argument("--other", default="fox", help="an object that stays, for the picture and the number")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", default="esd.png")
    args = parser.parse_args()
    pipe, latents, scores = ldm.load(), [], []
    unet = erase(pipe, f"a {args.concept}", args.steps)
    edited = ldm.Pipeline(pipe.config, unet, pipe.vae, pipe.text_encoder)
    for prompt in (f"a {name} on the grass" for name in (args.concept, args.other)):
        for model in (pipe, edited):
            *_, last = model.stream(ldm.Request(prompt, seed=1, steps=12))
            latents.append(last.latents)
            scores.append(f"{score(pipe, last.latents, prompt):z.0f}")
    save_png(grid(pipe.decode(torch.cat(latents))), args.out, overwrite=True)
    print(f"score of {args.concept}: {' to '.join(scores[:2])} %, of {args.other}: {' to '.join(scores[2:])} %")


if __name__ == "__main__":
    main()
