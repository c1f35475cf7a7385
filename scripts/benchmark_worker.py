"""One side of `benchmark.py`, in a process of its own: does one part of the work each time it is told.

Its task is its argument, as JSON. It answers in lines of JSON: an empty one once it is ready; to "run" the seconds that
the part took; to "peak" the most bytes of host and device memory in use since it was ready, above what was then.
"""

import ctypes
import gc
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

TASK = json.loads(sys.argv[1])
PART, PIXELS = TASK["part"], TASK["pixels"]
FOLDER, FILE = Path(TASK["model"], "folder"), Path(TASK["model"], "file.safetensors")
DEVICE, DTYPE = torch.device(TASK["device"]), getattr(torch, TASK["dtype"])
GPU = DEVICE.type == "cuda"
PROMPTS = {"prompt": "a red apple on a wooden table", "negative_prompt": "blurry, low contrast"}
REQUEST = PROMPTS | {"guidance_scale": 7.5, "width": PIXELS, "height": PIXELS}
torch.manual_seed(0)
LATENTS = torch.randn(1, 4, *[PIXELS // TASK["factor"]] * 2).to(DEVICE, DTYPE)  # scaled
IMAGE = (torch.rand(1, 3, PIXELS, PIXELS) * 2 - 1).to(DEVICE, DTYPE)
MARKS = []  # the ends of the steps


def ours():
    """This package as the `ldm` command or a program uses it, but for the VAE, whose dtype is that of the rest."""
    import ldm
    from ldm.placement.allocator import keep_freed_memory
    from ldm.placement.memory import DECODE

    if TASK["command"]:
        keep_freed_memory()

    request = ldm.Request(**REQUEST, steps=TASK["steps"], sampler="ddim")

    def open():
        path = FILE if "file" in PART else FOLDER
        if not GPU and TASK["dtype"] == "float16":  # to be mapped, not to be computed in
            return ldm.checkpoint.files.load(path, dtype=DTYPE)
        place = ldm.Placement.fast if TASK["fast"] else ldm.Placement
        chosen = {"device": DEVICE, "dtype": DTYPE, "vae_dtype": DTYPE} | TASK["placement"]
        return ldm.load(path, place(**chosen))

    def steps(pipe):
        for step in pipe.stream(request):
            mark()
            latents = step.x
        return latents

    return open, {
        "text": lambda pipe: pipe.text_encoder.encode([*PROMPTS.values()]).context,
        "step": steps,
        "decode": lambda pipe: DECODE[pipe.placement.vae_memory](pipe.vae, LATENTS),
        "encode": lambda pipe: pipe.vae.encode(IMAGE).mean,
        "txt2img": lambda pipe: np.asarray(pipe.generate(request)[0]),
    }


def theirs():
    """diffusers with the same list of steps, its VAE in the dtype of the rest."""
    sys.modules["torchao"] = None  # which it would import unasked, for seconds
    import diffusers

    diffusers.logging.disable_progress_bar()

    def open():
        index = json.loads((FOLDER / "model_index.json").read_text())
        kind, options = getattr(diffusers, index["_class_name"]), {"torch_dtype": DTYPE}
        if "file" in PART:
            pipe = kind.from_single_file(FILE, config=str(FOLDER), **options)
        else:
            pipe = kind.from_pretrained(FOLDER, **options)
        pipe.set_progress_bar_config(disable=True)
        pipe.vae.register_to_config(force_upcast=False)
        ddim = {"clip_sample": False, "set_alpha_to_one": False}
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **ddim)
        return pipe.to(DEVICE)

    def text(pipe):
        guided = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        return torch.cat(pipe.encode_prompt(**PROMPTS, device=DEVICE, **guided)[:2])

    def encode(pipe):
        return pipe.vae.encode(IMAGE).latent_dist.mean * pipe.vae.config.scaling_factor

    def picture(pipe, **options):
        options |= REQUEST | {"generator": torch.Generator().manual_seed(0)}
        return pipe(num_inference_steps=TASK["steps"], **options).images[0]

    return open, {
        "text": text,
        "step": partial(picture, output_type="latent", callback_on_step_end=mark),
        "decode": lambda pipe: pipe.vae.decode(LATENTS / pipe.vae.config.scaling_factor).sample,
        "encode": encode,
        "txt2img": lambda pipe: np.asarray(picture(pipe)),
    }


def change(pipe, how):
    """Change a loaded pipeline in a way that has no option."""
    if how == "compiled":
        pipe.unet = torch.compile(pipe.unet, mode="reduce-overhead", fullgraph=True)
    elif how == "channels last":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)


def mark(*callback):
    """Note the time, of a GPU its own and without waiting for it. A callback's last argument is what it returns."""
    if GPU:
        MARKS.append(torch.cuda.Event(enable_timing=True))
        MARKS[-1].record()
    else:
        MARKS.append(time.perf_counter())
    return callback[-1] if callback else None


def clock():
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def timed(work):
    """The seconds of `work`, where it marks steps those of the mean one but the first, and what its result is like."""
    gc.collect()
    MARKS.clear()
    start = clock()
    out = work()
    seconds = clock() - start
    if MARKS:
        first, last = MARKS[0], MARKS[-1]
        taken = first.elapsed_time(last) / 1000 if GPU else last - first
        seconds = taken / (len(MARKS) - 1)
    out = out.unet.conv_out.bias if PART.startswith("load") else torch.as_tensor(out)
    return {"seconds": seconds, "numbers": out.numel(), "std": float(out.float().std())}


def memory(*, peak):
    """Bytes in use on the host (Linux) and the GPU; with `peak` the most since this was called without."""
    used = {}
    if sys.platform == "linux":
        if not peak:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what loading left over
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
        status = dict(s.split(":") for s in Path("/proc/self/status").read_text().splitlines())
        used["host"] = int(status["VmHWM" if peak else "VmRSS"].split()[0]) * 1024
    if GPU:
        if not peak:
            torch.cuda.reset_peak_memory_stats()
        used["device"] = torch.cuda.max_memory_allocated()
    return used


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer

    def answer(values):
        print(json.dumps(values), file=answers, flush=True)

    try:
        open, parts = {"ldm": ours, "diffusers": theirs}[TASK["library"]]()
        pipe = None if PART.startswith("load") else open()
        for how in TASK["changes"] if pipe else ():
            change(pipe, how)
        clock()
        answer({})
        before = memory(peak=False)
        for line in sys.stdin:
            if line == "run\n":
                answer(timed(partial(parts[PART], pipe) if pipe else open))
            else:
                answer({where: most - before[where] for where, most in memory(peak=True).items()})
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})


main()
