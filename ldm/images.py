"""Image tensors to 8-bit PIL pictures, and back."""

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor


def to_pil(images: Tensor) -> list[Image.Image]:
    """Turn images: b 3 h w in [-1, 1] into 8-bit pictures, clamped and rounded to the nearest level.

    CompVis' scripts round down instead, so that their pictures are up to one level darker.
    """
    levels = (images.float() * 0.5 + 0.5).clamp(0, 1) * 255
    array = rearrange(levels.round(), "b c h w -> b h w c").byte().cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def to_tensor(picture: Image.Image) -> Tensor:
    """Turn an RGB picture into an image: 1 3 h w in [-1, 1], fp32. `to_pil` turns the image into the same picture.

    Raises ValueError for a picture of another mode.
    """
    if picture.mode != "RGB":
        raise ValueError(f"the picture must have the mode RGB, got {picture.mode}: convert it with ldm.pictures.to_rgb")
    levels = rearrange(torch.from_numpy(np.array(picture)), "h w c -> 1 c h w").float().contiguous()
    return levels / 127.5 - 1
