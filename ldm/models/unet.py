"""The denoising UNet: an encoder with skip connections, a middle, and a decoder that takes the skips.

`down` and `up` are flat lists with one entry per skip connection, numbered as in LDM's input_blocks and output_blocks.
A ControlNet has the same encoder. Its outputs are added to the skips as `residuals`.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning import Condition, guidance_embedding, timestep_embedding
from ldm.config import UNetConfig
from ldm.models.layers import ResBlock
from ldm.models.transformer import KeysValues, SpatialTransformer

StageContext = Tensor | list[KeysValues]  # b n d, or the keys and values of each block of one stage
Context = Tensor | Sequence[StageContext]  # b n d for all stages, or a list with one entry per stage, see `project`


class Stage(nn.Module):
    """One entry of the encoder or decoder. The parts that are not None are applied in the order of the arguments."""

    def __init__(
        self,
        *,
        conv: nn.Conv2d | None = None,
        res: ResBlock | None = None,
        transformer: SpatialTransformer | None = None,
        downsample: nn.Conv2d | None = None,
        upsample: nn.Conv2d | None = None,
    ) -> None:
        super().__init__()
        self.conv, self.res, self.transformer = conv, res, transformer
        self.downsample, self.upsample = downsample, upsample

    def forward(self, x: Tensor, emb: Tensor, context: StageContext, size: torch.Size | None = None) -> Tensor:
        """Map x: b c h w to b c' h' w'. size: the h', w' of an upsampling stage."""
        if self.conv is not None:
            x = self.conv(x)
        if self.res is not None:
            x = self.res(x, emb)
        if self.transformer is not None:
            x = self.transformer(x, context)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:  # to the size of the next skip, which may be odd and so not exactly double
            x = self.upsample(F.interpolate(x, size=size, mode="nearest"))
        return x


class Middle(nn.Module):
    """The bottleneck: residual block, transformer, residual block; distilled models lack some or all of them."""

    def __init__(
        self, res_in: ResBlock | None, transformer: SpatialTransformer | None, res_out: ResBlock | None
    ) -> None:
        super().__init__()
        self.res_in, self.transformer, self.res_out = res_in, transformer, res_out

    def forward(self, x: Tensor, emb: Tensor, context: StageContext) -> Tensor:
        """Map b c h w to b c h w."""
        if self.res_in is not None:
            x = self.res_in(x, emb)
        if self.transformer is not None:
            x = self.transformer(x, context)
        if self.res_out is not None:
            x = self.res_out(x, emb)
        return x


class Encoder(nn.Module):
    """The first part of the network, which UNet and ControlNet share: embeddings, `down` and `mid`."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        first = config.channels[0]
        emb_dim = 4 * first
        self.time_embed = _embedding(first, emb_dim)
        self.vector_embed = _embedding(config.vector_dim, emb_dim) if config.vector_dim else None
        self.guidance_embed = nn.Linear(config.guidance_dim, first, bias=False) if config.guidance_dim else None

        self.down = nn.ModuleList([Stage(conv=nn.Conv2d(config.in_channels, first, 3, padding=1))])
        self.skip_channels = [first]
        channels = first
        down_depths, _ = config.depths()
        for level, (width, depths) in enumerate(zip(config.channels, down_depths, strict=True)):
            for depth in depths:
                self.down.append(Stage(res=self._res(channels, width), transformer=self._transformer(level, depth)))
                channels = width
                self.skip_channels.append(channels)
            if level < len(config.channels) - 1:
                self.down.append(Stage(downsample=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))
                self.skip_channels.append(channels)

        self.mid = Middle(
            self._res(channels, channels) if config.mid != "none" else None,
            self._transformer(len(config.channels) - 1, config.mid_depth),
            self._res(channels, channels) if config.mid == "full" else None,
        )

    def _res(self, in_channels: int, out_channels: int) -> ResBlock:
        groups, emb_dim = self.config.norm_groups, 4 * self.config.channels[0]
        return ResBlock(in_channels, out_channels, groups=groups, eps=1e-5, emb_dim=emb_dim)  # 1e-6 in the VAE

    def _transformer(self, level: int, depth: int) -> SpatialTransformer | None:
        config = self.config
        if depth == 0:
            return None
        return SpatialTransformer(
            config.channels[level],
            config.heads[level],
            config.context_dim,
            depth=depth,
            linear=config.linear_projection,
            groups=config.norm_groups,
            upcast=config.upcast_attention,
        )

    def embed(
        self, timesteps: Tensor, vector: Tensor | None, dtype: torch.dtype, guidance: Tensor | None = None
    ) -> Tensor:
        """Embed timesteps: b, vector: b vector_dim and guidance: b, if the model takes them. Returns b emb_dim."""
        embedded = timestep_embedding(timesteps, self.config.channels[0]).to(dtype)
        if self.guidance_embed is not None:
            if guidance is None:
                raise ValueError(
                    "this UNet needs guidance=, the guidance scale - 1 for each image: it was distilled with guidance"
                )
            sinusoid = guidance_embedding(guidance, self.guidance_embed.in_features)
            embedded = embedded + self.guidance_embed(sinusoid.to(dtype))
        emb = self.time_embed(embedded)
        if self.vector_embed is not None:
            if vector is None:
                raise ValueError(f"this UNet needs vector= of width {self.config.vector_dim} (pooled text and sizes)")
            emb = emb + self.vector_embed(vector.to(dtype))
        return emb

    def encode(self, x: Tensor, emb: Tensor, context: Context) -> tuple[Tensor, list[Tensor]]:
        """Run `down` and `mid` on x: b c h w. Return the output of `mid`, and one skip per `down` stage."""
        *contexts, middle = [context] * (len(self.down) + 1) if isinstance(context, Tensor) else context
        skips = []
        for stage, stage_context in zip(self.down, contexts, strict=True):
            x = stage(x, emb, stage_context)
            skips.append(x)
        return self.mid(x, emb, middle), skips

    def stages(self) -> list[nn.Module]:
        """List the stages in the order of their calls."""
        return [*self.down, self.mid]

    def project(self, context: Tensor) -> list[list[KeysValues]]:
        """Project context: b n d to the keys and values of every cross-attention, as one list for each of `stages`.

        `forward` accepts the result in place of the context. The result is valid until the weights change.
        """
        transformers = [stage.transformer for stage in self.stages()]
        return [[] if part is None else part.project(context) for part in transformers]  # type: ignore[union-attr, operator]


class UNet(Encoder):
    """The denoising UNet. Its training decides whether it predicts eps, v or x0."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        skip_channels = list(self.skip_channels)
        channels = config.channels[-1]
        self.up = nn.ModuleList()
        _, up_depths = config.depths()
        for level, depths in zip(reversed(range(len(config.channels))), up_depths, strict=True):
            width = config.channels[level]
            for i, depth in enumerate(depths):
                last = i == config.res_blocks and level > 0
                self.up.append(
                    Stage(
                        res=self._res(channels + skip_channels.pop(), width),
                        transformer=self._transformer(level, depth),
                        upsample=nn.Conv2d(width, width, 3, padding=1) if last else None,
                    )
                )
                channels = width

        self.norm_out = nn.GroupNorm(config.norm_groups, channels, eps=1e-5)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)

    def stages(self) -> list[nn.Module]:
        """List the stages in the order of their calls."""
        return [*super().stages(), *self.up]

    def bind(self, condition: Condition) -> Callable[..., Tensor]:
        """Return the UNet with a fixed condition: a function (z, timesteps, residuals=None) -> prediction.

        The keys and values of the context are computed here, once for all steps. The function is valid until the
        weights change.
        """
        context = self.project(condition.context)

        def network(z: Tensor, timesteps: Tensor, residuals: Sequence[Tensor] | None = None) -> Tensor:
            return self(z, timesteps, context, condition.vector, residuals, condition.guidance)

        return network

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Context,
        vector: Tensor | None = None,
        residuals: Sequence[Tensor] | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predict eps, v or x0, b out_channels h w, from noisy latents.

        x: b in_channels h w, of unit variance: z in `ldm.diffusion`. timesteps: b, 0 .. 999, fractions allowed.
        context: b n context_dim, or the result of `project`. vector: b vector_dim, for models with `vector_dim` (SDXL).
        residuals: the outputs of a ControlNet, one per `down` stage and one for `mid`. They are added to the skips and
          to the output of `mid`.
        guidance: b, the guidance scale - 1, for models with `guidance_dim` (LCM).
        Raises ValueError if a vector or guidance is missing that the model needs.
        """
        contexts = [context] * len(self.stages()) if isinstance(context, Tensor) else context
        emb = self.embed(timesteps, vector, x.dtype, guidance)
        x, skips = self.encode(x, emb, contexts[: -len(self.up)])

        if residuals is not None:
            *skips, x = (h + r for h, r in zip([*skips, x], residuals, strict=True))

        for stage, stage_context in zip(self.up, contexts[-len(self.up) :], strict=True):
            x = torch.cat([x, skips.pop()], dim=1)
            x = stage(x, emb, stage_context, size=skips[-1].shape[-2:] if skips else None)

        return self.conv_out(F.silu(self.norm_out(x)))


def _embedding(in_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, out_dim), nn.SiLU(), nn.Linear(out_dim, out_dim))
