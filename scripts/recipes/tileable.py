"""Tileable textures: all convolutions continue at the opposite side (circular padding), so that borders fit.

    python scripts/recipes/tileable.py "a 3D frog on a red background"

With circular padding a convolution commutes with every shift S along the torus, and attention does so, because it has
no positions. A network that halves the sides d times then has, for shifts by multiples of 2^d pixels,

    f(S x) = S f(x)

so that no place of the picture, its borders included, differs from another. Bergmann et al. 2017 (Periodic Spatial GAN)
generate periodic textures; the change of the padding was spread by users of Stable Diffusion and has no paper.
"""

import argparse
import copy
from typing import TypeVar

from PIL import Image
from torch import Tensor, nn

import ldm
from ldm.images import to_tensor
from ldm.pictures import save_png

Network = TypeVar("Network", bound=nn.Module)


def circular(network: Network) -> Network:
    """Return a copy of `network` whose convolutions have circular padding."""
    network = copy.deepcopy(network)
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            part.padding_mode = "circular"
    return network


def tiling(pipe: ldm.Pipeline) -> ldm.Pipeline:
    """Return a pipeline of tileable pictures. The given pipeline and its networks are not changed."""
    return ldm.Pipeline(pipe.config, circular(pipe.unet), circular(pipe.vae), pipe.text_encoder)


def border(image: Tensor) -> float:
    """Return the mean step of color from one border to the opposite one, relative to all steps. image: 1 3 h w."""
    steps = [(image.roll(-1, dim) - image).abs().mean(dim=(0, 1, 5 - dim)) for dim in (2, 3)]  # h, w
    return float(sum(each[-1] for each in steps) / sum(each[:-1].mean() for each in steps))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a picture that continues at the opposite side.")
    parser.add_argument("prompt", nargs="?", default="a 3D frog on a red background")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", default="tileable.png")
    args = parser.parse_args()
    pipe, request = ldm.load(), ldm.Request(args.prompt, seed=1, steps=args.steps)
    (plain,), (tile,) = (each.generate(request) for each in (pipe, tiling(pipe)))
    tiles = Image.new("RGB", (2 * tile.width, 2 * tile.height))
    for left in (0, tile.width):
        for top in (0, tile.height):
            tiles.paste(tile, (left, top))
    save_png(tiles, args.out, overwrite=True)
    before, after = (border(to_tensor(picture)) for picture in (plain, tile))
    print(f"color step across the borders / inside: {after:.2f}, with zero padding {before:.2f}")


if __name__ == "__main__":
    main()
