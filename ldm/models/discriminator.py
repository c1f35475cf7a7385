"""A patch discriminator for the training of autoencoders: it tells patches of real images from decoded ones."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Convolutions that score overlapping patches of an image (Isola et al. 2017, section 3.2.2), with group norms."""

    def __init__(self, channels: int = 32, layers: int = 2) -> None:
        super().__init__()
        widths = [channels * 2**i for i in range(layers + 1)]
        self.conv_in = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for width in widths[1:])
        self.conv_out = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images: b 3 h w in [-1, 1] to scores: b 1 h' w', one per patch, higher for real ones."""
        h = F.leaky_relu(self.conv_in(images), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.leaky_relu(norm(conv(h)), 0.2)
        return self.conv_out(h)
