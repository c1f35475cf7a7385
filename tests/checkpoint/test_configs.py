"""diffusers' and transformers' config files: read, written, completed by defaults, and refused."""

import dataclasses
import functools
import typing

import diffusers
import pytest
import torch
from transformers import CLIPTextConfig

from ldm.checkpoint import configs
from ldm.config import DiffusionConfig, TextConfig, UNetConfig, VAEConfig
from ldm.diffusion.schedule import BetaSchedule, NoiseSchedule, Spacing
from ldm.presets import PRESETS, SD15, SD21, SD21_BASE, SD_TURBO, SDXL_BASE, SDXL_REFINER, recognize

# What the folder of SD 1.5 says (without what its libraries ignore), written by diffusers 0.6
VAE_FROM = functools.partial(configs.vae_from_json, sdxl=False)
DIFFUSION_FROM = functools.partial(configs.diffusion_from_json, sdxl=False)
SD15_UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}


def test_sd15s_own_unet_config_is_the_preset():
    assert configs.unet_from_json(SD15_UNET, "here") == SD15.unet


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_configs_come_back_as_they_were_written(preset):
    assert configs.unet_from_json(configs.unet_to_json(preset.unet, 64), "") == preset.unet
    sdxl = preset.unet.vector_dim is not None
    assert configs.vae_from_json(configs.vae_to_json(preset.vae, 512), "", sdxl=sdxl) == preset.vae
    for text in preset.text:
        json = configs.text_to_json(text, 0, 2, sdxl=sdxl)
        assert configs.text_from_json(json, "", text.pad_id, sdxl=sdxl) == text
    json = configs.diffusion_to_json(preset.diffusion, preset.sampler)
    assert configs.diffusion_from_json(json, "", sdxl=sdxl) == (preset.diffusion, ())


@pytest.mark.parametrize("spacing", typing.get_args(Spacing))
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_ancestral"])
def test_every_diffusion_config_has_a_scheduler_that_diffusers_can_build(spacing, prediction, sampler):
    config = DiffusionConfig(prediction, "linear", 0.001, 0.01, 500, zero_terminal_snr=True, spacing=spacing, offset=0)
    json = configs.diffusion_to_json(config, sampler)
    scheduler = getattr(diffusers, json["_class_name"]).from_config(json)
    scheduler.set_timesteps(5)
    found, notes = configs.diffusion_from_json(dict(scheduler.config), "", sdxl=True)
    assert found == config
    if spacing != "lcm":  # what its last step is towards makes no difference to LCM
        assert notes == ()


@pytest.mark.parametrize("betas", typing.get_args(BetaSchedule))
def test_every_noise_schedule_is_that_of_diffusers(betas):
    config = DiffusionConfig(betas=betas)
    json = configs.diffusion_to_json(config, "ddim")
    assert configs.diffusion_from_json(json, "", sdxl=True)[0] == config
    theirs = diffusers.DDIMScheduler.from_config(json).alphas_cumprod
    ours = NoiseSchedule.from_config(config).alphas_cumprod
    torch.testing.assert_close(ours, theirs.double(), rtol=2e-4, atol=0)  # theirs are products in fp32


@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        ("PNDMScheduler", "leading"),
        ("DDIMScheduler", "leading"),
        ("DDPMScheduler", "leading"),
        ("LCMScheduler", "lcm"),
        ("EulerDiscreteScheduler", "linspace"),
        ("EulerAncestralDiscreteScheduler", "linspace"),
        ("DPMSolverMultistepScheduler", "linspace"),
        ("UniPCMultistepScheduler", "linspace"),
    ],
)
def test_what_a_scheduler_config_leaves_out_is_the_default_of_its_class(name, spacing):
    full = dict(getattr(diffusers, name)().config)
    betas = {key: full[key] for key in ("beta_schedule", "beta_start", "beta_end")}
    short = configs.diffusion_from_json({"_class_name": name, **betas}, "", sdxl=True)
    assert short[0] == configs.diffusion_from_json({"_class_name": name, **full}, "", sdxl=True)[0]
    assert short[0].spacing == spacing


def test_what_a_text_config_leaves_out_is_transformers_default():
    for sdxl in (False, True):
        full = CLIPTextConfig().to_dict()
        assert configs.text_from_json({}, "", 1, sdxl=sdxl) == configs.text_from_json(full, "", 1, sdxl=sdxl)


def test_what_a_unet_or_vae_config_leaves_out_is_diffusers_default():
    with torch.device("meta"):
        unet, vae = diffusers.UNet2DConditionModel(), diffusers.AutoencoderKL()
    assert configs.unet_from_json({}, "") == configs.unet_from_json(as_json(unet.config), "")
    for sdxl in (False, True):
        assert configs.vae_from_json({}, "", sdxl=sdxl) == configs.vae_from_json(as_json(vae.config), "", sdxl=sdxl)


def as_json(config):
    return {key: list(v) if isinstance(v, tuple) else v for key, v in config.items()}


@pytest.mark.parametrize(
    ("read", "json", "message"),
    [
        (configs.unet_from_json, {"act_fn": "gelu"}, "here: act_fn 'gelu' is not supported; allowed: 'silu'"),
        (configs.unet_from_json, {"time_cond_proj_dim": 7}, "guidance_dim must be even and 4 or more, got 7"),
        (configs.unet_from_json, {"block_out_channels": 5}, "blocks .* are not supported"),
        (configs.unet_from_json, {"block_out_channels": ["a"] * 4}, "here: channels must be int, got 'a'"),
        (
            configs.unet_from_json,
            {"up_block_types": ["UpBlock2D"] * 3},
            r"here: blocks \['UpBlock2D'.* allowed is one \(CrossAttn\)UpBlock2D",
        ),
        (
            configs.unet_from_json,
            {"down_block_types": ["AttnDownBlock2D"] * 4},
            r"here: blocks \['AttnDownBlock2D'.* allowed is one \(CrossAttn\)DownBlock2D",
        ),
        (
            configs.unet_from_json,
            {"transformer_layers_per_block": [1, 0, 1, 1]},
            r"\[1, 0, 1, 1\] are not supported; .* from 1",
        ),
        (  # diffusers refuses it, too: what the level's third block has going up, nothing says
            configs.unet_from_json,
            {"transformer_layers_per_block": [1, [1, 2], 1, 1]},
            r"up_depth needs .* one for each of its 3 residual blocks, got \(1, 2\)",
        ),
        (
            configs.unet_from_json,
            {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
            "mid_block_type .* is not supported; allowed: 'UNetMidBlock2DCrossAttn', 'UNetMidBlock2D', None",
        ),
        (configs.unet_from_json, {"attention_head_dim": [8]}, "need one entry per level"),
        (configs.unet_from_json, {"layers_per_block": [1, 2]}, r"res_blocks must be int, got \[1, 2\]"),
        (VAE_FROM, {"latents_mean": [1.0]}, r"latents_mean \[1.0\] is not supported"),
        (VAE_FROM, {"down_block_types": ["X"]}, "down_block_types must be DownEncoderBlock2D"),
        (DIFFUSION_FROM, {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler with"),
        (DIFFUSION_FROM, {"prediction_type": "flow"}, "one of epsilon, v_prediction, sample"),
        (DIFFUSION_FROM, {"beta_start": 0.1}, "here lacks beta_schedule, beta_end"),
        (
            DIFFUSION_FROM,
            {"beta_schedule": "squaredcos", "beta_start": 0.1, "beta_end": 0.2},
            "beta_schedule 'squaredcos' is not supported; allowed: 'scaled_linear', 'linear', 'squaredcos_cap_v2'",
        ),
        (DIFFUSION_FROM, {"trained_betas": [0.1]}, r"trained_betas \[0.1\] is not supported"),
    ],
)
def test_what_would_change_the_numbers_is_refused_by_name(read, json, message):
    with pytest.raises(ValueError, match=message):
        read(json, "here")


def test_text_encoders_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"architectures .* is not supported"):
        configs.text_from_json({"architectures": ["CLIPVisionModel"]}, "here", 0, sdxl=False)
    with pytest.raises(ValueError, match="activation must be one of 'quick_gelu', 'gelu', got 'relu'"):
        configs.text_from_json({"hidden_act": "relu"}, "here", 0, sdxl=False)


def test_what_the_layout_cannot_express_is_refused():
    uneven = UNetConfig(depth=(1, (1, 0), 1, 0), up_depth=(0, 1, 1, 1))
    with pytest.raises(ValueError, match=r"cannot express .*depth=\(1, \(1, 0\), 1, 0\).*: save in the ldm layout"):
        configs.unet_to_json(uneven, 8)
    with pytest.raises(ValueError, match=r"cannot express .*depth=\(1,\).*mid_depth=2"):
        configs.unet_to_json(UNetConfig(channels=(32,), depth=(1,), heads=(1,), mid_depth=2), 8)
    with pytest.raises(ValueError, match=r"cannot express .*output_layer=-2"):
        configs.text_to_json(TextConfig(output_layer=-2), 0, 2, sdxl=False)


def test_an_architecture_is_recognized_with_its_prediction_and_its_input_channels():
    sd2, v = (SD21.vae, SD21.text), DiffusionConfig(prediction="v")
    trailing = DiffusionConfig(spacing="trailing")
    assert recognize(SD21_BASE.unet, *sd2, DiffusionConfig()) == SD21_BASE
    assert recognize(SD21.unet, *sd2, v) == SD21
    assert recognize(SD21_BASE.unet, *sd2, trailing).name == "sd21-base"  # others write "trailing"
    assert recognize(SD21_BASE.unet, *sd2, trailing, turbo=True) == SD_TURBO
    inpainting = dataclasses.replace(SD15.unet, in_channels=9)
    assert recognize(inpainting, SD15.vae, SD15.text, v).name == "sd15-inpainting"
    assert recognize(SDXL_BASE.unet, VAEConfig(), SD15.text, v).name == "custom"


def test_what_a_vector_holds_follows_from_its_width_and_the_pooled_text():
    assert len(SDXL_BASE.micro_conditioning) == 6
    assert SDXL_REFINER.micro_conditioning[-1] == "aesthetic_score"
    odd = dataclasses.replace(SDXL_BASE, text=SD15.text)
    with pytest.raises(ValueError, match="takes a vector of 2816, the pooled text is 0 wide"):
        odd.micro_conditioning  # noqa: B018


def test_a_unet_that_is_told_its_guidance_is_sampled_as_its_authors_do():
    unet = dataclasses.replace(SD15.unet, guidance_dim=256)
    found = recognize(unet, SD15.vae, SD15.text, SD15.diffusion)
    assert (found.diffusion.spacing, found.sampler, found.steps) == ("lcm", "lcm", 4)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("curve", ["karras", "exponential"])
def test_eulers_curves_bend_the_list_of_the_spacing_and_others_all_timesteps(name, curve):
    json = {"beta_schedule": "linear", "beta_start": 0.1, "beta_end": 0.2, f"use_{curve}_sigmas": True}
    for spacing, found in (("leading", f"leading_{curve}"), ("trailing", f"trailing_{curve}"), ("linspace", curve)):
        json |= {"_class_name": name, "timestep_spacing": spacing}
        assert DIFFUSION_FROM(json, "here")[0].spacing == found
        json["_class_name"] = "DPMSolverMultistepScheduler"
        assert DIFFUSION_FROM(json, "here")[0].spacing == curve


def test_diffusers_pipelines_of_sd_1_and_2_take_offset_1_whatever_the_file_says():
    json = {"beta_schedule": "linear", "beta_start": 0.1, "beta_end": 0.2, "steps_offset": 0}
    assert DIFFUSION_FROM(json, "here")[0].offset == 1
    assert configs.diffusion_from_json(json, "here", sdxl=True)[0].offset == 0


@pytest.mark.parametrize(
    ("json", "note"),
    [
        ({"solver_order": 3}, "its scheduler's solver_order 3 has no counterpart here"),
        ({"algorithm_type": "dpmsolver"}, "algorithm_type dpmsolver"),
        (
            {"final_sigmas_type": "sigma_min", "set_alpha_to_one": True},
            "final_sigmas_type sigma_min, set_alpha_to_one True",
        ),
        ({"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}, None),
    ],
)
def test_options_of_a_scheduler_without_a_counterpart_are_noted(json, note):
    betas = {"beta_schedule": "linear", "beta_start": 0.1, "beta_end": 0.2}
    notes = DIFFUSION_FROM(json | betas, "here")[1]
    assert notes == () if note is None else note in notes[0]


@pytest.mark.parametrize("option", ["use_beta_sigmas", "use_flow_sigmas", "use_lu_lambdas", "thresholding"])
def test_options_of_a_scheduler_that_give_other_pictures_are_refused(option):
    json = {"beta_schedule": "linear", "beta_start": 0.1, "beta_end": 0.2, option: True}
    with pytest.raises(ValueError, match=f"here: {option} True is not supported; allowed: False"):
        DIFFUSION_FROM(json, "here")


@pytest.mark.parametrize("types", [5, None, [], [["DownEncoderBlock2D"]], ["DownEncoderBlock2D", {}]])
def test_block_types_of_a_vae_that_are_not_a_list_of_names_are_refused(types):
    with pytest.raises(ValueError, match="here: down_block_types must be DownEncoderBlock2D for every level, got"):
        configs.vae_from_json({"down_block_types": types}, "here", sdxl=False)


def test_a_unet_without_levels_is_refused():
    with pytest.raises(ValueError, match=r"here: blocks .* are not supported"):
        configs.unet_from_json({"block_out_channels": [], "layers_per_block": []}, "here")


def test_an_attribute_that_a_config_lost_takes_the_default_of_its_class():
    short = {k: v for k, v in SD15_UNET.items() if k not in ("attention_head_dim", "norm_num_groups")}
    assert configs.unet_from_json(short, "") == SD15.unet  # diffusers' defaults are 8 and 32
    assert configs.text_from_json({}, "", 0, sdxl=False).activation == "quick_gelu"


def test_the_overflow_of_sdxls_vae_follows_its_config_and_its_family():
    assert configs.vae_from_json({}, "", sdxl=True).overflows_fp16
    assert not configs.vae_from_json({"force_upcast": False}, "", sdxl=True).overflows_fp16
    assert not VAE_FROM({"force_upcast": True}, "").overflows_fp16  # diffusers' default for all
