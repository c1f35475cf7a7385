"""Stopping: Ctrl-C and `close()` end the work at once, keep finished pictures, and leave nothing else behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest
import torch

import ldm
from ldm import atomic, jobs
from ldm.cli import main
from ldm.outputs import Outputs
from ldm.pipeline import Pipeline
from ldm.placement.offload import tensors_of
from ldm.refiner import stream_both
from tests.tiny import TINY_RANDOM, TINY_REFINER, TINY_SDXL, random_controlnet, random_networks

FP32 = torch.float32
modes = pytest.mark.parametrize("mode", [None, "model", "blocks"])


def offloaded(mode, config=TINY_RANDOM):
    """A pipeline whose networks are copied to another place of the host's memory for their work."""
    return Pipeline(config, *random_networks(config), placement=ldm.Placement("cpu", FP32, FP32, "sdpa", offload=mode))


def homes(*pipes):
    """Where each tensor of the networks is."""
    networks = [n for p in pipes for n in (p.unet, p.vae, p.text_encoder, *p.controlnets.values())]
    return [tensor.data_ptr() for network in networks for tensor in tensors_of(network)]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_the_command_with_one_sentence_and_an_empty_folder(model_folder, tmp_path):
    words = ["txt2img", "a frog", "--model", str(model_folder), "--device", "cpu", "--steps", "1000", "--preview", "1"]
    # a job in the background of a script inherits that SIGINT is ignored
    handled = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"import sys; {handled}; from ldm.cli import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", code, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "out.preview.png").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "ldm: error: interrupted"
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize(
    ("error", "code", "said"), [(KeyboardInterrupt(), 130, "interrupted"), (FloatingPointError("NaN"), 1, "NaN")]
)
def test_what_ends_the_work_between_two_pictures_keeps_and_lists_the_finished_ones(
    model_folder, tmp_path, monkeypatch, capsys, grid, error, code, said
):
    monkeypatch.chdir(tmp_path)
    decode, decoded = ldm.models.vae.VAE.decode, []

    def stop_at_the_third(self, latents):
        decoded.append(latents)
        if len(decoded) == 3:
            raise error
        return decode(self, latents)

    monkeypatch.setattr(ldm.models.vae.VAE, "decode", stop_at_the_third)
    words = ["--steps", "1", "--images", "4", "--preview", "1", *["--grid"] * grid]
    assert main(["txt2img", "a frog", "--model", str(model_folder), "--device", "cpu", *words]) == code
    out, err = capsys.readouterr()
    finished = [] if grid else ["out-00001.png", "out-00002.png"]
    assert out == ""
    listed = f"; finished: {', '.join(finished)}" if finished else ""
    assert err.splitlines()[-1] == f"ldm: error: {said}{listed}"
    assert sorted(os.listdir()) == finished


def test_a_picture_is_written_before_the_next_is_decoded(pipe, tmp_path, monkeypatch):
    decode, seen = Pipeline.decode, []
    monkeypatch.setattr(Pipeline, "decode", lambda *args: seen.append(len(os.listdir(tmp_path))) or decode(*args))
    job = jobs.Job(ldm.Request("a frog", steps=1, images=3))
    result = jobs.run(job, jobs.Models(pipe), Outputs(tmp_path / "a.png", job.count))
    assert seen == [0, 1, 2]
    assert len(result.files) == 3
    assert all(result.seconds[part] >= 0 for part in ("sample", "decode", "save"))


def test_ctrl_c_does_not_wait_for_the_digest_of_a_large_file(pipe, tmp_path, monkeypatch):
    go_on, begun = threading.Event(), threading.Event()

    def slow(path):
        begun.set()
        go_on.wait(60)
        return "0"

    def stop(steps, total):
        begun.wait(60)
        yield next(steps)
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "digest", slow)
    job = jobs.Job(ldm.Request("a frog", steps=2))
    threads = set(threading.enumerate())
    try:
        with pytest.raises(KeyboardInterrupt):
            jobs.run(job, jobs.Models(pipe), Outputs(tmp_path / "a.png", job.count), stop)
        (still,) = set(threading.enumerate()) - threads
        assert still.daemon  # does not keep the program alive
    finally:
        go_on.set()
    still.join(60)
    assert os.listdir(tmp_path) == []


@modes
def test_ctrl_c_in_a_job_brings_the_networks_home(tmp_path, mode):
    pipe = offloaded(mode)
    before = homes(pipe)

    def stop(steps, total):
        yield next(steps)
        assert mode is None or homes(pipe) != before
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        jobs.run(jobs.Job(ldm.Request("a frog", steps=2)), jobs.Models(pipe), Outputs(tmp_path / "a.png", 1), stop)
    assert stopped.traceback  # its frames still hold the generator
    assert homes(pipe) == before
    assert os.listdir(tmp_path) == []


@modes
def test_closing_the_generator_brings_the_unet_and_its_controlnets_home(mode, tmp_path):
    from PIL import Image

    pipe = offloaded(mode)
    request = ldm.Request("a frog", steps=3, controls=(ldm.Control("a", Image.new("RGB", (32, 32))),))
    pipe.controlnets["a"] = random_controlnet()
    before = homes(pipe)
    with closing(pipe.stream(request)) as steps:
        next(steps)
        assert mode is None or homes(pipe) != before
    assert homes(pipe) == before


@modes
@pytest.mark.parametrize("taken", [1, 4])
def test_closing_the_generator_of_base_and_refiner_brings_both_home(mode, taken):
    base, refiner = offloaded(mode, TINY_SDXL), offloaded(mode, TINY_REFINER)
    before = homes(base, refiner)
    with closing(stream_both(base, refiner, ldm.Request("a frog", steps=4, spacing="trailing"), handover=0.5)) as steps:
        for _ in range(taken):
            step = next(steps)
        assert mode is None or homes(base, refiner) != before
    assert step.index == taken - 1
    assert homes(base, refiner) == before


def test_ctrl_c_while_a_folder_is_replaced_leaves_the_old_one(tmp_path, monkeypatch):
    path, new = tmp_path / "model", tmp_path / "new"
    for folder in (path, new):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    rename, calls = os.rename, []

    def stop_at_the_second(source, target, **options):
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        atomic.replace_folder(path, new)
    assert (path / "name").read_text() == "model"
    assert sorted(os.listdir(tmp_path)) == ["model", "new"]
