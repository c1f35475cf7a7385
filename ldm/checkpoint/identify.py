"""Identify the networks in a file, their architecture and prediction type, from names, shapes and metadata."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from ldm.checkpoint import tables
from ldm.checkpoint.keymap import Rule, translate
from ldm.checkpoint.known import NAMES, KnownFile
from ldm.checkpoint.parts import Part
from ldm.checkpoint.tensors import Tensors
from ldm.config import ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.diffusion.denoiser import Prediction
from ldm.presets import FAMILIES, PRESETS, SD15, SD21, SD21_BASE, SDXL_BASE, family_key

ENOUGH_EMA = 100  # the fewest tensors of a moving average of the UNet; pruned files keep two counters of it
OTHER_INPUTS = {  # UNets with inputs that this package does not provide, by their input channels
    5: "Stable Diffusion 2 depth-to-image, which needs a depth map",
    7: "the Stable Diffusion x4 upscaler, which needs a small picture",
    13: "a virtual try-on model, which needs pictures of a person and of clothes",
}

# Tensors beside the networks that are left out without a note: the noise schedule, moving averages, training state,
# and constants. The schedule is computed anew, because fp16 files lose its low end.
IGNORED = re.compile(
    r"betas|alphas_cumprod(_prev)?|(sqrt|log)_one_minus_alphas_cumprod|sqrt_(recip_|recipm1_)?alphas_cumprod"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|logvar|scale_factor|denoiser\.(log_)?sigmas"
    r"|(model_ema|loss|first_stage_model\.loss|embedding_manager|cond_stage_model\.(.*\.)?vision_model)\..*"
    r"|(.*\.)?(position_ids|attn_mask|logit_scale)|cond_stage_key|v_pred|ztsnr"
)
_SCALED = re.compile(
    r"(.*\.)?scaled_fp8|.*\.(comfy_quant|scale_weight|scale_input|weight_scale|input_scale|absmax|quant_map)"
)
_EDM = {"edm_mean": "Playground v2.5", "edm_std": "Playground v2.5", "edm_vpred.sigma_max": "CosXL"}
_TOWER = re.compile(  # the token embedding of a text tower; the group `level` tells the style of its names
    r"(?P<prefix>((cond_stage_model|conditioner\.embedders\.\d+|text_encoders?(_2)?(\.clip_[lgh])?|clip_[lgh]|te[12]?)\.)?"
    r"(model\.)?(transformer\.)?)(?P<level>text_model\.embeddings\.|embeddings\.|)token_embedding\.weight"
)
_STYLES = {"text_model.embeddings.": "hf", "embeddings.": "hf without text_model", "": "openclip"}


class Place(NamedTuple):
    """Where a network is in a file: the prefix of its tensors' names, and the style of the names after it."""

    prefix: str
    style: str  # "ldm", "diffusers"; for text towers "hf", "hf without text_model", "openclip"


class Tower(NamedTuple):
    """A text tower in a file."""

    place: Place
    width: int
    vocab_size: int


class Contents(NamedTuple):
    """The networks that a file holds. towers: all text towers, those with the shortest prefix first."""

    unet: Place | None
    vae: Place | None
    towers: tuple[Tower, ...]


def find(tensors: Tensors) -> Contents:
    """Find the networks of a file under the prefixes and styles of names in use."""
    names = {name for name in tensors.shapes if not IGNORED.fullmatch(name)}
    unet_marks = {  # all of a style must be there: a ControlNet has the first one too
        "ldm": ("input_blocks.0.0.weight", "out.2.weight"),
        "diffusers": ("conv_in.weight", "conv_norm_out.weight", "time_embedding.linear_1.weight"),
    }
    vae_marks = {
        "ldm": ("encoder.down.0.block.0.conv1.weight",),
        "diffusers": ("encoder.down_blocks.0.resnets.0.conv1.weight",),
    }
    unet = _place(names, (tables.UNET_PREFIX, "unet.", "diffusion_model.", ""), unet_marks)
    vae = _place(names, (tables.VAE_PREFIX, "vae.", ""), vae_marks)
    towers = []
    for found in filter(None, map(_TOWER.fullmatch, names)):
        if len(shape := tensors.shapes[found[0]]) == 2:
            towers.append(Tower(Place(found["prefix"], _STYLES[found["level"]]), shape[1], shape[0]))
    return Contents(unet, vae, tuple(sorted(towers, key=lambda t: (len(t.place.prefix), t.place))))


def _place(names: set[str], prefixes: tuple[str, ...], marks: Mapping[str, tuple[str, ...]]) -> Place | None:
    styles = ((p, style, found) for p in prefixes for style, found in marks.items())
    return next((Place(p, style) for p, style, found in styles if names.issuperset(p + n for n in found)), None)


def check_stored_plainly(tensors: Tensors) -> None:
    """Raise ValueError for quantized weights, which need a scale, and for EDM models: neither is supported."""
    for name, dtype in tensors.dtypes.items():
        if _SCALED.fullmatch(name) or (dtype in ("I8", "U8") and name.endswith(".weight")):
            raise ValueError(
                f"{tensors} is quantized, its numbers need scales ({name}): give one in fp32, fp16 or bf16"
            )
    for name, model in _EDM.items():
        if name in tensors.shapes:
            raise ValueError(f"{tensors} is an EDM model as {model} is (it holds {name}), which is not supported")


def unet_part(tensors: Tensors, place: Place, config: UNetConfig, *, ema: bool = False) -> Part:
    """Return the UNet at `place` as a Part. ema: read its moving average instead."""
    return Part(tensors, _unet_rules(tensors, place, config), place.prefix, ema=ema)


def vae_part(tensors: Tensors, place: Place, config: VAEConfig) -> Part:
    """Return the VAE at `place` as a Part. In diffusers' style its attention has the current names or the old ones."""
    if place.style == "ldm":
        return Part(tensors, tables.ldm_vae(config), place.prefix)
    old = any(name.endswith("attentions.0.query.weight") for name in tensors.shapes)
    attention = tables.OLD_DIFFUSERS_VAE_ATTENTION if old else tables.DIFFUSERS_VAE_ATTENTION
    return Part(tensors, tables.diffusers_vae(attention), place.prefix)


def text_part(tensors: Tensors, place: Place, config: TextConfig) -> Part:
    """Return the text tower at `place` as a Part, with the official tensors that `config` does not use."""
    prefix, shapes = place.prefix, tensors.shapes
    openclip = place.style == "openclip"
    rules = tables.OPENCLIP_TEXT if openclip else tables.hf_text("text_model" if place.style == "hf" else "")
    if openclip and f"{prefix}text_projection" not in shapes:  # Playground v2 stores the weight of a Linear
        rules = (Rule("projection.weight", "text_projection.weight"), *rules)
    last = translate(f"blocks.{config.layers}.norm1.x", rules, prefix).name  # SD 2 uses the layers before this one only
    last = last.rsplit(".", 2)[0] + "."
    unused = {f"{prefix}logit_scale"}
    if config.projection is None and (openclip or config.layers == SD21.text[0].layers):
        unused |= {f"{prefix}text_projection", *(n for n in shapes if n.startswith(last))}
    return Part(tensors, rules, prefix, unused=tuple(sorted(unused & shapes.keys())))


def count_ema(tensors: Tensors) -> int:
    """Count the tensors of the UNet's moving average."""
    return sum(name.startswith("model_ema.diffusion_model") for name in tensors.shapes)


def _unet_rules(tensors: Tensors, place: Place, config: UNetConfig) -> tuple[Rule, ...]:
    """Return the rules from our UNet to the file's names. Two names of the guidance embedding are in use."""
    if place.style == "diffusers":
        return tables.diffusers_unet(config)
    other = Rule("guidance_embed", "time_embed.cond_proj")
    found = f"{place.prefix}{other.theirs}.weight" in tensors.shapes
    return (other, *tables.ldm_unet(config)) if found else tables.ldm_unet(config)


class Shapes:
    """The shapes of a UNet's tensors by our own names, whatever the style of the names in the file."""

    def __init__(self, tensors: Tensors, place: Place) -> None:
        self.tensors, self.place = tensors, place
        self.names = [n for n in tensors.shapes if n.startswith(place.prefix)]
        self.number_by(8)  # an upper bound, until they are counted

    def number_by(self, res_blocks: int) -> None:
        """Number the stages as a UNet with this many residual blocks per level does."""
        self.rules = _unet_rules(self.tensors, self.place, dataclasses.replace(SD15.unet, res_blocks=res_blocks))

    def name(self, key: str) -> str:
        """Return the name that our parameter `key` has in the file's style."""
        return translate(key, self.rules, self.place.prefix).name

    def __contains__(self, key: str) -> bool:
        return self.name(key) in self.tensors.shapes

    def size(self, key: str, dim: int) -> int:
        """Return the size of `key` along `dim`. Raises ValueError if the tensor or the dimension is missing."""
        shape = self.tensors.shapes.get(self.name(key), ())
        if dim >= len(shape):
            raise ValueError(f"{self.tensors} lacks {self.name(key)}, or its shape is wrong: {list(shape)}")
        return shape[dim]

    def depth(self, stage: str) -> int:
        """Count the transformer blocks of a stage, such as "down.1" or "mid"."""
        start = self.name(f"{stage}.transformer.blocks.0.norm1").removesuffix("0.norm1")
        numbers = (n.removeprefix(start).split(".")[0] for n in self.names if n.startswith(start))
        return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def unet_of(tensors: Tensors, place: Place) -> tuple[UNetConfig, ModelConfig, str]:
    """Identify a UNet by its names and shapes. Returns its architecture, its family's preset, and the reason.

    Raises ValueError as `encoder_of` does.
    """
    shapes, config, family, why = encoder_of(tensors, place)
    levels, per_level = len(config.channels), config.res_blocks + 1
    up = [shapes.depth(f"up.{i}") for i in range(levels * per_level)]
    config = dataclasses.replace(
        config,
        out_channels=shapes.size("conv_out.weight", 0),
        up_depth=tuple(tuple(up[i : i + per_level]) for i in range(0, len(up), per_level)),
        guidance_dim=shapes.size("guidance_embed.weight", 1) if "guidance_embed.weight" in shapes else None,
    )
    lcm = ", distilled into a latent consistency model (LCM)" if config.guidance_dim else ""
    return config, family, f"{why}{lcm}"


def encoder_of(tensors: Tensors, place: Place) -> tuple[Shapes, UNetConfig, ModelConfig, str]:
    """Identify the encoder of a UNet or ControlNet. Returns its shapes, architecture, family's preset, and the reason.

    Everything is counted, except the numbers of heads, which are those of the family. Raises ValueError for a family
    that is not supported, naming it if it is known.
    """
    shapes = Shapes(tensors, place)
    counts = range(1, 9)
    res_blocks = next((i for i in counts if f"down.{i + 1}.res.norm1.weight" not in shapes), 8)
    shapes.number_by(res_blocks)
    per_level = res_blocks + 1
    levels = next((i for i in counts if f"down.{i * per_level + 1}.res.norm1.weight" not in shapes), 8)
    channels = tuple(shapes.size(f"down.{i * per_level + 1}.res.conv1.weight", 0) for i in range(levels))
    inputs = shapes.size("down.0.conv.weight", 1)
    vector = shapes.size("vector_embed.0.weight", 1) if "vector_embed.0.weight" in shapes else None
    text = next((tensors.shapes[n] for n in shapes.names if n.endswith("attn2.to_k.weight")), ())
    context = text[1] if len(text) == 2 else 0
    if not text and vector == SDXL_BASE.unet.vector_dim:
        context = SDXL_BASE.unet.context_dim  # the small ControlNet for SDXL has no attention

    seen = f"{channels[0]} model channels and text of width {context}"
    check_inputs(inputs, tensors)
    family = [p for p in FAMILIES if family_key(p.unet) == (channels[0], context, vector)]
    if not family:
        name = "Stable unCLIP" if vector and context == 1024 else "no family known here"
        raise ValueError(
            f"{tensors} is {name} ({seen}, {f'a vector of {vector}' if vector else 'no vector'}): supported are "
            + ", ".join(NAMES.values())
        )
    down = [shapes.depth(f"down.{i}") for i in range(levels * per_level)]
    per_block = [tuple(down[i + 1 : i + per_level]) for i in range(0, len(down), per_level)]
    depth = tuple(blocks[0] if len(set(blocks)) == 1 else blocks for blocks in per_block)
    middle: Literal["full", "residual", "none"] = "full" if shapes.depth("mid") else "residual"
    if "mid.res_in.norm1.weight" not in shapes:
        middle = "none"
    config = dataclasses.replace(
        family[0].unet,
        in_channels=inputs,
        channels=channels,
        res_blocks=res_blocks,
        depth=depth,
        up_depth=None if all(isinstance(d, int) for d in depth) else (0,) * levels,  # an encoder has none
        mid=middle,
        mid_depth=shapes.depth("mid"),
        heads=(8,) * levels if family[0] is SD15 else tuple(max(c // 64, 1) for c in channels),
    )
    return shapes, config, family[0], f"{seen} are {NAMES[context]}"


def check_inputs(channels: int, where: object, latents: int = 4) -> None:
    """Raise ValueError for a number of UNet input channels that no task has. latents: channels of the latents."""
    if channels not in (latents, 2 * latents, 2 * latents + 1):
        name = OTHER_INPUTS.get(channels, "no model that is known here")
        raise ValueError(f"{where} is {name} ({channels} input channels): it is not supported")


def padded_as_official(text: tuple[TextConfig, ...], *, ours: bool) -> tuple[tuple[TextConfig, ...], tuple[str, ...]]:
    """Return `text` with the padding token of OpenCLIP's towers corrected if this package wrote the file, and notes.

    ours: whether this package wrote the file. Version 0.1 read SD 2 folders with the wrong padding token.
    """
    wrong = [(t.activation, t.pad_id, t.vocab_size) == ("gelu", 49407, 49408) for t in text]
    if not any(wrong):
        return text, ()
    if not ours:
        return text, ('its text encoder pads with <|endoftext|>, and all official OpenCLIP towers with "!"',)
    text = tuple(dataclasses.replace(t, pad_id=0) if bad else t for t, bad in zip(text, wrong, strict=True))
    return text, ('an earlier version of ldm wrote the wrong padding token into it; "!" is used',)


# What the UNet predicts.

_WORDS: dict[str, Prediction] = {
    **dict.fromkeys(("eps", "epsilon", "eps_prediction", "epsilon_prediction"), "eps"),
    **dict.fromkeys(("v", "v_pred", "vpred", "v_prediction", "vprediction", "v_parameterization", "velocity"), "v"),
    **dict.fromkeys(("x0", "sample"), "x0"),
}
_METADATA: dict[str, dict[str, Prediction]] = {
    "modelspec.prediction_type": _WORDS,  # values such as "v-zsnr" also name the schedule
    "modelspec.predict_key": _WORDS,  # of ComfyUI
    "ss_v_parameterization": {"true": "v", "false": "eps"},  # of kohya's trainer
}
_SD2_METADATA: dict[str, dict[str, Prediction]] = {
    "modelspec.architecture": {"stable_diffusion_v2_512": "eps", "stable_diffusion_v2_768_v": "v"},
    "global_step": {"875000": "eps", "220000": "eps", "110000": "v"},  # 2.0 base, 2.1 base, 2.1
}
# ComfyUI's rule: the standard deviation of this tensor is above the bound in SD 2 models that predict v only.
_PROBED, _PROBED_STD = "up.11.transformer.blocks.0.norm1.bias", 0.09


class Decision(NamedTuple):
    """What the UNet predicts, whether its schedule ends at zero SNR, the reason, and notes for the user."""

    prediction: Prediction
    zero_terminal_snr: bool
    why: str
    notes: tuple[str, ...]


def decide(
    tensors: Tensors, place: Place, family: ModelConfig, asked: Prediction | None, known: KnownFile | None
) -> Decision:
    """Decide what the UNet at `place` predicts, by the first source that tells; notes name the others that disagree.

    The sources in order: the user (`asked`), a known file (`known`), marker tensors, metadata, and for SD 2 the
    standard deviation of one small tensor. If none tells, the UNet predicts eps.
    """
    said, notes = [], []  # said: (prediction, the clause that gives the reason)
    zero_snr = "it holds the marker tensor ztsnr" if "ztsnr" in tensors.shapes else ""
    if asked:
        said.append((asked, f"you asked for {asked}"))
    if known and known.preset:
        prediction = PRESETS[known.preset.removesuffix("-inpainting")].diffusion.prediction
        said.append((prediction, f"by its {known.told_by} it is {known.name}, which predicts {prediction}"))
    if "v_pred" in tensors.shapes:
        said.append(("v", "it holds the marker tensor v_pred"))
    for key, meanings in (_METADATA | (_SD2_METADATA if family is SD21_BASE else {})).items():
        value = tensors.metadata.get(key, "").strip()
        word = re.sub(r"[\W_]+", "_", value.lower()).strip("_")
        plain = re.sub(r"_?zt?snr_?", "", word)
        clause = f"its metadata {key} says {value[:40]!r}"
        if plain != word:
            zero_snr = zero_snr or clause
        if plain in meanings:
            said.append((meanings[plain], clause))
        elif meanings is _WORDS and plain not in ("", "none"):
            notes.append(f"{clause}, which is not a known prediction type")
    if tensors.metadata.get("ss_zero_terminal_snr", "").lower() == "true":
        zero_snr = zero_snr or "its metadata ss_zero_terminal_snr says so"
    if family is SD21_BASE:
        said += _probe(tensors, Shapes(tensors, place))
    said.append(("eps", "its family does and nothing in it says otherwise"))

    prediction, why = said[0]
    notes += [f"{clause}, which is not followed" for other, clause in said[1:-1] if other != prediction]
    if zero_snr:
        why += f"; its schedule ends in zero SNR: {zero_snr}"
    return Decision(prediction, bool(zero_snr), why, tuple(notes))


def _probe(tensors: Tensors, shapes: Shapes) -> Iterator[tuple[Prediction, str]]:
    """Tell eps from v in SD 2 text-to-image models, which agree in all names and shapes."""
    shapes.number_by(SD21.unet.res_blocks)
    name = shapes.name(_PROBED)
    if name in tensors.shapes and shapes.size("down.0.conv.weight", 1) == 4:
        ((_, value),) = tensors.read([name])
        std = value.float().std(unbiased=False).item()
        prediction: Prediction = "v" if std > _PROBED_STD else "eps"
        side = "above" if prediction == "v" else "not above"
        found = f"the standard deviation of {name}, {std:.3f}, is {side} {_PROBED_STD}"
        yield prediction, f"{found}, as in SD 2 models that predict {prediction}"
