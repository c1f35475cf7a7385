"""The objective of an editing model: InstructPix2Pix (Brooks et al. 2023).

The UNet predicts the picture after an edit from its noisy latents, the instruction, and the latents of the picture
before the edit; see `ldm.editing`.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoint.parts import Model
from ldm.diffusion.denoiser import guided
from ldm.editing import taking_pictures, two_scales, with_picture
from ldm.models.unet import UNet
from ldm.training.diffusion import DiffusionLoss, DiffusionObjective, Networks
from ldm.training.latents import picture_latents
from ldm.training.loop import Batch, extras

SHOWN = 8  # sample pictures, each below its picture before the edit
IMAGE_GUIDANCE = 1.5  # of the sample pictures: the default of `ldm edit`


@dataclass(frozen=True)
class EditLoss(DiffusionLoss):
    """The weights of a `DiffusionLoss`, with the shares of the examples without instruction and without picture."""

    caption_dropout: float = 0.05  # share without the instruction; as many without the picture, and without both

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.caption_dropout < 1 / 3:
            raise ValueError(
                f"caption_dropout must be less than 1/3 for an editing model, got {self.caption_dropout}: this share "
                "of the examples has no instruction, as many have no picture, and as many have neither"
            )


class EditObjective(DiffusionObjective):
    """Train the UNet of an editing model.

    The images of the batches show the pictures after an edit, and the captions are the instructions. The batches also
    have one of these tensors:
      "source"  b 3 h w in [0, 1], the pictures before the edit
      "picture" b c h w, their latents; see `picture_latents`
    """

    def __init__(self, model: Model, weights: EditLoss, *, train_text_encoder: bool = False) -> None:
        """Train the UNet of `model`, which takes 2 c channels, and the text encoder if asked.

        Raises ValueError as `DiffusionObjective` does.
        """
        super().__init__(model.config, Networks(model.unet, model.text_encoder), model.vae, weights)
        self.networks.unet.requires_grad_(True)
        self.networks.text_encoder.requires_grad_(train_text_encoder)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean weighted squared error of one batch at random timesteps.

        Some examples have no instruction, some no picture, and some neither (section 3.2.1).
        """
        text, kept = kept_inputs(torch.rand(len(batch[0])), self.weights.caption_dropout)
        picture = self._picture(batch)
        picture = picture * kept.to(picture)[:, None, None, None]
        unet = self.networks.unet
        return self._errors(batch, lambda z, t, c: unet(torch.cat([z, picture], dim=1), t, c.context, c.vector), text)

    def _picture(self, batch: Batch) -> Tensor:
        """Return the latents of the pictures before the edit, which are not scaled: b c h w."""
        more = extras(batch)
        with torch.no_grad():
            return more["picture"] if "picture" in more else picture_latents(self.vae, more["source"])

    def sample(self, batch: Batch) -> Tensor:
        """Return the pictures before an edit, decoded, each above the one after it: SHOWN 3 2h w."""
        images, instructions = batch[0][:SHOWN], batch[1][:SHOWN]
        picture = self._picture(batch)[:SHOWN]
        size = self._size(images)
        text, empty = (
            self._condition(self.networks.text_encoder, texts, size)
            for texts in (instructions, [None] * len(instructions))
        )
        conditions = [
            with_picture(text, picture),
            with_picture(empty, picture),
            with_picture(empty, torch.zeros_like(picture)),
        ]
        rule = two_scales(self.config.guidance_scale, IMAGE_GUIDANCE)
        network = guided(taking_pictures(self.networks.unet.bind), conditions, rule)
        after = self._decoded(network, self._noise(len(instructions), images))
        before = self.vae.decode(picture * self.vae.config.scaling_factor)
        return torch.cat([before, after], dim=2)


def kept_inputs(draws: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Tell which examples keep their instruction, and which keep their picture: b booleans each.

    A `share` of the examples loses the instruction alone, as many lose the picture alone, and as many lose both.
    draws: b random numbers, uniform in 0..1.
    """
    return draws >= 2 * share, (draws < share) | (draws >= 3 * share)


def with_picture_input(unet: UNet) -> UNet:
    """Return a copy of a UNet with twice as many input channels. The new ones have no effect yet (section 3.2)."""
    channels = unet.config.in_channels
    wide = UNet(replace(unet.config, in_channels=2 * channels))
    weights, name = unet.state_dict(), "down.0.conv.weight"
    wide.load_state_dict(weights | {name: F.pad(weights[name], (0, 0, 0, 0, 0, channels))})
    return wide.to(next(unet.parameters()))
