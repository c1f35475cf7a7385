"""Tensor names as data: ours -> LDM single file, and ours -> diffusers folder.

The tables are valid for every configuration. Where the numbers in the names depend on the number of residual blocks,
levels or transformer blocks, a function computes the name.
"""

from collections.abc import Callable

from ldm.checkpoint.keymap import Form, Piece, Rule
from ldm.config import TextConfig, UNetConfig, VAEConfig

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CONTROLNET_PREFIX = "control_model."


def _same(*names: str) -> tuple[Rule, ...]:
    return tuple(Rule(name, name) for name in names)


def _renamed(names: dict[str, str], form: Form = Form.SAME) -> tuple[Rule, ...]:
    return tuple(Rule(ours, theirs, form=form) for ours, theirs in names.items())


# Parts of the UNet and the VAE.

_RES = _same("norm1", "conv1", "norm2", "conv2")
_TRANSFORMER_BLOCK = (
    *_renamed({"attn1.to_out": "attn1.to_out.0", "attn2.to_out": "attn2.to_out.0"}),
    *_renamed({"ff.proj": "ff.net.0.proj", "ff.out": "ff.net.2"}),
    *_same("attn1", "attn2", "norm1", "norm2", "norm3"),
)
_TRANSFORMER = (*_same("norm", "proj_in", "proj_out"), Rule("blocks.{n}", "transformer_blocks.{n}", _TRANSFORMER_BLOCK))
_LDM_RES = (
    *_renamed({"norm1": "in_layers.0", "conv1": "in_layers.2", "emb": "emb_layers.1"}),
    *_renamed({"norm2": "out_layers.0", "conv2": "out_layers.3", "skip": "skip_connection"}),
)
_LDM_VAE_RES = (*_RES, Rule("skip", "nin_shortcut"))
_LDM_VAE_ATTENTION = (
    *_same("norm"),
    *_renamed({"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}, Form.PIXELS),
)
_DIFFUSERS_RES = (*_RES, *_renamed({"emb": "time_emb_proj", "skip": "conv_shortcut"}))
DIFFUSERS_VAE_ATTENTION = _renamed(
    {"norm": "group_norm", "to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
)
OLD_DIFFUSERS_VAE_ATTENTION = _renamed(  # of older folders, SD 1.5's own among them
    {"norm": "group_norm", "to_q": "query", "to_k": "key", "to_v": "value", "to_out": "proj_attn"}
)


def ldm_unet(config: UNetConfig) -> tuple[Rule, ...]:
    """Return the rules from our UNet to LDM's, without UNET_PREFIX."""

    def upsample(i: int) -> str:  # the entry after the transformer, or after the residual block if there is none
        level, block = divmod(i, config.res_blocks + 1)
        return f"output_blocks.{i}.{2 if config.depths()[1][level][block] else 1}.conv"

    return (
        *_renamed({"time_embed": "time_embed", "vector_embed": "label_emb.0"}),
        Rule("guidance_embed", "time_embedding.cond_proj"),  # converters keep diffusers' name
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
        *_renamed({"norm_out": "out.0", "conv_out": "out.2"}),
    )


def diffusers_unet(config: UNetConfig) -> tuple[Rule, ...]:
    """Return the rules from our UNet to diffusers' UNet2DConditionModel."""
    per_level = config.res_blocks + 1  # stages: down, the residual blocks and one downsampler; up, one block more

    def down(part: str) -> Callable[[int], str]:  # stage 0 is conv_in
        return lambda i: f"down_blocks.{(i - 1) // per_level}.{part}.{(i - 1) % per_level}"

    def up(part: str) -> Callable[[int], str]:
        return lambda i: f"up_blocks.{i // per_level}.{part}.{i % per_level}"

    return (
        *_renamed({"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}),
        *_renamed({"vector_embed.0": "add_embedding.linear_1", "vector_embed.2": "add_embedding.linear_2"}),
        *_renamed({"guidance_embed": "time_embedding.cond_proj", "down.0.conv": "conv_in"}),
        Rule("down.{i}.res", down("resnets"), _DIFFUSERS_RES),
        Rule("down.{i}.transformer", down("attentions"), _TRANSFORMER),
        Rule("down.{i}.downsample", lambda i: f"down_blocks.{i // per_level - 1}.downsamplers.0.conv"),
        Rule("mid.res_in", "mid_block.resnets.0", _DIFFUSERS_RES),
        Rule("mid.transformer", "mid_block.attentions.0", _TRANSFORMER),
        Rule("mid.res_out", "mid_block.resnets.1", _DIFFUSERS_RES),
        Rule("up.{i}.res", up("resnets"), _DIFFUSERS_RES),
        Rule("up.{i}.transformer", up("attentions"), _TRANSFORMER),
        Rule("up.{i}.upsample", lambda i: f"up_blocks.{i // per_level}.upsamplers.0.conv"),
        *_renamed({"norm_out": "conv_norm_out", "conv_out": "conv_out"}),
    )


def ldm_controlnet(config: UNetConfig) -> tuple[Rule, ...]:
    """Return the rules from our ControlNet to that of its authors, without CONTROLNET_PREFIX."""
    return (
        Rule("hint.{i}", lambda i: f"input_hint_block.{2 * i}"),  # an activation has the odd number between
        Rule("zero_convs.{i}", "zero_convs.{i}.0"),
        Rule("mid_out", "middle_block_out.0"),
        *ldm_unet(config),
    )


def diffusers_controlnet(config: UNetConfig, hints: int) -> tuple[Rule, ...]:
    """Return the rules from our ControlNet to diffusers' ControlNetModel. hints: the layers of the hint embedding."""
    above = "controlnet_cond_embedding"

    def hint(i: int) -> str:
        return f"{above}.{'conv_in' if i == 0 else 'conv_out' if i == hints - 1 else f'blocks.{i - 1}'}"

    return (
        Rule("hint.{i}", hint),
        Rule("zero_convs.{i}", "controlnet_down_blocks.{i}"),
        Rule("mid_out", "controlnet_mid_block"),
        *diffusers_unet(config),
    )


def ldm_vae(config: VAEConfig) -> tuple[Rule, ...]:
    """Return the rules from our VAE to LDM's, without VAE_PREFIX; LDM numbers the decoder's levels in reverse."""
    last = len(config.channels) - 1
    shared = (
        *_same("conv_in", "norm_out", "conv_out"),
        Rule("mid.res_in", "mid.block_1", _LDM_VAE_RES),
        Rule("mid.attn", "mid.attn_1", _LDM_VAE_ATTENTION),
        Rule("mid.res_out", "mid.block_2", _LDM_VAE_RES),
    )
    encoder = (
        Rule("levels.{i}.blocks.{j}", "down.{i}.block.{j}", _LDM_VAE_RES),
        Rule("levels.{i}.downsample", "down.{i}.downsample.conv"),
    )
    decoder = (
        Rule("levels.{i}.blocks.{j}", lambda i, j: f"up.{last - i}.block.{j}", _LDM_VAE_RES),
        Rule("levels.{i}.upsample", lambda i: f"up.{last - i}.upsample.conv"),
    )
    return _vae(shared, encoder, decoder)


def diffusers_vae(attention: tuple[Rule, ...] = DIFFUSERS_VAE_ATTENTION) -> tuple[Rule, ...]:
    """Return the rules from our VAE to diffusers' AutoencoderKL. attention: its current names or the old ones."""
    shared = (
        *_renamed({"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}),
        Rule("mid.res_in", "mid_block.resnets.0", _DIFFUSERS_RES),
        Rule("mid.attn", "mid_block.attentions.0", attention),
        Rule("mid.res_out", "mid_block.resnets.1", _DIFFUSERS_RES),
    )
    encoder = (
        Rule("levels.{i}.blocks.{j}", "down_blocks.{i}.resnets.{j}", _DIFFUSERS_RES),
        Rule("levels.{i}.downsample", "down_blocks.{i}.downsamplers.0.conv"),
    )
    decoder = (
        Rule("levels.{i}.blocks.{j}", "up_blocks.{i}.resnets.{j}", _DIFFUSERS_RES),
        Rule("levels.{i}.upsample", "up_blocks.{i}.upsamplers.0.conv"),
    )
    return _vae(shared, encoder, decoder)


def _vae(shared: tuple[Rule, ...], encoder: tuple[Rule, ...], decoder: tuple[Rule, ...]) -> tuple[Rule, ...]:
    halves = Rule("encoder", "encoder", (*shared, *encoder)), Rule("decoder", "decoder", (*shared, *decoder))
    return (*halves, *_same("quant_conv", "post_quant_conv"))


# The text towers.

_HF_BLOCK = (
    *_renamed({"attn.to_q": "self_attn.q_proj", "attn.to_k": "self_attn.k_proj", "attn.to_v": "self_attn.v_proj"}),
    *_renamed({"attn.to_out": "self_attn.out_proj", "norm1": "layer_norm1", "norm2": "layer_norm2"}),
    *_renamed({"fc1": "mlp.fc1", "fc2": "mlp.fc2"}),
)


def hf_text(level: str = "text_model") -> tuple[Rule, ...]:
    """Return the rules from our tower to transformers' CLIPTextModel, whose names LDM uses too for OpenAI's CLIP.

    level: the outer module of the names; "" for files that leave it out.
    """
    above = f"{level}." if level else ""
    return (
        Rule("token_embedding", f"{above}embeddings.token_embedding"),
        Rule("position_embedding", f"{above}embeddings.position_embedding"),
        Rule("blocks.{n}", f"{above}encoder.layers.{{n}}", _HF_BLOCK),
        Rule("norm", f"{above}final_layer_norm"),
        Rule("projection", "text_projection"),
    )


_OPENCLIP_BLOCK = (
    *(
        Rule(f"attn.to_{part}.{kind}", f"attn.in_proj_{kind}", piece=Piece(i, 3))
        for i, part in enumerate("qkv")
        for kind in ("weight", "bias")
    ),
    *_renamed({"attn.to_out": "attn.out_proj", "norm1": "ln_1", "norm2": "ln_2"}),
    *_renamed({"fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}),
)
OPENCLIP_TEXT = (
    *_renamed({"token_embedding": "token_embedding", "position_embedding.weight": "positional_embedding"}),
    Rule("blocks.{n}", "transformer.resblocks.{n}", _OPENCLIP_BLOCK),
    Rule("norm", "ln_final"),
    Rule("projection.weight", "text_projection", form=Form.TRANSPOSED),
)


def official_towers(text: tuple[TextConfig, ...], *, sgm: bool) -> list[tuple[str, tuple[Rule, ...]]]:
    """Return the prefix and the rules of each tower in an official single file; sgm: in one of SDXL.

    OpenAI's CLIP, with quick_gelu, is stored under transformers' names, OpenCLIP's towers under their own.
    """
    owners = [f"conditioner.embedders.{i}." if sgm else "cond_stage_model." for i in range(len(text))]
    return [
        (f"{owner}transformer.", hf_text()) if config.activation == "quick_gelu" else (f"{owner}model.", OPENCLIP_TEXT)
        for owner, config in zip(owners, text, strict=True)
    ]
