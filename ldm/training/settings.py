"""The settings of the training loop: the table [loop] of a recipe."""

from dataclasses import dataclass
from typing import Literal

from ldm.config import check_fields

OptimizerName = Literal["adamw", "adam", "sgd", "adafactor", "muon", "adamw8bit"]
SPLITTABLE = ("adamw", "adam", "sgd")  # they treat each number by itself, so that weights may be split anywhere


@dataclass(frozen=True)
class LoopConfig:
    """The optimization. A step is one update of the weights."""

    steps: int
    batch_size: int = 32  # images
    accumulate: int = 1  # batches per step
    optimizer: OptimizerName = "adamw"  # see `ldm.training.optimizers`
    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # of the learning rate, after the warmup
    warmup: int = 200  # steps
    betas: tuple[float, float] = (0.9, 0.99)  # decays of the averages of the gradient and of its square
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient
    bf16: bool = False  # compute the networks in bfloat16, as autocast does; the weights stay in fp32
    fp16: bool = False  # likewise in float16, with a loss scaler (Micikevicius et al. 2018)
    gradient_checkpointing: bool = False  # less memory for more time; see `ldm.training.recompute`
    parallel: Literal["ddp", "fsdp"] = "ddp"  # whole weights in each process of torchrun, or a part of them
    ema: float = 0.999  # decay of the average of the weights; 0: no average
    seed: int = 0
    workers: int = 0  # processes that load data; 0: the training process loads them
    log_every: int = 20  # steps
    tensorboard: bool = False  # write the log for TensorBoard, too
    validate_every: int = 500  # steps; for recipes that keep pictures out
    sample_every: int = 500
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        check_fields(self)
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "log_every",
            "validate_every",
            "sample_every",
            "checkpoint_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup must be from 0 to steps - 1 = {self.steps - 1}, got {self.warmup}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be at least 0 and less than 1, got {self.ema}")
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 exclude each other: choose one")
        if self.parallel == "fsdp" and self.optimizer not in SPLITTABLE:
            raise ValueError(
                f"parallel = 'fsdp' needs one of the optimizers {', '.join(SPLITTABLE)}, got {self.optimizer}"
            )
        if self.parallel == "fsdp" and self.fp16:
            raise ValueError("parallel = 'fsdp' works with bf16, and fp16 was asked for")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and less than 1, got {self.betas[0]} and {self.betas[1]}")
