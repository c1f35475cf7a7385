"""FID, KID, precision and recall, and CLIP score of any pictures. The feature networks are local files.

What each network sees:
- A TorchScript file: uint8 b 3 299 299. Pillow's bicubic filter scales each picture to 299 x 299 pixels, which may
  change its proportions. The result is rounded to 8 bits; clean-fid (Parmar et al. 2022) does not round. The published
  file of the Inception network, inception-2015-12-05.pt, is asked for its 2,048 features (`return_features`).
- A folder of CLIP: see `ldm.image_prompt.pixels`. The features are the projected embeddings.
Pictures are read as `ldm.pictures.to_rgb` says: upright, in sRGB, transparent pixels over white.

Compare only numbers with the same network and the same number of pictures. With fewer pictures than features, FID is
much too high (Chong & Forsyth 2020).
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoint.ip_adapters import load_image_encoder
from ldm.image_prompt import pixels
from ldm.models.token_files import read_tokenizer
from ldm.pictures import read_picture
from ldm.training.data import SUFFIXES
from ldm.training.kid import kid
from ldm.training.scripted import open_script

Picture = str | Path | Image.Image
Features = Callable[[Sequence[Picture]], Tensor]  # pictures -> n d

MEASURES = ("fid", "kid", "precision_recall", "clip_score")
SIDE = 299  # pixels, of the pictures that the Inception network was trained on
BATCH = 32  # pictures that a network sees at a time
ROWS = 1024  # features whose distances are in memory at a time
NEIGHBORS = 3  # as in the experiments of Kynkaanniemi et al.
KID_BLOCK = 1000  # pictures, as in the paper


def feature_network(path: str | Path, device: torch.device) -> Features:
    """Open a TorchScript file, or a folder with a vision tower of CLIP. Raises ValueError for anything else."""
    if Path(path).is_dir():
        tower = load_image_encoder(path, device=device)
        size = tower.config.image_size
        return lambda pictures: _apply(lambda x: tower(x).image_embeds, pictures, lambda p: pixels(p, size), device)
    network: Any = open_script(path, device)
    known = {argument.name for argument in network.forward.schema.arguments}
    options = {"return_features": True} if "return_features" in known else {}
    return lambda pictures: _apply(lambda x: network(x, **options), pictures, _inception_pixels, device)


def compare(names: Sequence[str], made: Tensor, true: Tensor) -> dict[str, float]:
    """Return the measures `names` of two sets of features, n d and m d. All but "clip_score" of MEASURES are possible.

    KID is in blocks of 1,000 random pictures, or of a tenth of the smaller set if that is less.
    Raises ValueError for less than 20 pictures.
    """
    count = min(len(made), len(true))
    if count < 20:
        raise ValueError(f"two sets of at least 20 pictures can be compared, got {len(made)} and {len(true)}")
    found: dict[str, float] = {}
    if "fid" in names:
        found["fid"] = fid(made, true)
    if "kid" in names:
        sides = (_some(side, count, seed) for seed, side in enumerate((made, true)))  # no pairs of equal file names
        found["kid"], found["kid_error"] = kid(*sides, block=min(KID_BLOCK, count // 10), standardize=False)
    if "precision_recall" in names:
        found["precision"], found["recall"] = precision_recall(made, true)
    return found


def pictures_in(folder: str | Path) -> list[Path]:
    """Return the picture files in `folder` and its subfolders, sorted. Raises ValueError if there are none."""
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"there are no pictures in {folder}: give a folder with {', '.join(SUFFIXES)} files")
    return found


def fid(made: Tensor, true: Tensor) -> float:
    """Return the Frechet distance of two normal distributions fitted to features, n d and m d (Heusel et al. 2017).

    |mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2)), computed by torchmetrics in float64.
    Raises ValueError without torchmetrics.
    """
    check_torchmetrics()
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Features(true.shape[1]))
    metric.update(true.double(), real=True)
    metric.update(made.double(), real=False)
    return float(metric.compute())


def check_torchmetrics() -> None:
    """Raise ValueError if torchmetrics is not installed."""
    if find_spec("torchmetrics") is None:
        raise ValueError(
            "FID needs torchmetrics, which is not installed: install the extra with pip install 'ldm[metrics]'"
        )


class _Features(nn.Module):
    """Stands for the feature network of torchmetrics, which gets the features instead of pictures."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def precision_recall(made: Tensor, true: Tensor, neighbors: int = NEIGHBORS) -> tuple[float, float]:
    """Return the improved precision and recall of features, n d and m d (Kynkaanniemi et al. 2019, eq. 1 and 2).

    Precision: the share of the made pictures that lie near a true one. Recall: the share of the true pictures that lie
    near a made one. Near means: not farther from that picture than its `neighbors`-th nearest neighbor in its own set.
    """
    return _share_near(made.double(), true.double(), neighbors), _share_near(true.double(), made.double(), neighbors)


def _share_near(points: Tensor, others: Tensor, neighbors: int) -> float:
    # The nearest of `others` to one of them is that one itself.
    radii = [torch.cdist(rows, others).kthvalue(neighbors + 1).values for rows in torch.split(others, ROWS)]
    near = [(torch.cdist(rows, others) <= torch.cat(radii)).any(dim=1) for rows in torch.split(points, ROWS)]
    return torch.cat(near).double().mean().item()


@torch.no_grad()
def clip_score(folder: str | Path, pictures: Sequence[Picture], captions: Sequence[str], device: torch.device) -> float:
    """Return the mean of 100 max(cos(picture, caption), 0) in CLIP's embeddings (Hessel et al. 2021, without w = 2.5).

    folder: a whole CLIP model with its tokenizer, as transformers saves it. A caption that is too long is cut off.
    torchmetrics' CLIPScore is not used, because version 1.9 does not work with transformers 5.
    Raises ValueError without transformers, for a folder without CLIP, and unless there is one caption per picture.
    """
    if len(pictures) != len(captions) or not captions:
        raise ValueError(f"there must be one caption per picture, got {len(captions)} for {len(pictures)} pictures")
    if find_spec("transformers") is None:
        raise ValueError(
            "the CLIP score needs transformers, which is not installed: install the extra with "
            "pip install 'ldm[metrics]'"
        )
    from transformers import CLIPModel  # takes seconds

    tokenizer, pad_id = read_tokenizer(folder)
    try:
        model: Any = CLIPModel.from_pretrained(str(folder), local_files_only=True).eval().to(device)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} holds no whole CLIP model: {' '.join(str(error).split())[:200]}") from error
    length, size = model.config.text_config.max_position_embeddings, model.config.vision_config.image_size
    scores = []
    for start in range(0, len(captions), BATCH):
        chosen = slice(start, start + BATCH)
        ids = [[tokenizer.bos_id, *tokenizer.encode(text)[: length - 2], tokenizer.eos_id] for text in captions[chosen]]
        longest = max(map(len, ids))
        padded = torch.tensor([row + [pad_id] * (longest - len(row)) for row in ids], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)
        seen = torch.cat([pixels(read_picture(picture), size) for picture in pictures[chosen]]).to(device)
        found = model(input_ids=padded, attention_mask=mask, pixel_values=seen)  # both embeddings have length 1
        scores.append((found.image_embeds * found.text_embeds).sum(dim=1).clamp(min=0))
    return 100 * torch.cat(scores).mean().item()


@torch.no_grad()
def _apply(
    network: Callable[[Tensor], Tensor],
    pictures: Sequence[Picture],
    prepare: Callable[[Image.Image], Tensor],
    device: torch.device,
) -> Tensor:
    found = []
    for start in range(0, len(pictures), BATCH):
        batch = torch.cat([prepare(read_picture(picture)) for picture in pictures[start : start + BATCH]])
        features = network(batch.to(device))
        if features.dim() != 2 or len(features) != len(batch):
            raise ValueError(f"a feature network gives b d numbers, this one gives {tuple(features.shape)}")
        found.append(features.float().cpu())
    return torch.cat(found)


def _inception_pixels(picture: Image.Image) -> Tensor:
    """Return an RGB picture as uint8: 1 3 299 299."""
    scaled = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)[None]


def _some(features: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` of the features in random order, always the same: files in one folder are often sorted."""
    return features[torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:count]]
