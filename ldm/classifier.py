"""What an image classifier says of pictures: the answers that `ldm.variants.report` counts (extra `vision`)."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image


class Classifier:
    """An image classifier in transformers' files, for the CPU in fp32.

    folder: with config.json, whose `id2label` has the names of the classes, preprocessor_config.json, and the weights.
    Nothing is fetched, and no code of the folder runs.
    Raises ValueError without transformers, for a folder of something else, and if it lacks weights.
    """

    def __init__(self, folder: str | Path) -> None:
        if find_spec("transformers") is None:
            raise ValueError(
                "an image classifier needs transformers, which is not installed: install the extra with pip install "
                "'ldm[vision]'"
            )
        if not Path(folder, "config.json").is_file():
            raise ValueError(f"{folder} has no config.json: name a folder with an image classifier of transformers")
        from transformers import AutoImageProcessor, AutoModelForImageClassification  # takes seconds
        from transformers.utils import logging

        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            self._processor = AutoImageProcessor.from_pretrained(folder, **local)
            self._model, loaded = AutoModelForImageClassification.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, **local
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ValueError(f"{folder} holds no image classifier of transformers: {error}") from error
        finally:
            if shown:
                logging.enable_progress_bar()
        if lacking := sorted(loaded["missing_keys"]):
            raise ValueError(
                f"{folder} lacks the weights {', '.join(lacking[:3])}: transformers would draw them at random"
            )
        self._model.eval()

    @torch.no_grad()
    def __call__(self, picture: Image.Image) -> str:
        """Return the name of the most likely class of an RGB picture."""
        logits = self._model(**self._processor(picture, return_tensors="pt")).logits
        return self._model.config.id2label[int(logits.argmax())]
