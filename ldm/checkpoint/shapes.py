"""The architecture of a checkpoint from the names and shapes of its tensors alone.

Shapes tell everything but the numbers of heads and of normalisation groups, which are those of the family.
"""

from dataclasses import dataclass
from typing import Literal

from ldm.checkpoint.tensors import Tensors
from ldm.config import (
    SD15,
    SD21_BASE,
    SDXL_BASE,
    SDXL_REFINER,
    ModelConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
)

Family = Literal["sd1", "sd2", "sdxl", "sdxl-refiner"]
HEAD_WIDTH = 64  # of every attention but those of SD 1.x's UNet, which has 8 heads everywhere

PRESETS_OF: dict[Family, ModelConfig] = {
    "sd1": SD15,
    "sd2": SD21_BASE,
    "sdxl": SDXL_BASE,
    "sdxl-refiner": SDXL_REFINER,
}
NAMES = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sdxl-refiner": "the Stable Diffusion XL refiner",
}
_OTHER_INPUTS = {  # by the channels that the UNet takes
    5: "Stable Diffusion 2 depth-to-image, which needs a depth map",
    7: "the Stable Diffusion x4 upscaler, which needs a small picture",
}


@dataclass(frozen=True)
class Shapes:
    """The shapes behind one prefix in a checkpoint."""

    tensors: Tensors
    prefix: str

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors.shapes

    def size(self, name: str, dim: int) -> int:
        """Return the size of dimension `dim` of the tensor `name`. Raises ValueError if it has none."""
        shape = self.tensors.shapes.get(self.prefix + name)
        if shape is None:
            raise ValueError(f"{self.tensors} is incomplete, it lacks {self.prefix}{name}")
        if dim >= len(shape):
            raise ValueError(f"{self.prefix}{name} in {self.tensors} has the shape {list(shape)}")
        return shape[dim]

    def count(self, name: str) -> int:
        """Return how many tensors there are of `name`, whose {} counts from 0."""
        n = 0
        while name.format(n) in self:
            n += 1
        return n


def family_of(unet: Shapes) -> tuple[Family, str]:
    """Tell the family of a UNet under LDM's names, and by what.

    Raises ValueError for one that is not supported, by its name where it has one.
    """
    width = unet.size("input_blocks.0.0.weight", 0)
    inputs = unet.size("input_blocks.0.0.weight", 1)
    context = context_dim(unet)
    vector = unet.size("label_emb.0.0.weight", 1) if "label_emb.0.0.weight" in unet else None
    seen = f"{width} model channels and text of width {context}"
    if inputs in _OTHER_INPUTS:
        raise ValueError(
            f"{unet.tensors} is {_OTHER_INPUTS[inputs]} ({inputs} input channels): it is not supported"
        )
    for family, preset in PRESETS_OF.items():
        if (width, context, vector) == (
            preset.unet.channels[0],
            preset.unet.context_dim,
            preset.unet.vector_dim,
        ):
            return family, f"{seen} are {NAMES[family]}"
    name = "Stable unCLIP" if vector and context == 1024 else "no family known here"
    raise ValueError(
        f"{unet.tensors} is {name} ({seen}, {f'a vector of {vector}' if vector else 'no vector'}): supported are "
        + ", ".join(NAMES.values())
    )


def context_dim(unet: Shapes) -> int:
    """Return the width of the text that the UNet attends to. Raises ValueError if it attends to none."""
    names = (n for n in unet.tensors.shapes if n.startswith(unet.prefix))
    name = next((n for n in names if n.endswith("attn2.to_k.weight")), None)
    if name is None:
        raise ValueError(f"{unet.tensors} is incomplete, it lacks {unet.prefix}*.attn2.to_k.weight")
    return unet.size(name.removeprefix(unet.prefix), 1)


def unet_from_shapes(shapes: Shapes, family: Family) -> UNetConfig:
    """Infer the UNet. Raises ValueError for a tensor that is missing or a plan that no UNetConfig has."""
    per_level = 1  # entries of input_blocks: residual blocks up to a level's downsampler, and that
    while f"input_blocks.{per_level}.0.in_layers.2.weight" in shapes:
        per_level += 1
    channels = [shapes.size("input_blocks.1.0.in_layers.2.weight", 0)]
    depth = [shapes.count("input_blocks.1.1.transformer_blocks.{}.norm1.weight")]
    while f"input_blocks.{(i := 1 + len(channels) * per_level)}.0.in_layers.2.weight" in shapes:
        channels.append(shapes.size(f"input_blocks.{i}.0.in_layers.2.weight", 0))
        depth.append(shapes.count(f"input_blocks.{i}.1.transformer_blocks.{{}}.norm1.weight"))
    vector = "label_emb.0.0.weight"
    return UNetConfig(
        in_channels=shapes.size("input_blocks.0.0.weight", 1),
        out_channels=shapes.size("out.2.weight", 0),
        channels=tuple(channels),
        res_blocks=per_level - 1,
        depth=tuple(depth),
        mid_depth=shapes.count("middle_block.1.transformer_blocks.{}.norm1.weight"),
        heads=tuple(8 if family == "sd1" else max(c // HEAD_WIDTH, 1) for c in channels),
        context_dim=context_dim(shapes),
        vector_dim=shapes.size(vector, 1) if vector in shapes else None,
        linear_projection=family != "sd1",
    )


def vae_from_shapes(shapes: Shapes, scaling_factor: float) -> VAEConfig:
    """Infer the VAE but for its scale, which no shape tells. Raises ValueError for a tensor that is missing."""
    name = "encoder.down.{}.block.0.conv1.weight"
    levels = max(shapes.count(name), 1)
    return VAEConfig(
        channels=tuple(shapes.size(name.format(i), 0) for i in range(levels)),
        res_blocks=shapes.count("encoder.down.0.block.{}.conv1.weight"),
        latent_channels=shapes.size("decoder.conv_in.weight", 1),
        scaling_factor=scaling_factor,
    )


def clip_from_shapes(shapes: Shapes, like: TextConfig) -> TextConfig:
    """Infer a tower under transformers' names; `like` says which of its outputs are used.

    Raises ValueError for a tensor that is missing.
    """
    width = shapes.size("embeddings.token_embedding.weight", 1)
    return TextConfig(
        width=width,
        layers=shapes.count("encoder.layers.{}.layer_norm1.weight"),
        heads=max(width // HEAD_WIDTH, 1),
        mlp=shapes.size("encoder.layers.0.mlp.fc1.weight", 0),
        activation=like.activation,
        projection=like.projection,
        vocab_size=shapes.size("embeddings.token_embedding.weight", 0),
        max_length=shapes.size("embeddings.position_embedding.weight", 0),
        pad_id=like.pad_id,
        output_layer=like.output_layer,
        final_norm=like.final_norm,
    )


def openclip_from_shapes(shapes: Shapes, like: TextConfig) -> TextConfig:
    """Infer a tower under OpenCLIP's names; `like` says which of its outputs are used.

    Where the context is the normed layer before the last, that last block is not counted. Files that have been
    through a trainer may lack it; they lack the unused projection, too.
    Raises ValueError for a tensor that is missing.
    """
    width = shapes.size("token_embedding.weight", 1)
    layers = shapes.count("transformer.resblocks.{}.ln_1.weight")
    if like.projection is None and "text_projection" in shapes:
        layers -= 1
    return TextConfig(
        width=width,
        layers=layers,
        heads=max(width // HEAD_WIDTH, 1),
        mlp=shapes.size("transformer.resblocks.0.mlp.c_fc.weight", 0),
        activation=like.activation,
        projection=shapes.size("text_projection", 1) if like.projection else None,
        vocab_size=shapes.size("token_embedding.weight", 0),
        max_length=shapes.size("positional_embedding", 0),
        pad_id=like.pad_id,
        output_layer=like.output_layer,
        final_norm=like.final_norm,
    )
