"""Time this package against diffusers and write docs/performance.md and .json: `python scripts/benchmark.py --write`.

For each row two processes load the same random weights and do the same work in turn, A B B A A B ..., so that whatever
else the machine does meets both. A row that fails is told on stderr and left out; those of earlier runs stay. Of
performance.md only what stands between its marks is replaced.
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
from dataclasses import replace
from datetime import date
from functools import cache, partial
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ldm.checkpoint import files
from ldm.checkpoint.parts import Model
from ldm.config import TextConfig, UNetConfig, VAEConfig
from ldm.models.attention import math_attention, set_attention, sliced_attention
from ldm.models.text import TextEncoder
from ldm.models.tokens import Tokenizer
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.placement.memory import DECODE, slab_budget
from ldm.placement.offload import Streamed
from ldm.placement.slabs import encode_slabs
from ldm.placement.tiles import encode_tiles
from ldm.presets import SD15, SD21, SDXL_BASE, SDXL_REFINER, TINY

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.live_bytes import LiveBytes  # noqa: E402

CUT_DOWN = replace(
    SD15,
    name="cut-down",
    unet=UNetConfig(channels=(64, 128), depth=(1, 1), heads=(2, 2), context_dim=64),
    vae=VAEConfig(channels=(32, 32, 64, 64), res_blocks=1),
    text=(TextConfig(width=64, layers=2, heads=2, mlp=128),),
)
REFINER_WIDTHS = replace(  # the widths of SDXL's refiner, in a UNet that runs anywhere
    CUT_DOWN,
    name="refiner-widths",
    unet=replace(SDXL_REFINER.unet, res_blocks=1, depth=(0, 1, 1, 0), mid_depth=1, context_dim=64, vector_dim=None),
)
CASES = {  # architecture and pixels, in the order of the tables
    "bundled-64": (TINY, 64),
    "cut-down-64": (CUT_DOWN, 64),
    "sd15-256": (SD15, 256),
    "sd15-512": (SD15, 512),
    "sd15-1024": (SD15, 1024),
    "sd15-2048": (SD15, 2048),
    "sd21-768": (SD21, 768),
    "sdxl-1024": (SDXL_BASE, 1024),
    "refiner-widths-256": (REFINER_WIDTHS, 256),
}
DEFAULTS = {  # cases, dtypes, and steps of a picture
    "cpu": (["sd15-256", "sd15-512"], ["float32", "bfloat16"], 4),
    "cuda": (["sd15-512", "sd21-768", "sdxl-1024"], ["float16", "bfloat16"], 20),
}
PLANS = {  # what is measured where no case, part or variant is chosen
    "cpu": [
        "--parts command --cases bundled-64",
        "--parts step decode txt2img --cases bundled-64 --variants ldm ldm-not-packed ldm-library",
        "--parts step --cases refiner-widths-256 --variants ldm ldm-not-packed",
        "--parts memory --cases sd15-512 sd15-1024 sd15-2048 sd21-768 sdxl-1024",
        "--parts import text decode encode txt2img --cases sd15-256",
        "--parts step --cases sd15-256 --variants ldm ldm-library ldm-not-packed ldm-library-fast",
        "--parts step --cases sd15-256 --against diffusers-kept-memory",
        "--parts step --cases sd15-256 --variants ldm-sequential --against ldm",
        "--parts step decode txt2img --cases sd15-512",
        "--parts decode --cases sd15-1024 --variants ldm-slabs ldm-tiles --against ldm --dtypes bfloat16",
        "--parts load_file load_folder ready_file --cases sd15-256 --variants ldm ldm-library",
    ],
    "cuda": [
        "--parts command --cases bundled-64",
        "--parts memory --cases sd15-512 sd15-1024 sd15-2048 sd21-768 sdxl-1024",
        "--parts import text step decode encode txt2img",
        "--parts step txt2img --variants ldm-no-graph ldm-compiled",
        "--parts step txt2img --against diffusers-compiled",
        "--parts step txt2img --variants ldm-sequential ldm-offload-model ldm-offload-blocks",
        "--parts decode --cases sd15-1024 --variants ldm-slabs ldm-tiles --against ldm",
        "--parts load_file load_folder ready_file --cases sd15-512",
    ],
}
COMPUTING = ["text", "step", "decode", "encode", "txt2img"]
STARTING = ["ready_file", "ready_folder"]
TIMED = ["load_file", "load_folder", *STARTING, *COMPUTING]
PROCESSES = ["command", "import"]  # each run is a process
PARTS = ["memory", *PROCESSES, *TIMED]
SIDES = {  # what is not as in `DEFAULT`; the name begins with the library's
    "ldm": {},
    "ldm-library": {"command": False, "fast": False},
    "ldm-library-fast": {"command": False},
    "ldm-not-packed": {"placement": {"packed": False}},
    "ldm-channels-last": {"placement": {"packed": False}, "changes": ["channels last"]},
    "ldm-sdpa": {"placement": {"attention": "sdpa"}},
    "ldm-sliced": {"placement": {"attention": "sliced"}},
    "ldm-math": {"placement": {"attention": "math"}},
    "ldm-sequential": {"placement": {"guidance": "sequential"}},
    "ldm-slabs": {"placement": {"vae_memory": "slabs"}},
    "ldm-tiles": {"placement": {"vae_memory": "tiles"}},
    "ldm-no-graph": {"placement": {"cuda_graph": False}},
    "ldm-compiled": {"placement": {"compile": True}},
    "ldm-offload-model": {"placement": {"offload": "model"}},
    "ldm-offload-blocks": {"placement": {"offload": "blocks"}},
    "diffusers": {},
    "diffusers-kept-memory": {
        "env": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}  # of glibc
    },
    "diffusers-compiled": {"changes": ["compiled"]},
}
DEFAULT = {
    "env": {},  # of the process
    "command": True,  # as the `ldm` command does, keep freed memory
    "fast": True,  # take ldm.Placement.fast and not ldm.Placement
    "placement": {},  # its fields beside device and dtype
    "changes": [],  # what `change` of benchmark_worker does to the loaded pipeline
}
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
QUIET |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
CODE = {  # of a process, by part and library; else the library is imported
    ("import", "diffusers"): (  # torchao would be imported unasked, for seconds
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
    """Why a row could not be measured."""


# ------------------------------------------------------------------ counted


@cache
def networks(config):
    """The UNet, the VAE and the text encoder in fp16, without memory."""
    with torch.device("meta"):
        text = TextEncoder(config.text, [Tokenizer.official()] * len(config.text))
        made = UNet(config.unet), VAE(config.vae), text
    return [network.to("meta", torch.float16) for network in made]


def size(*networks):
    """How many numbers the networks hold."""
    return sum(p.numel() for network in networks for p in network.parameters())


def calls(case):
    """Each part as the network that it needs and a function that runs it; a step has guidance, a batch of two."""
    config, pixels = CASES[case]
    unet, vae, text = networks(config)
    side, tokens = pixels // config.vae.factor, config.text[0].max_length
    empty = partial(torch.empty, dtype=torch.float16, device="meta")
    latents, context = empty(2, 4, side, side), empty(2, tokens, config.unet.context_dim)
    image, vector = empty(1, 3, pixels, pixels), empty(2, config.unet.vector_dim or 0)

    def streamed():
        with Streamed(unet, "meta"):
            unet(latents, empty(2), context, vector)

    return {
        "text": (text, lambda: text.encode(["", ""])),
        "step": (unet, lambda: unet(latents, empty(2), context, vector)),
        "step sequential": (unet, lambda: unet(latents[:1], empty(1), context[:1], vector[:1])),
        "step streamed": (unet, streamed),
        "decode": (vae.decoder, lambda: vae.decode(latents[:1])),
        "decode slabs": (vae.decoder, lambda: DECODE["slabs"](vae, latents[:1])),
        "decode tiles": (vae.decoder, lambda: DECODE["tiles"](vae, latents[:1])),
        "encode": (vae.encoder, lambda: vae.encode(image)),
        "encode slabs": (vae.encoder, lambda: encode_slabs(vae, image, budget=slab_budget(vae, latents))),
        "encode tiles": (vae.encoder, lambda: encode_tiles(vae, image)),
    }


@cache
@torch.no_grad()
def work(case, part, steps=1):
    """The operations of a part, a multiply-add being two, and the weights that it reads, a UNet's in each step."""
    if part == "txt2img":
        works = [work(case, "text"), *[work(case, "step")] * steps, work(case, "decode")]
        return [sum(amounts) for amounts in zip(*works, strict=True)]
    network, call = calls(case)[part]
    set_attention(network, math_attention)
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops(), size(network)


def fused(q, k, v):
    """What a fused kernel holds beside its inputs."""
    return torch.empty_like(q)


ATTENTIONS = {"sdpa": fused, "sliced": sliced_attention, "math": math_attention}
WAYS = {  # of a whole picture: side, its parts, and whether a network is on the device only while it works
    "ldm": (["text", "step", "decode"], False),
    "ldm-sequential": (["text", "step sequential", "decode"], False),
    "ldm-slabs": (["text", "step", "decode slabs"], False),
    "ldm-tiles": (["text", "step", "decode tiles"], False),
    "ldm-offload-model": (["text", "step", "decode"], True),
    "ldm-offload-blocks": (["text", "step streamed", "decode"], True),
    "ldm-offload-blocks, slabs": (["text", "step streamed", "decode slabs"], True),
}


@cache
@torch.no_grad()
def peak(case, part, attention):
    """The most bytes in tensors at a time during a part, beside the weights that were there before."""
    network, call = calls(case)[part]
    set_attention(network, ATTENTIONS[attention])
    with LiveBytes() as live:
        call()
    return live.peak


def counted(case):
    """Rows of the most bytes in tensors, in fp16: of each part beside its weights, and of a picture with them."""
    large = CASES[case][1] > CASES[case][0].image_size  # a case of the VAE alone
    for part in ("decode", "encode") if large else ("step", "decode", "encode"):
        for attention in ATTENTIONS:
            yield memory_row(case, part, f"ldm-{attention}", peak(case, part, attention))
    for part in ("decode", "encode"):
        for way in ("slabs", "tiles"):
            yield memory_row(case, part, f"ldm-{way}", peak(case, f"{part} {way}", "sdpa"))
    if large:
        return
    yield memory_row(case, "step", "ldm-sequential", peak(case, "step sequential", "sdpa"))
    unet, vae, text = (2 * size(network) for network in networks(CASES[case][0]))
    for side, (parts, offload) in WAYS.items():
        peaks = [peak(case, part, "sdpa") for part in parts]
        if offload:  # a streamed UNet's weights come within the part
            weights = [text, 0 if "streamed" in parts[1] else unet, vae]
            most = max(w + p for w, p in zip(weights, peaks, strict=True))
        else:
            most = unet + vae + text + max(peaks)
        yield memory_row(case, "picture", side, most)


def memory_row(case, part, side, most):
    return {"case": case, "part": part, "side": side, "peak, MiB": mib(most)}


def mib(count):
    return round(count / 2**20, 1)


# ------------------------------------------------------------------ measured


def matrix_rate(device, dtype):
    """The most operations a second of large products and convolutions."""
    n, b = (8192, 16) if device == "cuda" else (2048, 1)
    draw = partial(torch.randn, device=device, dtype=dtype)
    a, x, w = draw(n, n), draw(b, 512, 64, 64), draw(512, 512, 3, 3)
    y, v = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    conv = 2 * x.numel() * w[0].numel()
    tried = [(2 * n**3, torch.mm, a, a), (conv, F.conv2d, x, w), (conv, F.conv2d, y, v)]
    return max(flops / fastest(device, *call) for flops, *call in tried)


def copy_rate(device):
    """The most bytes a second that a large copy reads and writes."""
    a, b = torch.ones(2, 2**27, device=device)
    return 2 * a.nbytes / fastest(device, b.copy_, a)


def fastest(device, call, *inputs):
    """Seconds of the fastest of ten calls."""
    seconds = []
    for _ in range(11):
        start = time.perf_counter()
        call(*inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def system(file, pattern, default):
    """What Linux says of the machine, elsewhere the default."""
    path = Path("/proc", file)
    found = re.search(pattern, path.read_text()) if path.is_file() else None
    return type(default)(found[1]) if found else default


def check_room(case, dtype, device):
    """Raise FailedError unless two models fit, with the activations of a VAE, which has the largest."""
    config, pixels = CASES[case]
    need = dtype.itemsize * (2 * size(*networks(config)) + 800 * pixels**2)
    free = system("meminfo", r"MemAvailable:\s+(\d+)", math.inf) * 1024
    if device == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
    if need > free:
        raise FailedError(f"needs about {need / 1e9:.0f} GB of memory, {free / 1e9:.0f} are free")


def write_model(config, path):
    """Write random weights in fp16 into the folder `path`, in both layouts; the bundled model as it is, a folder."""
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
    """A new process, benchmark_worker.py or an import alone, that is ready once this exists."""

    def __init__(self, side, task):
        self.side, library = side, side.split("-")[0]
        task = {"library": library} | DEFAULT | SIDES.get(side, {}) | task
        command = [Path(__file__).with_name("benchmark_worker.py"), json.dumps(task)]
        if task["part"] in PROCESSES:
            code = CODE.get((task["part"], library), f"import {library}")
            command = ["-c", f"{code}\nprint('{{}}')"]
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | QUIET | task["env"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer()

    def ask(self, word):
        with suppress(BrokenPipeError):  # of a process that has ended
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
    """Seconds until a new process is ready."""
    began = time.perf_counter()
    with closing(Worker(side, task)):
        return {"seconds": time.perf_counter() - began}


def alternate(a, b, rounds):
    """Call both in turn, A B B A A B ..., after one call each that is not counted; returns pairs of results."""
    a(), b()
    return [(a(), b()) if i % 2 == 0 else (b(), a())[::-1] for i in range(rounds)]


def measure(sides, task, rounds):
    """Time a task on two sides; returns what a row says of it. Raises FailedError if one fails or they differ."""
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
    """Measure what a row names and add it; `models` is a folder. Raises FailedError if that cannot be done."""
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
    task |= {"pixels": pixels, "factor": config.vae.factor, "steps": 3 if part == "step" else steps}
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


# ------------------------------------------------------------------ told

MEMORY = """\
## Memory, counted

Of one picture in fp16, by counting tensors without computing (`tests/live_bytes.py`); kernels may use more inside. Of
a step, decode and encode: the most that tensors take at a time beside the weights. Of a picture: with all weights that
are on the device then. sdpa is counted as a fused kernel, which holds no scores; slabs have the budget of the option.
"""
MARKS = ("<!-- measured -->\n", "<!-- end -->")
ABOUT = ("machine", "device", "date", "command", "threads", "versions", "rates")
KEY = ("machine", "case", "part", "dtype", "side", "against")


def document(results):
    """All results as Markdown."""
    text = []
    for machine in dict.fromkeys(row["machine"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["machine"] == machine]
        runs = dict.fromkeys("; ".join(row[name] for name in ABOUT[2:]) for row in rows)
        text += [f"## {machine}\n", "".join(f"- {run}\n" for run in runs), table(rows)]
    return "\n".join([*text, MEMORY, table(results["memory"])] if results["memory"] else text)


def table(rows):
    """Rows as Markdown, without what is told of their runs."""
    head = list(dict.fromkeys(name for row in rows for name in row if name not in ABOUT))
    cells = [[row.get(name, "") for name in head] for row in rows]
    lines = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in line] for line in cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *lines])


def place(key):
    """Where the row of a key stands: by machine, then as in `CASES`."""
    machine, case, *rest = key
    return machine or "", [*CASES, case].index(case), case, [str(name) for name in rest]


def publish(folder, new):
    """Write results into the folder, if any, in the place of the same rows there, and keep the others."""
    if folder is None:
        return
    file = folder / "performance.json"
    old = json.loads(file.read_text()) if file.is_file() else {"rows": [], "memory": []}
    merged = {}
    for kind in old:
        rows = {tuple(row.get(name) for name in KEY): row for row in old[kind] + new[kind]}
        merged[kind] = [rows[key] for key in sorted(rows, key=place)]
    file.write_text(json.dumps(merged, indent=1) + "\n")
    text, (begin, end) = file.with_suffix(".md"), MARKS
    written = text.read_text(encoding="utf-8") if text.is_file() else f"# Performance\n\n{begin}{end}\n"
    before, rest = written.split(begin)
    after = rest.split(end)[1]
    text.write_text(f"{before}{begin}\n{document(merged)}\n{end}{after}", encoding="utf-8")


def arguments(words):
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--device", choices=DEFAULTS, default="cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--parts", nargs="+", choices=PARTS)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--variants", nargs="+", choices=SIDES, help="our side (default: ldm)")
    parser.add_argument("--against", choices=SIDES, default="diffusers")
    parser.add_argument("--steps", type=int, help="of a whole picture")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", nargs="?", type=Path, const=ROOT / "docs", metavar="FOLDER")
    args = parser.parse_args(words)
    args.chosen = args.cases or args.parts or args.variants
    cases, dtypes, steps = DEFAULTS[args.device]
    args.cases, args.dtypes = args.cases or cases, args.dtypes or dtypes
    args.parts, args.variants = args.parts or PARTS, args.variants or ["ldm"]
    args.steps = args.steps or steps
    if args.device == "cpu" and "float16" in args.dtypes:
        parser.error("a CPU loads float16, which is timed in any case, and does not compute in it")
    return args


def jobs(args):
    """The rows to measure: case, part, dtype, side and the other side. Loading is timed without a cast, too."""
    if "command" in args.parts:
        yield "bundled-64", "command", "", "ldm", "torch"
    if "import" in args.parts:
        yield from (("", "import", "", "ldm", other) for other in ["diffusers", "torch"])
    for case, part in product(args.cases, [part for part in args.parts if part in TIMED]):
        dtypes = dict.fromkeys(args.dtypes if part in COMPUTING else ["float16", *args.dtypes])
        for dtype, side in product(dtypes, args.variants):
            yield case, part, dtype, side, args.against


def machine(device):
    """The processor and its memory, and the GPU where that computes."""
    gpu = f"{torch.cuda.get_device_name()}; " if device == "cuda" else ""
    memory = system("meminfo", r"MemTotal:\s+(\d+)", 0) / 2**20
    name = system("cpuinfo", r"model name\s*: (.*)", platform.machine())
    return f"{gpu}{name}, {os.cpu_count()} cores, {memory:.0f} GiB"


def main():
    args = arguments(sys.argv[1:])
    plans = [args]
    if not args.chosen:
        plans = [arguments([*sys.argv[1:], *plan.split()]) for plan in PLANS[args.device]]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # gigabytes of models are deleted
    rates = {name: matrix_rate(args.device, getattr(torch, name)) for name in args.dtypes}
    rates["copy"] = copy_rate(args.device)
    libraries = ("torch", "diffusers", "transformers")
    about = {
        "machine": machine(args.device),
        "device": args.device,
        "date": str(date.today()),
        "command": f"`python scripts/benchmark.py {shlex.join(sys.argv[1:])}`",
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
