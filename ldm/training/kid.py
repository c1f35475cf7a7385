"""The kernel distance between two sets of pictures (KID, Binkowski et al. 2018), in the features of a VAE's encoder.

KID is independent of the checker of `ldm.training.checker`: it looks at the pictures alone, not at their prompts, and
becomes large for blur, noise and missing variety, too. It is an estimate of a squared distance: about 0, also slightly
below 0, for two sets of pictures of the same kind.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.images import to_tensor
from ldm.models.vae import VAE

BLOCK = 100  # pictures; the distance is measured in blocks of this size, as the paper does
BATCH = 32  # pictures that the encoder sees at a time
CELLS = 4  # the picture is divided into CELLS x CELLS parts, so that the layout counts


@torch.no_grad()
def features(vae: VAE, pictures: Sequence[Image.Image]) -> Tensor:
    """Return n d: the mean and the standard deviation of the encoder's last level in each part of the picture.

    The last level is the deepest one with many channels; the layers behind it shrink them to the latents. The mean
    tells what is where, and the standard deviation, which blur lowers, how detailed it is.
    """
    weight, found = next(vae.parameters()), []
    for start in range(0, len(pictures), BATCH):
        batch = torch.cat([to_tensor(picture) for picture in pictures[start : start + BATCH]])
        h = vae.encoder.conv_in(batch.to(weight))
        for level in vae.encoder.levels:
            h = level(h)
        mean, square = (F.adaptive_avg_pool2d(x.float(), CELLS) for x in (h, h.square()))
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        found.append(torch.cat([mean, deviation], dim=1).flatten(1).cpu())
    return torch.cat(found)


def kid(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Return the distance of two sets of features, n d, and its standard error over the blocks.

    The distance of a block is the unbiased estimate of MMD^2 with the kernel (x.y / d + 1)^3 (section 4 of the paper).
    Raises ValueError for sets of different sizes, and for less than two blocks of pictures.
    """
    if len(first) != len(second) or len(first) < 2 * BLOCK:
        raise ValueError(
            f"KID compares two equal sets of at least {2 * BLOCK} pictures, got {len(first)} and {len(second)}"
        )
    starts = range(0, len(first) - BLOCK + 1, BLOCK)
    found = torch.stack([_mmd2(*(side[i : i + BLOCK].double() for side in (first, second))) for i in starts])
    return found.mean().item(), found.std().item() / math.sqrt(len(found))


def _mmd2(a: Tensor, b: Tensor) -> Tensor:
    n, d = a.shape

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / d + 1) ** 3

    within = sum((kernel(x, x).sum() - kernel(x, x).diagonal().sum()) / (n * (n - 1)) for x in (a, b))
    return within - 2 * kernel(a, b).mean()
