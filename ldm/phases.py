r"""Prompts that change during sampling: the texts of each phase, and a denoiser that takes the phases in turn.

    [from:to:when]   "from" in the first `when` steps, then "to"
    [to:when]        nothing in the first `when` steps, then "to"
    [from::when]     "from" in the first `when` steps, then nothing

`when` is a number of steps. With a point, as in 0.5, it is a share of the steps. The steps are those that run: image to
image often runs only the last steps of the request. As noise levels: "from" is read above the level at which step
`when` + 1 starts, and "to" at this level and below. So "to" is never read if `when` is the number of steps or more.
The changes can be nested, and stand in the brackets of weights. This is the syntax of A1111's web UI.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ldm.conditioning import Condition
from ldm.diffusion.denoiser import Denoiser, within

_WHEN = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)\s*")


def at_step(prompt: str, step: int, steps: int) -> tuple[str, int]:
    """Return what `prompt` says in step `step` of `steps`, and the next step in which it may say something else.

    A prompt that stays the same from here on has `steps` as the next step.
    Raises ValueError for [a|b], which A1111 reads as an alternation.
    """
    said, i, following = "", 0, steps
    while i < len(prompt):
        inside = _inside(prompt, i) if prompt[i] == "[" else None
        if inside is not None:
            parts, marks, end = inside
            if "|" in marks:
                raise ValueError(
                    f"{prompt[i:end][:60]!r} would alternate between its words in every step, which is not supported: "
                    r"write [from:to:when], or \| for a bar that is part of the prompt"
                )
            if len(parts) in (2, 3) and _WHEN.fullmatch(parts[-1]):
                change = _step(parts[-1], steps)
                before, after = parts[:-1] if len(parts) == 3 else ("", parts[0])
                if step < change:
                    following = min(following, change)
                # The words can change again, so they are read like the rest.
                prompt, i = (before if step < change else after) + prompt[end:], 0
                continue
        width = 2 if prompt[i] == "\\" else 1
        said += prompt[i : i + width]
        i += width
    return said, following


def _step(when: str, steps: int) -> int:
    """Return the number of steps before a change: with a point, `when` is a share of all steps."""
    return max(0, min(steps, int(float(when) * steps) if "." in when else int(when)))


def _inside(prompt: str, start: int) -> tuple[list[str], list[str], int] | None:
    """Split the text in the bracket that opens at `start` at its own colons and bars.

    Returns the parts, the marks between them, and where the text goes on; None for a bracket that is not closed.
    """
    parts, marks, closing, i = [""], list[str](), list[str](), start + 1
    while i < len(prompt):
        character = prompt[i]
        if character == "]" and not closing:
            return parts, marks, i + 1
        if character in ":|" and not closing:
            marks.append(character)
            parts.append("")
            i += 1
            continue
        if character in "([":
            closing.append(")" if character == "(" else "]")
        elif character in ")]" and (not closing or closing.pop() != character):
            return None
        width = 2 if character == "\\" else 1
        parts[-1] += prompt[i : i + width]
        i += width
    return None


def phases(
    texts: Sequence[str | None], which: Sequence[Sequence[int]], scalars: Sequence[tuple[float, ...]], sigmas: Tensor
) -> dict[str, Any]:
    """Return these fields of a `Plan` anew, with the texts of all phases, and `changes`, the levels between them.

    The steps are those that run: after k of them the noise level is sigmas[k]. At this level the next phase begins, so
    that a second estimate at this level, as in Heun's method, is made with the new text.
    """
    steps = len(sigmas) - 1
    said: list[tuple[str | None, int]] = []  # each different text once, with the index of its original
    rows: list[tuple[int, ...]] = []
    starts, step = [0], 0
    while step < steps:
        following, now = steps, []
        for i, text in enumerate(texts):
            reading, change = (None, steps) if text is None else at_step(text, step, steps)
            following = min(following, change)
            if (reading, i) not in said:
                said.append((reading, i))
            now.append(said.index((reading, i)))
        new = [tuple(now[i] for i in row) for row in which]
        if new != rows[-len(new) :]:
            rows += new
            starts += [step] if step else []
        step = following
    return {
        "texts": tuple(text for text, _ in said),
        "which": tuple(rows),
        "scalars": tuple(scalars[i] for _, i in said) if scalars else (),
        "changes": tuple(float(sigmas[start]) for start in starts[1:]),
    }


def in_turn(
    denoiser: Callable[[Any, Sequence[Condition]], Denoiser], plan: Any, conditions: Sequence[Condition]
) -> Denoiser:
    """Make a denoiser for each phase of `plan`, and one that calls each at its noise levels.

    denoiser: makes the denoiser of a plan and its conditions, such as `Pipeline.denoiser`.
    """
    n = len(conditions) // (len(plan.changes) + 1)
    alone = dataclasses.replace(plan, changes=())
    denoisers = [denoiser(alone, conditions[i : i + n]) for i in range(0, len(conditions), n)]
    denoise = denoisers.pop()
    for level, before in zip(reversed(plan.changes), reversed(denoisers), strict=True):
        denoise = within((level, math.inf), before, denoise)
    return denoise
