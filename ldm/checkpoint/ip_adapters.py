"""IP-Adapters on disk, as they were published, and the vision towers of CLIP that they need."""

import math
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ldm.atomic import beside, replace_folder
from ldm.checkpoint.configs import Json
from ldm.checkpoint.folder import config_of, tensors_of, write_network
from ldm.checkpoint.keymap import Piece, Rule
from ldm.checkpoint.known import kind_of
from ldm.checkpoint.parts import Part, check, collect, fill
from ldm.checkpoint.tensors import TensorFiles, Tensors, some, write_tensors
from ldm.models.ip_adapter import HEAD_DIM, ImageProjection, IPAdapter, Resampler, check_fits
from ldm.models.unet import UNet

_LAYER = "image_proj.layers.{i}."
RULES = (  # from our names to those of the files; the numbers count self-attentions and cross-attentions
    Rule("to_k.{i}", lambda i: f"ip_adapter.{2 * i + 1}.to_k_ip"),
    Rule("to_v.{i}", lambda i: f"ip_adapter.{2 * i + 1}.to_v_ip"),
    Rule(f"{_LAYER}norm_image", f"{_LAYER}0.norm1"),
    Rule(f"{_LAYER}norm_tokens", f"{_LAYER}0.norm2"),
    Rule(f"{_LAYER}attn.to_q", f"{_LAYER}0.to_q"),
    Rule(f"{_LAYER}attn.to_k", f"{_LAYER}0.to_kv", piece=Piece(0, 2)),
    Rule(f"{_LAYER}attn.to_v", f"{_LAYER}0.to_kv", piece=Piece(1, 2)),
    Rule(f"{_LAYER}attn.to_out", f"{_LAYER}0.to_out"),
    Rule(f"{_LAYER}norm", f"{_LAYER}1.0"),
    Rule(f"{_LAYER}up", f"{_LAYER}1.1"),
    Rule(f"{_LAYER}down", f"{_LAYER}1.3"),
    Rule("image_proj", "image_proj"),
)
TOKENS = 4  # of the plain IP-Adapter; its files do not tell it
_FACES = (  # a tensor that tells the kind, and the kind
    ("image_proj.perceiver_resampler.proj_in.weight", "FaceID Plus"),
    ("image_proj.norm.weight", "FaceID"),
    ("image_proj.proj.3.weight", "full-face"),
)
_TOWER = re.compile(r"vision_model\.(?!embeddings\.position_ids)|visual_projection\.")
_HEADS = {768: 12, 1024: 16, 1280: 16, 1664: 16}  # by the width of the published towers
_TOWER_SHAPES = (  # the tensors whose shapes tell the sizes
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.embeddings.position_embedding.weight",
    "vision_model.encoder.layers.0.mlp.fc1.weight",
    "visual_projection.weight",
)
_TOWER_RULES = (Rule("vision_model", "vision_model"), Rule("visual_projection", "visual_projection"))


def load_ip_adapter(
    path: str | Path,
    *,
    unet: UNet | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> IPAdapter:
    """Load the IP-Adapter in the .safetensors file at `path`. dtype: None keeps the stored one.

    unet: the UNet to use it with. Raises ValueError for an IP-Adapter that does not fit the UNet, and for a file of
    another kind. Raises it for tensors that are missing, unknown or of another shape.
    """
    tensors = TensorFiles([Path(path)])
    with torch.device("meta"):
        adapter = _build(tensors)
    part = Part(tensors, RULES)
    if strange := check({"IP-Adapter": adapter}, {"IP-Adapter": part}):
        raise ValueError(f"{path} holds {len(strange)} tensors that no IP-Adapter here has: {some(strange)}")
    if unet is not None:
        try:
            check_fits(adapter, unet)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    fill(adapter, part, dtype=dtype, device=torch.device(device))
    return adapter


def save_ip_adapter(adapter: IPAdapter, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Save an IP-Adapter as the .safetensors file `path`, with the published names. dtype: None keeps that of it."""
    with beside(Path(path)) as new:
        write_tensors(collect(adapter, RULES, dtype=dtype), new)
        os.replace(new, path)


def _build(tensors: Tensors) -> IPAdapter:
    """Build the IP-Adapter that the shapes describe. Raises ValueError, naming it, for another kind of file."""
    shapes = tensors.shapes
    if not (kind := kind_of(tensors) or "").startswith("an IP-Adapter"):
        what = f"is {kind}" if kind else f"holds {some(sorted(shapes))}"
        raise ValueError(f"{tensors} {what}: give an IP-Adapter as it was first published")
    for name, face in _FACES:
        if name in shapes and "image_proj.proj.weight" not in shapes:
            raise ValueError(
                f"{tensors} is an IP-Adapter of the kind {face}, which is not supported: give a plain one or a Plus one"
            )
    count = sum(bool(re.fullmatch(r"ip_adapter\.\d+\.to_k_ip\.weight", name)) for name in shapes)
    widths = [_shape(tensors, f"ip_adapter.{2 * i + 1}.to_k_ip.weight")[0] for i in range(count)]
    if "image_proj.latents" not in shapes:
        wide, image_dim = _shape(tensors, "image_proj.proj.weight")
        return IPAdapter(ImageProjection(image_dim, wide // TOKENS, TOKENS), image_dim, wide // TOKENS, widths)
    _, tokens, dim = _shape(tensors, "image_proj.latents", 3)
    _, image_dim = _shape(tensors, "image_proj.proj_in.weight")
    context_dim, _ = _shape(tensors, "image_proj.proj_out.weight")
    mlp, _ = _shape(tensors, "image_proj.layers.0.1.1.weight")
    if image_dim == 512:
        raise ValueError(f"{tensors} is of InstantID, which reads faces with another network: it is not supported")
    if dim % HEAD_DIM:
        raise ValueError(f"{tensors}: the width of image_proj.latents must be a multiple of {HEAD_DIM}, got {dim}")
    layers = len({found[1] for name in shapes if (found := re.match(r"image_proj\.layers\.(\d+)\.", name))})
    resampler = Resampler(image_dim, context_dim, tokens, dim=dim, mlp=mlp, layers=layers)
    return IPAdapter(resampler, image_dim, context_dim, widths)


def _shape(tensors: Tensors, name: str, dims: int = 2) -> tuple[int, ...]:
    """Return the shape of a tensor. Raises ValueError for one that is missing or has another number of dimensions."""
    shape = tensors.shapes.get(name)
    if shape is None or len(shape) != dims or 0 in shape:
        found = "is missing" if shape is None else f"has the shape {list(shape)}"
        raise ValueError(f"{tensors} is no complete IP-Adapter: {name} {found}; fetch it again")
    return shape


def check_transformers() -> None:
    """Raise ValueError if transformers, which the extra `vision` installs, is not there."""
    if find_spec("transformers") is None:
        raise ValueError(
            "image prompts need transformers, which is not installed: install the extra with pip install 'ldm[vision]'"
        )


def load_image_encoder(
    path: str | Path, *, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
) -> Any:
    """Load a vision tower of CLIP as transformers' `CLIPVisionModelWithProjection`. dtype: None keeps the stored one.

    path: a folder with config.json and model.safetensors, or one such .safetensors file. The widths of a file are
    those of its tensors. The heads and the activation, which a file does not tell, are those of the published tower
    with its width.
    Raises ValueError without transformers, and for anything but a vision tower of CLIP.
    """
    check_transformers()
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection  # takes seconds

    path = Path(path)
    if path.is_dir():
        config, where = config_of(path)
        if config.get("model_type") not in ("clip_vision_model", "clip"):
            raise ValueError(f"{where} describes {config.get('model_type')}: give a vision tower of CLIP")
        projection = {name: config[name] for name in ("projection_dim",) if name in config}
        config = config.get("vision_config", config) | projection
        tensors = tensors_of(path, "model", pickles=False)
    else:
        tensors = TensorFiles([path])
        config = _tower_config(tensors)
    try:
        with torch.device("meta"):
            tower = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(config))
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} describes no vision tower: {' '.join(str(error).split())[:200]}") from error
    part = Part(tensors, _TOWER_RULES)
    left = check({"vision tower": tower}, {"vision tower": part})
    if strange := [name for name in left if _TOWER.match(name)]:
        raise ValueError(f"{tensors} holds {len(strange)} tensors that its vision tower lacks: {some(strange)}")
    embeddings = tower.vision_model.embeddings  # its buffer is in no file
    embeddings.register_buffer("position_ids", torch.arange(embeddings.num_positions)[None], persistent=False)
    fill(tower, part, dtype=dtype, device=torch.device(device))
    return tower


def save_image_encoder(tower: Any, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Save a vision tower as a folder for `load_image_encoder` and for transformers. A tower at `path` is replaced.

    tower: transformers' `CLIPVisionModelWithProjection`. dtype: None keeps that of the tower.
    Raises ValueError if `path` is anything else.
    """
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"{path} is not a folder of a vision tower, so it is not overwritten: give another path")
    path = Path(path).resolve()
    with beside(path) as new:
        new.mkdir(exist_ok=True)
        write_network(new, "model", tower.config.to_diff_dict(), collect(tower, _TOWER_RULES, dtype=dtype))
        replace_folder(path, new)


def _tower_config(tensors: Tensors) -> Json:
    """Return the arguments of `CLIPVisionConfig` that the shapes tell, and those of the published towers."""
    layers = {found[1] for n in tensors.shapes if (found := re.match(r"vision_model\.encoder\.layers\.(\d+)\.", n))}
    shapes = [tensors.shapes.get(name, ()) for name in _TOWER_SHAPES]
    if [len(shape) for shape in shapes] != [4, 2, 2, 2]:
        what = kind_of(tensors) or f"a file with {some(sorted(tensors.shapes))}"
        raise ValueError(f"{tensors} is {what}: give CLIP's vision tower with its projection, in transformers' names")
    (width, _, _, patch), (positions, _), (mlp, _), (projection, _) = shapes
    if width not in _HEADS:
        raise ValueError(
            f"{tensors} is a vision tower of width {width}, and only of the widths {', '.join(map(str, _HEADS))} the "
            "number of heads is known: give the folder with its config.json"
        )
    return {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": patch * math.isqrt(positions - 1),
        "intermediate_size": mlp,
        "num_hidden_layers": len(layers),
        "num_attention_heads": _HEADS[width],
        "hidden_act": "quick_gelu" if width in (768, 1024) else "gelu",  # of OpenAI, and of OpenCLIP
        "projection_dim": projection,
    }
