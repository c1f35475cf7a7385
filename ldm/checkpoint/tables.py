"""Names of the official checkpoints as data: ours -> LDM single file, ours -> diffusers folder.

The tables hold for every UNet of this kind: where numbering depends on the architecture, it is computed from the
residual blocks and depths of its configuration.
"""

from collections.abc import Callable
from typing import NamedTuple

from ldm.checkpoint.keymap import EITHER_RANK, PIXELS, TRANSPOSED, Piece, Rule
from ldm.config import TextConfig, UNetConfig, VAEConfig

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."


def _same(*names: str) -> tuple[Rule, ...]:
    return tuple(Rule(name, name) for name in names)


# Parts that LDM and diffusers name alike.

_TRANSFORMER_BLOCK = (
    *_same("norm1", "norm2", "norm3"),
    Rule("attn1.to_out", "attn1.to_out.0"),
    Rule("attn2.to_out", "attn2.to_out.0"),
    *_same("attn1", "attn2"),
    Rule("ff.proj", "ff.net.0.proj"),
    Rule("ff.out", "ff.net.2"),
)
_TRANSFORMER = (
    *_same("norm"),
    Rule("proj_in", "proj_in", form=EITHER_RANK),
    Rule("blocks.{n}", "transformer_blocks.{n}", _TRANSFORMER_BLOCK),
    Rule("proj_out", "proj_out", form=EITHER_RANK),
)

# Residual blocks and the VAE's attention.

_LDM_RES = (
    Rule("norm1", "in_layers.0"),
    Rule("conv1", "in_layers.2"),
    Rule("emb", "emb_layers.1"),
    Rule("norm2", "out_layers.0"),
    Rule("conv2", "out_layers.3"),
    Rule("skip", "skip_connection"),
)
_LDM_VAE_RES = (*_same("norm1", "conv1", "norm2", "conv2"), Rule("skip", "nin_shortcut"))
_LDM_VAE_ATTENTION = (
    *_same("norm"),
    Rule("to_q", "q", form=PIXELS),
    Rule("to_k", "k", form=PIXELS),
    Rule("to_v", "v", form=PIXELS),
    Rule("to_out", "proj_out", form=PIXELS),
)
_DIFFUSERS_RES = (
    *_same("norm1", "conv1", "norm2", "conv2"),
    Rule("emb", "time_emb_proj"),
    Rule("skip", "conv_shortcut"),
)
DIFFUSERS_VAE_ATTENTION = (
    Rule("norm", "group_norm"),
    Rule("to_q", "to_q", form=EITHER_RANK),
    Rule("to_k", "to_k", form=EITHER_RANK),
    Rule("to_v", "to_v", form=EITHER_RANK),
    Rule("to_out", "to_out.0", form=EITHER_RANK),
)
OLD_DIFFUSERS_VAE_ATTENTION = (  # of older folders, SD 1.5's own among them
    Rule("norm", "group_norm"),
    Rule("to_q", "query", form=EITHER_RANK),
    Rule("to_k", "key", form=EITHER_RANK),
    Rule("to_v", "value", form=EITHER_RANK),
    Rule("to_out", "proj_attn", form=EITHER_RANK),
)


def ldm_unet(config: UNetConfig) -> tuple[Rule, ...]:
    """Return the rules from our UNet to LDM's, without UNET_PREFIX."""
    per_level, levels = config.res_blocks + 1, len(config.channels)

    def upsample(i: int) -> str:  # it follows the transformer, where the level has one
        depth = config.depth[levels - 1 - i // per_level]
        return f"output_blocks.{i}.{2 if depth else 1}.conv"

    return (
        Rule("time_embed", "time_embed"),
        Rule("vector_embed", "label_emb.0"),
        Rule("down.{i}.conv", "input_blocks.{i}.0"),
        Rule("down.{i}.res", "input_blocks.{i}.0", _LDM_RES),
        Rule("down.{i}.transformer", "input_blocks.{i}.1", _TRANSFORMER),
        Rule("down.{i}.downsample", "input_blocks.{i}.0.op"),
        Rule("mid.res_in", "middle_block.0", _LDM_RES),
        Rule("mid.transformer", "middle_block.1", _TRANSFORMER),
        Rule("mid.res_out", "middle_block.2", _LDM_RES),
        Rule("up.{i}.res", "output_blocks.{i}.0", _LDM_RES),
        Rule("up.{i}.transformer", "output_blocks.{i}.1", _TRANSFORMER),
        Rule("up.{i}.upsample", upsample),
        Rule("norm_out", "out.0"),
        Rule("conv_out", "out.2"),
    )


def diffusers_unet(config: UNetConfig) -> tuple[Rule, ...]:
    """Return the rules from our UNet to diffusers' UNet2DConditionModel."""
    per_level = config.res_blocks + 1  # entries: going down its blocks and one downsampler

    def down(part: str) -> Callable[[int], str]:  # stage 0 is conv_in
        return lambda i: f"down_blocks.{(i - 1) // per_level}.{part}.{(i - 1) % per_level}"

    def up(part: str) -> Callable[[int], str]:
        return lambda i: f"up_blocks.{i // per_level}.{part}.{i % per_level}"

    return (
        Rule("time_embed.0", "time_embedding.linear_1"),
        Rule("time_embed.2", "time_embedding.linear_2"),
        Rule("vector_embed.0", "add_embedding.linear_1"),
        Rule("vector_embed.2", "add_embedding.linear_2"),
        Rule("down.0.conv", "conv_in"),
        Rule("down.{i}.res", down("resnets"), _DIFFUSERS_RES),
        Rule("down.{i}.transformer", down("attentions"), _TRANSFORMER),
        Rule(
            "down.{i}.downsample", lambda i: f"down_blocks.{i // per_level - 1}.downsamplers.0.conv"
        ),
        Rule("mid.res_in", "mid_block.resnets.0", _DIFFUSERS_RES),
        Rule("mid.transformer", "mid_block.attentions.0", _TRANSFORMER),
        Rule("mid.res_out", "mid_block.resnets.1", _DIFFUSERS_RES),
        Rule("up.{i}.res", up("resnets"), _DIFFUSERS_RES),
        Rule("up.{i}.transformer", up("attentions"), _TRANSFORMER),
        Rule("up.{i}.upsample", lambda i: f"up_blocks.{i // per_level}.upsamplers.0.conv"),
        Rule("norm_out", "conv_norm_out"),
        Rule("conv_out", "conv_out"),
    )


def ldm_vae(config: VAEConfig) -> tuple[Rule, ...]:
    """Return the rules from our VAE to LDM's, without VAE_PREFIX; LDM counts the decoder's levels backwards."""
    last = len(config.channels) - 1
    middle = (
        Rule("res_in", "block_1", _LDM_VAE_RES),
        Rule("attn", "attn_1", _LDM_VAE_ATTENTION),
        Rule("res_out", "block_2", _LDM_VAE_RES),
    )
    encoder = (
        *_same("conv_in", "norm_out", "conv_out"),
        Rule("levels.{i}.blocks.{j}", "down.{i}.block.{j}", _LDM_VAE_RES),
        Rule("levels.{i}.downsample", "down.{i}.downsample.conv"),
        Rule("mid", "mid", middle),
    )
    decoder = (
        *_same("conv_in", "norm_out", "conv_out"),
        Rule("levels.{i}.blocks.{j}", lambda i, j: f"up.{last - i}.block.{j}", _LDM_VAE_RES),
        Rule("levels.{i}.upsample", lambda i: f"up.{last - i}.upsample.conv"),
        Rule("mid", "mid", middle),
    )
    return (
        Rule("encoder", "encoder", encoder),
        Rule("decoder", "decoder", decoder),
        *_same("quant_conv", "post_quant_conv"),
    )


def diffusers_vae(attention: tuple[Rule, ...] = DIFFUSERS_VAE_ATTENTION) -> tuple[Rule, ...]:
    """Return the rules from our VAE to diffusers' AutoencoderKL, with today's or the old `attention` names."""
    shared = (
        *_same("conv_in", "conv_out"),
        Rule("norm_out", "conv_norm_out"),
        Rule("mid.res_in", "mid_block.resnets.0", _DIFFUSERS_RES),
        Rule("mid.attn", "mid_block.attentions.0", attention),
        Rule("mid.res_out", "mid_block.resnets.1", _DIFFUSERS_RES),
    )
    encoder = (
        *shared,
        Rule("levels.{i}.blocks.{j}", "down_blocks.{i}.resnets.{j}", _DIFFUSERS_RES),
        Rule("levels.{i}.downsample", "down_blocks.{i}.downsamplers.0.conv"),
    )
    decoder = (
        *shared,
        Rule("levels.{i}.blocks.{j}", "up_blocks.{i}.resnets.{j}", _DIFFUSERS_RES),
        Rule("levels.{i}.upsample", "up_blocks.{i}.upsamplers.0.conv"),
    )
    return (
        Rule("encoder", "encoder", encoder),
        Rule("decoder", "decoder", decoder),
        *_same("quant_conv", "post_quant_conv"),
    )


# From one of our text towers.

_HF_BLOCK = (
    Rule("norm1", "layer_norm1"),
    Rule("attn.to_q", "self_attn.q_proj"),
    Rule("attn.to_k", "self_attn.k_proj"),
    Rule("attn.to_v", "self_attn.v_proj"),
    Rule("attn.to_out", "self_attn.out_proj"),
    Rule("norm2", "layer_norm2"),
    Rule("fc1", "mlp.fc1"),
    Rule("fc2", "mlp.fc2"),
)


def hf_text(level: str = "text_model") -> tuple[Rule, ...]:
    """Return the rules to the names of transformers, and of OpenAI's CLIP in LDM; in some files without `level`."""
    above = f"{level}." if level else ""
    return (
        Rule("token_embedding", f"{above}embeddings.token_embedding"),
        Rule("position_embedding", f"{above}embeddings.position_embedding"),
        Rule("blocks.{n}", f"{above}encoder.layers.{{n}}", _HF_BLOCK),
        Rule("norm", f"{above}final_layer_norm"),
        Rule("projection", "text_projection"),
    )


_OPENCLIP_BLOCK = (
    Rule("norm1", "ln_1"),
    *(
        Rule(f"attn.to_{part}.{kind}", f"attn.in_proj_{kind}", piece=Piece(i, 3))
        for i, part in enumerate("qkv")
        for kind in ("weight", "bias")
    ),
    Rule("attn.to_out", "attn.out_proj"),
    Rule("norm2", "ln_2"),
    Rule("fc1", "mlp.c_fc"),
    Rule("fc2", "mlp.c_proj"),
)
OPENCLIP_TEXT = (
    Rule("token_embedding", "token_embedding"),
    Rule("position_embedding.weight", "positional_embedding"),
    Rule("blocks.{n}", "transformer.resblocks.{n}", _OPENCLIP_BLOCK),
    Rule("norm", "ln_final"),
    Rule("projection.weight", "text_projection", form=TRANSPOSED),
)


class OfficialTower(NamedTuple):
    """Where a text tower stands in an official single file, and by which rules."""

    prefix: str
    rules: tuple[Rule, ...]


def official_towers(text: tuple[TextConfig, ...], *, sgm: bool) -> list[OfficialTower]:
    """Return where the towers stand: in LDM's `cond_stage_model`, or as `sgm` (SDXL) counts its embedders.

    OpenAI's CLIP, with quick_gelu, is held under transformers' names, OpenCLIP's towers under their own.
    """
    towers = []
    for i, config in enumerate(text):
        owner = f"conditioner.embedders.{i}." if sgm else "cond_stage_model."
        if config.activation == "quick_gelu":
            towers.append(OfficialTower(f"{owner}transformer.", hf_text()))
        else:
            towers.append(OfficialTower(f"{owner}model.", OPENCLIP_TEXT))
    return towers
