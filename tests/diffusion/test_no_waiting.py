"""The sampling loop asks the device for nothing: it could run ahead of a GPU to its end.

`meta` stands for the device: reading one of its numbers is an error, as a GPU's would be a wait.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm.conditioning import Condition
from ldm.diffusion.consistency import consistency
from ldm.diffusion.denoiser import classifier_free, guided, parametrize, within
from ldm.diffusion.samplers import SAMPLERS, seeded_noise
from ldm.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule()
STEPS = 5


class Crossings(TorchDispatchMode):
    """Counts the operations that take tensors of the CPU and of the device, or turn one into the other."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if torch.is_tensor(leaf)]
        if func not in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            tensors = [t for t in tensors if t.ndim]  # a single number goes along with the kernel
        self.count += len({t.device.type for t in tensors}) > 1
        return out


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_moves_nothing_but_fresh_noise_and_reads_nothing(name, prediction, rescale):
    conditions = [Condition(torch.empty(2, 7, 3, device="meta")) for _ in range(2)]
    bind = lambda condition: lambda z, t: z + t[:, None, None, None]  # noqa: E731
    predict = guided(bind, conditions, classifier_free(5.0, rescale))
    denoise = parametrize(predict, SCHEDULE, prediction, dtype=torch.bfloat16)
    denoise = consistency(within((0.1, 10.0), denoise, denoise), SCHEDULE)
    draws = []

    def noise():
        draws.append(seeded_noise([0, 1], (4, 8, 8))())
        return draws[-1]

    x = torch.empty(2, 4, 8, 8, device="meta")
    with Crossings() as crossings:
        for step in SAMPLERS[name](denoise, x, SCHEDULE.steps(STEPS), noise=noise):
            assert step.x.device.type == "meta"
    assert step.index == STEPS - 1
    assert crossings.count == len(draws) <= STEPS - 1


def test_the_check_sees_a_copy_and_a_read():
    x = torch.empty(2, device="meta")
    with Crossings() as crossings:
        torch.ones(2).to(x)
        torch.ones(()).to(x).expand(2)
        x + torch.ones(())
    assert crossings.count == 2
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        x.sum().item()
