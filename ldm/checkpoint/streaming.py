"""Models on disk whose weights are read, computed and written one tensor at a time, so that memory stays bounded."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ldm.checkpoint.files import Identity, at_once, unused
from ldm.checkpoint.folder import write_folder
from ldm.checkpoint.keymap import inverse
from ldm.checkpoint.parts import Model, cast, modules
from ldm.checkpoint.single import write_single
from ldm.checkpoint.sources import open_source
from ldm.checkpoint.tensors import TensorFiles
from ldm.config import Layout

T = TypeVar("T")
Watch = Callable[[list[T]], Iterable[T]]  # returns the same items, with a progress bar for example
Change = Callable[[str, str, Tensor], Tensor]  # (part, our name, old value) -> new value


class Weights:
    """The weights of a model on disk by part and our name. `shapes` are known from the start; `read` reads one."""

    def __init__(self, model: Identity) -> None:
        self.parts = model.source.parts
        self.states = {part: network.state_dict() for part, network in modules(*model.networks).items()}
        self.shapes = {part: {key: value.shape for key, value in state.items()} for part, state in self.states.items()}

    def read(self, part: str, key: str) -> Tensor:
        """Return one weight in our shape and in the stored dtype. The tensor is a copy, in memory of its own."""
        at = self.parts[part].stored(self.states[part])[key]
        ((_, value),) = self.parts[part].tensors.read([at.name], mapped=False)
        return at.form.restore(value.chunk(at.piece.of)[at.piece.number], self.shapes[part][key])

    def dtype_of(self, part: str, key: str) -> torch.dtype:
        """Return the stored dtype. Raises ValueError if it is not a floating-point one."""
        return self.parts[part].dtype_of(self.parts[part].stored(self.states[part])[key].name)


def rewrite(
    model: Identity,
    path: str | Path,
    change: Change,
    *,
    layout: Layout,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
    watch: Watch[tuple[str, str]] = list,
) -> None:
    """Save an identified model with other weights. In memory are the old and the new value of one tensor.

    change: computes each new weight. path, layout, dtype, overwrite: as of `ldm.checkpoint.files.save`.
    metadata: entries for the file, or for the files of the networks.
    watch: wraps the list of the written tensors, by part and stored name.
    Raises ValueError as `save` does, and for a weight that is not finite in its dtype. The old file then stays.
    """
    weights = Weights(model)
    for part, network in modules(*model.networks).items():
        kinds = {key: dtype or weights.dtype_of(part, key) for key in weights.shapes[part]}
        state = {key: value.to(kinds[key]) for key, value in weights.states[part].items()}
        network.load_state_dict(state, assign=True)
    hollow = Model(model.config, *model.networks, unused(model.source), model.why)
    with at_once(path, layout, dtype, overwrite=overwrite) as new:
        (write_single if layout == "ldm" else write_folder)(new, hollow, dtype, metadata)
        parts = open_source(new).parts
        stored = {part: inverse(there.stored(weights.shapes[part])) for part, there in parts.items()}
        files = {part: TensorFiles(there.tensors.paths) for part, there in parts.items()}

        def computed(part: str, key: str) -> Tensor:
            value = change(part, key, weights.read(part, key))
            value = cast(f"the new {key} of the {part}", value, dtype or weights.dtype_of(part, key))
            return parts[part].stored(weights.shapes[part])[key].form.store(value)

        for part, name in watch([(part, name) for part, names in stored.items() for name in names]):
            files[part].overwrite(name, torch.cat([computed(part, key) for key in stored[part][name]]))
        for written in files.values():
            written.sync()
