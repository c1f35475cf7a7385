"""--stats and --trace: which work counts to which stage, and that a measured run is the same run."""

import ctypes
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm import stats as module
from ldm.cli import main
from ldm.stats import Stats, measured
from tests.tiny import TINY_RANDOM, random_networks

FROG = ldm.Request("a frog", steps=3, images=2)
DOCS = (Path(__file__).parent.parent / "docs" / "operate.md").read_text(encoding="utf-8")


@pytest.fixture
def mine():
    return ldm.Pipeline(TINY_RANDOM, *random_networks())


def test_each_stage_is_counted_and_the_pictures_stay_the_same(mine):
    plain = mine.generate(FROG)
    with measured(mine) as stats:
        pictures = mine.generate(FROG)
        with stats.stage("save"):
            pass
    assert stats.calls == {"text": 1, "step": 3, "decode": 1, "save": 1}
    found = stats.as_dict()
    assert found["seconds"].keys() == found["calls"].keys()
    assert found["steps_per_second"] == pytest.approx(3 / stats.seconds["step"], abs=1e-3)
    assert found["peak_mib"]["host"] > 50  # PyTorch alone takes more
    assert json.loads(json.dumps(found)) == found
    assert all(np.array_equal(a, b) for a, b in zip(plain, pictures, strict=True))
    assert not {"conditions", "walk", "decode", "encode_image"} & vars(mine).keys()  # nothing is left behind


def test_a_picture_to_start_from_is_encoded_in_a_stage_of_its_own(mine):
    source = ldm.Source(Image.new("RGB", (32, 32), "red"), strength=0.5)
    with measured(mine) as stats:
        mine.generate(ldm.Request("a frog", steps=4, source=source))
    assert (stats.calls["encode"], stats.calls["step"]) == (1, 2)  # half of the steps


def test_the_time_of_a_step_is_that_of_the_network_and_not_that_of_its_receiver(mine, monkeypatch):
    forward = mine.unet.conv_out.forward
    monkeypatch.setattr(mine.unet.conv_out, "forward", lambda x: time.sleep(0.05) or forward(x))
    with measured(mine) as stats:
        began = time.perf_counter()
        for _ in mine.stream(FROG):
            time.sleep(0.2)
        elapsed = time.perf_counter() - began
    assert 3 * 0.05 <= stats.seconds["step"] <= elapsed - 3 * 0.2


def test_an_error_leaves_the_pipeline_as_it_was(mine):
    with pytest.raises(ValueError, match="the request must be"), measured(mine):
        mine.generate("a frog")
    assert "walk" not in vars(mine)


def test_without_steps_there_is_no_speed():
    assert "steps_per_second" not in Stats(torch.device("cpu")).as_dict()


def test_the_gpu_is_asked_in_the_background(monkeypatch):
    monkeypatch.setattr(module, "INTERVAL", 0.01)
    powers = iter([100_000, 300_000, *[200_000] * 10_000])  # milliwatts
    asked = []

    def utilization(handle):
        asked.append(handle)
        return SimpleNamespace(gpu=80)

    nvml = SimpleNamespace(
        NVMLError=ArithmeticError,
        nvmlDeviceGetUtilizationRates=utilization,
        nvmlDeviceGetPowerUsage=lambda handle: next(powers),
    )
    stats = Stats(torch.device("cpu"))
    with module._watched(stats, nvml, "the handle"):
        while len(asked) < 3:
            time.sleep(0.01)
    assert stats.gpu["utilization_percent"] == 80
    assert stats.gpu["peak_watts"] == 300
    assert 150 < stats.gpu["watts"] < 250
    assert set(asked) == {"the handle"}
    assert stats.as_dict()["gpu"] == stats.gpu

    nvml.nvmlDeviceGetPowerUsage = lambda handle: 1 // 0  # this GPU does not tell its power
    silent = Stats(torch.device("cpu"))
    with module._watched(silent, nvml, "the handle"):
        pass
    assert silent.gpu == {"utilization_percent": 80}


NVML = """
#include <string.h>
typedef struct { unsigned gpu, memory; } rates;
static int device;
int nvmlInitWithFlags(unsigned flags) { return 0; }
const char *nvmlErrorString(int code) { return "refused"; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    *handle = &device;
    return strcmp(uuid, "GPU-12-34") ? 6 : 0;  // 6: not found
}
int nvmlDeviceGetUtilizationRates(void *handle, rates *found) {
    found->gpu = 70; found->memory = 5;
    return handle == &device ? 0 : 1;
}
int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) { *milliwatts = 250000; return 0; }
"""


@pytest.fixture
def nvml(monkeypatch):
    """The package nvidia-ml-py itself, which has not loaded the driver's library yet."""
    pynvml = pytest.importorskip("pynvml")
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
    return pynvml


def test_nvidia_ml_py_itself_asks_the_library_of_the_driver(nvml, monkeypatch, tmp_path):
    """The driver's library is a stand-in in C, because only a machine with such a GPU has the real one."""
    if shutil.which("cc") is None:
        pytest.skip("a C compiler makes the stand-in")
    (tmp_path / "nvml.c").write_text(NVML)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "nvml.so", tmp_path / "nvml.c"], check=True)
    monkeypatch.setattr(nvml, "nvmlLib", ctypes.CDLL(str(tmp_path / "nvml.so")))
    stats = Stats(torch.device("cpu"))
    with module._watched(stats, *module._open_gpu(torch.device("cuda"))):
        pass
    assert stats.gpu == {"utilization_percent": 70, "watts": 250, "peak_watts": 250}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="56-78"))
    assert module._open_gpu(torch.device("cuda")) is None


def test_a_machine_without_the_library_of_the_driver_has_no_gpu_to_ask(nvml, monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(nvml, "CDLL", missing)
    assert module._open_gpu(torch.device("cuda")) is None


# ------------------------------------------------------------------ the command


@pytest.fixture
def frog(model_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return ["txt2img", "a frog", "--model", str(model_folder), "--device", "cpu", "--steps", "2"]


def test_the_command_prints_one_line_of_json_beside_the_path(frog, capsys):
    assert main([*frog, "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == "out.png\n"
    found = json.loads(err.splitlines()[-1].removeprefix("ldm: "))
    assert set(found["seconds"]) == {"text", "step", "decode", "save"}
    assert found["calls"] == {"text": 1, "step": 2, "decode": 1, "save": 1}
    assert main([*frog, "--stats", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["calls"]["step"] == 2


@pytest.mark.slow
def test_a_trace_has_the_stages_and_the_operations(frog, tmp_path, capsys):
    assert main([*frog, "--trace", "trace.json"]) == 0
    names = [event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert names.count("ldm step") >= 2
    assert {"ldm text", "ldm decode"} <= set(names)
    assert any(name.startswith("aten::") for name in names)
    assert main([*frog, "--trace", "trace.json"]) == 2
    assert "the trace trace.json exists; choose another --trace" in capsys.readouterr().err
    assert main([*frog, "--trace", "no/trace.json"]) == 2
    assert "is in no folder" in capsys.readouterr().err


def test_the_code_of_the_docs_runs(tmp_path, monkeypatch, capsys, model_folder):
    monkeypatch.chdir(tmp_path)
    code = next(block for block in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL) if "measured" in block)
    exec(compile(code.replace("ldm.load()", f"ldm.load({str(model_folder)!r})"), "docs/operate.md", "exec"), {})
    assert "'save'" in capsys.readouterr().out
