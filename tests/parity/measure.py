"""Measure how far this package is from diffusers: `python -m tests.parity.measure --write docs/parity.md`.

With --full also at the official sizes (30 GB of disk, 18 GB of memory); with --device cuda on a GPU, and in fp16 too.
"""

import argparse
import platform
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

import ldm
from ldm.models.tokens import Tokenizer
from tests.parity import compare, golden, reference
from tests.parity.compare import TIMESTEPS
from tests.parity.reference import FAMILIES

HEAD = """\
# Parity with diffusers

Written by `{command}` on {machine}.

The weights are random. diffusers built, saved and ran the models; this package loaded the folders that it saved.
"Relative" is the largest difference in parts of the largest value, in fp32. The columns of a lower precision are errors
of the run in that precision, ours and diffusers' own, against diffusers' fp32 run: root mean square, in parts of the
run's own. Their ratio, with its standard error, is 1 where both round alike and below 1 where ours is the more exact.
"""
NETWORKS = """\
## Networks

Small models: the published architectures with narrower UNets (64 to 128 channels) and text encoders of 3 layers.
{inputs} random inputs each, the UNet at timesteps {timesteps} in each of them; the text encoders read
a prompt and a negative prompt that each library cut into tokens by itself.
"""
PICTURES = """\
## Pictures

Of the same models, from prompt to bytes: 32 seeds for each line, 64 pixels, with a guidance scale of 7.5 and a
negative prompt unless the line says otherwise. The largest difference is in levels of 255; the relative one and the
lower precisions are of the latents. Over all lines our error in {precision} is {ratio:.2f} of diffusers' own: most of
it is the UNet's, which rounds alike in both; the rest is the sampler's, which here is never rounded. Where a sampler
of diffusers has timesteps of its own, it was told to take the others'; combinations that are missing cannot be told
(`STEP_LISTS` in `tests/parity/reference.py` says why).
"""
FULL_SIZE = """\
## At full size

The official architectures, with one random input and one picture from 8 seeds, of 128 pixels.
"""
FILES = """\
## Files

The small models, saved by us in both layouts: how many of the tensors that were read equal those that diffusers had
saved, bit for bit. Single files were read by diffusers' own converter, `from_single_file(file, config=folder)`.
"""
GOLDEN = """\
## Token ids and step lists

{equal} of {prompts} golden prompts give the ids of transformers. Two differences are meant. An "!" stays 256 in the
towers of SD 2 and SDXL that pad with 0, as their authors' code has it; transformers takes it for padding there. And
texts are cut as they are; OpenAI's own code repairs them first, which shows in

{repaired}

{named} of {lists} golden step lists of diffusers have a name here, and differ by {worst:.0e} at most: they are written
with five decimals. A sampler takes any list of levels, but these have no name:

{unnamed}
"""


def document(command: str, device: str, *, full: bool) -> str:
    """Measure everything and return it as Markdown."""
    dtypes = [torch.bfloat16, torch.float16] if device != "cpu" else [torch.bfloat16]
    networks, pictures, files = [], [], []
    for name, family in FAMILIES.items():
        print(name, file=sys.stderr)
        task = compare.small_size(name)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            reference.build(folder, reference.small(family))
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
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    command = " ".join(["python -m tests.parity.measure", *sys.argv[1:]])
    text = document(command, args.device, full=args.full)
    if args.write:
        args.write.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
