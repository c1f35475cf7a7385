"""The settings of sampling that a LoRA of few steps needs, as JSON in the metadata of its file."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ldm.checkpoint.folder import LORA_FILES
from ldm.checkpoint.tensors import TensorFiles, parse_object
from ldm.config import ModelConfig, check_number
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import Spacing
from ldm.strict import from_dict

KEY = "ldm.sampling"


@dataclass(frozen=True)
class Sampling:
    """Defaults for a model with this LoRA; see `ModelConfig`."""

    sampler: str
    spacing: Spacing
    steps: int
    guidance_scale: float

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"the sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}")
        check_number("steps", self.steps, 1, whole=True)
        check_number("guidance_scale", self.guidance_scale, 0)

    def metadata(self) -> dict[str, str]:
        """Return the metadata of the file."""
        return {KEY: json.dumps(dataclasses.asdict(self))}


LCM_LORA = Sampling("lcm", "lcm", 4, 1.0)  # the LoRA contains the guidance


def with_sampling(config: ModelConfig, loras: Iterable[str | Path]) -> ModelConfig:
    """Return `config` with the settings that the files of these LoRAs say; the last one counts.

    loras: files, or folders as diffusers saves them. Raises ValueError for settings that are malformed.
    """
    found = said(loras)
    if found is None:
        return config
    return dataclasses.replace(
        config,
        diffusion=dataclasses.replace(config.diffusion, spacing=found.spacing),
        sampler=found.sampler,
        steps=found.steps,
        guidance_scale=found.guidance_scale,
    )


def kept(loras: Iterable[str | Path]) -> dict[str, str]:
    """Return the metadata of a file that is made from these LoRAs: their settings. Raises as `with_sampling` does."""
    found = said(loras)
    return {} if found is None else found.metadata()


def said(loras: Iterable[str | Path]) -> Sampling | None:
    """Return the settings that the last one of these LoRAs says, if one says some. Raises as `with_sampling` does."""
    last = None
    for path in map(Path, loras):
        file = next((path / name for name in LORA_FILES if (path / name).is_file()), path)
        text = TensorFiles([file]).metadata.get(KEY)
        if text is not None:
            where = f"{file}, metadata {KEY}"
            last = from_dict(parse_object(text, where), Sampling, where)
    return last
