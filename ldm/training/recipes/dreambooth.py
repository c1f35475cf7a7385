"""The recipe of DreamBooth (Ruiz et al. 2022): a model learns one object, and keeps its idea of the object's class."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ldm.checkpoint.files import save
from ldm.checkpoint.parts import Model
from ldm.checkpoint.save_loras import LoraLayout
from ldm.images import to_pil
from ldm.pictures import save_png
from ldm.training.adapters import Adapters, LoraConfig
from ldm.training.data import Folder
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
        dataset = self.encoded(self.pictures(), model)
        prior = Prior(self._class_pictures(model), self.prior_weight) if self.class_prompts else None
        torch.manual_seed(self.loop.seed)
        learned: nn.Module
        if self.lora:
            learned = new_adapters(model, self.lora)
        else:
            learned = nn.ModuleList([model.unet, *(model.text_encoder.towers if self.train_text_encoder else [])])
        objective = TeachingObjective(model, learned, self.loss, prior=prior, sample_prompts=self.sample_prompts)
        average = train(objective, dataset, self.loop, self.out, self.fixed_values())
        if isinstance(average, Adapters):
            return save_adapters(average, model, self.out, self.layout)
        learned.load_state_dict(average.state_dict())
        save(model, self.out / "model", layout="diffusers", dtype=torch.float16, overwrite=True)
        return self.out / "model"

    def pictures(self) -> Dataset:
        """Return the data set, whose captions are the instance prompt if there is one."""
        if not self.instance_prompt:
            return super().pictures()
        return captioned(self.data, (self.instance_prompt,), self.out / "instance")

    def _class_pictures(self, model: Model) -> Dataset:
        """Return pictures that `model` has drawn of the class. Those that are in `out`/class are not drawn again.

        Picture i has the seed loop.seed + i. Raises ValueError if the folder holds pictures of other settings.
        """
        folder, count = self.out / "class", self.class_images
        prompts = [self.class_prompts[i % len(self.class_prompts)] for i in range(count)]
        rows = [{"file_name": f"{i:05d}.png", "text": prompt} for i, prompt in enumerate(prompts)]
        source = json.dumps({"model": str(self.model), "size": self.data.size, "seed": self.loop.seed, "rows": rows})
        folder.mkdir(parents=True, exist_ok=True)
        said = folder / "source.json"
        if said.is_file() and said.read_text(encoding="utf-8") != source:
            raise ValueError(f"{folder} holds class pictures of another recipe: delete it, or choose another `out`")
        said.write_text(source, encoding="utf-8")
        left = [i for i in range(count) if not (folder / rows[i]["file_name"]).is_file()]
        objective = TeachingObjective(model, nn.ModuleList(), self.loss)
        side = self.data.size // model.config.vae.factor
        with torch.no_grad(), tqdm(total=count, initial=count - len(left), unit="picture", disable=None) as progress:
            for start in range(0, len(left), AT_ONCE):
                some = left[start : start + AT_ONCE]
                generators = [torch.Generator().manual_seed(self.loop.seed + i) for i in some]
                shape = model.config.vae.latent_channels, side, side
                noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
                noise = noise.to(next(model.unet.parameters()).device)
                shown = [prompts[i] for i in some]
                images = objective.draw(model.unet.bind, model.text_encoder, shown, noise)
                for i, picture in zip(some, to_pil(images), strict=True):
                    save_png(picture, folder / rows[i]["file_name"])
                progress.update(len(some))
        write_list(folder, rows)
        return self.encoded(Folder(folder, self.data.size), model, "class-latents", ("data.", "class_", "model"))
