"""A process of a training by torchrun, for test_distributed.py: ranks.py OUT [NAME=VALUE ...].

kill=N: rank 1 kills itself in its step number N, unless torchrun has started it again.
spoil=N: the loss of rank 1 is not finite in step N.
Other names are settings of the loop. The first process writes the result's weights to OUT/result.pt.
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import torch

from ldm.training.diffusion import DiffusionLoss, DiffusionObjective, Networks
from ldm.training.distributed import joined, rank
from ldm.training.loop import LoopConfig, train
from tests.tiny import TINY_SDXL, random_networks

CONFIG = LoopConfig(
    steps=6, batch_size=6, accumulate=2, learning_rate=1e-3, warmup=1, ema=0.9, log_every=1, sample_every=3,
    checkpoint_every=2,
)  # fmt: skip


class Noise:
    """Twenty pictures of noise; the captions have different lengths."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randint(256, (3, 16, 16), generator=generator).to(torch.uint8), self.caption(index)

    def caption(self, index):
        return f"number {index}"


class Disturbed(DiffusionObjective):
    """Train both text encoders, of which the last layers have no gradient, and the UNet."""

    kill = spoil = calls = 0

    def forward(self, batch):
        self.calls += 1
        step = (self.calls + 1) // CONFIG.accumulate
        if rank() == 1 and step == self.kill and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        loss, logs = super().forward(batch)
        return loss * float("nan") if rank() == 1 and step == self.spoil else loss, logs


def main(out, settings):
    unet, vae, text_encoder = random_networks(TINY_SDXL)
    weights = DiffusionLoss(caption_dropout=0.3)
    objective = Disturbed(TINY_SDXL, Networks(unet, text_encoder), vae, weights, sample_prompts=["number 1"])
    values = {name: json.loads(value) for name, value in (setting.split("=") for setting in settings)}
    objective.kill, objective.spoil = values.pop("kill", 0), values.pop("spoil", 0)
    with joined(torch.device("cpu")):
        config = dataclasses.replace(CONFIG, **values)
        average = train(objective, Noise(), config, Path(out), {"batch_size": config.batch_size})
    torch.save(average.state_dict(), Path(out) / "result.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
