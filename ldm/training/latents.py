"""The latents of a data set, encoded once. A training that meets each picture several times saves the VAE's time."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ldm.atomic import beside
from ldm.models.vae import VAE
from ldm.training.loop import Dataset, collate

PART = 2048  # examples in a file
BATCH = 32  # examples that the VAE encodes at a time


class Latents:
    """The first examples of a data set as moments: (the mean and std of the latents: 2c h w, caption)."""

    def __init__(
        self, dataset: Dataset, count: int, vae: VAE, folder: Path, source: Mapping[str, object], *, bf16: bool = False
    ) -> None:
        """Encode the examples, or read those that an earlier run has written to `folder`.

        source: what the examples depend on, as JSON can hold it. The files keep it, with a digest of the encoder.
        Raises ValueError if `folder` has latents of another source or encoder.
        """
        self.dataset = dataset
        count, text = min(count, len(dataset)), json.dumps({**source, "encoder": _digest(vae)})
        parts = []
        with tqdm(total=count, unit="picture", desc="encode", disable=None) as progress:
            for start in range(0, count, PART):
                indices = range(start, min(start + PART, count))
                path = folder / f"{start:08d}.safetensors"
                if not path.is_file():
                    self._write(path, indices, vae, text, bf16)
                parts.append(_read(path, len(indices), text))
                progress.update(len(indices))
        self.moments = torch.cat(parts)  # n 2c h w

    def _write(self, path: Path, indices: range, vae: VAE, source: str, bf16: bool) -> None:
        device = next(vae.parameters()).device
        batches = []
        for start in range(0, len(indices), BATCH):
            images = collate([self.dataset[i] for i in indices[start : start + BATCH]])[0]
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                batches.append(torch.cat(vae.encode(images.to(device)), dim=1).half().cpu())
        with beside(path) as new:
            save_file({"moments": torch.cat(batches).contiguous()}, new, {"source": source})
            os.replace(new, path)

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        return self.moments[index].float(), self.dataset.caption(index)

    def caption(self, index: int) -> str:
        """Return the caption of an example."""
        return self.dataset.caption(index)


def _digest(vae: VAE) -> str:
    """Return the sha256 of what turns images into latents. The decoder may change."""
    parts = sorted((n, t) for n, t in vae.state_dict().items() if n.startswith(("encoder.", "quant_conv.")))
    found = hashlib.sha256(str(vae.config.scaling_factor).encode())
    for _, tensor in parts:
        found.update(tensor.cpu().numpy().tobytes())
    return found.hexdigest()


def _read(path: Path, count: int, source: str) -> Tensor:
    with safe_open(path, "pt") as file:
        moments: Tensor = file.get_tensor("moments")
        if file.metadata()["source"] != source or len(moments) != count:
            raise ValueError(
                f"{path} has latents of other data or of another encoder: delete the folder {path.parent}, or choose "
                "another `out`"
            )
    return moments
