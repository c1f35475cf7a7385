"""The recipes of `ldm train`: one TOML file per experiment. It trains a VAE, a diffusion model or a ControlNet."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ldm.atomic import beside, replace_folder
from ldm.checkpoint.controlnets import save_controlnet
from ldm.checkpoint.files import load, load_vae, save, save_vae
from ldm.checkpoint.parts import Model
from ldm.config import DiffusionConfig, Mid, ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.control import check_opencv
from ldm.loading import locate
from ldm.models.attention import math_attention, set_attention
from ldm.models.controlnet import HINT_CHANNELS, ControlNet
from ldm.models.text import TextEncoder
from ldm.models.token_files import read_tokenizer, save_tokenizer
from ldm.models.tokens import Tokenizer
from ldm.models.unet import UNet
from ldm.strict import from_dict, read_toml
from ldm.training.controlnet import ControlNetObjective
from ldm.training.data import DataConfig
from ldm.training.diffusion import DiffusionLoss, DiffusionObjective, Networks, zero_init
from ldm.training.latents import Latents
from ldm.training.loop import Dataset, LoopConfig, collate, train
from ldm.training.vae import VAELoss, VAEObjective, latent_std
from ldm.training.vocabulary import build_vocabulary


@dataclass(frozen=True)
class VAERecipe:
    """Train a VAE and save it to `out`/vae. Its scaling factor is measured at the end, unless the encoder stays."""

    recipe: str
    out: Path
    loop: LoopConfig
    data: DataConfig = field(default_factory=DataConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    loss: VAELoss = field(default_factory=VAELoss)
    start: Path | None = None  # a VAE of the same architecture, whose weights the training starts from


@dataclass(frozen=True)
class LDMRecipe:
    """Train a UNet and a text encoder in the latents of a fixed VAE, and save all three to `out`/model."""

    recipe: str
    out: Path
    vae: Path  # of the VAE: the `out`/vae of a VAE recipe, or any VAE or model that `load_vae` reads
    loop: LoopConfig
    name: str = "custom"
    latents: int = 0  # encode this many examples once, before the training; 0: encode every batch
    start: Path | None = None  # a model of the same architecture, whose weights and vocabulary the training starts from
    data: DataConfig = field(default_factory=DataConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    text: TextConfig = field(default_factory=TextConfig)
    vocabulary: int = 0  # tokens of a new vocabulary, learned from the captions; 0: CLIP's vocabulary of 49,408 tokens
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    loss: DiffusionLoss = field(default_factory=DiffusionLoss)
    guidance_scale: float = 7.5  # of the sample pictures, and the default of the trained model
    sample_prompts: tuple[str, ...] = ()  # of the sample pictures; none: the captions of the last batch


@dataclass(frozen=True)
class ControlNetRecipe:
    """Train a ControlNet of edges for a fixed model, and save it to `out`/controlnet. It needs the extra `control`."""

    recipe: str
    out: Path
    model: Path  # what `ldm.load` takes
    loop: LoopConfig
    data: DataConfig = field(default_factory=DataConfig)
    loss: DiffusionLoss = field(default_factory=DiffusionLoss)
    hint_channels: tuple[int, ...] = HINT_CHANNELS
    mid: Mid | None = None  # see `UNetConfig`; None: as in the UNet


Recipe = VAERecipe | LDMRecipe | ControlNetRecipe
RECIPES: dict[str, type[Recipe]] = {"vae": VAERecipe, "ldm": LDMRecipe, "controlnet": ControlNetRecipe}
FREE = frozenset(  # may change in a run that goes on, because they change no number (steps: only of later steps)
    {
        "out",
        "name",
        "guidance_scale",
        "sample_prompts",
        "diffusion.spacing",
        "diffusion.offset",
        "loop.steps",
        "loop.workers",
        "loop.log_every",
        "loop.sample_every",
        "loop.checkpoint_every",
    }
)


def read_recipe(path: str | Path) -> Recipe:
    """Read the recipe at `path`. Its key `recipe` is a name in RECIPES.

    Raises ValueError for a missing file, an unknown recipe or key, or a bad value.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no recipe {path}; the project's own recipes are in its folder configs/")
    kinds = tuple(RECIPES)
    table = read_toml(path)
    kind = table.get("recipe")
    if kind not in kinds:
        raise ValueError(f"{path}: recipe must be one of {', '.join(map(repr, kinds))}, got {kind!r}")
    return from_dict(table, RECIPES[kind], where=str(path))


def run(recipe: Recipe, device: torch.device) -> Path:
    """Start the training that `recipe` describes, or resume it; return the folder of the trained weights.

    Raises ValueError for data, a VAE or a model that cannot be read, and for sizes or networks that do not fit
    together. Raises ValueError, FloatingPointError and Interrupted as `train` does.
    """
    if isinstance(recipe, VAERecipe):
        return _run_vae(recipe, device)
    return _run_ldm(recipe, device) if isinstance(recipe, LDMRecipe) else _run_controlnet(recipe, device)


def _run_vae(recipe: VAERecipe, device: torch.device) -> Path:
    size, crop = recipe.data.size, recipe.loss.crop
    _check_side("size", size, recipe.vae)
    _check_side("crop", crop, recipe.vae)
    if recipe.loss.decoder_only and recipe.start is None:
        raise ValueError("decoder_only trains the decoder of a VAE that exists: give its folder as `start`")
    if crop > size:
        raise ValueError(f"crop must be at most the pictures' size of {size} pixels, got {crop}")
    dataset = recipe.data.open()
    torch.manual_seed(recipe.loop.seed)
    config = dataclasses.replace(recipe.vae, scaling_factor=1.0)  # the true factor is measured at the end
    objective = VAEObjective(config, recipe.loss).to(device)
    start = load_vae(recipe.start, device=device) if recipe.start else None
    if start:
        if dataclasses.replace(start.config, scaling_factor=1.0) != config:
            raise ValueError(
                f"the VAE in {recipe.start} has another architecture than [vae] says: give the values of that VAE, or "
                "leave `start` out"
            )
        objective.vae.load_state_dict(start.state_dict())
    average = train(objective, dataset, recipe.loop, recipe.out, fixed_values(recipe))

    objective.vae.load_state_dict(average.state_dict())
    if start and recipe.loss.decoder_only:
        factor = start.config.scaling_factor
    else:
        images, _ = collate([dataset[i] for i in range(min(256, len(dataset)))])
        factor = 1 / latent_std(objective.vae, images.to(device))
    objective.vae.config = dataclasses.replace(config, scaling_factor=factor)
    save_vae(objective.vae, recipe.out / "vae", image_size=size)
    return recipe.out / "vae"


def _run_ldm(recipe: LDMRecipe, device: torch.device) -> Path:
    vae = load_vae(recipe.vae, device=device)
    _check_side("size", recipe.data.size, vae.config)
    channels = (recipe.unet.in_channels, recipe.unet.out_channels)
    if channels != (vae.config.latent_channels,) * 2:
        raise ValueError(
            f"in_channels and out_channels of [unet] must be {vae.config.latent_channels}, as many as the latents of "
            f"the VAE {recipe.vae} have, got {channels[0]} and {channels[1]}"
        )
    dataset = recipe.data.open()
    start = load(recipe.start, device=device) if recipe.start else None
    tokenizer = start.text_encoder.tokenizers[0] if start else _tokenizer(recipe, dataset)
    text = dataclasses.replace(recipe.text, vocab_size=len(tokenizer.vocab), pad_id=tokenizer.eos_id)
    config = ModelConfig(
        name=recipe.name,
        unet=recipe.unet,
        vae=vae.config,
        text=(text,),
        diffusion=recipe.diffusion,
        image_size=recipe.data.size,
        guidance_scale=recipe.guidance_scale,
    )
    torch.manual_seed(recipe.loop.seed)
    text_encoder = TextEncoder((text,), (tokenizer,))
    networks = Networks(zero_init(UNet(recipe.unet)), text_encoder)
    objective = DiffusionObjective(config, networks, vae, recipe.loss, sample_prompts=recipe.sample_prompts)
    objective.to(device)
    if device.type == "cpu":  # the gradient of PyTorch's fused attention takes a fifth of a step there
        set_attention(objective.networks, math_attention)
    if start:
        if (start.config.unet, start.config.text) != (config.unet, config.text):
            raise ValueError(
                f"the model in {recipe.start} has another architecture than [unet] and [text] say: give both the "
                "values of that model, or leave `start` out"
            )
        objective.networks.load_state_dict(Networks(start.unet, start.text_encoder).state_dict())
    if recipe.latents:
        source = {name: value for name, value in fixed_values(recipe).items() if name.startswith("data.")}
        dataset = Latents(dataset, recipe.latents, vae, recipe.out / "latents", source, bf16=recipe.loop.bf16)
    average = train(objective, dataset, recipe.loop, recipe.out, fixed_values(recipe))

    assert isinstance(average, Networks)
    model = Model(config, average.unet, vae, average.text_encoder)
    save(model, recipe.out / "model", layout="diffusers", dtype=torch.float16, overwrite=True)
    return recipe.out / "model"


def _run_controlnet(recipe: ControlNetRecipe, device: torch.device) -> Path:
    check_opencv()
    model = load(locate(recipe.model), device=device)
    _check_side("size", recipe.data.size, model.config.vae)
    if 2 ** (len(recipe.hint_channels) - 1) != model.config.vae.factor:
        raise ValueError(
            f"hint_channels must be {(model.config.vae.factor).bit_length()} numbers, because the latents are "
            f"{model.config.vae.factor} times smaller than the pictures, got {recipe.hint_channels}"
        )
    dataset = recipe.data.open()
    torch.manual_seed(recipe.loop.seed)
    network = ControlNet.copy_of(model.unet, hint_channels=recipe.hint_channels, mid=recipe.mid).to(device)
    objective = ControlNetObjective(model, network, recipe.loss)
    if device.type == "cpu":
        set_attention(objective, math_attention)
    average = train(objective, dataset, recipe.loop, recipe.out, fixed_values(recipe))
    assert isinstance(average, ControlNet)
    save_controlnet(average, recipe.out / "controlnet", dtype=torch.float16)
    return recipe.out / "controlnet"


def _tokenizer(recipe: LDMRecipe, dataset: Dataset) -> Tokenizer:
    """Return CLIP's tokenizer, or one with `recipe.vocabulary` tokens learned from the first 20,000 captions."""
    if not recipe.vocabulary:
        return Tokenizer.official()
    folder = recipe.out / "tokenizer"
    if not folder.is_dir():
        captions = (dataset.caption(i) for i in range(min(20_000, len(dataset))))
        vocab, merges = build_vocabulary(captions, recipe.vocabulary)
        with beside(folder) as new:
            save_tokenizer(Tokenizer(vocab, merges), new, recipe.text.max_length)
            replace_folder(folder, new)
    return read_tokenizer(folder)[0]


def _check_side(name: str, side: int, vae: VAEConfig) -> None:
    if side % vae.factor:
        raise ValueError(f"{name} must be a multiple of {vae.factor} pixels for this VAE, got {side}")


def fixed_values(recipe: Recipe) -> dict[str, Any]:
    """Return the values of `recipe` that a run keeps from start to end, by name, such as "loop.batch_size"."""
    table = json.loads(json.dumps(dataclasses.asdict(recipe), default=str))
    return {name: value for name, value in _flat(table).items() if name not in FREE}


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
