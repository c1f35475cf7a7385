"""What is concluded of diffusers folders of all ages: small files as the libraries of their day wrote them.

The configurations are written from facts about published folders, 2022 to 2025; the weights are hollow.
"""

import json
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ldm.checkpoint import tables
from ldm.checkpoint.files import identify
from ldm.checkpoint.parts import collect
from ldm.config import ModelConfig
from ldm.models.token_files import save_tokenizer
from ldm.models.tokens import Tokenizer
from ldm.presets import SD15, SD21_BASE, SDXL_BASE, SDXL_REFINER
from tests.checkpoint.standin import hollow_model, write_hollow
from tests.sparse import sparse

Json = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
SD1_UNET: Json = {  # of diffusers 0.2; what is absent had no name yet
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "layers_per_block": 2,
    "sample_size": 64,
    "down_block_types": [CROSS] * 3 + [PLAIN],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SD2_UNET = SD1_UNET | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SDXL_UNET = SD2_UNET | {
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "sample_size": 128,
    "down_block_types": [PLAIN, CROSS, CROSS],
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "upcast_attention": None,
    "only_cross_attention": False,
}
REFINER_UNET = SDXL_UNET | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": [PLAIN, CROSS, CROSS, PLAIN],
    "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
}
VAE: Json = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
CLIP_L: Json = {
    "architectures": ["CLIPTextModel"],
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "hidden_act": "quick_gelu",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
VIT_H = CLIP_L | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "hidden_act": "gelu",
}
BIG_G = VIT_H | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
BETAS: Json = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
END, BANG = "<|endoftext|>", "!"
DECODER: Json = {
    "added_tokens_decoder": {"0": {"content": "!", "special": True}, "49407": {"content": END, "special": True}}
}


def old_tokenizer(pad: str, said: str = END) -> Json:
    """transformers before 4.34: the map decides, whatever tokenizer_config.json says."""
    return {"tokenizer_config": {"pad_token": said}, "special_tokens_map": {"pad_token": pad}}


def new_tokenizer(pad: str, mapped: str | None = None) -> Json:
    """transformers since 4.34: tokenizer_config.json decides, and the map is not read."""
    return {"tokenizer_config": DECODER | {"pad_token": pad}, "special_tokens_map": {"pad_token": mapped or pad}}


@dataclass(frozen=True)
class Folder:
    """A folder's small files, and what is to be concluded. like: the preset with its names and shapes."""

    like: ModelConfig
    unet: Json
    scheduler: Json
    texts: tuple[Json, ...] = (CLIP_L,)
    tokenizers: tuple[Json, ...] = (old_tokenizer(END),)
    vae: Json = field(default_factory=lambda: VAE)
    index: Json = field(default_factory=dict)
    added: Json = field(default_factory=dict)  # added_tokens.json of the tokenizers
    preset: str = "sd15"
    prediction: str = "eps"
    spacing: str = "leading"
    offset: int = 1
    size: int = 512
    guidance: float = 7.5
    scale: float = 0.18215
    pads: tuple[int, ...] = (49407,)
    note: str | None = None


def scheduler(name: str, **options: Any) -> Json:
    return BETAS | {"_class_name": name} | options


SDXL = Folder(
    SDXL_BASE,
    SDXL_UNET,
    scheduler("EulerDiscreteScheduler", timestep_spacing="leading"),
    (CLIP_L, BIG_G),
    (old_tokenizer(END), old_tokenizer(BANG, BANG)),
    VAE | {"scaling_factor": 0.13025},
    {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
    preset="sdxl-base",
    size=1024,
    guidance=5.0,
    scale=0.13025,
    pads=(49407, 0),
)
SD1 = Folder(SD15, SD1_UNET, scheduler("PNDMScheduler"))
SD2 = Folder(
    SD21_BASE, SD2_UNET, scheduler("PNDMScheduler"), (VIT_H,), (old_tokenizer(BANG),), preset="sd21-base", pads=(0,)
)
FOLDERS = {
    "SD 1.4 of 2022: PNDM's own spacing, no scaling factor": SD1,
    "SD 1 trained by EveryDream, with DDPM": replace(
        SD1, scheduler=scheduler("DDPMScheduler", variance_type="fixed_small")
    ),
    "SD 1 at 640 pixels, of 2024": replace(
        SD1,
        unet=SD1_UNET | {"sample_size": 80},
        size=640,
        tokenizers=(new_tokenizer(END),),
        index={"image_encoder": [None, None]},
        vae=VAE | {"latents_mean": None, "force_upcast": True, "scaling_factor": 0.18215},
    ),
    "SD 1 whose converter wrote sample_size 32": replace(SD1, unet=SD1_UNET | {"sample_size": 32}, size=256),
    "SD 1 without an offset, which diffusers sets to 1": replace(
        SD1, scheduler=scheduler("DDIMScheduler", steps_offset=0)
    ),
    "SD 1 with an image encoder that is not used": replace(
        SD1,
        index={"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]},
        note="image_encoder is not used",
    ),
    "SD 1 in UniPC's linspace": replace(
        SD1, scheduler=scheduler("UniPCMultistepScheduler", timestep_spacing="linspace"), spacing="linspace"
    ),
    "SD 1 with DPM-Solver's Karras, over all timesteps": replace(
        SD1,
        spacing="karras",
        scheduler=scheduler("DPMSolverMultistepScheduler", timestep_spacing="leading", use_karras_sigmas=True),
    ),
    "SD 1 with Euler's Karras, over the leading list": replace(
        SD1,
        spacing="leading_karras",
        scheduler=scheduler("EulerDiscreteScheduler", timestep_spacing="leading", use_karras_sigmas=True),
    ),
    "SD 1 whose last step is the class's, to alpha 1": replace(
        SD1,
        scheduler=scheduler("DDIMScheduler", set_alpha_to_one=True),
        note="set_alpha_to_one True has no counterpart",
    ),
    "SD 2.1 at 768, official: the map says '!', the config <|endoftext|>": replace(
        SD2,
        unet=SD2_UNET | {"sample_size": 96, "upcast_attention": True},
        preset="sd21",
        prediction="v",
        size=768,
        scheduler=scheduler("DDIMScheduler", prediction_type="v_prediction"),
    ),
    "SD 2.1-base, official": SD2,
    "SD 2 whose index says PNDM and whose scheduler file says DDIM": replace(
        SD2, index={"scheduler": ["diffusers", "PNDMScheduler"]}, scheduler=scheduler("DDIMScheduler")
    ),
    "SD 2 whose index says LCM over another's file": replace(
        SD2,
        index={"scheduler": ["diffusers", "LCMScheduler"]},
        scheduler=scheduler("DDIMScheduler"),
        spacing="lcm",
        guidance=1.0,  # an LCM without an embedded scale has the guidance in its weights
    ),
    "SD 2 since transformers 4.34: the config decides": replace(SD2, tokenizers=(new_tokenizer(BANG, END),)),
    "SD 2 saved with <|endoftext|> as diffusers would pad it": replace(
        SD2, tokenizers=(new_tokenizer(END, BANG),), pads=(49407,), note="pads with <|endoftext|>"
    ),
    "SD 2.1-base with SD.Next's trailing scheduler": replace(
        SD2, scheduler=scheduler("EulerAncestralDiscreteScheduler", timestep_spacing="trailing"), spacing="trailing"
    ),
    "SDXL base, official": SDXL,
    "SDXL with SD.Next's trailing scheduler": replace(
        SDXL, spacing="trailing", scheduler=scheduler("EulerAncestralDiscreteScheduler", timestep_spacing="trailing")
    ),
    "SDXL-Turbo: trailing, and 64 latent pixels": replace(
        SDXL,
        unet=SDXL_UNET | {"sample_size": 64},
        preset="sdxl-turbo",
        spacing="trailing",
        size=512,
        guidance=0.0,
        scheduler=scheduler("EulerAncestralDiscreteScheduler", timestep_spacing="trailing"),
        tokenizers=(
            old_tokenizer(END),
            {"special_tokens_map": {"pad_token": {"content": "!"}}, "tokenizer_config": {}},
        ),
    ),
    "SDXL of an early converter, with SD 1's scale": replace(SDXL, vae=VAE | {"sample_size": 256}, scale=0.18215),
    "SDXL with added_tokens.json that adds nothing": replace(
        SDXL, tokenizers=(new_tokenizer(END), new_tokenizer(BANG)), added={"!": 0, "<|startoftext|>": 49406, END: 49407}
    ),
    "SDXL with an offset of 0, which its pipeline follows": replace(
        SDXL, scheduler=scheduler("EulerDiscreteScheduler", timestep_spacing="leading", steps_offset=0), offset=0
    ),
    "the SDXL refiner, whose tower stands in text_encoder": Folder(
        SDXL_REFINER,
        REFINER_UNET,
        SDXL.scheduler,
        (BIG_G,),
        (old_tokenizer(BANG, BANG),),
        SDXL.vae,
        {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True},
        preset="sdxl-refiner",
        size=1024,
        guidance=5.0,
        scale=0.13025,
        pads=(0,),
    ),
    "SD 1 for inpainting": replace(SD1, unet=SD1_UNET | {"in_channels": 9}, preset="sd15-inpainting"),
}
REFUSED = {
    "is a .* with controlnet, which is not supported": replace(
        SD1, index={"controlnet": ["diffusers", "ControlNetModel"]}
    ),
    "text_encoder of .* is ChatGLMModel, supported are CLIPTextModel": replace(
        SDXL, index={"text_encoder": ["kolors", "ChatGLMModel"]}
    ),
    "is a virtual try-on model.*13 input channels": replace(SDXL, unet=SDXL_UNET | {"in_channels": 13}),
    "depth-to-image, which needs a depth map": replace(SD2, unet=SD2_UNET | {"in_channels": 5}),
    "EDMDPMSolverMultistepScheduler": replace(
        SDXL, scheduler=scheduler("EDMDPMSolverMultistepScheduler", sigma_max=80.0)
    ),
    "latents_mean .* is not supported": replace(SDXL, vae=VAE | {"latents_mean": [-1.6, 1.9, -1.4, 2.5]}),
    "describes AutoencoderTiny, supported are AutoencoderKL": replace(SD1, vae={"_class_name": "AutoencoderTiny"}),
    "thresholding True is not supported": replace(
        SD1, scheduler=scheduler("DPMSolverMultistepScheduler", thresholding=True)
    ),
}


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's vocab.json and merges.txt, as every folder has them."""
    folder = tmp_path_factory.mktemp("vocabulary")
    save_tokenizer(Tokenizer.official(), folder, 77)
    return folder


@cache
def shapes_of(like: ModelConfig, inputs: int) -> list[Shapes]:
    """Return the names and shapes of the networks in diffusers' layout: the UNet, the VAE, the text encoders."""
    model = hollow_model(replace(like, unet=replace(like.unet, in_channels=inputs)))
    tensors = [
        collect(model.unet, tables.diffusers_unet(model.config.unet)),
        collect(model.vae, tables.diffusers_vae()),
    ]
    tensors += [collect(tower, tables.hf_text()) for tower in model.text_encoder.towers]
    return [{name: tuple(value.shape) for name, value in network.items()} for network in tensors]


def write_folder(root: Path, made: Folder, vocabulary: Path) -> Path:
    """Write the folder, with hollow weights."""
    unet, vae, *texts = shapes_of(made.like, made.unet["in_channels"])
    towers = ["text_encoder", "text_encoder_2"][: len(made.texts)]
    index = {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None]}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"scheduler": ["diffusers", made.scheduler["_class_name"]]}
    parts = [("unet", made.unet, "diffusion_pytorch_model", unet), ("vae", made.vae, "diffusion_pytorch_model", vae)]
    for name, config, shapes in zip(towers, made.texts, texts, strict=True):
        index |= {name: ["transformers", config["architectures"][0]]}
        index |= {name.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"]}
        parts.append((name, config, "model", shapes))
    for name, config, stem, shapes in parts:
        write_json(root / name / "config.json", config)
        write_hollow(root / name / f"{stem}.safetensors", shapes)
    for name, tokenizer in zip(towers, made.tokenizers, strict=True):
        folder = root / name.replace("text_encoder", "tokenizer")
        for stem, content in tokenizer.items():
            write_json(folder / f"{stem}.json", content)
        if made.added:
            write_json(folder / "added_tokens.json", made.added)
        for file in ("vocab.json", "merges.txt"):
            (folder / file).symlink_to(vocabulary / file)
    write_json(root / "scheduler" / "scheduler_config.json", made.scheduler)
    write_json(root / "model_index.json", index | made.index)
    return root


def write_json(path: Path, value: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("name", sparse(FOLDERS, 3))
def test_what_is_concluded_of_a_folder(name: str, tmp_path: Path, vocabulary: Path) -> None:
    made = FOLDERS[name]
    found = identify(write_folder(tmp_path / "model", made, vocabulary))
    config = found.config
    assert (config.name, config.diffusion.prediction) == (made.preset, made.prediction)
    assert (config.diffusion.spacing, config.diffusion.offset) == (made.spacing, made.offset)
    assert (config.image_size, config.guidance_scale) == (made.size, made.guidance)
    assert config.vae.scaling_factor == made.scale
    assert tuple(text.pad_id for text in config.text) == made.pads
    assert [max(tokenizer.vocab.values()) for tokenizer in found.source.tokenizers] == [49407] * len(made.pads)
    if made.note is None:
        assert found.source.notes == ()
    else:
        assert made.note in found.why


@pytest.mark.parametrize("message", REFUSED)
def test_folders_that_would_give_other_pictures_are_refused_by_name(
    message: str, tmp_path: Path, vocabulary: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        identify(write_folder(tmp_path / "model", REFUSED[message], vocabulary))


def test_a_folder_that_an_earlier_version_padded_wrongly_is_read_with_the_right_padding(
    tmp_path: Path, vocabulary: Path
) -> None:
    root = write_folder(tmp_path / "model", replace(SD2, tokenizers=(new_tokenizer(END),)), vocabulary)
    extras = {"name": "custom", "image_size": 512, "guidance_scale": 7.5, "steps": 25, "sampler": "dpmpp_2m"}
    write_json(root / "ldm.json", extras)
    found = identify(root)
    assert found.config.text[0].pad_id == 0
    assert "earlier version of ldm wrote the wrong padding token" in found.why


def test_sd_turbo_as_a_folder_is_told_by_its_name_alone(tmp_path: Path, vocabulary: Path) -> None:
    trailing = FOLDERS["SD 2.1-base with SD.Next's trailing scheduler"]
    assert identify(write_folder(tmp_path / "sd-turbo", trailing, vocabulary)).preset == "sd-turbo"
