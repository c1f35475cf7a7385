"""ControlNet: a copy of the UNet's encoder that sees a second picture, the hint (Zhang et al. 2023).

`Controlled(unet, controls)` is the UNet with the outputs of several ControlNets added to its skips. As `UNet`, it has a
method `bind(condition)`, so it takes the UNet's place everywhere.
"""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning import Condition
from ldm.config import Mid, UNetConfig
from ldm.models.unet import Context, Encoder, UNet

HINT_CHANNELS = (16, 32, 96, 256)  # of all published ControlNets


class ControlNet(Encoder):
    """The encoder of a UNet, with an embedding of the hint and one 1x1 convolution for each output.

    config: of the UNet; the fields of the decoder are not used. hint_channels: channels of the hint embedding, which
    halves the size between two of them, down to the size of the latents. pooled: average each output over its pixels;
    the ControlNet then acts on the prompt only (the "shuffle" ControlNet).
    A new ControlNet outputs zeros, so that the UNet predicts what it predicted before.
    """

    def __init__(
        self, config: UNetConfig, *, hint_channels: Sequence[int] = HINT_CHANNELS, pooled: bool = False
    ) -> None:
        super().__init__(config)
        self.hint_channels, self.pooled = tuple(hint_channels), pooled
        self.hint = nn.ModuleList([nn.Conv2d(3, hint_channels[0], 3, padding=1)])
        for narrow, wide in pairwise(self.hint_channels):
            self.hint.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.hint.append(nn.Conv2d(narrow, wide, 3, stride=2, padding=1))
        self.hint.append(nn.Conv2d(hint_channels[-1], config.channels[0], 3, padding=1))
        self.zero_convs = nn.ModuleList(nn.Conv2d(channels, channels, 1) for channels in self.skip_channels)
        self.mid_out = nn.Conv2d(config.channels[-1], config.channels[-1], 1)
        for layer in (self.hint[-1], *self.zero_convs, self.mid_out):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    @classmethod
    def copy_of(cls, unet: UNet, *, hint_channels: Sequence[int] = HINT_CHANNELS, mid: Mid | None = None) -> Self:
        """Return a new ControlNet for `unet`, with a copy of its encoder.

        mid: "residual" and "none" leave out parts of the middle, for a smaller file (default: as in the UNet).
        """
        config = unet.config if mid is None else dataclasses.replace(unet.config, mid=mid)
        network = cls(config, hint_channels=hint_channels)
        own = network.state_dict()
        network.load_state_dict({name: t for name, t in unet.state_dict().items() if name in own}, strict=False)
        return network

    def embed_hint(self, hint: Tensor) -> Tensor:
        """Embed pictures: b 3 h*f w*f in [0, 1] as features: b c h w, at the size of the latents."""
        first, *others = self.hint
        x = first(hint)
        for conv in others:
            x = conv(F.silu(x))
        return x

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Context, hint: Tensor, vector: Tensor | None = None
    ) -> list[Tensor]:
        """Return the `residuals` of `UNet.forward`: one for each `down` stage and one for `mid`.

        x, timesteps, context, vector: as for the UNet. hint: pictures, b 3 h*f w*f in [0, 1], or the result of
        `embed_hint`.
        Raises ValueError if the size of the hint is not that of the pictures.
        """
        features = self.embed_hint(hint) if hint.shape[1] == 3 else hint
        if features.shape[-2:] != x.shape[-2:]:
            f = 2 ** (len(self.hint_channels) - 1)
            raise ValueError(
                f"the hint must have {f} pixels for each latent pixel, so {f * x.shape[-1]} x {f * x.shape[-2]}; its "
                f"embedding is {features.shape[-1]} x {features.shape[-2]}, the latents {x.shape[-1]} x {x.shape[-2]}"
            )
        emb = self.embed(timesteps, vector, x.dtype)
        *contexts, middle = [context] * (len(self.down) + 1) if isinstance(context, Tensor) else context
        residuals: list[Tensor] = []
        for stage, zero_conv, stage_context in zip(self.down, self.zero_convs, contexts, strict=True):
            x = stage(x, emb, stage_context)
            if not residuals:  # after the first convolution
                x = x + features
            residuals.append(zero_conv(x))
        residuals.append(self.mid_out(self.mid(x, emb, middle)))
        return [r.mean(dim=(2, 3), keepdim=True) for r in residuals] if self.pooled else residuals


class Applied(NamedTuple):
    """A ControlNet with its hint.

    hint: 1 3 h w in [0, 1], or b 3 h w, one for each picture of the batch. weight: a factor of the outputs.
    guess: act on the prompt only, not on the negative prompt, with the outputs at high resolution weighted down to a
    tenth: the picture then follows the hint even without a prompt ("guess mode").
    """

    network: ControlNet
    hint: Tensor
    weight: float = 1.0
    guess: bool = False


class Controlled:
    """A UNet with ControlNets, whose outputs are added up.

    The UNet may take more channels than the latents, as for inpainting: a ControlNet gets the first ones.
    Raises ValueError for a ControlNet that was made for another UNet.
    """

    def __init__(self, unet: UNet, controls: Sequence[Applied]) -> None:
        for control in controls:
            check_fits(control.network, unet)
        self.unet, self.controls = unet, tuple(controls)

    def bind(self, condition: Condition) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the function (z, timesteps) -> prediction of a condition.

        All that the steps share is computed here: keys and values of the context, and the embedding of the hints.
        """
        network = self.unet.bind(condition)
        found = [_bound(control, condition) for control in self.controls]
        bound = [each for each in found if each is not None]

        def controlled(z: Tensor, timesteps: Tensor) -> Tensor:
            total: list[Tensor] | None = None
            for residuals in (each(z, timesteps) for each in bound):
                total = residuals if total is None else [a + b for a, b in zip(total, residuals, strict=True)]
            return network(z, timesteps, residuals=total)

        return controlled


def check_fits(network: ControlNet, unet: UNet) -> None:
    """Raise ValueError unless the outputs of `network` fit the skips of `unet`, and both take the same text."""
    for what, own, wanted in (
        ("text of width", network.config.context_dim, unet.config.context_dim),
        ("a vector of width", network.config.vector_dim, unet.config.vector_dim),
        ("skips with the channels", network.skip_channels, unet.skip_channels),
    ):
        if own != wanted:
            raise ValueError(
                f"the ControlNet has {what} {own}, and the UNet of the model {wanted}: use a ControlNet that was made "
                "for this model's family"
            )


def _bound(control: Applied, condition: Condition) -> Callable[[Tensor, Tensor], list[Tensor]] | None:
    """Return the function (z, timesteps) -> weighted residuals, or None if no row is the prompt's in guess mode."""
    network, weight = control.network, control.weight
    rows: Tensor | None = None  # the rows that the ControlNet acts on; None: all
    if (control.guess or network.pooled) and condition.is_prompt is not None and not condition.is_prompt.all():
        rows = condition.is_prompt.nonzero().flatten()
        if len(rows) == 0:
            return None
        condition = condition.map(lambda tensor: tensor[rows])
    context, vector = network.project(condition.context), condition.vector
    features = network.embed_hint(control.hint)
    features = features.repeat(len(condition.context) // len(features), 1, 1, 1)
    count = len(network.skip_channels) + 1
    scaled = control.guess and not network.pooled
    weights = (weight * torch.logspace(-1, 0, count)).tolist() if scaled else [weight] * count

    def residuals(z: Tensor, timesteps: Tensor) -> list[Tensor]:
        x = z[:, : network.config.in_channels]
        if rows is None:
            outputs = network(x, timesteps, context, features, vector)
            return [w * r for w, r in zip(weights, outputs, strict=True)]
        outputs = network(x[rows], timesteps[rows], context, features, vector)
        return [
            r.new_zeros(len(z), *r.shape[1:]).index_copy(0, rows, w * r) for w, r in zip(weights, outputs, strict=True)
        ]

    return residuals
