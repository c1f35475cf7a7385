"""What `ldm train` can train: a TOML file per experiment, read strictly, run by the one loop."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ldm.checkpoint.files import load, load_vae, save, save_vae
from ldm.checkpoint.parts import Model
from ldm.config import DiffusionConfig, ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.models.text import TextEncoder
from ldm.models.token_files import read_tokenizer, save_tokenizer
from ldm.models.tokens import Tokenizer
from ldm.models.unet import UNet
from ldm.strict import from_dict, read_toml
from ldm.training.data import DataConfig
from ldm.training.diffusion import DiffusionLoss, DiffusionObjective, Networks
from ldm.training.loop import Dataset, LoopConfig, collate, train
from ldm.training.vae import VAELoss, VAEObjective, latent_std
from ldm.training.vocabulary import build_vocabulary


@dataclass(frozen=True)
class VAERecipe:
    """Train an autoencoder and save it, with its scaling factor, as `out`/vae."""

    recipe: str
    out: Path
    loop: LoopConfig
    data: DataConfig = field(default_factory=DataConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    loss: VAELoss = field(default_factory=VAELoss)


@dataclass(frozen=True)
class LDMRecipe:
    """Train a UNet and its text encoder in the latents of a fixed VAE; save all three as `out`/model."""

    recipe: str
    out: Path
    vae: Path  # a folder with config.json and weights: the `out`/vae of a VAE recipe, or diffusers'
    loop: LoopConfig
    name: str = "custom"
    start: Path | None = None  # a model of this architecture to go on from, with its vocabulary
    data: DataConfig = field(default_factory=DataConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    text: TextConfig = field(default_factory=TextConfig)
    vocabulary: int = 0  # tokens of an own vocabulary, built from the captions; 0: CLIP's 49,408
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    loss: DiffusionLoss = field(default_factory=DiffusionLoss)
    guidance_scale: float = 7.5  # of the sample grids, and the trained model's default
    sample_prompts: tuple[str, ...] = ()  # of the sample grids; none: captions of the last batch


Recipe = VAERecipe | LDMRecipe
RECIPES: dict[str, type[Recipe]] = {"vae": VAERecipe, "ldm": LDMRecipe}


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe; its key `recipe` says which.

    Raises ValueError for a missing file, an unknown recipe or key, or a bad value.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no recipe {path}; those that ship with the project are in configs/")
    kinds = tuple(RECIPES)
    table = read_toml(path)
    kind = table.get("recipe")
    if kind not in kinds:
        raise ValueError(f"{path}: recipe must be one of {', '.join(map(repr, kinds))}, got {kind!r}")
    return from_dict(table, RECIPES[kind], where=str(path))


def run(recipe: Recipe, device: torch.device) -> Path:
    """Train, or go on training, what `recipe` describes; return the folder of the finished weights.

    Raises ValueError if `recipe.out` holds a run of another recipe, or its data cannot be read.
    """
    if isinstance(recipe, VAERecipe):
        return _run_vae(recipe, device)
    return _run_ldm(recipe, device)


def _run_vae(recipe: VAERecipe, device: torch.device) -> Path:
    dataset = recipe.data.open()
    torch.manual_seed(recipe.loop.seed)
    config = dataclasses.replace(recipe.vae, scaling_factor=1.0)  # measured at the end
    objective = VAEObjective(config, recipe.loss).to(device)
    average = train(objective, dataset, recipe.loop, recipe.out, _text(recipe))

    objective.vae.load_state_dict(average.state_dict())
    images, _ = collate([dataset[i] for i in range(min(256, len(dataset)))])
    std = latent_std(objective.vae, images.to(device))
    objective.vae.config = dataclasses.replace(config, scaling_factor=1 / std)
    save_vae(objective.vae, recipe.out / "vae", image_size=recipe.data.size)
    return recipe.out / "vae"


def _run_ldm(recipe: LDMRecipe, device: torch.device) -> Path:
    dataset = recipe.data.open()
    vae = load_vae(recipe.vae, device=device)
    start = load(recipe.start, device=device) if recipe.start else None
    tokenizer = start.text_encoder.tokenizers[0] if start else _tokenizer(recipe, dataset)
    text = dataclasses.replace(recipe.text, vocab_size=len(tokenizer.vocab), pad_id=tokenizer.eos_id)
    torch.manual_seed(recipe.loop.seed)
    objective = DiffusionObjective(
        recipe.unet,
        TextEncoder((text,), (tokenizer,)),
        vae,
        recipe.diffusion,
        recipe.loss,
        sample_prompts=recipe.sample_prompts,
        sample_guidance=recipe.guidance_scale,
    ).to(device)
    if start:
        if (start.config.unet, start.config.text) != (recipe.unet, (text,)):
            raise ValueError(f"the model in {recipe.start} is of another architecture than [unet] and [text] say")
        objective.networks.load_state_dict(Networks(start.unet, start.text_encoder).state_dict())
    average = train(objective, dataset, recipe.loop, recipe.out, _text(recipe))

    assert isinstance(average, Networks)
    config = ModelConfig(
        name=recipe.name,
        unet=recipe.unet,
        vae=vae.config,
        text=(text,),
        diffusion=recipe.diffusion,
        image_size=recipe.data.size,
        guidance_scale=recipe.guidance_scale,
    )
    unet, text_encoder = average.unet, average.text_encoder
    assert isinstance(unet, UNet)
    assert isinstance(text_encoder, TextEncoder)
    model = Model(config, unet, vae, text_encoder)
    save(model, recipe.out / "model", layout="diffusers", dtype=torch.float16, overwrite=True)
    return recipe.out / "model"


def _tokenizer(recipe: LDMRecipe, dataset: Dataset) -> Tokenizer:
    """Return CLIP's tokenizer, or one of `recipe.vocabulary` tokens for the dataset's own captions."""
    if not recipe.vocabulary:
        return Tokenizer.official()
    folder = recipe.out / "tokenizer"
    if not folder.is_dir():
        captions = [dataset[i][1] for i in range(min(20_000, len(dataset)))]
        vocab, merges = build_vocabulary(captions, recipe.vocabulary)
        partial = folder.with_name("tokenizer.partial")
        save_tokenizer(Tokenizer(vocab, merges), partial, recipe.text.max_length)
        partial.rename(folder)
    return read_tokenizer(folder)[0]


def _text(recipe: Recipe) -> str:
    """Return the whole recipe as one line, to compare a resumed run with."""
    return json.dumps(dataclasses.asdict(recipe), default=str, sort_keys=True)
