"""`ldm.rescue` and `ldm.placement.budget`: injected errors, and estimates against measured peaks."""

import dataclasses
import errno
import json
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm import rescue
from ldm.jobs import Job, Models
from ldm.outputs import Outputs
from ldm.placement.budget import Way, Work, fit, need, ways
from ldm.placement.memory import Placement
from ldm.presets import SD15
from ldm.record import ModelChoice, recall

REQUEST = ldm.Request("a cat", steps=2, width=32, height=32, images=4, seed=3)


@pytest.fixture
def work(model_folder, tmp_path):
    """Run a request with a pipeline of its own; returns the files, what was said, and the pipeline."""
    pipe = ldm.load(model_folder, ldm.Placement(device="cpu"))

    def work(request=REQUEST, break_it=lambda pipe: None, **more):
        said: list[str] = []
        break_it(pipe)
        outputs = Outputs(tmp_path / "out.png", request.images)
        job = Job(request, ModelChoice(str(model_folder)), pipe.placement)
        result = rescue.run(job, Models(pipe), outputs, say=said.append, pause=lambda seconds: None, **more)
        return result, said

    work.pipe = pipe
    return work


def pixels(files):
    return [np.asarray(Image.open(file)).astype(int) for file in files]


def expected(pipe, request=REQUEST):
    return [np.asarray(picture).astype(int) for picture in pipe.generate(request)]


def out_of_memory_if(monkeypatch, module, name, condition):
    """Make a method raise as CUDA does if `condition` of its first argument holds."""
    real = getattr(module, name)

    def guarded(first, *rest, **more):
        if condition(first):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(first, *rest, **more)

    monkeypatch.setattr(module, name, guarded)


@pytest.mark.parametrize(
    ("largest", "adjusted"),
    [
        (8, ()),
        (4, ("prompt and negative prompt one after the other",)),
        (2, ("prompt and negative prompt one after the other", "2 pictures at once")),
        (1, ("prompt and negative prompt one after the other", "2 pictures at once", "1 picture at once")),
    ],
)
def test_a_unet_that_takes_fewer_pictures_makes_the_same_ones(largest, adjusted, work, monkeypatch):
    right = expected(work.pipe)
    out_of_memory_if(monkeypatch, work.pipe.unet, "forward", lambda x: len(x) > largest)
    result, said = work()
    assert said == [f"out of memory: trying again with {new}" for new in adjusted]
    assert len(result.files) == 4
    for one, other in zip(pixels(result.files), right, strict=True):
        assert np.abs(one - other).max() <= 1
    assert [recall(file).adjusted for file in result.files] == [adjusted] * 4
    assert result.seeds == [3, 4, 5, 6]


def test_a_decoder_out_of_memory_works_in_slabs_and_keeps_what_is_written(work, monkeypatch):
    right = expected(work.pipe)
    whole, calls = work.pipe.vae.decode, []

    def decode(latents):
        calls.append(len(latents))
        if len(calls) >= 2:  # the second picture
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(latents)

    monkeypatch.setattr(work.pipe.vae, "decode", decode)
    result, said = work()
    assert said[-1] == "out of memory: trying again with the VAE in slabs"
    for one, other in zip(pixels(result.files), right, strict=True):
        assert np.abs(one - other).max() <= 1
    assert recall(result.files[0]).adjusted == ()  # it was written before
    assert "the VAE in slabs" in recall(result.files[3]).adjusted


def test_out_of_memory_in_the_text_encoder_is_tried_in_every_way_and_then_raised(work, monkeypatch):
    out_of_memory_if(monkeypatch, work.pipe.text_encoder, "encode", lambda texts: True)
    with pytest.raises(torch.OutOfMemoryError):
        work()


class Faults:
    """Makes functions fail at random: at most as often as there are ways to need less memory, and pauses."""

    def __init__(self, random, injected):
        self.random, self.injected = random, injected
        self.left = {MemoryError: 4, OSError: 3}
        self.written = Counter()

    def in_front_of(self, function, stage, error):
        def call(*values, **options):
            kind = OSError if isinstance(error, OSError) else MemoryError
            if self.left[kind] and self.random.random() < 0.3:
                self.left[kind] -= 1
                self.injected[stage] += 1
                raise error
            return function(*values, **options)

        return call

    def save(self, outputs, index, picture, texts):
        self.written[index] += 1
        return SAVE(outputs, index, picture, texts)


SAVE = Outputs.save


@pytest.mark.slow
def test_faults_at_random_places_lose_no_picture_and_write_none_twice(model_folder, tmp_path, monkeypatch):
    """The numbers that this test prints are in docs/operate.md."""
    right = expected(ldm.load(model_folder, ldm.Placement(device="cpu")))
    random, injected = Random(0), Counter()
    for run in range(12):
        pipe, faults = ldm.load(model_folder, ldm.Placement(device="cpu")), Faults(random, injected)
        stages = {"text encoder": (pipe.text_encoder, "encode"), "UNet": (pipe.unet, "forward")}
        with monkeypatch.context() as patch:
            for stage, (owner, name) in (stages | {"decoder": (pipe.vae, "decode")}).items():
                full = torch.OutOfMemoryError("CUDA out of memory")
                patch.setattr(owner, name, faults.in_front_of(getattr(owner, name), stage, full))
            passing = OSError(errno.EIO, "Input/output error")
            patch.setattr(Outputs, "save", faults.in_front_of(partial(Faults.save, faults), "disk", passing))
            job = Job(REQUEST, ModelChoice(str(model_folder)), pipe.placement)
            outputs = Outputs(tmp_path / f"{run}.png", REQUEST.images)
            result = rescue.run(job, Models(pipe), outputs, pause=lambda seconds: None)
        assert faults.written == dict.fromkeys(range(REQUEST.images), 1)
        for one, other in zip(pixels(result.files), right, strict=True):
            assert np.abs(one - other).max() <= 1
    print(f"{injected.total()} faults: {dict(injected)}")
    assert len(injected) == 4


def test_pictures_get_smaller_only_if_that_is_allowed(work, monkeypatch):
    request = dataclasses.replace(REQUEST, width=128, height=64, images=1)
    side = 128 // work.pipe.config.vae.factor
    out_of_memory_if(monkeypatch, work.pipe.unet, "forward", lambda x: x.shape[-1] >= side)
    with pytest.raises(torch.OutOfMemoryError):
        work(request)
    result, said = work(request, allow_smaller=True)
    width, height = Image.open(result.files[0]).size
    assert width < 128
    assert height < 64
    assert said[-1] == f"out of memory: trying again with {width} x {height} pixels"
    assert f"{width} x {height} pixels" in recall(result.files[0]).adjusted


def test_a_grid_is_not_split(work, monkeypatch, model_folder, tmp_path):
    out_of_memory_if(monkeypatch, work.pipe.unet, "forward", lambda x: len(x) > 4)
    job = Job(REQUEST, ModelChoice(str(model_folder)), work.pipe.placement, grid=True)
    result = rescue.run(job, Models(work.pipe), Outputs(tmp_path / "grid.png", 1))
    assert recall(result.files[0]).adjusted == ("prompt and negative prompt one after the other",)
    assert Image.open(result.files[0]).size == (64, 64)


def test_a_network_that_overflows_is_loaded_in_fp32(model_folder, tmp_path, monkeypatch):
    pipe = ldm.load(model_folder, ldm.Placement(device="cpu", vae_dtype="bfloat16"))
    name, norm = next((n, m) for n, m in pipe.vae.decoder.named_modules() if isinstance(m, torch.nn.GroupNorm))
    monkeypatch.setattr(norm, "forward", lambda x: torch.full_like(x, torch.nan))
    said: list[str] = []
    request = dataclasses.replace(REQUEST, images=1)
    job = Job(request, ModelChoice(str(model_folder)), pipe.placement)
    result = rescue.run(job, Models(pipe), Outputs(tmp_path / "a.png", 1), say=said.append)
    new = f"the vae in fp32, because decoder.{name} gave numbers that are not finite"
    assert said == [f"the vae gave numbers that are not finite: trying again with {new}"]
    record = recall(result.files[0])
    assert (record.adjusted, record.placement["vae_dtype"]) == ((new,), "float32")


def test_numbers_that_are_not_finite_in_fp32_are_an_error(work, monkeypatch):
    monkeypatch.setattr(work.pipe.vae, "decode", lambda latents: latents.new_full((1, 3, 32, 32), torch.nan))
    with pytest.raises(FloatingPointError, match="the VAE gave numbers that are not finite in float32"):
        work(dataclasses.replace(REQUEST, images=1))


@pytest.mark.parametrize("times", [3, 4])
def test_a_disk_that_fails_for_a_moment_is_tried_three_times_more(times, work, monkeypatch, tmp_path):
    real, failures, pauses = Outputs.save, [], []

    def save(self, index, picture, texts):
        if index == 1 and len(failures) < times:
            failures.append(index)
            raise OSError(errno.EIO, "Input/output error")
        return real(self, index, picture, texts)

    monkeypatch.setattr(Outputs, "save", save)
    job = Job(REQUEST, ModelChoice(str(work.pipe.paths["unet"].parent)), work.pipe.placement)
    outputs = Outputs(tmp_path / "out.png", 4)
    if times > 3:
        with pytest.raises(OSError, match="Input/output error"):
            rescue.run(job, Models(work.pipe), outputs, pause=pauses.append)
    else:
        result = rescue.run(job, Models(work.pipe), outputs, pause=pauses.append)
        assert len(result.files) == 4
    assert pauses == [1.0, 2.0, 4.0]


def test_another_error_is_raised_at_once(work, monkeypatch):
    def broken(*words, **more):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(work.pipe.unet, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        work()


def test_the_command_tells_and_records_what_it_changed(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rescue, "free_bytes", lambda device: 5 << 20)
    code, out, err = run("txt2img", "a cat", "--steps", "1", "--images", "2", "--json")
    assert code == 0
    said = r"ldm: 0.0 GB of memory are free: prompt and negative prompt one after the other.* may still need 0.1 GB"
    assert re.search(said, err)
    settings = json.loads(out)["settings"]
    assert settings["placement"]["guidance"] == "sequential"
    assert settings["adjusted"][0] == "prompt and negative prompt one after the other"


# ------------------------------------------------------------------ the estimate


def test_each_way_needs_less_at_some_part_than_the_one_before():
    placement = Placement(device="cpu").resolve(SD15)
    found = [need(SD15, way.placement, Work(way.images, 512, 512)) for way in ways(placement, 4)]
    steps, decodes = [each.step for each in found], [each.decode for each in found]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > steps[1] > steps[2] > steps[3]
    assert decodes[-1] < decodes[0]


def test_on_a_gpu_the_last_ways_move_weights():
    placement = dataclasses.replace(Placement(dtype="float16", vae_dtype="float16"), device=torch.device("cuda"))
    *_, model, blocks = ways(placement, 1)
    assert (model.placement.offload, blocks.placement.offload) == ("model", "blocks")
    work = Work(1, 512, 512)
    first, second, third = (need(SD15, each, work).peak for each in (placement, model.placement, blocks.placement))
    assert first > second > third
    way, _ = fit(SD15, placement, work, int(2.2 * 2**30))
    assert way.placement.offload == "model"


def test_enough_memory_changes_nothing():
    placement = Placement(device="cpu").resolve(SD15)
    way, _ = fit(SD15, placement, Work(2, 512, 512), 32 << 30)
    assert way == Way(placement, 2)


MEASURE = """
import re, sys, torch
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.placement.budget import KERNELS, Work, _networks, need
from ldm.placement.memory import Placement
from ldm.presets import PRESETS
torch.set_num_threads(1)

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

config = PRESETS[sys.argv[1]]
side, placement = int(sys.argv[2]), Placement(device="cpu", dtype=sys.argv[3], vae_memory=sys.argv[4]).resolve(config)
before = status("VmRSS")
unet, vae = UNet(config.unet).to(placement.dtype), VAE(config.vae).to(placement.vae_dtype)
placement.apply({"unet": unet, "vae": vae})
open("/proc/self/clear_refs", "w").write("5")
f, d, u = side // config.vae.factor, placement.dtype, config.unet
with torch.no_grad():
    vector = torch.randn(2, u.vector_dim).to(d) if u.vector_dim else None
    unet(torch.randn(2, u.in_channels, f, f).to(d), torch.zeros(2), torch.randn(2, 77, u.context_dim).to(d), vector)
    step = status("VmHWM") - before
    open("/proc/self/clear_refs", "w").write("5")
    placement.decoder()(vae, torch.randn(1, config.vae.latent_channels, f, f).to(placement.vae_dtype))
    decode = status("VmHWM") - before
found = need(config, placement, Work(1, side, side))
text = found.text - KERNELS - sum(p.nbytes for n in _networks(config, placement.dtype, placement.vae_dtype)[1:]
    for p in n.parameters())
print(found.step / (step + text), found.decode / (decode + text))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    "case",
    [("sd15", "256", "float32", "whole"), ("sd15", "512", "bfloat16", "whole"), ("sd15", "512", "float32", "slabs")],
)
def test_estimates_are_within_a_fifth_of_the_measured_peaks(case):
    done = subprocess.run([sys.executable, "-c", MEASURE, *case], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    step, decode = map(float, done.stdout.split())
    print(f"estimate / measured peak of {' '.join(case)}: step {step:.3f}, decode {decode:.3f}")
    assert 0.8 < step < 1.2
    assert 0.8 < decode < 1.2
