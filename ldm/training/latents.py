"""Examples whose latents or captions were encoded once. A training that meets each picture several times saves time."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ldm.atomic import beside
from ldm.models.text import TextEncoder
from ldm.models.vae import VAE
from ldm.training.data import Some
from ldm.training.loop import Dataset, Example, collate, extras

PART = 2048  # examples in a file of latents
TEXTS = 256  # examples in a file of captions, which are larger
BATCH = 32  # examples that are encoded at a time

Row = Mapping[str, Tensor]  # what is kept of one example


class Latents(Some):
    """The first examples of a data set as moments: (the mean and std of the latents: 2c h w, caption).

    The other tensors of the examples are kept, too: a mask as large as the latents. "source", the picture before an
    edit, becomes "picture": c h w; see `picture_latents`.
    """

    def __init__(
        self,
        dataset: Dataset,
        count: int,
        vae: VAE,
        folder: Path,
        source: Mapping[str, object],
        also: nn.Module | None = None,
        *,
        bf16: bool = False,
    ) -> None:
        """Encode the examples, or read those that an earlier run has written to `folder`.

        source: what the examples depend on, as JSON can hold it. The files keep it, with a digest of the encoder.
        also: a network from images, b 3 h w in [-1, 1], to more tensors by name, b ... each, which are kept in fp16.
        Raises ValueError if `folder` has latents of another source or encoder.
        """
        super().__init__(dataset, torch.arange(min(count, len(dataset))))
        self.vae, self.bf16 = vae, bf16
        encoder = {n: t for n, t in vae.state_dict().items() if n.startswith(("encoder.", "quant_conv."))}
        networks = {"encoder": _digest(encoder, str(vae.config.scaling_factor))}
        if also:
            networks["also"] = _digest(also.state_dict())
        text = json.dumps({**source, **networks})
        self.rows = _kept(folder, "latents", len(self), PART, lambda indices: text, lambda i: self._encode(i, also))

    def _encode(self, indices: range, also: nn.Module | None) -> list[Row]:
        examples = {i: self.dataset[i] for i in indices}
        rows: dict[int, Row] = {}
        device = next(self.vae.parameters()).device
        for shape in {example[0].shape: None for example in examples.values()}:
            group = [i for i in indices if examples[i][0].shape == shape]
            batch = collate([examples[i] for i in group])
            images, found = batch[0].to(device), dict(extras(batch))
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                moments = torch.cat(self.vae.encode(images), dim=1)
                more = dict(also(images)) if also else {}
                if "source" in found:
                    more["picture"] = picture_latents(self.vae, found.pop("source").to(device))
            found |= {name: tensor.half().cpu() for name, tensor in {"moments": moments, **more}.items()}
            if "mask" in found:
                found["mask"] = F.interpolate(found["mask"], moments.shape[-2:], mode="area").half()
            rows |= zip(group, _rows(found), strict=True)
        return [rows[i] for i in indices]

    def __getitem__(self, index: int) -> Example:
        more = {name: tensor.float() for name, tensor in self.rows[index].items()}
        moments = more.pop("moments")
        return (moments, self.caption(index), more) if more else (moments, self.caption(index))


def picture_latents(vae: VAE, pictures: Tensor) -> Tensor:
    """Return the latents that an editing model is given: the mode of the VAE's distribution, not scaled.

    pictures: b 3 h w in [0, 1]. See `ldm.editing`.
    """
    return vae.encode(2 * pictures - 1).mode() / vae.config.scaling_factor


class Texts(Some):
    """The examples of a data set with their captions encoded: "context": n d and, if it is pooled, "pooled": p."""

    def __init__(self, dataset: Dataset, text_encoder: TextEncoder, folder: Path, *, bf16: bool = False) -> None:
        """Encode the captions, or use those that an earlier run has written to `folder`. They are read when needed.

        Raises ValueError if `folder` has other captions or those of another encoder.
        """
        super().__init__(dataset, torch.arange(len(dataset)))
        self.text_encoder, self.bf16 = text_encoder, bf16
        encoder = _digest(text_encoder.state_dict(), *(json.dumps(t.vocab) for t in text_encoder.tokenizers))

        def source(indices: range) -> str:
            captions = json.dumps([dataset.caption(i) for i in indices])
            return json.dumps({"captions": hashlib.sha256(captions.encode()).hexdigest(), "encoder": encoder})

        self.rows = _kept(folder, "captions", len(self), TEXTS, source, self._encode)

    def _encode(self, indices: range) -> list[Row]:
        device = next(self.text_encoder.parameters()).device
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            given = self.text_encoder.encode([self.dataset.caption(i) for i in indices])
        found = {"context": given.context} | ({} if given.vector is None else {"pooled": given.vector})
        return _rows({name: tensor.half().cpu() for name, tensor in found.items()})

    def __getitem__(self, index: int) -> Example:
        example = self.dataset[index]
        texts = {name: tensor.float() for name, tensor in self.rows[index].items()}
        return example[0], example[1], {**extras(example), **texts}


def _digest(tensors: Mapping[str, Tensor], *words: str) -> str:
    """Return the sha256 of the words and of the tensors in the order of their names."""
    found = hashlib.sha256("".join(words).encode())
    for _, tensor in sorted(tensors.items()):
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _rows(tensors: Mapping[str, Tensor]) -> list[Row]:
    """Split tensors with one row for each example."""
    return [dict(zip(tensors, row, strict=True)) for row in zip(*tensors.values(), strict=True)]


def _kept(
    folder: Path, what: str, count: int, size: int, source: Callable[[range], str], encode: Callable[[range], list[Row]]
) -> list[Row]:
    """Return the rows of the first `count` examples, from files of `size` examples in `folder`.

    A file that is absent is written: `encode` makes the rows of some indices. source: a text that the file of these
    indices must have.
    """
    rows: list[Row] = []
    with tqdm(total=count, desc=f"encode {what}", disable=None) as progress:
        for start in range(0, count, size):
            indices = range(start, min(start + size, count))
            path, text = folder / f"{start:08d}.safetensors", source(indices)
            if not path.is_file():
                found = [row for i in range(0, len(indices), BATCH) for row in encode(indices[i : i + BATCH])]
                with beside(path) as new:
                    save_file(_packed(found), new, {"source": text})
                    os.replace(new, path)
            rows += _read(path, what, len(indices), text)
            progress.update(len(indices))
    return rows


def _packed(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Join the tensors of one name if they have one shape, else number them."""
    packed: dict[str, Tensor] = {}
    for name in rows[0]:
        tensors = [row[name] for row in rows]
        if len({tensor.shape for tensor in tensors}) == 1:
            packed[name] = torch.stack(tensors)
        else:
            packed |= {f"{name}.{i}": tensor.contiguous() for i, tensor in enumerate(tensors)}
    return packed


def _read(path: Path, what: str, count: int, source: str) -> list[Row]:
    """Return the rows of a file; their tensors are read from the disk when they are used."""
    with safe_open(path, "pt") as file:
        same = file.metadata()["source"] == source
        tensors = {name: file.get_tensor(name) for name in file.keys()} if same else {}  # noqa: SIM118
    names = {name.split(".")[0] for name in tensors}
    found = {n: tensors[n] if n in tensors else [tensors[f"{n}.{i}"] for i in range(count)] for n in sorted(names)}
    if not same or any(len(rows) != count for rows in found.values()):
        raise ValueError(
            f"{path} has {what} of other data or of another encoder: delete the folder {path.parent}, or choose "
            "another `out`"
        )
    return [{name: rows[i] for name, rows in found.items()} for i in range(count)]
