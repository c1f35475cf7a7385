"""The recipes of `ldm train`: one TOML file per experiment. Each kind of recipe has a module of this package."""

from pathlib import Path

from ldm.strict import from_dict, read_toml
from ldm.training.recipes.base import FREE, Recipe
from ldm.training.recipes.consistency import ConsistencyRecipe, LCMRecipe
from ldm.training.recipes.controlnet import ControlNetRecipe
from ldm.training.recipes.diffusion import LDMRecipe
from ldm.training.recipes.dreambooth import DreamBoothRecipe
from ldm.training.recipes.editing import EditRecipe
from ldm.training.recipes.image_prompt import ImagePromptRecipe
from ldm.training.recipes.lora import LoraRecipe
from ldm.training.recipes.reward import RewardRecipe
from ldm.training.recipes.textual_inversion import TextualInversionRecipe
from ldm.training.recipes.vae import VAERecipe
from ldm.training.recipes.vision import VisionRecipe

__all__ = [
    "FREE",
    "RECIPES",
    "ConsistencyRecipe",
    "ControlNetRecipe",
    "DreamBoothRecipe",
    "EditRecipe",
    "ImagePromptRecipe",
    "LCMRecipe",
    "LDMRecipe",
    "LoraRecipe",
    "Recipe",
    "RewardRecipe",
    "TextualInversionRecipe",
    "VAERecipe",
    "VisionRecipe",
    "read_recipe",
]

RECIPES: dict[str, type[Recipe]] = {
    "vae": VAERecipe,
    "ldm": LDMRecipe,
    "controlnet": ControlNetRecipe,
    "vision": VisionRecipe,
    "ip_adapter": ImagePromptRecipe,
    "edit": EditRecipe,
    "lora": LoraRecipe,
    "dreambooth": DreamBoothRecipe,
    "textual_inversion": TextualInversionRecipe,
    "lcm": LCMRecipe,
    "consistency": ConsistencyRecipe,
    "reward": RewardRecipe,
}


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
