"""The kernel distance between two sets of pictures (KID, Binkowski et al. 2018), in the features of a VAE's encoder.

The paper takes the pooled features of the Inception network, which is trained on photographs. Here, they come from the
encoder of the model's own VAE, which knows emoji and needs no download. Compare only models with the same VAE.
`ldm.training.metrics` computes the same distance in the features of other networks.

KID is independent of `ldm.training.checker`: it compares pictures and does not use their prompts. Blur, noise and
missing variety make it larger, too. It is an estimate of a squared distance: about 0, also slightly below 0, for two
sets of pictures of the same kind.
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


@torch.no_grad()
def features(vae: VAE, pictures: Sequence[Image.Image]) -> Tensor:
    """Return n d: the mean and the standard deviation of each channel that the encoder's last convolution reads.

    These channels are the deepest ones before the latents, and normalized. Over the whole picture, their mean tells
    which colors and textures there are, and their standard deviation, which blur lowers, how detailed they are. Like
    the features of the paper, they do not tell where something is. Features of each part of the picture found blur
    less surely, because they vary more between pictures.
    """
    weight, found = next(vae.parameters()), []
    for start in range(0, len(pictures), BATCH):
        batch = torch.cat([to_tensor(picture) for picture in pictures[start : start + BATCH]])
        h = vae.encoder.conv_in(batch.to(weight))
        for level in vae.encoder.levels:
            h = level(h)
        h = F.silu(vae.encoder.norm_out(vae.encoder.mid(h))).float()
        found.append(torch.cat([h.mean((2, 3)), h.std((2, 3))], dim=1).cpu())
    return torch.cat(found)


def kid(made: Tensor, true: Tensor, *, block: int | None = None, standardize: bool = True) -> tuple[float, float]:
    """Return the distance of two sets of features, n d, and its standard error over the blocks.

    The distance of a block is the unbiased estimate of MMD^2 with the kernel (x.y / d + 1)^3 (section 4 of the paper).
    block: pictures in a block; None: BLOCK. The paper draws its blocks again and again from the same pictures. Here no
    two blocks share a picture, which gives a standard error.
    standardize: first give each feature of `true` the mean 0 and the standard deviation 1, and change `made` alike. The
    VAE's features need this: without a common scale, the kernel would see only the features with the largest values.
    The paper does not standardize the Inception features.
    Raises ValueError for sets of different sizes, and for less than two blocks of pictures.
    """
    block = block or BLOCK
    if len(made) != len(true) or len(made) < 2 * block:
        raise ValueError(
            f"KID compares two equal sets of at least {2 * block} pictures, got {len(made)} and {len(true)}"
        )
    x, y = made.double(), true.double()
    if standardize:
        mean, deviation = y.mean(0), y.std(0).clamp(min=1e-6)
        x, y = (x - mean) / deviation, (y - mean) / deviation
    starts = range(0, len(x) - block + 1, block)
    found = torch.stack([_mmd2(x[i : i + block], y[i : i + block]) for i in starts])
    return found.mean().item(), found.std().item() / math.sqrt(len(found))


def _mmd2(a: Tensor, b: Tensor) -> Tensor:
    n, d = a.shape

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / d + 1) ** 3

    within = sum((kernel(x, x).sum() - kernel(x, x).diagonal().sum()) / (n * (n - 1)) for x in (a, b))
    return within - 2 * kernel(a, b).mean()
