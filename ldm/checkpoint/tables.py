"""Names of the official checkpoints as data: ours -> LDM single file, ours -> diffusers folder.

The tables hold for every UNet of this kind: where numbering depends on the architecture, it is computed from the
residual blocks and depths of its configuration.
"""

from collections.abc import Callable
from typing import NamedTuple

from ldm.checkpoint.keymap import Form, Piece, Rule
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
    Rule("proj_in", "proj_in"),
    Rule("blocks.{n}", "transformer_blocks.{n}", _TRANSFORMER_BLOCK),
    Rule("proj_out", "proj_out"),
)
_CLIP = _same("embeddings", "encoder", "final_layer_norm")

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
    Rule("to_q", "q", form=Form.PIXELS),
    Rule("to_k", "k", form=Form.PIXELS),
    Rule("to_v", "v", form=Form.PIXELS),
    Rule("to_out", "proj_out", form=Form.PIXELS),
)
_DIFFUSERS_RES = (
    *_same("norm1", "conv1", "norm2", "conv2"),
    Rule("emb", "time_emb_proj"),
    Rule("skip", "conv_shortcut"),
)
DIFFUSERS_VAE_ATTENTION = (
    Rule("norm", "group_norm"),
    Rule("to_q", "to_q"),
    Rule("to_k", "to_k"),
    Rule("to_v", "to_v"),
    Rule("to_out", "to_out.0"),
)
OLD_DIFFUSERS_VAE_ATTENTION = (  # of older folders, SD 1.5's own among them
    Rule("norm", "group_norm"),
    Rule("to_q", "query"),
    Rule("to_k", "key"),
    Rule("to_v", "value"),
    Rule("to_out", "proj_attn"),
)


def ldm_unet(config: UNetConfig) -> tuple[Rule, ...]:
    """Return the rules from our UNet to LDM's, without UNET_PREFIX."""
    up_depths = [depth for level in config.depths()[1] for depth in level]

    def upsample(i: int) -> str:  # it follows the transformer, where there is one
        return f"output_blocks.{i}.{2 if up_depths[i] else 1}.conv"

    return (
        Rule("time_embed", "time_embed"),
        Rule("guidance_embed", "time_embedding.cond_proj"),  # converters leave diffusers' name
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
        Rule("guidance_embed", "time_embedding.cond_proj"),
        Rule("vector_embed.0", "add_embedding.linear_1"),
        Rule("vector_embed.2", "add_embedding.linear_2"),
        Rule("down.0.conv", "conv_in"),
        Rule("down.{i}.res", down("resnets"), _DIFFUSERS_RES),
        Rule("down.{i}.transformer", down("attentions"), _TRANSFORMER),
        Rule("down.{i}.downsample", lambda i: f"down_blocks.{i // per_level - 1}.downsamplers.0.conv"),
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


# From one of our text towers. The module inside has the level `text_model` in some versions of transformers only.


def hf_text(level: str = "text_model") -> tuple[Rule, ...]:
    """Return the rules to the names of transformers, and of OpenAI's CLIP in LDM; in some files without `level`."""
    return (Rule("model.text_model", level, _CLIP), Rule("model", level, _CLIP), Rule("projection", "text_projection"))


_OPENCLIP_BLOCK = (
    Rule("layer_norm1", "ln_1"),
    Rule("layer_norm2", "ln_2"),
    *(
        Rule(f"self_attn.{part}_proj.{kind}", f"attn.in_proj_{kind}", piece=Piece(i, 3))
        for i, part in enumerate("qkv")
        for kind in ("weight", "bias")
    ),
    Rule("self_attn.out_proj", "attn.out_proj"),
    Rule("mlp.fc1", "mlp.c_fc"),
    Rule("mlp.fc2", "mlp.c_proj"),
)
_OPENCLIP = (
    Rule("embeddings.token_embedding", "token_embedding"),
    Rule("embeddings.position_embedding.weight", "positional_embedding"),
    Rule("encoder.layers.{n}", "transformer.resblocks.{n}", _OPENCLIP_BLOCK),
    Rule("final_layer_norm", "ln_final"),
)
OPENCLIP_TEXT = (
    Rule("model.text_model", "", _OPENCLIP),
    Rule("model", "", _OPENCLIP),
    Rule("projection.weight", "text_projection", form=Form.TRANSPOSED),
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
