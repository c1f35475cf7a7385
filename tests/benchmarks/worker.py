"""One side of the benchmark, in a process of its own: it does one part of the work each time it reads "run".

The argument is the task, as JSON. The process answers in lines of JSON. The first answer, empty, says that it is ready.
The answer to "run" holds the seconds that the part took. The answer to "peak" says how far memory use, on the host and
on the device, has risen since the process was ready.
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
LATENTS = torch.randn(1, TASK["channels"], *[PIXELS // TASK["factor"]] * 2).to(DEVICE, DTYPE)  # scaled
IMAGE = (torch.rand(1, 3, PIXELS, PIXELS) * 2 - 1).to(DEVICE, DTYPE)
MARKS = []  # the times at which steps ended


def ours():
    """Use this package as the `ldm` command or a program does, but with the VAE in the dtype of the other networks."""
    import ldm
    from ldm.placement.allocator import keep_freed_memory

    if TASK["command"]:
        keep_freed_memory()

    request = ldm.Request(**REQUEST, steps=TASK["steps"], sampler="ddim")

    def open():
        path = FILE if "file" in PART else FOLDER
        if not GPU and TASK["dtype"] == "float16":  # a CPU does not compute in it: only load the file
            return ldm.checkpoint.files.load(path, dtype=DTYPE)
        place = ldm.Placement.fast if TASK["fast"] else ldm.Placement
        chosen = {"device": DEVICE, "dtype": DTYPE, "vae_dtype": DTYPE} | TASK["placement"]
        return ldm.load(path, place(**chosen))

    def steps(pipe):
        for step in pipe.stream(request):
            mark()
            latents = step.latents
        return latents

    return open, {
        "text": lambda pipe: pipe.text_encoder.encode([*PROMPTS.values()]).context,
        "step": steps,
        "decode": lambda pipe: pipe.placement.decoder()(pipe.vae, LATENTS),
        "encode": lambda pipe: pipe.vae.encode(IMAGE).mean,
        "txt2img": lambda pipe: np.asarray(pipe.generate(request)[0]),
    }


def theirs():
    """Use diffusers with the same list of steps and the VAE in the dtype of the other networks."""
    sys.modules["torchao"] = None  # diffusers would import it, which takes seconds
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
        pipe = pipe.to(DEVICE)
        if TASK["compiled"]:
            pipe.unet = torch.compile(pipe.unet, mode="reduce-overhead", fullgraph=True)
        return pipe

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


def mark(*callback):
    """Note the time, on a GPU by an event and without waiting. As a callback of diffusers, return the last argument."""
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
    """Return the seconds of `work` and a summary of its result.

    If `work` marks steps, the seconds are the mean of all steps after the first.
    """
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
    """Return the bytes in use on the host (Linux) and the GPU; with `peak` the most since the last call without it."""
    used = {}
    if sys.platform == "linux":
        if not peak:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # give back the freed memory that glibc keeps
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
    os.dup2(2, 1)  # what a library prints goes to stderr

    def answer(values):
        print(json.dumps(values), file=answers, flush=True)

    try:
        open, parts = {"ldm": ours, "diffusers": theirs}[TASK["library"]]()
        pipe = None if PART.startswith("load") else open()
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


if __name__ == "__main__":
    main()
