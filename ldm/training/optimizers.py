"""Optimizers and schedules of the learning rate, by the names that a recipe has for them."""

import math
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.training.settings import LoopConfig


def make_optimizers(network: nn.Module, config: LoopConfig) -> list[Optimizer]:
    """Return the optimizers of all trainable parameters: one, or for "muon" two.

    adamw: Loshchilov & Hutter 2019. adam: Kingma & Ba 2015. sgd: betas[0] is its momentum. adafactor: Shazeer & Stern
    2018; it has no betas. muon: Jordan et al. 2024, for matrices that are no embedding, with steps as large as AdamW's;
    AdamW optimizes all other parameters. adamw8bit: AdamW whose averages have 8 bits (Dettmers et al. 2022).
    Raises ValueError if nothing is trainable, PyTorch is too old for Muon, or torchao is not installed.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the objective is trainable")
    name, decay = config.optimizer, config.weight_decay
    if name == "sgd":
        return [torch.optim.SGD(parameters, momentum=config.betas[0], weight_decay=decay, fused=True)]
    if name == "adam":
        return [torch.optim.Adam(parameters, betas=config.betas, weight_decay=decay, fused=True)]
    if name == "adafactor":
        return [torch.optim.Adafactor(parameters, weight_decay=decay)]
    if name == "adamw8bit":
        return [_adamw8bit(parameters, config)]
    if name == "muon":
        return _muon(network, parameters, config)
    return [_adamw(parameters, config)]


def _adamw(parameters: list[nn.Parameter], config: LoopConfig) -> Optimizer:
    return torch.optim.AdamW(parameters, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def _adamw8bit(parameters: list[nn.Parameter], config: LoopConfig) -> Optimizer:
    if find_spec("torchao") is None:
        raise ValueError(
            "the optimizer 'adamw8bit' needs torchao, which is not installed: install the extra with "
            "pip install 'ldm[int8]', or take 'adamw'"
        )
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, betas=config.betas, weight_decay=config.weight_decay)


def _muon(network: nn.Module, parameters: list[nn.Parameter], config: LoopConfig) -> list[Optimizer]:
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"PyTorch {torch.__version__} has no optimizer 'muon': install 2.9 or later, or take 'adamw'")
    tables = {id(part.weight) for part in network.modules() if isinstance(part, nn.Embedding)}
    matrices = [p for p in parameters if p.ndim == 2 and id(p) not in tables]
    others = [p for p in parameters if p.ndim != 2 or id(p) in tables]
    if not matrices:
        raise ValueError("the optimizer 'muon' is for matrices, and the objective trains none: take 'adamw'")
    muon = torch.optim.Muon(matrices, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, *([_adamw(others, config)] if others else [])]


def learning_rate(step: int, config: LoopConfig) -> float:
    """Return the learning rate of `step`: linear warmup, then the schedule.

    cosine: half a cosine to zero (Loshchilov & Hutter 2017). linear: a line to zero.
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / (config.steps - config.warmup)
    factors = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return config.learning_rate * factors[config.schedule]


def set_learning_rate(optimizers: list[Optimizer], rate: float) -> None:
    """Set the learning rate of all parameters."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # torchao's optimizers read it from the tensor that they made
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
