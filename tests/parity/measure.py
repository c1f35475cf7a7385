"""Measure the differences between this package and diffusers: `python -m tests.parity.measure --write docs/parity.md`.

--tasks measures the tasks instead, from image to image to LoRA: `--tasks --write docs/parity_tasks.md`.
--full measures the official sizes too (30 GB of disk, 18 GB of memory). --device cuda measures on a GPU, in fp16 too.
"""

import argparse
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

import ldm
from ldm.models.tokens import Tokenizer
from tests.parity import compare, controls, golden, inversions, ip_adapters, loras, reference, tenants
from tests.parity.compare import TIMESTEPS
from tests.parity.reference import FAMILIES, SCHEDULERS

IMAGES = 4  # for each cell of the table of image to image and of the refiner

HEAD = """\
# Parity with diffusers

Written by `{command}` on {machine}.

The weights are random. diffusers built the models, saved them and ran them; this package loaded the saved folders.
"Relative" is the largest difference divided by the largest value, in fp32. The columns of a lower precision compare
this package and diffusers in this precision with diffusers in fp32. They hold the root mean square of the error,
divided by that of the fp32 result. Their ratio, with its standard error, is 1 if both round alike, and below 1 if ours
is more exact. [The tasks](parity_tasks.md), from image to image to LoRA, have a page of their own.
"""
NETWORKS = """\
## Networks

Small models: the published architectures with narrower UNets (64 to 128 channels) and text encoders of 3 layers. Each
has {inputs} random inputs, and the UNet runs at the timesteps {timesteps} with each of them. The text
encoders read a prompt and a negative prompt, and each library makes the tokens itself.
"""
TASKS = """\
# Parity with diffusers: tasks

Written by `{command}` on {machine}.

The models are the small ones of [parity.md](parity.md), with random weights. Each picture has 64 pixels.
"""
PICTURES = """\
## Pictures

The same models, from the prompt to the bytes of a picture. Each line has 32 seeds, 64 pixels, a guidance scale of 7.5
and a negative prompt, unless the line says otherwise. The largest difference is in levels of 255. "Relative" and the
lower precisions compare the latents. Some samplers of diffusers have timesteps of their own; these were told to take
the timesteps of the others. Combinations for which this is not possible are missing (`STEP_LISTS` in
`tests/parity/reference.py` says why).

Over all lines our error in {precision} is {ratio:.2f} of diffusers' error. Most of the error comes from the UNet, which
rounds alike in both. The rest comes from the sampler, which this package computes in fp32.
"""
TENANTS = """\
## Image to image, and SDXL with its refiner

The same models. Each cell is the largest difference of {images} pictures from diffusers, in levels of 255, and both
libraries run the same number of steps. Image to image starts from a picture of 64 pixels; a strength of 0.6 runs 12 of
20 steps. "sdxl-base, 0.8" is the base model and its refiner with a handover of 0.8; together they run 25 steps.

With Heun's method diffusers stops the base model in the middle of a step, and lets the refiner begin this step again.
For this table its refiner was given the latents from the beginning of the step.
"""
CONTROLS = """\
## ControlNets

The same models with small random ControlNets. Each cell is the largest difference of {images} pictures from diffusers,
in levels of 255, with Euler's method and 20 steps. "Shares" are two ControlNets that act in a part of the steps each.
"Shuffle" has averaged outputs.
"""
IP_ADAPTERS = """\
## Image prompts

The same models with small random IP-Adapters in the files of their authors, and a small vision tower. Each cell is the
largest difference of {images} pictures from diffusers, in levels of 255, with Euler's method and 20 steps. "Both" are a
plain and a Plus IP-Adapter at the same time.
"""
INPAINTING = """\
## Inpainting

The same models and pictures, with a mask of half of each side, all steps, and 10 of them. "4 channels" keeps the known
latents of a text-to-image model. "9 channels" is the same UNet with 5 more input channels of random weights, for the
mask and the masked picture. The pictures are compared before the kept pixels are pasted. DDIM ends at level 0 in both:
at its own last level, 0.03, diffusers removes the noise of the kept latents, and this package does not.
"""
EDITING = """\
## Editing

The same pictures edited by models with 4 more input channels of random weights, for the latents of the picture:
InstructPix2Pix. All steps, 10 of them, with an image guidance of 1.5.
"""
INVERSIONS = """\
## Textual inversion

The same text encoders with two embeddings, of one vector and of three. The table holds the largest difference of the
context, and of the pooled text where the model has one, divided by the largest value. diffusers pools at the largest id
of a prompt, which is that of an embedding; for this table it was told the end token, where this package pools.
"""
TAESD = """\
## Previews

The decoder of TAESD, which makes previews, at full size with random weights: the largest difference is {:.2g}, relative
{:.1e}.
"""
LORAS = """\
## LoRA

The same models with random LoRAs of kohya's names, for attentions and convolutions of the UNet and for the text
encoders. Each cell is the largest difference of {images} pictures from diffusers with peft, in levels of 255, with
Euler's method and 20 steps. "Two" have the weights 0.7 and -0.4.
"""
FULL_SIZE = """\
## At full size

The official architectures, with one random input and one picture from each of 8 seeds, of 128 pixels.
"""
FILES = """\
## Files

This package saved the small models in both layouts. The table counts the tensors that equal those that diffusers had
saved, bit for bit. diffusers read single files with its own converter: `from_single_file(file, config=folder)`.
"""
GOLDEN = """\
## Token ids and step lists

{equal} of {prompts} golden prompts give the token ids of transformers. Two differences are intended. First, "!" keeps
its id 256 in the text encoders of SD 2 and SDXL that pad with 0, as in the code of their authors. transformers takes
"!" for padding there. Second, OpenAI's own code repairs a text before it makes tokens; this package and transformers do
not. These prompts show the second difference:

{repaired}

{named} of {lists} golden step lists of diffusers have a name here. They differ by at most {worst:.0e}, because the
golden lists are written with five decimals. A sampler takes any list of levels, but these lists have no name:

{unnamed}
"""


def document(command: str, device: str, *, full: bool) -> str:
    """Measure networks, pictures and files, and return the results as Markdown."""
    dtypes = [torch.bfloat16, torch.float16] if device != "cpu" else [torch.bfloat16]
    networks: list[compare.Row] = []
    pictures: list[compare.Row] = []
    files = []
    for name, folder in _small_models():
        task = compare.small_size(name)
        for row in compare.measure(name, folder, task, device, dtypes):
            (pictures if row.what in task.asked else networks).append(row)
        both = ldm.load(folder, ldm.Placement("cpu")), reference.load(folder)
        files.append((name, compare.saved(name, folder, *both)))
    parts = [
        HEAD.format(command=command, machine=_machine(device)),
        NETWORKS.format(inputs=len(task.given), timesteps=", ".join(map(str, TIMESTEPS))),
        _differences(networks),
        PICTURES.format(**_overall(pictures)),
        _differences(pictures),
    ]
    if full:
        parts += [FULL_SIZE, _differences(_full_size(device, dtypes))]
    readings = list(files[0][1])
    rows = ([name, *(f"{a} of {b}" for a, b in read.values())] for name, read in files)
    parts += [FILES, _table(["model", *readings], rows), _golden()]
    return "\n".join(parts)


def tasks(command: str) -> str:
    """Measure the tasks on the CPU and return the results as Markdown."""
    tenancies, controlled, prompted, inpainted, edited, inverted, adapted = ([] for _ in range(7))
    for name, folder in _small_models():
        both = ldm.load(folder, ldm.Placement("cpu")), reference.load(folder)
        if FAMILIES[name].makes_pictures:
            tenancies.append([name, *_image_to_image(*both)])
        if name in inversions.FAMILIES:
            cells = [f"{value:.1e}" for value in inversions.differences(folder, both[1], folder)]
            inverted.append([name, *cells, *[""] * (2 - len(cells))])
        if name in loras.FAMILIES and loras.installed():
            adapted.append([name, *_with_loras(*both, folder)])
        if name in ip_adapters.FAMILIES:
            prompted.append([name, *_image_prompts(*both, folder)])
        if name in controls.FAMILIES:
            controlled.append([name, *_controlled(*both, folder)])
            inpainted.append([f"{name}, 4 channels", *_inpainting(*both)])
            wide = tenants.nine_channels(both[1], folder / "9")
            inpainted.append([f"{name}, 9 channels", *_inpainting(ldm.load(folder / "9", ldm.Placement("cpu")), wide)])
            if name != "sdxl-base":
                wide = tenants.eight_channels(both[1], folder / "8")
                edited.append([name, *_editing(ldm.load(folder / "8", ldm.Placement("cpu")), wide)])
    parts = [
        TASKS.format(command=command, machine=_machine("cpu")),
        TENANTS.format(images=IMAGES),
        _table(["model", *SCHEDULERS], tenancies + _two_stages()),
        CONTROLS.format(images=IMAGES),
        _table(["model", *controls.CASES], controlled),
        IP_ADAPTERS.format(images=IMAGES),
        _table(["model", *ip_adapters.CASES], prompted),
        INPAINTING,
        _table(["model", *SCHEDULERS], inpainted),
        EDITING,
        _table(["model", *SCHEDULERS], edited),
        INVERSIONS,
        _table(["model", "context", "pooled text"], inverted),
        TAESD.format(*compare.taesd()),
    ]
    if adapted:
        parts += [LORAS.format(images=IMAGES), _table(["model", *loras.CASES], adapted)]
    return "\n".join(parts)


def _small_models() -> Iterator[tuple[str, Path]]:
    """Build the small model of each family in a folder, which is deleted afterwards."""
    for name, family in FAMILIES.items():
        print(name, file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            reference.build(Path(folder), reference.small(family))
            yield name, Path(folder)


def _image_to_image(ours: ldm.Pipeline, theirs: Any) -> Iterator[str]:
    """Yield the largest difference for each sampler."""
    for sampler in SCHEDULERS:
        request = tenants.from_picture(sampler, images=IMAGES)
        yield _compared(tenants.ours(ours, request), tenants.theirs(theirs, request))


def _controlled(ours: ldm.Pipeline, theirs: Any, folder: Path) -> Iterator[str]:
    """Yield the largest difference for each case of `controls.CASES`."""
    networks = controls.three(folder, theirs)
    for case in controls.CASES.values():
        request = tenants.request(images=IMAGES, controls=case(networks, controls.hints(2)))
        yield str(compare.levels(tenants.ours(ours, request)[0], controls.theirs(theirs, request)))


def _image_prompts(ours: ldm.Pipeline, theirs: Any, folder: Path) -> Iterator[str]:
    """Yield the largest difference for each case of `ip_adapters.CASES`."""
    ip_adapters.build(folder / "ip", theirs)
    for case in ip_adapters.CASES:
        request = tenants.request(images=IMAGES, image_prompts=ip_adapters.prompts(folder / "ip", case))
        yield str(compare.levels(tenants.ours(ours, request)[0], ip_adapters.theirs(theirs, request)))


def _with_loras(ours: ldm.Pipeline, theirs: Any, folder: Path) -> Iterator[str]:
    """Yield the largest difference for each case of `loras.CASES`."""
    files = loras.write(folder, theirs)
    for case in loras.CASES:
        yield str(loras.difference(ours, theirs, files, case, tenants.request(images=IMAGES)))


def _inpainting(ours: ldm.Pipeline, theirs: Any) -> Iterator[str]:
    """Yield the largest difference for each sampler."""
    for sampler in SCHEDULERS:
        request = tenants.with_mask(sampler, steps=10, images=IMAGES)
        yield _compared(tenants.ours_inpainted(ours, request), tenants.theirs_inpainted(theirs, request))


def _editing(ours: ldm.Pipeline, theirs: Any) -> Iterator[str]:
    """Yield the largest difference for each sampler."""
    for sampler in SCHEDULERS:
        request = tenants.to_edit(sampler, steps=10, images=IMAGES)
        yield _compared(tenants.ours(ours, request), tenants.theirs_edited(theirs, request))


def _two_stages() -> list[list[str]]:
    print("sdxl-base and sdxl-refiner", file=sys.stderr)
    models = []
    for name in ("sdxl-base", "sdxl-refiner"):
        with tempfile.TemporaryDirectory() as temporary:
            reference.build(Path(temporary), reference.small(FAMILIES[name]))
            models.append((ldm.load(temporary, ldm.Placement("cpu")), reference.load(Path(temporary))))
    ours, theirs = zip(*models, strict=True)
    rows = []
    for handover in (0.8, 0.5):
        rows.append([f"sdxl-base, {handover}"])
        for sampler in SCHEDULERS:
            request = tenants.request(sampler, 25, images=IMAGES)
            expected = tenants.theirs_in_two_stages(*theirs, request, handover)
            own = tenants.same_handover(request, handover)
            rows[-1].append(_compared(tenants.ours_in_two_stages(*ours, request, own), expected))
    return rows


def _compared(ours: tuple[np.ndarray, Any], theirs: tuple[np.ndarray, Any]) -> str:
    """Return the largest difference in levels. Raises ValueError if the numbers of steps differ."""
    if ours[1] != theirs[1]:
        raise ValueError(f"ours runs {ours[1]} steps, theirs {theirs[1]}")
    return str(compare.levels(ours[0], theirs[0]))


def _full_size(device: str, dtypes: list[torch.dtype]) -> list[compare.Row]:
    rows = []
    for name in compare.FULL_SIZE:
        print(f"{name} at full size", file=sys.stderr)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            reference.build(folder, FAMILIES[name])
            rows += compare.measure(name, folder, compare.full_size(name), device, dtypes)
    return rows


def _differences(rows: list[compare.Row]) -> str:
    head = ["model", "what", "largest difference", "relative"]
    for precision in rows[0].low:
        head += [f"{precision}, ours", f"{precision}, diffusers", "ratio"]
    lines = []
    for row in rows:
        line = [row.model, row.what, f"{row.largest:.2g}", f"{row.relative:.1e}"]
        for ours, theirs in row.low.values():
            ratio = f"{ours.mean() / theirs.mean():.2f}"
            if len(ours) > 1:
                ratio += f" ± {(ours / theirs).std() / len(ours) ** 0.5:.2f}"
            line += [f"{ours.mean():.1e}", f"{theirs.mean():.1e}", ratio]
        lines.append(line)
    return _table(head, lines)


def _overall(rows: list[compare.Row]) -> dict[str, Any]:
    """The first of the lower precisions, and the geometric mean of the ratios in it."""
    precision = next(iter(rows[0].low))
    ratios = [ours.mean() / theirs.mean() for ours, theirs in (row.low[precision] for row in rows)]
    return {"precision": precision, "ratio": float(torch.stack(ratios).log().mean().exp())}


def _table(head: list[str], lines: Iterable[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _golden() -> str:
    tokenizer, worst = Tokenizer.official(), 0.0
    equal = [golden.token_ids(tokenizer, c["prompt"]) == c["transformers"] for c in golden.TOKENS]
    unnamed = {n: why for n, why in golden.EXPRESSED.items() if isinstance(why, str)}
    for case in golden.SCHEDULES:
        if case["name"] not in unnamed and case["sigmas"]:
            pairs = zip(golden.steps(case)[0], case["sigmas"], strict=True)
            worst = max(worst, *(abs(ours - theirs) for ours, theirs in pairs))
    return GOLDEN.format(
        equal=sum(equal),
        prompts=len(equal),
        repaired="\n".join(f"- {what}: `{t!a}`" for t, what in golden.REPAIRED_BY_OPENAI.items()),
        named=len(golden.SCHEDULES) - len(unnamed),
        lists=len(golden.SCHEDULES),
        worst=worst,
        unnamed="\n".join(f"- {name}: {why}" for name, why in unnamed.items()),
    )


def _machine(device: str) -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if device != "cpu":
        name = torch.cuda.get_device_name(device)
    elif info.is_file():  # Linux, where platform says x86_64 only
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        name = {key.strip(): value.strip() for key, value in fields.items()}.get("model name", name)
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }
    return f"{name}, with " + ", ".join(f"{what} {version}" for what, version in versions.items())


def main() -> None:
    """Measure, and print the document or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    command = " ".join(["python -m tests.parity.measure", *sys.argv[1:]])
    if args.tasks and (args.full or args.device != "cpu"):
        parser.error("--tasks measures small models on the CPU: omit --full and --device")
    text = tasks(command) if args.tasks else document(command, args.device, full=args.full)
    if args.write:
        args.write.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
