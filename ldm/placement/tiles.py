"""Encode and decode a picture in overlapping tiles that are blended: little memory, nearly as fast, not exact.

The normalizations and the attention of the VAE see one tile only, so colors and contrast differ from tile to tile. The
blending hides this. `ldm.placement.slabs` is exact, and slower.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ldm.models.vae import VAE, Gaussian


@torch.no_grad()
def decode_tiles(vae: VAE, latents: Tensor, *, tile: int = 64, overlap: int = 8) -> Tensor:
    """Decode one picture at a time in square tiles, approximately, with the memory of one tile.

    latents: b c h w, scaled. tile: the largest side of a tile. overlap: the smallest overlap of two neighbors. Both are
    in latent pixels. Overlaps are computed twice: for 128 x 128 latent pixels in 3 x 3 tiles, a quarter more work.
    Returns images: b 3 h*f w*f, without gradients. Raises ValueError unless 1 <= overlap <= tile / 2.
    """
    blend = partial(_blend, vae.decode, tile=tile, overlap=overlap, after=vae.config.factor)
    return torch.cat([blend(latent) for latent in latents[:, None]])


@torch.no_grad()
def encode_tiles(vae: VAE, images: Tensor, *, tile: int = 64, overlap: int = 8) -> Gaussian:
    """Encode one picture at a time in square tiles, approximately. Means and standard deviations are blended.

    images: b 3 h w in [-1, 1]. tile, overlap: as for `decode_tiles`. Returns the distribution of scaled latents:
    b c h/f w/f, without gradients.
    Raises ValueError unless 1 <= overlap <= tile / 2, and if h or w is not a multiple of f.
    """
    vae.check_size(images)

    def encode(part: Tensor) -> Tensor:
        return torch.cat(vae.encode(part), dim=1)  # mean, std

    blend = partial(_blend, encode, tile=tile, overlap=overlap, before=vae.config.factor)
    return Gaussian(*torch.cat([blend(image) for image in images[:, None]]).chunk(2, dim=1))


def _blend(
    network: Callable[[Tensor], Tensor], x: Tensor, *, tile: int, overlap: int, before: int = 1, after: int = 1
) -> Tensor:
    """Run `network` on the tiles of x: 1 c h w, and average the results with weights that fall to the edges of a tile.

    before, after: the side of a latent pixel in pixels of x and of the result.
    """
    if not 1 <= overlap <= tile / 2:
        raise ValueError(f"tiles of {tile} must overlap by 1 to {tile // 2} latent pixels, got {overlap}")
    rows, columns = (_spans(n // before, tile, overlap, before, after, x.device) for n in x.shape[2:])
    height, width = (n // before * after for n in x.shape[2:])
    out = None
    for source_rows, target_rows, down in rows:
        for source_columns, target_columns, across in columns:
            y = network(x[:, :, source_rows, source_columns])
            if out is None:
                out = y.new_zeros(1, y.shape[1], height, width, dtype=torch.float32)
            out[:, :, target_rows, target_columns] += y * (down[:, None] * across)
    assert out is not None
    return out.to(x.dtype)


def _spans(
    length: int, tile: int, overlap: int, before: int, after: int, device: torch.device
) -> list[tuple[slice, slice, Tensor]]:
    """Place tiles evenly along one side: for each tile its slice of the input, its slice of the result, its weights.

    The number of tiles is the smallest possible, and then their size is. At each pixel the weights sum to 1.
    """
    count = math.ceil((length - overlap) / (tile - overlap)) if length > tile else 1
    tile = math.ceil((length + (count - 1) * overlap) / count)
    starts = torch.linspace(0, length - tile, count).round().int().tolist()
    ramp = torch.arange(0.5, tile * after, device=device)
    window = torch.minimum(ramp, ramp.flip(0)).clamp(max=overlap * after)
    sources = [slice(start * before, (start + tile) * before) for start in starts]
    targets = [slice(start * after, (start + tile) * after) for start in starts]
    total = torch.zeros(length * after, device=device)
    for target in targets:
        total[target] += window
    return [(s, t, window / total[t]) for s, t in zip(sources, targets, strict=True)]
