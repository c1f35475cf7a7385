"""Approximate accelerations of a UNet: the pictures change, and docs/shortcuts.md says how much and for what gain.

Nothing uses them unless asked to, and both leave the UNet that they are given as it was.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.transformer import Context, SpatialTransformer, TransformerBlock
from ldm.models.unet import UNet


@dataclass
class Run:
    """The calls of a `DeepCache` that belong together, and what it keeps from one to the next."""

    context: Context
    calls: int = 0  # since the last full one, with it
    shape: torch.Size | None = None  # of x in that one
    deep: Tensor | None = None  # the input of the shallow `up` stages in that one

    def keep(self, stage: nn.Module, args: object, out: Tensor) -> None:
        """As a forward hook of the last deep stage."""
        self.deep = out.detach()


class DeepCache(nn.Module):
    """A UNet that computes its deep part in every so many calls only (Ma et al. 2023), for sampling.

    From one noise level to the next the deep features change least. A full call keeps what enters the last `depth`
    stages of `up`; the calls that follow compute only those, and the first `depth` stages of `down` for their skips.

    unet: is not changed; use it itself again to undo. every: of so many calls one is full; 1: all are.
    depth: 1 to len(unet.up) - 1, of the pairs of stages that are always computed, the more the nearer to the UNet.
    Raises ValueError for another `every` or depth.
    """

    def __init__(self, unet: UNet, *, every: int, depth: int = 1) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"every must be 1 call or more, got {every}")
        if not 1 <= depth < len(unet.up):
            raise ValueError(f"depth must be 1 to {len(unet.up) - 1} of this UNet's {len(unet.up)} stages, got {depth}")
        self.unet, self.every, self.depth = unet, every, depth

    def prepare(self, context: Tensor, vector: Tensor | None = None) -> tuple[Run, Tensor | None]:
        """Begin a run of calls: they take what this returns in place of both, and nothing is kept between runs."""
        prepared, vector = self.unet.prepare(context, vector)
        return Run(prepared), vector

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        run: Run,
        vector: Tensor | None = None,
        residuals: Sequence[Tensor] | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predict as the UNet does, with its arguments, but for the context that `prepare` made.

        Another shape of x than in the last call starts anew. Raises ValueError for a context that is no run.
        """
        if not isinstance(run, Run):
            raise ValueError(
                f"DeepCache takes the context that its `prepare` returns, new for each run, got a {type(run).__name__}"
            )
        if run.calls % self.every == 0 or run.shape != x.shape:
            with self.unet.up[-self.depth - 1].register_forward_hook(run.keep):
                out: Tensor = self.unet(x, timesteps, run.context, vector, residuals, guidance)
            run.calls, run.shape = 1, x.shape
            return out
        run.calls += 1

        emb = self.unet.embed(timesteps, vector, x.dtype, guidance)
        skips = []
        for stage in self.unet.down[: self.depth]:
            x = stage(x, emb, run.context)
            skips.append(x)
        if residuals is not None:
            skips = [h + r for h, r in zip(skips, residuals, strict=False)]  # the shallow ones
        assert run.deep is not None  # since the full call
        x = run.deep
        for stage in self.unet.up[-self.depth :]:
            x = torch.cat([x, skips.pop()], dim=1)
            x = stage(x, emb, run.context, size=skips[-1].shape[-2:] if skips else None)
        out = self.unet.conv_out(F.silu(self.unet.norm_out(x)))
        return out


@contextmanager
def merged_tokens(unet: UNet, ratio: float) -> Iterator[None]:
    """Let similar pixels share a token in the self-attention of the highest resolution, inside a `with` block.

    Token merging for Stable Diffusion (Bolya & Hoffman 2023): tokens are averaged before the self-attention and its
    answer is copied to all that share it. Unlike there, which tokens stay is not drawn at random, see `share_slots`.
    ratio: how many of the tokens go, 0 to 0.75; 0 changes nothing.
    Raises ValueError for another ratio, and for compiled blocks, which call no hooks.
    """
    if not 0 <= ratio <= 0.75:
        raise ValueError(f"the ratio of merged tokens must lie in 0 .. 0.75, got {ratio}")
    with ExitStack() as undo:
        for transformer in _finest_transformers(unet) if ratio else []:
            merging = _Merging(ratio)
            undo.enter_context(transformer.register_forward_pre_hook(merging.measure))
            for block in transformer.blocks:
                assert isinstance(block, TransformerBlock)
                if block._compiled_call_impl is not None:
                    raise ValueError(
                        "compiled blocks would go on without merging tokens; load the model without compile"
                    )
                undo.enter_context(block.attn1.register_forward_pre_hook(merging.merge))
                undo.enter_context(block.attn1.register_forward_hook(merging.unmerge))
        yield


def share_slots(x: Tensor, height: int, width: int, ratio: float) -> tuple[Tensor, int]:
    """Give each token of x: b (h w) c one of n slots, so that n is `ratio` less than h w: b (h w) indices, and n.

    The top left token of each 2 x 2 square has a slot of its own. Each other one looks for the most similar of these,
    by the cosine, and those that found the best match share its slot.
    """
    index = torch.arange(height * width, device=x.device).reshape(height, width)
    hosts = index[::2, ::2].flatten()
    guests = torch.cat([index[::2, 1::2].flatten(), index[1::2].flatten()])
    x = F.normalize(x, dim=-1)
    likeness, host = (x[:, guests] @ x[:, hosts].transpose(1, 2)).max(dim=-1)  # b g
    rank = likeness.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # b g
    merged = min(int(ratio * len(index.flatten())), len(guests))

    slots = index.new_empty(x.shape[:2])  # b (h w)
    slots[:, hosts] = torch.arange(len(hosts), device=x.device)
    slots[:, guests] = torch.where(rank < merged, host, len(hosts) + rank - merged)
    return slots, height * width - merged


class _Merging:
    """The hooks of one transformer, and what they tell each other."""

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def measure(self, transformer: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Before the transformer: note the height and width that its tokens come from."""
        self.height, self.width = args[0].shape[-2:]

    def merge(self, attention: nn.Module, args: tuple[Tensor]) -> Tensor:
        """Before its self-attention: average the tokens of each slot, b (h w) c to b n c."""
        (x,) = args
        slots, count = share_slots(x, self.height, self.width, self.ratio)
        self.slots = slots[:, :, None].expand_as(x)
        merged = x.new_zeros(x.shape[0], count, x.shape[2])
        return merged.scatter_reduce(1, self.slots, x, "mean", include_self=False)

    def unmerge(self, attention: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        """After it: give each token what came out of its slot, b n c to b (h w) c."""
        return out.gather(1, self.slots)


def _finest_transformers(unet: UNet) -> list[SpatialTransformer]:
    """The transformers of the highest resolution that has any."""
    found: dict[int, list[SpatialTransformer]] = {}  # level -> its transformers
    level = 0
    for stage in [*unet.down, unet.mid, *unet.up]:
        if stage.transformer is not None:
            found.setdefault(level, []).append(stage.transformer)
        level += getattr(stage, "downsample", None) is not None
        level -= getattr(stage, "upsample", None) is not None
    return found[min(found)]
