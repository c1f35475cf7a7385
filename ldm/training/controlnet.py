"""The objective of a ControlNet: with it, a fixed UNet predicts better, because it sees edges (Zhang et al. 2023)."""

import torch
from torch import Tensor

from ldm.checkpoint.parts import Model
from ldm.control import canny
from ldm.images import to_pil, to_tensor
from ldm.models.controlnet import Applied, Controlled, ControlNet
from ldm.training.diffusion import DiffusionLoss, DiffusionObjective, Networks
from ldm.training.loop import Batch

SHOWN = 8  # sample pictures, each below its hint


class ControlNetObjective(DiffusionObjective):
    """Train a ControlNet for a fixed model. The hint of each training image is its edges by Canny's method.

    The batches have images. Some captions should be dropped, so that the ControlNet learns to follow the hint without a
    prompt (half of them in section 3.3).
    """

    def __init__(self, model: Model, network: ControlNet, weights: DiffusionLoss) -> None:
        """Freeze all networks of `model`. `network` is trained."""
        super().__init__(model.config, Networks(model.unet, model.text_encoder), model.vae, weights)
        self.networks.eval().requires_grad_(False)
        self.network = network.requires_grad_(True)

    @property
    def trained(self) -> ControlNet:
        """The ControlNet."""
        return self.network

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean weighted squared error of one batch at random timesteps."""
        hint, unet = edges(batch[0]), self.networks.unet
        return self._errors(
            batch, lambda z, t, c: unet(z, t, c.context, c.vector, self.network(z, t, c.context, hint, c.vector))
        )

    def sample(self, batch: Batch) -> Tensor:
        """Return the hints, each above a picture of its caption with this hint: SHOWN 3 2h w."""
        images, captions = batch[0][:SHOWN], batch[1][:SHOWN]
        hint = edges(images)
        controlled = Controlled(self.networks.unet, [Applied(self.network, hint)])
        pictures = self._sampled(controlled.bind, self.networks.text_encoder, captions, (images, captions))
        return torch.cat([2 * hint - 1, pictures], dim=2)


def edges(images: Tensor) -> Tensor:
    """Return the edges of images, b 3 h w in [-1, 1], as hints: b 3 h w in [0, 1]."""
    found = [to_tensor(canny(picture)) for picture in to_pil(images)]
    return (torch.cat(found).to(images) + 1) / 2
