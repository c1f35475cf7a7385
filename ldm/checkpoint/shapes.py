"""The architecture of an SD 1.x checkpoint from the shapes of its tensors alone, under LDM's names.

Shapes tell everything but the numbers of heads and of normalisation groups, which are those of the family.
"""

from dataclasses import dataclass

from ldm.checkpoint.tensors import TensorFiles
from ldm.config import TextConfig, UNetConfig, VAEConfig

UNET_HEADS = 8  # in every attention of an SD 1.x UNet
CLIP_HEAD_WIDTH = 64


@dataclass(frozen=True)
class Shapes:
    """The shapes behind one prefix in a checkpoint."""

    tensors: TensorFiles
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


def unet_from_shapes(shapes: Shapes) -> UNetConfig:
    """Infer the UNet. Raises ValueError for a tensor that is missing or a plan that no UNetConfig has."""
    per_level = 1  # entries of input_blocks: residual blocks up to a level's downsampler, and that
    while f"input_blocks.{per_level}.0.in_layers.2.weight" in shapes:
        per_level += 1
    channels = [shapes.size("input_blocks.1.0.in_layers.2.weight", 0)]
    depth = [shapes.count("input_blocks.1.1.transformer_blocks.{}.norm1.weight")]
    while f"input_blocks.{(i := 1 + len(channels) * per_level)}.0.in_layers.2.weight" in shapes:
        channels.append(shapes.size(f"input_blocks.{i}.0.in_layers.2.weight", 0))
        depth.append(shapes.count(f"input_blocks.{i}.1.transformer_blocks.{{}}.norm1.weight"))
    return UNetConfig(
        in_channels=shapes.size("input_blocks.0.0.weight", 1),
        out_channels=shapes.size("out.2.weight", 0),
        channels=tuple(channels),
        res_blocks=per_level - 1,
        depth=tuple(depth),
        mid_depth=shapes.count("middle_block.1.transformer_blocks.{}.norm1.weight"),
        heads=(UNET_HEADS,) * len(channels),
        context_dim=context_dim(shapes),
    )


def context_dim(shapes: Shapes) -> int:
    """Return the width of the text that the UNet's middle attends to."""
    return shapes.size("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1)


def vae_from_shapes(shapes: Shapes) -> VAEConfig:
    """Infer the VAE; its scale is that of SD 1.x. Raises ValueError for a tensor that is missing."""
    name = "encoder.down.{}.block.0.conv1.weight"
    levels = max(shapes.count(name), 1)
    return VAEConfig(
        channels=tuple(shapes.size(name.format(i), 0) for i in range(levels)),
        res_blocks=shapes.count("encoder.down.0.block.{}.conv1.weight"),
        latent_channels=shapes.size("decoder.conv_in.weight", 1),
    )


def text_from_shapes(shapes: Shapes) -> TextConfig:
    """Infer the CLIP text tower. Raises ValueError for a tensor that is missing."""
    width = shapes.size("embeddings.token_embedding.weight", 1)
    return TextConfig(
        width=width,
        layers=shapes.count("encoder.layers.{}.layer_norm1.weight"),
        heads=width // CLIP_HEAD_WIDTH,
        mlp=shapes.size("encoder.layers.0.mlp.fc1.weight", 0),
        vocab_size=shapes.size("embeddings.token_embedding.weight", 0),
        max_length=shapes.size("embeddings.position_embedding.weight", 0),
    )
