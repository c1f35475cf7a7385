"""Configurations of the official models and of models distilled from them, and recognition of an architecture.

A preset has every number that a checkpoint requires; nothing else in the package branches on a model's name.
"""

import dataclasses

from ldm.config import DiffusionConfig, ModelConfig, TextConfig, UNetConfig, VAEConfig

_VIT_H = TextConfig(
    width=1024,
    layers=23,  # the 24th layer of the file is unused: the context is the layer before it, after the final norm
    heads=16,
    mlp=4096,
    activation="gelu",
    pad_id=0,
)
_SDXL_CLIP_L = TextConfig(output_layer=-2, final_norm=False)
_SDXL_BIG_G = TextConfig(
    width=1280,
    layers=32,
    heads=20,
    mlp=5120,
    activation="gelu",
    projection=1280,
    pad_id=0,
    output_layer=-2,
    final_norm=False,
)

SD15 = ModelConfig(name="sd15")
SD21_BASE = ModelConfig(
    name="sd21-base", unet=UNetConfig(heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True), text=(_VIT_H,)
)
SD21 = dataclasses.replace(
    SD21_BASE,
    name="sd21",
    unet=dataclasses.replace(SD21_BASE.unet, upcast_attention=True),
    diffusion=DiffusionConfig(prediction="v"),
    image_size=768,
)
SD_TURBO = dataclasses.replace(
    SD21_BASE,
    name="sd-turbo",
    diffusion=DiffusionConfig(spacing="trailing"),
    guidance_scale=0.0,  # the guidance is distilled into the weights (Sauer et al. 2023)
    steps=4,
    sampler="euler_ancestral",
)
SDXL_BASE = ModelConfig(
    name="sdxl-base",
    unet=UNetConfig(
        channels=(320, 640, 1280),
        depth=(0, 2, 10),
        mid_depth=10,
        heads=(5, 10, 20),
        context_dim=2048,
        vector_dim=2816,
        linear_projection=True,
    ),
    vae=VAEConfig(scaling_factor=0.13025, overflows_fp16=True),
    text=(_SDXL_CLIP_L, _SDXL_BIG_G),
    image_size=1024,
    guidance_scale=5.0,
    zero_negative=True,
)
SDXL_TURBO = dataclasses.replace(
    SDXL_BASE,
    name="sdxl-turbo",
    diffusion=DiffusionConfig(spacing="trailing"),
    image_size=512,
    guidance_scale=0.0,
    steps=4,
    sampler="euler_ancestral",
)
SDXL_REFINER = ModelConfig(
    name="sdxl-refiner",
    unet=UNetConfig(
        channels=(384, 768, 1536, 1536),
        depth=(0, 4, 4, 0),
        mid_depth=4,
        heads=(6, 12, 24, 24),
        context_dim=1280,
        vector_dim=2560,
        linear_projection=True,
    ),
    vae=VAEConfig(scaling_factor=0.13025, overflows_fp16=True),
    text=(_SDXL_BIG_G,),
    image_size=1024,
    guidance_scale=5.0,
)
TINY = ModelConfig(  # weights/tiny, trained by the recipes in configs/
    name="tiny",
    unet=UNetConfig(
        in_channels=8,
        out_channels=8,
        channels=(96, 160, 192),
        res_blocks=1,
        depth=(0, 1, 1),
        heads=(3, 5, 6),
        context_dim=192,
        norm_groups=8,  # at least 12 channels per group; with fewer, absolute color is lost
    ),
    vae=VAEConfig(
        channels=(32, 64, 128, 128), res_blocks=1, latent_channels=8, norm_groups=4, scaling_factor=0.9305599450490267
    ),
    text=(TextConfig(width=192, layers=3, heads=6, mlp=768, vocab_size=1264, max_length=32, pad_id=1263),),
    diffusion=DiffusionConfig(prediction="v", spacing="trailing"),
    image_size=128,
    guidance_scale=4.0,
)
PRESETS: dict[str, ModelConfig] = {
    preset.name: preset for preset in (SD15, SD21_BASE, SD21, SD_TURBO, SDXL_BASE, SDXL_REFINER, SDXL_TURBO, TINY)
}

# UNets distilled from SD 1.5 or SDXL, by their published names. The other networks are those of SD 1.5 or SDXL.
_KOALA = dataclasses.replace(SDXL_BASE.unet, res_blocks=1, depth=(0, 2, 5), mid="none")
_BK_SDM = dataclasses.replace(SD15.unet, res_blocks=1)
RELATIVES: dict[str, UNetConfig] = {
    "SSD-1B": dataclasses.replace(SDXL_BASE.unet, depth=(0, 2, 4), up_depth=((4, 4, 10), (2, 1, 1), 0), mid="residual"),
    "Segmind-Vega": dataclasses.replace(SDXL_BASE.unet, depth=(0, 1, 2), mid="residual"),
    "KOALA-700M": _KOALA,
    "KOALA-1B": dataclasses.replace(_KOALA, depth=(0, 2, 6), mid="full", mid_depth=6),
    "BK-SDM-Base": _BK_SDM,  # and Segmind's small-sd
    "BK-SDM-Small": dataclasses.replace(_BK_SDM, mid="none"),
    "BK-SDM-Tiny": dataclasses.replace(  # and Segmind's tiny-sd
        _BK_SDM, channels=(320, 640, 1280), depth=(1, 1, 1), heads=(8, 8, 8), mid="none"
    ),
}

FAMILIES = (SD15, SD21_BASE, SDXL_BASE, SDXL_REFINER)  # one preset per family
VARIANTS = {4: "", 8: "-instruct-pix2pix", 9: "-inpainting"}  # suffixes of names, by the UNet's input channels


def recognize(
    unet: UNetConfig, vae: VAEConfig, text: tuple[TextConfig, ...], diffusion: DiffusionConfig, *, turbo: bool = False
) -> ModelConfig:
    """Return an architecture as a ModelConfig, with the name and the defaults of the preset that it matches.

    Without a match the name is "custom", and the image size, guidance and steps are those of the closest family.
    turbo: the model is SD-Turbo or SDXL-Turbo, whose networks are those of SD 2 and SDXL.
    """
    family = next((p for p in FAMILIES if family_key(p.unet) == family_key(unet)), None)
    like = family or (SDXL_BASE if unet.is_sdxl else SD15)
    if like is SD21_BASE:
        like = SD_TURBO if turbo else SD21 if diffusion.prediction == "v" else SD21_BASE
    elif like is SDXL_BASE and turbo:
        like = SDXL_TURBO
    own = dataclasses.replace(like, unet=unet, vae=vae, text=text, diffusion=diffusion)
    if unet.guidance_dim is not None:
        diffusion = dataclasses.replace(diffusion, spacing="lcm")
        own = dataclasses.replace(own, diffusion=diffusion, sampler="lcm", steps=4, guidance_scale=8.5)
    elif diffusion.spacing == "lcm":  # distilled without the scale as an input, such as merged with an LCM-LoRA
        own = dataclasses.replace(own, sampler="lcm", steps=4, guidance_scale=1.0)
    plain = dataclasses.replace(
        unet, in_channels=4, upcast_attention=like.unet.upcast_attention, linear_projection=like.unet.linear_projection
    )
    name = "custom"
    if unet.in_channels in VARIANTS and [t.width for t in text] == [t.width for t in like.text]:
        names = {like.name: like.unet} | RELATIVES | {"lcm": dataclasses.replace(SD15.unet, guidance_dim=256)}
        found = (known + VARIANTS[unet.in_channels] for known, other in names.items() if other == plain)
        name = next(found, "custom")
    return dataclasses.replace(own, name=name)


def family_key(unet: UNetConfig) -> tuple[int, int, int | None]:
    """Return the numbers that differ between the UNets of the families, and agree within a family."""
    return unet.channels[0], unet.context_dim, unet.vector_dim
