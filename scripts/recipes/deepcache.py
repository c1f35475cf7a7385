"""DeepCache (Ma et al. 2023): run the deep part of the UNet only in every N-th call. The picture changes a little.

    python scripts/recipes/deepcache.py "a frog on the grass" --every 3

From one step to the next, the deep features of the UNet change least. A full call keeps the features that enter the
last `depth` stages of `up`. The calls after it run only these stages, and the first `depth` stages of `down` for their
skips. docs/shortcuts.md has the time and the difference on the bundled model.
"""

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ldm
from ldm.conditioning import Condition
from ldm.diffusion.denoiser import Network
from ldm.models.unet import UNet


class DeepCache(nn.Module):
    """A UNet with a cache, to be used as `pipe.unet = DeepCache(pipe.unet, every=3)`. The UNet is not changed.

    every: one of so many calls is full. depth: the number of stages of `up` that every call runs.
    """

    def __init__(self, unet: UNet, *, every: int, depth: int = 1) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"every must be 1 call or more, got {every}")
        if not 1 <= depth < len(unet.up):
            raise ValueError(f"depth must be 1 to {len(unet.up) - 1} of this UNet's {len(unet.up)} stages, got {depth}")
        self.unet, self.every, self.depth = unet, every, depth

    def bind(self, condition: Condition) -> Network:
        """Return the function (z, timesteps) -> prediction of one condition, with a cache of its own."""
        unet, first = self.unet, len(self.unet.up) - self.depth  # the first of the stages that every call runs
        contexts = unet.project(condition.context)
        ups = contexts[-len(unet.up) :]
        kept, calls, shape = torch.empty(0), 0, None  # of the last full call: the input of stage `first`

        def network(z: Tensor, timesteps: Tensor) -> Tensor:
            nonlocal kept, calls, shape
            full = shape != z.shape or calls == self.every
            calls, shape = 1 if full else calls + 1, z.shape
            emb = unet.embed(timesteps, condition.vector, z.dtype, condition.guidance)
            if full:
                x, skips = unet.encode(z, emb, contexts[: -len(unet.up)])
            else:
                x, skips = z, []
                for stage, context in zip(unet.down[: self.depth], contexts[: self.depth], strict=True):
                    x = stage(x, emb, context)
                    skips.append(x)
                x = kept
            for i in range(0 if full else first, len(unet.up)):
                if i == first:
                    kept = x.detach()
                x = torch.cat([x, skips.pop()], dim=1)
                x = unet.up[i](x, emb, ups[i], size=skips[-1].shape[-2:] if skips else None)
            return unet.conv_out(F.silu(unet.norm_out(x)))

        return network


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a picture with and without DeepCache, and compare them.")
    parser.add_argument("prompt")
    parser.add_argument("--model", default="weights/tiny")
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--depth", type=int, default=1)
    args = parser.parse_args()
    pipe, pictures = ldm.load(args.model), []
    for name, unet in (("without", pipe.unet), ("with", DeepCache(pipe.unet, every=args.every, depth=args.depth))):
        pipe.unet, start = unet, time.perf_counter()
        pictures.append(np.asarray(pipe.generate(ldm.Request(args.prompt, seed=1))[0], float))
        print(f"{name} DeepCache: {time.perf_counter() - start:.2f} s")
    print(f"mean difference: {abs(pictures[0] - pictures[1]).mean():.2f} of 255 levels")
