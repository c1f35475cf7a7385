"""The same inputs through this package and through diffusers: networks, pictures and files."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from torch import Tensor

import ldm
from ldm.checkpoint import files
from ldm.checkpoint.taesd import load_taesd
from ldm.conditioning import timestep_embedding
from tests.parity import reference
from tests.parity.reference import FAMILIES, PROMPTS, STEP_LISTS, Family

TIMESTEPS = (999, 750, 500, 250, 1)

Outputs = dict[str, Tensor]  # by name, fp32 on the CPU


# ------------------------------------------------------------------ networks


class Inputs(NamedTuple):
    """What the networks of both are given, drawn from a seed; the UNet's have a row for each of TIMESTEPS."""

    images: Tensor  # 2 3 h w
    latents: Tensor  # 2 4 h/8 w/8
    noisy: Tensor  # 5 in_channels h/8 w/8
    context: Tensor  # 5 77 d
    pooled: Tensor | None  # 5 p
    time_ids: Tensor | None  # 5 6, or 5 5


def draw(family: Family, seed: int, side: int) -> Inputs:
    """Draw inputs for the networks of `family`; side: of the images, in pixels."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows, small, pooled, ids = len(TIMESTEPS), side // 8, None, None
    if family.time_ids:
        pooled = randn(rows, family.towers["text_encoder_2"].config["projection_dim"])
        ids = torch.tensor([family.time_ids] * rows)
    return Inputs(
        images=torch.rand(2, 3, side, side, generator=generator) * 2 - 1,
        latents=randn(2, 4, small, small),
        noisy=randn(rows, family.unet.get("in_channels", 4), small, small),
        context=randn(rows, 77, family.unet["cross_attention_dim"]),
        pooled=pooled,
        time_ids=ids,
    )


@torch.no_grad()
def of_diffusers(pipe: Any, given: Inputs) -> Outputs:
    """Run diffusers' networks."""
    unet, vae, outputs = pipe.unet, pipe.vae, {}

    def to(x: Tensor) -> Tensor:
        return x.to(unet.device, unet.dtype)

    for name, tokenizer, tower in reference.towers(pipe):
        ids = tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
        out = tower(ids.to(unet.device), output_hidden_states=True)
        # SDXL takes the layer before the last, unnormed
        outputs[name] = out.last_hidden_state if given.pooled is None else out.hidden_states[-2]
        if hasattr(out, "text_embeds"):
            outputs[f"{name}, pooled"] = out.text_embeds
    added = None
    if given.pooled is not None and given.time_ids is not None:
        added = {"text_embeds": to(given.pooled), "time_ids": to(given.time_ids)}
    timesteps = torch.tensor(TIMESTEPS, device=unet.device)
    noisy, context = to(given.noisy), to(given.context)
    outputs["unet"] = unet(noisy, timesteps, context, added_cond_kwargs=added).sample
    posterior, scale = vae.encode(to(given.images)).latent_dist, vae.config.scaling_factor
    outputs["vae, mean encoded"] = posterior.mean * scale
    outputs["vae, deviation encoded"] = posterior.std * scale
    outputs["vae, decoded"] = vae.decode(to(given.latents) / scale).sample
    return {name: x.float().cpu() for name, x in outputs.items()}


@torch.no_grad()
def of_ours(pipe: ldm.Pipeline, given: Inputs) -> Outputs:
    """Run our networks."""
    weight, outputs = next(pipe.unet.parameters()), {}
    for tower in pipe.text_encoder.towers:
        # as diffusers counts: SDXL's tower with a projection is the second, also where it is alone
        name = "text_encoder_2" if tower.config.projection else "text_encoder"
        encoded = tower(tower.tokenize(PROMPTS))
        outputs[name] = encoded.context
        if encoded.vector is not None:
            outputs[f"{name}, pooled"] = encoded.vector
    vector = None
    if given.pooled is not None and given.time_ids is not None:
        sizes = timestep_embedding(given.time_ids.flatten(), 256).reshape(len(TIMESTEPS), -1)
        vector = torch.cat([given.pooled, sizes], dim=1).to(weight)
    timesteps = torch.tensor(TIMESTEPS, device=weight.device, dtype=torch.float32)
    noisy, context = given.noisy.to(weight), given.context.to(weight)
    outputs["unet"] = pipe.unet(noisy, timesteps, context, vector)
    posterior = pipe.vae.encode(given.images.to(weight))
    outputs["vae, mean encoded"], outputs["vae, deviation encoded"] = posterior
    outputs["vae, decoded"] = pipe.vae.decode(given.latents.to(weight))
    return {name: x.float().cpu() for name, x in outputs.items()}


# ------------------------------------------------------------------ pictures


def requests(name: str, side: int = 64, images: int = 2) -> dict[str, ldm.Request]:
    """What both are asked for with the model `name`: every sampler of SD 1.5, and what others are made for."""
    steered = ldm.Request(*PROMPTS, guidance_scale=7.5, seed=42, images=images, width=side, height=side)

    def ask(
        sampler: str, spacing: str, steps: int, sizes: ldm.Sizes | None = None, **more: Any
    ) -> tuple[str, ldm.Request]:
        request = dataclasses.replace(steered, sampler=sampler, spacing=spacing, steps=steps, sizes=sizes, **more)
        given = dataclasses.asdict(sizes or ldm.Sizes())
        named = more | {key: value for key, value in given.items() if value is not None}
        return f"{steps} {sampler} {spacing}" + "".join(f", {key} {value!r}" for key, value in named.items()), request

    distilled = {"negative_prompt": None, "guidance_scale": 0.0}
    sizes = {"original_width": 1024, "original_height": 768, "crop_top": 16, "crop_left": 64}
    scores = {"crop_left": 8, "aesthetic_score": 7.5, "negative_aesthetic_score": 1.5}
    asked = {
        "sd15": [ask(sampler, spacing, steps) for sampler, spacing, steps in STEP_LISTS],
        "sd21-base": [ask("ddim", "leading", 10), ask("dpmpp_2m", "leading", 10)],
        "sd21": [
            ask("ddim", "leading", 10),
            ask("euler", "trailing", 10, guidance_rescale=0.7),
            ask("dpmpp_2m_sde", "leading", 10),
        ],
        "sd-turbo": [
            ask("euler", "trailing", 1, **distilled),
            ask("euler", "trailing", 4, **distilled),
            ask("euler_ancestral", "trailing", 4, **distilled),
        ],
        "sdxl-base": [
            ask("euler", "leading", 10, negative_prompt=None),
            ask("euler", "leading", 10, negative_prompt=""),
            ask("euler", "leading", 10, sizes=ldm.Sizes(**sizes, target_width=512, target_height=640)),
            ask("dpmpp_2m", "leading", 10),
        ],
        "sdxl-refiner": [
            ask("euler", "leading", 10),
            ask("euler", "leading", 10, negative_prompt=None),
            ask("ddim", "leading", 10, sizes=ldm.Sizes(**(sizes | scores))),
        ],
        "sdxl-turbo": [
            ask("euler_ancestral", "trailing", 1, **distilled),
            ask("euler_ancestral", "trailing", 4, **distilled),
        ],
    }
    return dict(asked.get(name, []))


def pictures(pipe: ldm.Pipeline, request: ldm.Request) -> tuple[np.ndarray, Tensor]:
    """Make with us what `request` asks for; as `reference.pictures`."""
    *_, last = pipe.stream(request)
    return np.stack([np.asarray(picture) for picture in pipe.decode(last.latents)]), last.latents.cpu()


def levels(ours: np.ndarray, theirs: np.ndarray) -> int:
    """The largest difference of two pictures, in levels of 255."""
    return int(abs(ours.astype(int) - theirs.astype(int)).max())


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in parts of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def errors(x: Tensor, exact: Tensor) -> Tensor:
    """The root mean square of the difference, in parts of that of `exact`, of each entry of the first dimension."""
    return (x - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)


@torch.no_grad()
def taesd() -> tuple[float, float]:
    """Return how far our TAESD is from diffusers', full size and random weights: the largest difference, and relative.

    diffusers saves its folder, which we load.
    """
    torch.manual_seed(0)
    theirs, latents = diffusers.AutoencoderTiny().eval(), 2 * torch.randn(2, 4, 16, 16)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours, exact = load_taesd(folder)(latents), theirs.decode(latents).sample
    return float((ours - exact).abs().max()), relative(ours, exact)


# ------------------------------------------------------------------ files


def saved(name: str, folder: Path, ours: ldm.Pipeline, theirs: Any) -> dict[str, tuple[int, int]]:
    """Save `ours` in both layouts, and read these with diffusers and with us.

    ours, theirs: loaded from `folder`.
    Returns how many of the tensors read equal those saved bit for bit, and how many there are.
    """
    original = _tensors(theirs)
    with tempfile.TemporaryDirectory() as temporary:
        file, copy = Path(temporary) / f"{name}.safetensors", Path(temporary) / name
        files.save(ours, file, layout="ldm")
        files.save(ours, copy, layout="diffusers")
        read = FAMILIES[name].pipeline.from_single_file(file, config=str(folder))
        again = ldm.load(file, ldm.Placement("cpu"))
        return {
            "single file, read by diffusers": _equal(_tensors(read), original),
            "single file, read by us": _equal(_tensors(again), _tensors(ours)),
            "folder, read by diffusers": _equal(_tensors(reference.load(copy)), original),
        }


def _tensors(pipe: Any) -> dict[str, Tensor]:
    """Every tensor of the networks of a pipeline, ours or diffusers', by network and name."""
    networks = ("unet", "vae", "text_encoder", "text_encoder_2")
    return {
        f"{name}.{key}": tensor
        for name in networks
        if getattr(pipe, name, None) is not None
        for key, tensor in getattr(pipe, name).state_dict().items()
    }


def _equal(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[int, int]:
    equal = [k in tensors and torch.equal(tensors[k], wanted[k]) for k in wanted]
    return sum(equal), len(tensors.keys() | wanted.keys())


# ------------------------------------------------------------------ everything, in every precision


class Task(NamedTuple):
    """What both do with a model."""

    given: list[Inputs]  # to the networks
    asked: dict[str, ldm.Request]  # pictures, by label


class Run(NamedTuple):
    """What one of both made of a task, in one precision."""

    outputs: Outputs  # of the networks, one per input; and the latents of the pictures, by label
    pictures: dict[str, np.ndarray]


class Row(NamedTuple):
    """How far ours is from diffusers'. low: by precision, our `errors` and theirs, against diffusers' fp32 run."""

    model: str
    what: str
    largest: float  # in levels of 255 for a picture
    relative: float
    low: dict[str, tuple[Tensor, Tensor]]


def run_ours(folder: Path, task: Task, device: str, dtype: torch.dtype) -> Run:
    """Load the model in `folder` with us, all of it in `dtype`, and do `task`."""
    pipe = ldm.load(folder, ldm.Placement(device, dtype=dtype, vae_dtype=dtype))
    made = {label: pictures(pipe, request) for label, request in task.asked.items()}
    return _run([of_ours(pipe, given) for given in task.given], made)


def run_diffusers(folder: Path, task: Task, device: str, dtype: torch.dtype) -> Run:
    """Load the model in `folder` with diffusers, all of it in `dtype`, and do `task`."""
    pipe = reference.load(folder, dtype, device)
    made = {label: reference.pictures(pipe, request) for label, request in task.asked.items()}
    return _run([of_diffusers(pipe, given) for given in task.given], made)


def _run(networks: list[Outputs], made: dict[str, tuple[np.ndarray, Tensor]]) -> Run:
    outputs = {what: torch.stack([out[what] for out in networks]) for what in networks[0]}
    latents = {label: x for label, (_, x) in made.items()}
    return Run(outputs | latents, {label: images for label, (images, _) in made.items()})


def measure(name: str, folder: Path, task: Task, device: str = "cpu", dtypes: Sequence[torch.dtype] = ()) -> list[Row]:
    """Compare networks and pictures of the model in `folder`, in fp32 and `dtypes`; one copy of it is in memory."""
    theirs = run_diffusers(folder, task, device, torch.float32)
    ours = run_ours(folder, task, device, torch.float32)
    lower = {
        str(dtype).removeprefix("torch."): (
            run_ours(folder, task, device, dtype),
            run_diffusers(folder, task, device, dtype),
        )
        for dtype in dtypes
    }
    rows = []
    for what, exact in theirs.outputs.items():
        largest = float((ours.outputs[what] - exact).abs().max())
        if what in task.asked:
            largest = levels(ours.pictures[what], theirs.pictures[what])
        low = {
            precision: (errors(a.outputs[what], exact), errors(b.outputs[what], exact))
            for precision, (a, b) in lower.items()
        }
        rows.append(Row(name, what, largest, relative(ours.outputs[what], exact), low))
    return rows


def small_size(name: str) -> Task:
    """Eight inputs and every picture from 32 seeds, of 64 pixels: enough for a mean of rounding errors."""
    given = [draw(reference.small(FAMILIES[name]), seed, 64) for seed in range(8)]
    return Task(given, requests(name, images=32))


FULL_SIZE = {  # the families that are compared at full size, and the picture that they make
    "sd15": "10 ddim leading",
    "sd21": "10 ddim leading",
    "sdxl-base": "10 euler leading, negative_prompt None",
}


def full_size(name: str, images: int = 8) -> Task:
    """One input and one picture of 128 pixels, the latter from 8 seeds and in 4 steps."""
    label = FULL_SIZE[name]
    request = dataclasses.replace(requests(name, side=128, images=images)[label], steps=4)
    return Task([draw(FAMILIES[name], 0, 128)], {label.replace("10", "4", 1): request})
