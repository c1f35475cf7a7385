"""The recipe of DreamBooth (Ruiz et al. 2022): a model learns one object, and keeps its idea of the object's class."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ldm.checkpoint.parts import Model
from ldm.checkpoint.save_loras import LoraLayout
from ldm.images import to_pil
from ldm.pictures import save_png
from ldm.training.adapters import Adapters, LoraConfig
from ldm.training.data import Folder
from ldm.training.diffusion import Networks
from ldm.training.distributed import first_process_first
from ldm.training.loop import Dataset, train
from ldm.training.recipes.lora import new_adapters, save_adapters
from ldm.training.recipes.teaching import TeachingRecipe, captioned, write_list
from ldm.training.teaching import Prior, TeachingObjective

AT_ONCE = 4  # class pictures


@dataclass(frozen=True, kw_only=True)
class DreamBoothRecipe(TeachingRecipe):
    """Teach a model one object from a few pictures, and save it to `out`/model; with `lora`, save only a LoRA.

    The model itself draws the pictures of the class before the training, into `out`/class.
    """

    instance_prompt: str = ""  # the caption of all pictures, such as "a photo of sks dog"; "": they have their own
    class_prompts: tuple[str, ...] = ()  # of the class pictures, in turn; none: no prior preservation
    class_images: int = 200
    prior_weight: float = 1.0  # of the loss of the class pictures
    train_text_encoder: bool = False  # all of it; for a LoRA give `text_targets` instead
    lora: LoraConfig | None = None  # train a LoRA; None: train the whole UNet
    layout: LoraLayout = "kohya"  # of the LoRA

    def __post_init__(self) -> None:
        if self.class_images < 1:
            raise ValueError(f"class_images must be at least 1, got {self.class_images}")
        if not self.prior_weight >= 0:
            raise ValueError(f"prior_weight must be at least 0, got {self.prior_weight}")
        if self.lesson and self.instance_prompt:
            raise ValueError("the pictures of [lesson] have captions: omit instance_prompt")
        if self.lora and self.train_text_encoder:
            raise ValueError(
                "train_text_encoder trains whole networks: for a LoRA give text_targets under [lora] instead"
            )

    def run(self, device: torch.device) -> Path:
        """Draw the class, train, and return the folder of the model or the path of the LoRA.

        Raises as `Recipe.run` does.
        """
        model = self.load(device)
        dataset, kept_out = self.examples(model)
        prior = Prior(self._class_pictures(model), self.prior_weight) if self.class_prompts else None
        torch.manual_seed(self.loop.seed)
        whole = Networks(model.unet, model.text_encoder) if self.train_text_encoder else model.unet
        objective = TeachingObjective(
            model,
            new_adapters(model, self.lora) if self.lora else whole,
            self.loss,
            prior=prior,
            sample_prompts=self.sample_prompts,
            kept_out=kept_out,
        )
        average = train(objective, dataset, self.loop, self.out, self.fixed_values())
        if isinstance(average, Adapters):
            return save_adapters(average, model, self.out, self.layout)
        found = objective.complete(average)
        return self.save(Model(model.config, found.unet, model.vae, found.text_encoder, model.unused))

    def pictures(self, *, sizes: bool = False) -> Dataset:
        """Return the data set, whose captions are the instance prompt if there is one."""
        if not self.instance_prompt:
            return super().pictures(sizes=sizes)
        return captioned(self.data, (self.instance_prompt,), self.out / "instance", sizes=sizes)

    def _class_pictures(self, model: Model) -> Dataset:
        """Return pictures that `model` has drawn of the class; the first process draws them.

        Raises ValueError if the folder holds pictures of other settings.
        """
        folder, count = self.out / "class", self.class_images
        prompts = [self.class_prompts[i % len(self.class_prompts)] for i in range(count)]
        rows = [{"file_name": f"{i:05d}.png", "text": prompt} for i, prompt in enumerate(prompts)]
        with first_process_first():
            self._check_class(folder, rows)
            self._draw(model, {folder / row["file_name"]: row["text"] for row in rows})
            write_list(folder, rows)
        pictures = Folder(folder, self.data.size, sizes=model.config.unet.is_sdxl)
        return self.encoded(pictures, count, model.vae, "class-latents", ("data.", "class_", "model"))

    def _check_class(self, folder: Path, rows: Sequence[Mapping[str, str]]) -> None:
        """Write the settings of the class pictures, or compare them. Raises ValueError if they differ."""
        source = json.dumps({"model": str(self.model), "size": self.data.size, "seed": self.loop.seed, "rows": rows})
        folder.mkdir(parents=True, exist_ok=True)
        said = folder / "source.json"
        if said.is_file() and said.read_text(encoding="utf-8") != source:
            raise ValueError(f"{folder} holds class pictures of another recipe: delete it, or choose another `out`")
        said.write_text(source, encoding="utf-8")

    def _draw(self, model: Model, prompts: Mapping[Path, str]) -> None:
        """Draw a picture of each prompt to its file, unless the file exists. Picture i has the seed loop.seed + i."""
        left = [(i, *pair) for i, pair in enumerate(prompts.items()) if not pair[0].is_file()]
        objective = TeachingObjective(model, nn.ModuleList(), self.loss)
        side, device = self.data.size // model.config.vae.factor, next(model.unet.parameters()).device
        shape = model.config.vae.latent_channels, side, side
        done = len(prompts) - len(left)
        with torch.no_grad(), tqdm(total=len(prompts), initial=done, unit="picture", disable=None) as progress:
            for start in range(0, len(left), AT_ONCE):
                numbers, files, texts = zip(*left[start : start + AT_ONCE], strict=True)
                generators = [torch.Generator().manual_seed(self.loop.seed + i) for i in numbers]
                noise = torch.stack([torch.randn(shape, generator=each) for each in generators]).to(device)
                images = objective.draw(model.unet.bind, model.text_encoder, texts, noise)
                for file, picture in zip(files, to_pil(images), strict=True):
                    save_png(picture, file)
                progress.update(len(files))
