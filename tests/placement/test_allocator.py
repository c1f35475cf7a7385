"""The command's allocator setting: made where the C library has it, by the command alone."""

import ctypes
import platform
import subprocess
import sys

import pytest

from ldm import cli
from ldm.placement.allocator import keep_freed_memory

# Page faults of writing a fresh tensor of 64 MB twenty times. With the setting, the first one's memory serves most of
# them: a small object behind a freed tensor can keep the next tensor from fitting there.
FAULTS = """
import resource, sys, torch
if sys.argv[1] == "kept":
    from ldm.placement.allocator import keep_freed_memory
    assert keep_freed_memory()
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_buffers_are_used_again_without_asking_the_kernel():
    faults = {
        mode: int(
            subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True).stdout
        )
        for mode in ("plain", "kept")
    }
    assert faults["kept"] < faults["plain"] / 2


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert keep_freed_memory() is False


def test_only_a_process_of_the_commands_own_is_changed(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: called.append(True))
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert not called
    monkeypatch.setattr(sys, "argv", ["ldm", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    assert called == [True]
