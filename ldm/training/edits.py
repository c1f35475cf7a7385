"""Pairs of emoji scenes with an instruction: the scene before an edit, and the scene after it.

The two scenes differ in one property: an object, the ground, the style, the size or the place. All else stays: both are
painted with the same random numbers. Each pair depends on (seed, index) alone.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.training.grounds import GROUNDS
from ldm.training.objects import MANY, MASS, NAMES
from ldm.training.scenes import PLACES, SIZE_WORDS, Scene, Scenes, held_out, pick, with_article

SHARES = {"objects": 0.3, "ground": 0.25, "style": 0.15, "size": 0.15, "place": 0.15}  # of the changed properties
DIRECTIONS = {
    "": "to the middle",
    "on the left": "to the left",
    "on the right": "to the right",
    "at the top": "to the top",
    "at the bottom": "to the bottom",
}


class Edit(NamedTuple):
    """The scenes before and after an edit, and the property that differs: a key of SHARES."""

    before: Scene
    after: Scene
    kind: str

    def instruction(self, rng: np.random.Generator | None = None) -> str:
        """Say the edit in English, such as "turn the frog into a crab". With `rng`, words vary.

        The objects are always named: a model that knows them by name learns the edits much faster.
        """

        def one_of(words: Sequence[str]) -> str:
            return pick(rng, words) if rng is not None and rng.random() < 0.25 else words[0]

        def noun(name: str) -> str:
            return one_of((name, *NAMES.get(name, ())))

        old, new = self.before.objects, self.after.objects
        if self.kind == "objects":
            changed = next(i for i, name in enumerate(old) if name != new[i])
            gone, come = noun(old[changed]), noun(new[changed])
            come = come if come in MANY | MASS else with_article(come)
            return one_of((f"turn the {gone} into {come}", f"replace the {gone} with {come}"))
        it = " and ".join(f"the {noun(name)}" for name in old)
        if self.kind == "ground":
            phrase = one_of(GROUNDS[self.after.ground].phrases)
            return f"{'put' if phrase.startswith(('on ', 'in ')) else 'show'} {it} {phrase}"
        if self.kind == "place":
            return f"move {it} {DIRECTIONS[self.after.place]}"
        word = self.after.style if self.kind == "style" else one_of(SIZE_WORDS[self.after.size])
        return f"make {it} {word}"


class Edits(Scenes):
    """A data set of a million random edits: (image after the edit: uint8 3 h w, instruction, {"source": image before}).

    No scene is held out, neither before an edit nor after it.
    """

    def edit(self, rng: np.random.Generator, kind: str) -> Edit:
        """Choose a random edit of one kind. kind: a key of SHARES."""
        while True:
            before = self.scene(rng)
            before = dataclasses.replace(before, style=before.style or pick(rng, self.painter.sprites))
            after = self._changed(before, kind, rng)
            if not before.count and after is not None and not held_out(self.concepts, after):
                return Edit(before, after, kind)

    def _changed(self, scene: Scene, kind: str, rng: np.random.Generator) -> Scene | None:
        """Return `scene` with one random change, or None if the change does not suit the scene."""
        if kind == "objects":
            objects = list(scene.objects)
            objects[rng.integers(len(objects))] = pick(rng, self.concepts)
            fits = len({*objects, *scene.objects}) == len(objects) + 1
            return dataclasses.replace(scene, objects=tuple(objects)) if fits else None
        choices = {
            "ground": tuple(GROUNDS),
            "style": tuple(self.painter.sprites),
            "size": ("small",) if scene.place else ("small", "big"),  # a big object fills the middle
            "place": () if scene.size == "big" else tuple(PLACES),
        }[kind]
        others = [word for word in choices if word != getattr(scene, kind)]
        if not others or (kind in ("size", "place") and scene.relation):
            return None
        return dataclasses.replace(scene, **{kind: pick(rng, others)})  # type: ignore[arg-type]

    def paint(self, scene: Scene, index: int) -> NDArray[np.uint8]:
        """Draw the scene before or after edit `index`: h w 3. The ground and the place have their own random numbers.

        So each of them stays if the other one changes.
        """
        ground, place = (np.random.default_rng((self.seed, index, part)) for part in (1, 2))
        return self.painter.paint(scene, ground, place)

    def __getitem__(self, index: int) -> tuple[Tensor, str, dict[str, Tensor]]:  # type: ignore[override]
        edit, instruction = self._edit(index)
        before, after = (
            torch.from_numpy(self.paint(scene, index)).permute(2, 0, 1) for scene in (edit.before, edit.after)
        )
        return after, instruction, {"source": before}

    def caption(self, index: int) -> str:
        """Return the instruction of an edit without drawing its scenes."""
        return self._edit(index)[1]

    def _edit(self, index: int) -> tuple[Edit, str]:
        rng = np.random.default_rng((self.seed, index))
        edit = self.edit(rng, str(rng.choice(list(SHARES), p=list(SHARES.values()))))
        return edit, edit.instruction(rng)
