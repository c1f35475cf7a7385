"""The objective of methods that teach a model something new and leave most of its weights as they are."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.checkpoint.parts import Model
from ldm.models.unet import UNet
from ldm.training.diffusion import DiffusionLoss, DiffusionObjective, Networks
from ldm.training.loop import Batch, Dataset, collate, to_device


class Prior(NamedTuple):
    """Pictures of the class that the model should go on to draw as before, and the weight of their loss."""

    dataset: Dataset
    weight: float


class TeachingObjective(DiffusionObjective):
    """Train a small part of a model, or some of its networks, by the loss of `DiffusionObjective`.

    A prior adds weight times the loss of as many pictures of the class to the loss of the batch (DreamBooth, Ruiz et
    al. 2022, eq. 2).
    """

    def __init__(
        self,
        model: Model,
        learned: nn.Module,
        weights: DiffusionLoss,
        *,
        prior: Prior | None = None,
        sample_prompts: Sequence[str] = (),
        kept_out: Dataset | None = None,
    ) -> None:
        """Freeze `model` but for the parameters of `learned`, with which the networks of `model` already compute.

        sample_prompts, kept_out: as for `DiffusionObjective`.
        """
        networks = Networks(model.unet, model.text_encoder)
        super().__init__(model.config, networks, model.vae, weights, sample_prompts=sample_prompts, kept_out=kept_out)
        self.networks.eval().requires_grad_(False)
        self.learned = learned.requires_grad_(True)
        self.prior = prior

    @property
    def trained(self) -> nn.Module:
        """The part that learns."""
        return self.learned

    def complete(self, trained: nn.Module) -> Networks:
        """Return the networks of the model, with `trained` in place of those that are trained whole."""
        return super().complete(trained) if isinstance(trained, UNet | Networks) else self.networks

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of one batch; the log has the loss of the class as "prior"."""
        loss, logs = super().forward(batch)
        if self.prior is None:
            return loss, logs
        count = len(batch[0])
        drawn = torch.randint(len(self.prior.dataset), (count,)).tolist()
        shown = collate([self.prior.dataset[i] for i in drawn])
        prior, _ = super().forward(to_device(shown, batch[0].device))
        return loss + self.prior.weight * prior, logs | {"prior": prior}
