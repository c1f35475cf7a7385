"""The recipe of textual inversion (Gal et al. 2022)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ldm.checkpoint.embeddings import save_embedding, words_used
from ldm.models.textual_inversion import normal
from ldm.training.loop import Dataset, train
from ldm.training.recipes.teaching import TeachingRecipe, captioned
from ldm.training.teaching import TeachingObjective
from ldm.training.words import learn_word


@dataclass(frozen=True, kw_only=True)
class TextualInversionRecipe(TeachingRecipe):
    """Teach a model one word, whose vectors alone learn, and save them to `out`/embedding for several programs."""

    word: str
    start: str  # the word whose vectors the training starts from
    vectors: int = 1
    captions: tuple[str, ...] = ()  # of every picture in turn, such as "a photo of <toy>"; none: they have their own

    def __post_init__(self) -> None:
        if self.vectors < 1:
            raise ValueError(f"vectors must be at least 1, got {self.vectors}")
        if self.lesson and self.captions:
            raise ValueError("the pictures of [lesson] have captions: omit captions")
        if self.lesson and self.lesson.word != self.word:
            raise ValueError(f"[lesson] needs word = {self.word!r}, as the recipe, got {self.lesson.word!r}")

    def run(self, device: torch.device) -> Path:
        """Train the vectors; return the folder of the embedding. Raises as `Recipe.run` does."""
        model = self.load(device)
        learned = learn_word(model.text_encoder, self.word, self.start, self.vectors)
        dataset, kept_out = self.examples(model)
        captions = {part.caption(i) for part in (dataset, kept_out) if part is not None for i in range(len(part))}
        if lacking := sorted(
            text for text in captions if normal(self.word) not in words_used(model.text_encoder, [text])
        ):
            raise ValueError(
                f"the caption {lacking[0]!r} does not have the word {self.word!r}: write it into each caption"
            )
        prompts = self.sample_prompts
        objective = TeachingObjective(model, learned, self.loss, sample_prompts=prompts, kept_out=kept_out)
        average = train(objective, dataset, self.loop, self.out, self.fixed_values())
        assert isinstance(average, nn.ParameterList)
        save_embedding(self.out / "embedding", self.word, list(average))
        return self.out / "embedding"

    def pictures(self, *, sizes: bool = False) -> Dataset:
        """Return the data set, whose captions are those of the recipe if there are any."""
        if not self.captions:
            return super().pictures(sizes=sizes)
        return captioned(self.data, self.captions, self.out / "captions", sizes=sizes)
