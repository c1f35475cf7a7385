"""Time this package against diffusers: `python -m tests.benchmarks.run --write` renews docs/performance.md and .json.

For each row two processes load the same random weights and do the same work in turn, A B B A A B ..., so that other
work on the machine disturbs both alike. If a row cannot be measured, stderr says why and the row is left out. Rows of
earlier runs stay. Of performance.md only the text between its two marks is replaced.
"""

import argparse
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing, suppress
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

from ldm.checkpoint import files
from ldm.checkpoint.parts import Model
from ldm.models.text import TextEncoder
from ldm.models.tokens import Tokenizer
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.presets import TINY
from tests.benchmarks.cases import CASES, COMPUTING, DEFAULT, DEFAULTS, PARTS, PLANS, PROCESSES, SIDES, STARTING, TIMED
from tests.benchmarks.counted import counted, mib, networks, size, work
from tests.benchmarks.report import KEY, document, publish

ROOT = Path(__file__).parents[2]
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
QUIET |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
CODE = {  # what a process runs, by part and library; all other processes import the library
    ("import", "diffusers"): (  # diffusers would import torchao, which takes seconds
        "import sys; sys.modules['torchao'] = None; from diffusers import StableDiffusionPipeline"
    ),
    ("command", "ldm"): """
import contextlib, sys, tempfile, ldm.cli
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
    sys.argv = ["ldm", "txt2img", "a frog on the grass", "--out", f"{folder}/out.png"]
    if ldm.cli.main():
        raise SystemExit("the command failed")
""",
}


class FailedError(Exception):
    """Say why a row could not be measured."""


def matrix_rate(device, dtype):
    """Measure the most operations a second of large matrix products and convolutions."""
    n, b = (8192, 16) if device == "cuda" else (2048, 1)
    draw = partial(torch.randn, device=device, dtype=dtype)
    a, x, w = draw(n, n), draw(b, 512, 64, 64), draw(512, 512, 3, 3)
    y, v = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    conv = 2 * x.numel() * w[0].numel()
    tried = [(2 * n**3, torch.mm, a, a), (conv, F.conv2d, x, w), (conv, F.conv2d, y, v)]
    return max(flops / fastest(device, *call) for flops, *call in tried)


def copy_rate(device):
    """Measure the bytes a second that a large copy reads and writes."""
    a, b = torch.ones(2, 2**27, device=device)
    return 2 * a.nbytes / fastest(device, b.copy_, a)


def fastest(device, call, *inputs):
    """Return the seconds of the fastest of ten calls."""
    seconds = []
    for _ in range(11):
        start = time.perf_counter()
        call(*inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def system(file, pattern, default):
    """Read a value from a file in /proc; return the default where there is no such file or value."""
    path = Path("/proc", file)
    found = re.search(pattern, path.read_text()) if path.is_file() else None
    return type(default)(found[1]) if found else default


def check_room(case, dtype, device):
    """Raise FailedError unless two models fit into memory, with the activations of the VAE, which are the largest."""
    config, pixels = CASES[case]
    need = dtype.itemsize * (2 * size(*networks(config)) + 800 * pixels**2)
    free = system("meminfo", r"MemAvailable:\s+(\d+)", math.inf) * 1024
    if device == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
    if need > free:
        raise FailedError(f"needs about {need / 1e9:.0f} GB of memory, {free / 1e9:.0f} are free")


def write_model(config, path):
    """Write random weights in fp16 into the folder `path`, in both layouts. The bundled model is copied as a folder."""
    if config is TINY:
        shutil.copytree(ROOT / "weights" / "tiny", path / "folder")
        return
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    text = TextEncoder(config.text, [Tokenizer.official()] * len(config.text))
    model = Model(config, UNet(config.unet), VAE(config.vae), text)
    torch.set_default_dtype(torch.float32)
    files.save(model, path / "folder", dtype=torch.float16)
    files.save(model, path / "file.safetensors", layout="ldm", dtype=torch.float16)


class Worker:
    """A new process, worker.py or the code of a command or import. It is ready when the constructor returns."""

    def __init__(self, side, task):
        self.side, library = side, side.split("-")[0]
        task = {"library": library} | DEFAULT | SIDES.get(side, {}) | task
        command = ["-m", "tests.benchmarks.worker", json.dumps(task)]
        if task["part"] in PROCESSES:
            code = CODE.get((task["part"], library), f"import {library}")
            command = ["-c", f"{code}\nprint('{{}}')"]
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | QUIET | task["env"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer()

    def ask(self, word):
        with suppress(BrokenPipeError):  # the process has ended, and the answer says so
            print(word, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"ended with {self.process.wait()}"}
        if "error" in answer:
            self.close()
            raise FailedError(f"{self.side}: {answer['error']}")
        return answer

    def close(self):
        self.process.communicate()


def start(side, task):
    """Measure the seconds until a new process is ready."""
    began = time.perf_counter()
    with closing(Worker(side, task)):
        return {"seconds": time.perf_counter() - began}


def alternate(a, b, rounds):
    """Call both in turn, A B B A A B ..., after one call each that is not counted. Returns pairs of results."""
    a(), b()
    return [(a(), b()) if i % 2 == 0 else (b(), a())[::-1] for i in range(rounds)]


def measure(sides, task, rounds):
    """Time a task on two sides and return the figures of a row.

    Raises FailedError if a side fails or the results differ.
    """
    peaks = [{}, {}]
    with ExitStack() as stack:
        if task["part"] in [*PROCESSES, *STARTING]:
            pairs = alternate(*(partial(start, side, task) for side in sides), rounds)
        else:
            workers = [stack.enter_context(closing(Worker(side, task))) for side in sides]
            pairs = alternate(*(partial(worker.ask, "run") for worker in workers), rounds)
            peaks = [worker.ask("peak") for worker in workers]
            for a, b in pairs:
                alike = abs(a["std"] - b["std"]) <= 0.1 * b["std"]
                if a["numbers"] != b["numbers"] or not alike:
                    raise FailedError(f"the sides did not do the same work: {a} and {b}")
    seconds = [statistics.median(pair[i]["seconds"] for pair in pairs) for i in (0, 1)]
    ratios = sorted(b["seconds"] / a["seconds"] for a, b in pairs)
    row = {"s": seconds[0], "its s": seconds[1], "ratio": statistics.median(ratios)}
    row |= {"least": ratios[0], "most": ratios[-1], "runs": rounds}
    return row | {
        f"{whose}{where} MiB": mib(peak[where])
        for where in peaks[0]
        for whose, peak in zip(("", "its "), peaks, strict=True)
    }


def fill(row, models, steps, rounds, rates):
    """Measure a row and add the figures to it. `models` is a folder. Raises FailedError if that is not possible."""
    case, part, name = row["case"], row["part"], row["dtype"]
    sides, dtype = (row["side"], row["against"]), getattr(torch, name, None)
    if part in PROCESSES:
        row |= measure(sides, {"part": part}, rounds)
        return
    check_room(case, dtype, row["device"])
    config, pixels = CASES[case]
    model = models / config.name
    if not model.exists():
        write_model(config, model)
    task = {"part": part, "dtype": name, "device": row["device"], "model": str(model)}
    task |= {"pixels": pixels, "factor": config.vae.factor, "channels": config.vae.latent_channels}
    task |= {"steps": 3 if part == "step" else steps}
    row |= measure(sides, task, rounds)
    if part in COMPUTING:
        flops, numbers = work(case, part, steps)
        bytes_read = numbers * dtype.itemsize
        row |= {"TFLOP": flops / 1e12, "GB": bytes_read / 1e9}
        row["of floor"] = max(flops / rates[name], bytes_read / rates["copy"]) / row["s"]
    if part == "step":
        row["steps/s"] = 1 / row["s"]
    elif part == "txt2img":
        row |= {"steps": steps, "steps/s": steps / row["s"]}


def arguments(words):
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--device", choices=DEFAULTS, default="cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--parts", nargs="+", choices=PARTS)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--variants", nargs="+", choices=SIDES, help="this package's side (default: ldm)")
    parser.add_argument("--against", choices=SIDES, default="diffusers")
    parser.add_argument("--steps", type=int, help="steps of a whole picture")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", nargs="?", type=Path, const=ROOT / "docs", metavar="FOLDER")
    args = parser.parse_args(words)
    args.chosen = args.cases or args.parts or args.variants
    cases, dtypes, steps = DEFAULTS[args.device]
    args.cases, args.dtypes = args.cases or cases, args.dtypes or dtypes
    args.parts, args.variants = args.parts or PARTS, args.variants or ["ldm"]
    args.steps = args.steps or steps
    if args.device == "cpu" and "float16" in args.dtypes:
        parser.error("a CPU does not compute in float16; loading float16 is timed without --dtypes")
    return args


def jobs(args):
    """Yield the rows to measure: case, part, dtype, side and the other side. Loading is timed without a cast, too."""
    if "command" in args.parts:
        yield "bundled-128", "command", "", "ldm", "torch"
    if "import" in args.parts:
        yield from (("", "import", "", "ldm", other) for other in ["diffusers", "torch"])
    for case, part in product(args.cases, [part for part in args.parts if part in TIMED]):
        dtypes = dict.fromkeys(args.dtypes if part in COMPUTING else ["float16", *args.dtypes])
        for dtype, side in product(dtypes, args.variants):
            yield case, part, dtype, side, args.against


def machine(device):
    """Name the processor, its memory and, for cuda, the GPU."""
    gpu = f"{torch.cuda.get_device_name()}; " if device == "cuda" else ""
    memory = system("meminfo", r"MemTotal:\s+(\d+)", 0) / 2**20
    name = system("cpuinfo", r"model name\s*: (.*)", platform.machine())
    return f"{gpu}{name}, {os.cpu_count()} cores, {memory:.0f} GiB"


def main():
    args = arguments(sys.argv[1:])
    plans = [args]
    if not args.chosen:
        plans = [arguments([*sys.argv[1:], *plan.split()]) for plan in PLANS[args.device]]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the gigabytes of models are deleted
    rates = {name: matrix_rate(args.device, getattr(torch, name)) for name in args.dtypes}
    rates["copy"] = copy_rate(args.device)
    libraries = ("torch", "diffusers", "transformers")
    about = {
        "machine": machine(args.device),
        "device": args.device,
        "date": str(date.today()),
        "command": f"`python -m tests.benchmarks.run {shlex.join(sys.argv[1:])}`",
        "threads": f"{torch.get_num_threads()} threads",
        "versions": ", ".join(f"{name} {version(name)}" for name in libraries),
        "rates": ", ".join(f"{what} {rate / 1e9:.0f} G/s" for what, rate in rates.items()),
    }
    results, failed = {"rows": [], "memory": []}, False
    counts = {case: None for plan in plans if "memory" in plan.parts for case in plan.cases}
    if counts:
        results["memory"] = [row for case in counts for row in counted(case)]
        publish(args.write, results)
    with tempfile.TemporaryDirectory() as models:
        for job in (job for plan in plans for job in jobs(plan)):
            row = about | dict(zip(KEY[1:], job, strict=True))
            try:
                fill(row, Path(models), args.steps, args.rounds, rates)
            except FailedError as error:
                failed = True
                print(*job, f"failed: {error}", file=sys.stderr)
                continue
            print(*job, f"{row['s']:.3g} s, ratio {row['ratio']:.2f}", file=sys.stderr)
            results["rows"].append(row)
            publish(args.write, results)
    print(document(results))
    sys.exit(failed)


if __name__ == "__main__":
    main()
