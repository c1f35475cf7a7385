"""One step of a training: batches, their loss and its gradient, and the update of the weights."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ldm.training.batches import Batch, to_device
from ldm.training.distributed import Replicated, any_process, from_all, rank, ranks
from ldm.training.draws import SharedDraws
from ldm.training.optimizers import learning_rate, make_optimizers, set_learning_rate
from ldm.training.settings import LoopConfig

NAMED = 8  # captions in the message about a batch
SMALLEST_SCALE = 1.0  # of the loss in fp16; below it, the gradient itself is not finite


class Updater:
    """Updates the trainable parameters of an objective. It holds the optimizers and, for fp16, the loss scaler."""

    def __init__(self, objective: nn.Module, processes: Replicated, config: LoopConfig) -> None:
        self.objective, self.processes, self.config = objective, processes, config
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(objective, config)
        self.device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.fp16)

    def update(self, data: Iterator[Batch], step: int) -> tuple[Batch, dict[str, Tensor]]:
        """Do step number `step`, from 0; return its last batch and its scalars. All random numbers depend on the seed.

        Raises FloatingPointError, and leaves the weights as they are, if a loss or the gradient is not finite. With
        fp16, a gradient that is not finite lowers the scale of the loss instead, and the weights stay.
        """
        config = self.config
        torch.manual_seed(config.seed * 1_000_003 + step)  # makes a resumed run exact
        self.objective.train()
        set_learning_rate(self.optimizers, learning_rate(step, config))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        losses, captions = [], []
        for i in range(config.accumulate):
            batch = to_device(next(data), self.device)
            with self.processes.synchronized(last=i == config.accumulate - 1):
                with shared_draws(batch), autocast(self.device, config):
                    loss, logs = self.processes.network(batch)
                self.scaler.scale(loss / config.accumulate).backward()
            losses.append(loss.detach())
            captions.append(batch[1])
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, config.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._check(step, torch.stack(losses), captions, norm)
        if norm.isfinite() or config.fp16:
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)  # not if a scaled gradient is not finite
            self.scaler.update()
        values = {"loss": loss} | logs | {"grad_norm": norm}
        return batch, values | ({"scale": torch.tensor(self.scaler.get_scale())} if config.fp16 else {})

    def _check(self, step: int, losses: Tensor, captions: list[list[str]], norm: Tensor) -> None:
        """Raise FloatingPointError in all processes if a loss or the gradient is not finite, naming the batches."""
        finite = losses.isfinite().tolist()
        overflow = not bool(norm.isfinite()) and (
            not self.scaler.is_enabled() or self.scaler.get_scale() < SMALLEST_SCALE
        )
        bad_loss, bad_gradient = any_process([not all(finite), overflow], self.device)
        if not (bad_loss or bad_gradient):
            return
        mine = [c for texts, fine in zip(captions, finite, strict=True) for c in texts if not fine or not bad_loss]
        named = [caption for texts in from_all(mine) for caption in texts]
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        raise FloatingPointError(
            f"the {'loss' if bad_loss else 'gradient'} of step {step + 1} is not finite; the captions of its pictures: "
            f"{', '.join(map(repr, named[:NAMED]))}{more}. The last checkpoint is kept: look at these pictures, or "
            "lower learning_rate and start again with another `out`"
        )


def autocast(device: torch.device, config: LoopConfig) -> torch.autocast:
    """Return the context in which the networks compute, in the number format of `config`."""
    return torch.autocast(device.type, torch.float16 if config.fp16 else torch.bfloat16, config.fp16 or config.bf16)


def shared_draws(batch: Batch) -> AbstractContextManager[object]:
    """Return a context in which the random numbers of a batch do not depend on the number of processes."""
    return SharedDraws(len(batch[1]), rank(), ranks()) if ranks() > 1 else nullcontext()
