"""The objective of methods that teach a model something new and leave most of its weights as they are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.checkpoint.parts import Model
from ldm.training.diffusion import DiffusionLoss, DiffusionObjective, Networks
from ldm.training.loop import Batch, Dataset, collate


class Prior(NamedTuple):
    """Pictures of the class that the model should go on to draw as before, and the weight of their loss."""

    dataset: Dataset
    weight: float


class TeachingObjective(DiffusionObjective):
    """Train a small part of a model, or some of its networks, by the loss of `DiffusionObjective`.

    With a prior, the loss is that of the batch plus weight times the loss of as many pictures of the class
    (DreamBooth, Ruiz et al. 2022, eq. 2). Checkpoints hold only the part that learns.
    """

    def __init__(
        self,
        model: Model,
        learned: nn.Module,
        weights: DiffusionLoss,
        *,
        prior: Prior | None = None,
        sample_prompts: Sequence[str] = (),
    ) -> None:
        """Freeze `model` but for the parameters of `learned`, with which the networks of `model` already compute.

        sample_prompts: as for `DiffusionObjective`.
        """
        networks = Networks(model.unet, model.text_encoder)
        super().__init__(model.config, networks, model.vae, weights, sample_prompts=sample_prompts)
        self.networks.eval().requires_grad_(False)
        self.learned = learned.requires_grad_(True)
        self.prior = prior
        self.register_state_dict_post_hook(_only_learned)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_none_missing)  # type: ignore[no-untyped-call]

    @property
    def trained(self) -> nn.Module:
        """The part that learns."""
        return self.learned

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of one batch; the log has the loss of the class as "prior"."""
        loss, logs = super().forward(batch)
        if self.prior is None:
            return loss, logs
        count = len(batch[0])
        drawn = torch.randint(len(self.prior.dataset), (count,)).tolist()
        shown = collate([self.prior.dataset[i] for i in drawn])
        prior, _ = super().forward((shown[0].to(batch[0].device), shown[1]))
        return loss + self.prior.weight * prior, logs | {"prior": prior}

    def sample(self, trained: nn.Module, batch: Batch) -> Tensor:
        """Return one guided picture for each sample prompt. The noise is the same at each call."""
        prompts = self.sample_prompts or batch[1][:16]
        with swapped(self.learned, trained):
            return self._sampled(self.networks.unet.bind, self.networks.text_encoder, prompts, batch)


@contextmanager
def swapped(module: nn.Module, other: nn.Module) -> Iterator[None]:
    """Exchange the values of the parameters of two equal modules for a while, without copying."""

    def swap() -> None:
        for one, two in zip(module.parameters(), other.parameters(), strict=True):
            one.data, two.data = two.data, one.data

    swap()
    try:
        yield
    finally:
        swap()


def _only_learned(objective: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    for name in [name for name in state if not name.startswith(f"{prefix}learned.")]:
        del state[name]


def _none_missing(objective: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if name.startswith("learned.")]
