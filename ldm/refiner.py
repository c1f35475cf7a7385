"""SDXL with its refiner: the base model runs the first steps, the refiner the last steps (Podell et al. 2023, 2.5)."""

import dataclasses
from collections.abc import Generator

import torch
from PIL import Image

from ldm.config import ModelConfig
from ldm.diffusion.samplers import Step
from ldm.pipeline import Pipeline
from ldm.request import Plan, Request
from ldm.sizes import Sizes

HANDOVER = 0.8


def refine(base: Pipeline, refiner: Pipeline, request: Request, *, handover: float = HANDOVER) -> list[Image.Image]:
    """Make the pictures of `request` with the base model and its refiner. Raises what `stream_both` raises."""
    *_, last = stream_both(base, refiner, request, handover=handover)
    return refiner.decode(last.latents)


def stream_both(base: Pipeline, refiner: Pipeline, request: Request, *, handover: float = HANDOVER) -> Generator[Step]:
    """Return a generator of all steps. Both models share one list of noise levels, which is cut in two.

    handover: the share of the training timesteps, from the noisy end, that the base model runs. With 0.8 the refiner
      takes over at timestep 200 of 1000, as with `denoising_end` and `denoising_start` of diffusers. SDXL's refiner was
      trained on the timesteps below 200.
    With `Placement(offload="model")` only one of the two UNets is on the device at a time.
    Raises ValueError for models with different noise schedules or latents, and for a handover that leaves one model no
    step. Raises it for a size or score that neither model takes.
    """
    plan, refiner_plan = plan_both(base, refiner, request, handover=handover)
    return _steps(base, refiner, plan, refiner_plan)


def plan_both(base: Pipeline, refiner: Pipeline, request: Request, *, handover: float) -> tuple[Plan, Plan]:
    """Make the plans of the base model and of the refiner. Together they run the steps of the request."""
    check_handover(handover)
    latents, others = ((c.latent_channels, c.scaling_factor, c.factor) for c in (base.config.vae, refiner.config.vae))
    if latents != others:
        raise ValueError(f"{base.config.name} and {refiner.config.name} have different latents: use SDXL's own refiner")
    if not torch.equal(base.schedule.sigmas, refiner.schedule.sigmas):
        raise ValueError(
            f"{base.config.name} and {refiner.config.name} were trained with different noise schedules: use a refiner "
            "that was made for this model"
        )
    if request.region:
        raise ValueError("inpainting runs on one model: leave out the refiner, or the mask")
    plan = base.plan(_with_own_sizes(request, base.config, refiner.config))
    shared = dataclasses.replace(
        _with_own_sizes(request, refiner.config, base.config),
        controls=(),  # a ControlNet fits one of the two UNets, and the base model decides the composition
        image_prompts=(),  # so does an IP-Adapter
        **{name: getattr(plan, name) for name in ("steps", "sampler", "spacing", "width", "height")},
    )
    cutoff = round(len(base.schedule) - handover * len(base.schedule))
    timesteps = base.schedule.timestep(plan.sigmas[:-1])
    cut = int((timesteps >= cutoff).sum())
    if not 0 < cut < len(timesteps):
        idle = "refiner" if cut else "base model"
        raise ValueError(
            f"handover {handover} leaves no step for the {idle}: it is timestep {cutoff}, and steps start at "
            f"{timesteps[0]:.0f} to {timesteps[-1]:.0f}; change the handover or take more steps"
        )
    return (
        dataclasses.replace(plan, sigmas=plan.sigmas[: cut + 1]),
        dataclasses.replace(refiner.plan(shared), sigmas=plan.sigmas[cut:]),
    )


def check_handover(handover: float) -> None:
    """Raise ValueError unless 0 < handover < 1."""
    if not 0 < handover < 1:
        raise ValueError(f"handover must lie between 0 and 1, got {handover}; SDXL's refiner is made for {HANDOVER}")


@torch.no_grad()
def _steps(base: Pipeline, refiner: Pipeline, plan: Plan, refiner_plan: Plan) -> Generator[Step]:
    noise, x = plan.noise(), base.start(plan)
    before, total = 0, len(plan.sigmas) + len(refiner_plan.sigmas) - 2
    for pipe, own in ((base, plan), (refiner, refiner_plan)):
        conditions = pipe.conditions(own)
        with pipe.at_work("unet", own.request.controls):
            for step in pipe.walk(own, pipe.denoiser(own, conditions), x, noise=noise):
                x = step.x
                yield dataclasses.replace(step, index=before + step.index, total=total)
        before += len(own.sigmas) - 1


def _with_own_sizes(request: Request, config: ModelConfig, other: ModelConfig) -> Request:
    """Leave out the sizes and scores that only the other model has: the base model and the refiner differ in them."""
    if request.sizes is None:
        return request
    left_out = set(other.micro_conditioning) - set(config.micro_conditioning)
    names = [f.name for f in dataclasses.fields(Sizes) if f.name.removeprefix("negative_") not in left_out]
    return dataclasses.replace(request, sizes=Sizes(**{name: getattr(request.sizes, name) for name in names}))
