"""Measure how often an editing model changes what its instructions name, and keeps all else."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from ldm.training.checker import Checker, Seen
from ldm.training.edits import SHARES, Edit, Edits
from ldm.training.evaluate import nearest_place, nearest_size
from ldm.training.objects import Sprites
from ldm.training.scenes import Scene

GenerateEdit = Callable[[str, int, Image.Image], Image.Image]  # instruction, seed, picture before -> picture after
SEED = 64  # of the edits, which are always the same


class Score(NamedTuple):
    """How often the pictures after some edits show what was asked for, and what was there before: counts."""

    changed: int  # the named property is as the instruction says
    kept: int  # the other properties are as before the edit
    both: int
    pictures: int


def changes(
    generate: GenerateEdit, sprites: Sprites, side: int, *, count: int = 64, seed: int = 0
) -> dict[str, dict[str, Score]]:
    """Let `generate` make `count` edits, and check the pictures. Return the scores: row -> kind of edit, or "all".

    Each scene has one object. The rows are the model's pictures, the pictures before the edits, and true pictures after
    the edits. The last two are what a model reaches that changes nothing, and the accuracy of the checker.
    side: of the pictures in pixels. seed: of the first picture; picture i has `seed` + i.
    """
    edits, checker = Edits(sprites, side, seed=SEED), Checker(sprites)
    asked = fixed_edits(edits, count)
    before, after = (
        [Image.fromarray(edits.paint(edit[part], i)) for i, edit in enumerate(asked)]  # type: ignore[arg-type]
        for part in (0, 1)
    )
    made = [generate(edit.instruction(), seed + i, before[i]) for i, edit in enumerate(asked)]
    rows = {"model": made, "picture before": before, "true picture": after}
    return {row: _scores(asked, [checker.look(picture) for picture in pictures]) for row, pictures in rows.items()}


def fixed_edits(edits: Edits, count: int) -> list[Edit]:
    """Return `count` edits of scenes with one object, of each kind in turn."""

    def edit(i: int) -> Edit:
        rng, kind = np.random.default_rng((edits.seed, i)), list(SHARES)[i % len(SHARES)]
        while len((found := edits.edit(rng, kind)).before.objects) > 1:
            pass
        return found

    return [edit(i) for i in range(count)]


def table(scores: Mapping[str, Mapping[str, Score]]) -> str:
    """Return the scores as lines of text, one for each row and kind of edit."""
    lines = [f"{'':<16}{'edit':<10}{'changed':>14}{'others kept':>14}{'both':>14}"]
    for row, kinds in scores.items():
        for kind, score in kinds.items():
            cells = (f"{n}/{score.pictures} {100 * n / score.pictures:3.0f}%" for n in score[:-1])
            lines.append(f"{row:<16}{kind:<10}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def _scores(edits: Sequence[Edit], seen: Sequence[Seen]) -> dict[str, Score]:
    """Return the scores of the pictures after the edits by kind, and of all of them."""
    verdicts: dict[str, list[tuple[bool, bool]]] = {kind: [] for kind in (*SHARES, "all")}
    for edit, one in zip(edits, seen, strict=True):
        right = _right(edit.after, one)
        verdict = right.pop(edit.kind), all(right.values())
        verdicts[edit.kind].append(verdict)
        verdicts["all"].append(verdict)
    return {
        kind: Score(sum(a for a, _ in found), sum(b for _, b in found), sum(a and b for a, b in found), len(found))
        for kind, found in verdicts.items()
        if found
    }


def _right(scene: Scene, seen: Seen) -> dict[str, bool]:
    """Tell which properties of a scene with one object a picture has, by the kinds of edits that change them."""
    (found,) = seen.objects
    return {
        "objects": (found.name,) == scene.objects,
        "ground": seen.ground == scene.ground,
        "style": found.style == scene.style,
        "size": nearest_size(found) == scene.size,
        "place": nearest_place(found) == scene.place,
    }
