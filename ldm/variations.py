"""Pictures between two pictures: the noise of two seeds mixed, two prompts mixed, or both.

A small amount of another seed varies one picture. Amounts from 0 to 1 lead from one picture to another; `between` makes
the requests on the way.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.conditioning import Condition
from ldm.config import check_fields, option
from ldm.diffusion.samplers import Noise, seeded_noise

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline
    from ldm.request import Plan, Request


@dataclass(frozen=True)
class Variation:
    """Another seed or prompt, or both, to mix into those of a request. At amount 1 they take their place.

    With another seed, all pictures of the request have its first seed, and picture i takes noise from `other_seed + i`.
    The initial noise equals that of A1111's "variation seed" and "variation strength". All other noise of the two seeds
    is mixed too, so that amount 1 gives the other picture with every sampler. A1111 does not mix the other noise.
    """

    other_seed: int | None = option(
        None, "mix in the noise of this seed, and of the next for each picture", "--variation-seed", low=0
    )
    other_prompt: str | None = option(None, "mix in this prompt", "--variation-prompt")
    amount: float = option(0.1, "how much of them to mix in, from 0 to 1", "--variation-strength", low=0, high=1)

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)
        if self.other_seed is None and self.other_prompt is None:
            raise ValueError("a variation needs another seed or another prompt: give other_seed or other_prompt")

    def noise(self, noise: Noise, plan: "Plan") -> Noise:
        """Mix the noise of the other seed into each draw of `noise`, by `slerp`."""
        if self.other_seed is None:
            return noise
        other = seeded_noise([self.other_seed + i for i in range(plan.request.images)], plan.latent_shape)
        return lambda: slerp(noise(), other(), self.amount)

    def conditions(self, conditions: list[Condition], pipe: "Pipeline", plan: "Plan") -> list[Condition]:
        """Mix the other prompt into the conditions, linearly: (1 - amount) a + amount b for each number of the text.

        Raises ValueError for prompts that change at different steps, and for prompts with different numbers of chunks.
        """
        if self.other_prompt is None:
            return conditions
        other = pipe.plan(dataclasses.replace(plan.request, prompt=self.other_prompt, variation=None))
        others = pipe.conditions(other)
        if other.changes != plan.changes or others[0].context.shape != conditions[0].context.shape:
            raise ValueError(
                f"two prompts are mixed only if they have as many chunks of 75 tokens and change at the same steps, "
                f"got {plan.request.prompt!r} and {self.other_prompt!r}"
            )
        return [_mixed(a, b, self.amount) for a, b in zip(conditions, others, strict=True)]

    def of(self, picture: int) -> "Variation":
        """Return the variation of one picture of the request."""
        seed = None if self.other_seed is None else self.other_seed + picture
        return dataclasses.replace(self, other_seed=seed)


def slerp(a: Tensor, b: Tensor, t: float, dim: int = -2) -> Tensor:
    """Interpolate between vectors along the arc from a, at t = 0, to b, at t = 1 (Shoemake 1985).

    sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b, where w is the angle between a and b

    Vectors of equal length keep this length, so two independent draws of noise give noise of the same variance. A
    linear mixture would have less. Parallel and opposite vectors, which do not lie on one arc, are mixed linearly.
    dim: the dimension of the vectors. For latents, b c h w, the default takes the columns of each channel, as A1111's
      web UI does. Computed in fp64.
    """
    start, end = a.double(), b.double()
    lengths = start.norm(dim=dim, keepdim=True) * end.norm(dim=dim, keepdim=True)
    angle = torch.acos(((start * end).sum(dim, keepdim=True) / lengths).clamp(-1, 1))
    sine = angle.sin()
    curved = sine > 1e-6  # false also for NaN, from a vector of zeros
    first, second = (torch.where(curved, (s * angle).sin() / sine, s) for s in (1 - t, t))
    return (first * start + second * end).to(a.dtype)


def between(request: "Request", prompts: Sequence[str], seeds: Sequence[int], frames: int) -> list["Request"]:
    """Make the requests of `frames` pictures on the way from the first prompt and seed to the last, in equal steps.

    prompts, seeds: the keyframes. One prompt, or one seed, holds for all keyframes.
    Raises ValueError for fewer than two keyframes, for prompts and seeds that do not match, for a negative seed, and
    for too few frames.
    """
    keyframes = max(len(prompts), len(seeds))
    if min(seeds) < 0:
        raise ValueError(f"the seeds of keyframes must be 0 or more, got {min(seeds)}")
    if keyframes < 2 or not {len(prompts), len(seeds)} <= {1, keyframes}:
        raise ValueError(
            "give two prompts or more, or two seeds or more; if both, then equally many: got "
            f"{len(prompts)} prompts and {len(seeds)} seeds"
        )
    if frames < keyframes:
        raise ValueError(f"frames must be {keyframes} or more, one for each prompt or seed, got {frames}")
    ways = list(zip(*(each * keyframes if len(each) == 1 else each for each in ([*prompts], [*seeds])), strict=True))
    requests = []
    for i in range(frames):
        keyframe, rest = divmod(i * (keyframes - 1), frames - 1)
        (prompt, seed), (next_prompt, next_seed) = ways[keyframe], ways[min(keyframe + 1, keyframes - 1)]
        variation = None
        if rest and (prompt, seed) != (next_prompt, next_seed):
            other_seed = None if next_seed == seed else next_seed
            other_prompt = None if next_prompt == prompt else next_prompt
            variation = Variation(other_seed, other_prompt, rest / (frames - 1))
        requests.append(dataclasses.replace(request, prompt=prompt, seed=seed, images=1, variation=variation))
    return requests


def _mixed(a: Condition, b: Condition, amount: float) -> Condition:
    mixed = {"context": torch.lerp(a.context, b.context, amount)}
    if a.vector is not None and b.vector is not None:
        mixed["vector"] = torch.lerp(a.vector, b.vector, amount)
    return dataclasses.replace(a, **mixed)
