"""Single-file checkpoints: what they are, told from the header alone. The files are hollow: headers without data."""

import dataclasses
import json

import pytest
import torch

from ldm.checkpoint import sources, tables
from ldm.checkpoint.files import identify, load
from ldm.checkpoint.known import KnownFile
from ldm.checkpoint.parts import collect
from ldm.checkpoint.single import METADATA_KEY
from ldm.checkpoint.sources import check_fits, merge, open_source
from ldm.config import UNetConfig
from ldm.models.unet import UNet
from ldm.presets import PRESETS, SD15, SD21, SD21_BASE, SD_TURBO, SDXL_BASE, SDXL_REFINER, SDXL_TURBO
from tests.checkpoint.standin import SCHEDULE, ema_shapes, hollow_model, official_shapes, write_hollow

UNET, VAE = tables.UNET_PREFIX, tables.VAE_PREFIX
TEXT = "cond_stage_model.transformer.text_model."


@pytest.fixture(scope="module")
def official() -> dict[str, tuple[int, ...]]:
    return official_shapes("sd15")


def unet_shapes(config: UNetConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        tensors = collect(UNet(config), tables.ldm_unet(config), UNET)
    return {name: tuple(value.shape) for name, value in tensors.items()}


@pytest.mark.parametrize("preset", [SD15, SD21_BASE, SDXL_BASE, SDXL_REFINER], ids=lambda p: p.name)
def test_each_family_is_told_from_its_shapes(preset, tmp_path):
    path = write_hollow(tmp_path / "model.safetensors?download=true", official_shapes(preset.name))
    identity = identify(path)
    assert identity.config == preset
    assert (identity.preset, identity.source.layout) == (preset.name, "ldm")
    assert identity.prediction == "eps"
    assert "model channels and text of width" in identity.why
    assert "it predicts eps: " in identity.why


@pytest.mark.parametrize(
    ("preset", "in_channels", "name"),
    [
        ("sd15", 9, "sd15-inpainting"),
        ("sd15", 8, "sd15-instruct-pix2pix"),
        ("sd21-base", 9, "sd21-base-inpainting"),
        ("sdxl-base", 9, "sdxl-base-inpainting"),
    ],
)
def test_variants_are_told_from_their_input_channels(preset, in_channels, name, tmp_path):
    identity = identify(write_hollow(tmp_path / "file", official_shapes(preset, in_channels)))
    assert identity.preset == name
    unet = dataclasses.replace(PRESETS[preset].unet, in_channels=in_channels)
    assert identity.config.unet == unet


def test_metadata_can_make_it_a_v_model(official, tmp_path):
    path = write_hollow(tmp_path / "file", official, {"modelspec.prediction_type": "v"})
    identity = identify(path)
    assert (identity.preset, identity.prediction) == ("sd15", "v")
    assert identity.why.endswith("its metadata modelspec.prediction_type says 'v'")


def test_a_v_model_of_sd2_is_the_one_of_768_pixels_with_attention_in_fp32(tmp_path):
    path = write_hollow(tmp_path / "file", official_shapes("sd21"))
    identity = identify(path, prediction="v")
    assert identity.config == SD21
    assert "you asked for v" in identity.why


def test_sd_turbo_is_told_from_the_name_of_its_text_encoder(tmp_path):
    shapes = {
        name.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): shape
        for name, shape in official_shapes("sd21").items()
    }
    path = write_hollow(tmp_path / "file", shapes | {"denoiser.sigmas": (1000,)})
    assert identify(path).config == SD_TURBO
    check_fits(open_source(path), path)


def test_zero_terminal_snr_makes_an_sdxl_that_starts_at_the_last_timestep(tmp_path):
    path = write_hollow(tmp_path / "file", official_shapes("sdxl-base") | {"v_pred": (0,), "ztsnr": (0,)})
    diffusion = identify(path).config.diffusion
    assert (diffusion.prediction, diffusion.zero_terminal_snr) == ("v", True)
    assert diffusion.spacing == "trailing"
    check_fits(open_source(path), path)


def test_a_known_file_is_what_its_digest_says(tmp_path, monkeypatch):
    path = write_hollow(tmp_path / "file", official_shapes("sdxl-base"))
    monkeypatch.setattr(sources, "known_files", lambda: {"0" * 64: KnownFile("sd_xl_turbo", "sdxl-turbo")})
    assert open_source(path).config == SDXL_BASE
    known = open_source(path, sha256="0" * 64)
    assert known.config == SDXL_TURBO
    assert "by its sha256 it is sd_xl_turbo" in known.why


def test_sdxl_turbo_is_told_by_its_size_to_the_byte(tmp_path):
    path = write_hollow(tmp_path / "file", official_shapes("sdxl-base"))
    metadata = {"x": ""}
    missing = 6_938_081_905 - write_hollow(path, official_shapes("sdxl-base"), metadata).stat().st_size
    metadata["x"] = "x" * missing
    identity = identify(write_hollow(path, official_shapes("sdxl-base"), metadata))
    assert identity.config == SDXL_TURBO
    assert "by its size in bytes it is sd_xl_turbo_1.0_fp16.safetensors" in identity.why


@pytest.mark.parametrize("preset", ["sd15", "sd21", "sdxl-base", "sdxl-refiner"])
def test_schedules_averages_and_constants_beside_a_model_are_known_to_be_useless(preset, tmp_path):
    shapes = official_shapes(preset)
    extra = dict.fromkeys((*SCHEDULE, "denoiser.sigmas", "denoiser.log_sigmas", "logvar"), (1000,))
    extra |= {"cond_stage_model.model.attn_mask": (77, 77)} | ema_shapes(shapes)
    path = write_hollow(tmp_path / "file", shapes | extra)
    source = open_source(path)
    check_fits(source, path)
    assert source.notes == ("it also holds an averaged copy of the UNet, used with ema only",)
    check_fits(open_source(path, ema=True), path)


def test_without_an_averaged_copy_none_can_be_asked_for(official, tmp_path):
    counters = {"model_ema.decay": (), "model_ema.num_updates": ()}
    for path in (write_hollow(tmp_path / "plain", official), write_hollow(tmp_path / "pruned", official | counters)):
        with pytest.raises(ValueError, match=r"has no averaged copy \(model_ema\.\*\)"):
            open_source(path, ema=True)


def test_distilled_depths_and_fewer_levels_are_told_from_the_shapes(official, tmp_path):
    unet = UNetConfig(channels=(320, 640, 1280), depth=(2, 0, 1), heads=(8, 8, 8), res_blocks=1, mid_depth=2)
    rest = {name: shape for name, shape in official.items() if not name.startswith(UNET)}
    identity = identify(write_hollow(tmp_path / "file", rest | unet_shapes(unet)))
    assert identity.config.unet == unet
    assert (identity.preset, identity.config.vae) == ("custom", SD15.vae)


def test_an_sdxl_of_other_depths_keeps_the_habits_of_sdxl(tmp_path):
    unet = dataclasses.replace(SDXL_BASE.unet, depth=(0, 1, 3), mid_depth=3)
    shapes = official_shapes("sdxl-base")
    rest = {name: shape for name, shape in shapes.items() if not name.startswith(UNET)}
    config = identify(write_hollow(tmp_path / "file", rest | unet_shapes(unet))).config
    assert config == dataclasses.replace(SDXL_BASE, name="custom", unet=unet)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(SD21.unet, in_channels=5), "Stable Diffusion 2 depth-to-image"),
        (dataclasses.replace(SD21.unet, in_channels=7), "the Stable Diffusion x4 upscaler"),
        (dataclasses.replace(SD21.unet, vector_dim=2048), "Stable unCLIP"),
        (UNetConfig(channels=(64,), depth=(1,), heads=(1,)), "no family known here"),
    ],
)
def test_other_models_are_refused_by_name(config, message, tmp_path):
    path = write_hollow(tmp_path / "file", unet_shapes(config))
    with pytest.raises(ValueError, match=f"file is {message}"):
        identify(path)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "a LoRA"),
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "a LyCORIS adapter, a kind of LoRA"),
        ("emb_params", "a textual-inversion embedding"),
        ("<frog>", "a textual-inversion embedding"),
        ("ip_adapter.1.to_k_ip.weight", "an IP-Adapter"),
        ("adapter.body.0.in_conv.weight", "a T2I-Adapter"),
        ("model.diffusion_model.double_blocks.0.img_attn.proj.weight", "a Flux transformer"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight", "a Stable Diffusion 3"),
        ("transformer_blocks.0.attn.to_q.weight", "a diffusion transformer"),
    ],
)
def test_files_of_another_kind_are_refused_by_name(name, what, tmp_path):
    shapes = {name: (2, 2), "other": (2,)}
    with pytest.raises(ValueError, match=f"file is {what}.*: give a full checkpoint"):
        load(write_hollow(tmp_path / "file", shapes))


def test_a_controlnet_is_not_taken_for_the_unet_whose_half_it_is(tmp_path):
    half = {
        name.removeprefix(UNET): shape
        for name, shape in unet_shapes(SD15.unet).items()
        if "output_blocks" not in name and not name.startswith(f"{UNET}out.")
    }
    for prefix in ("", "control_model."):
        shapes = {prefix + name: shape for name, shape in half.items()}
        shapes |= {f"{prefix}input_hint_block.0.weight": (16, 3, 3, 3)}
        with pytest.raises(ValueError, match="file is a ControlNet"):
            identify(write_hollow(tmp_path / "file", shapes))


def test_a_unet_with_more_levels_than_any_is_of_no_known_family(tmp_path):
    shapes = {f"{UNET}input_blocks.0.0.weight": (8, 4, 3, 3), f"{UNET}out.2.weight": (4, 8, 3, 3)}
    for i in range(1, 100):
        shapes |= {f"{UNET}input_blocks.{i}.0.in_layers.{j}.weight": (8, 8, 3, 3) for j in (0, 2)}
    with pytest.raises(ValueError, match="is no family known here"):
        identify(write_hollow(tmp_path / "file", shapes))


def test_files_of_no_known_kind_show_some_names(tmp_path):
    with pytest.raises(ValueError, match=r"is no Stable Diffusion checkpoint, it has bert\.w, gpt\.w: give"):
        identify(write_hollow(tmp_path / "file", {"gpt.w": (2,), "bert.w": (2,)}))
    with pytest.raises(ValueError, match="no Stable Diffusion checkpoint"):
        identify(write_hollow(tmp_path / "empty", {}))


@pytest.mark.parametrize(("prefix", "part"), [(VAE, "vae"), (TEXT, "text_encoder"), (UNET, "unet")])
def test_a_checkpoint_without_a_part_says_how_to_give_one(prefix, part, official, tmp_path):
    shapes = {name: shape for name, shape in official.items() if not name.startswith(prefix)}
    flag = part.replace("_", "-")
    with pytest.raises(ValueError, match=rf"has no {part}, only .* with {part}= \(--{flag}\)"):
        identify(write_hollow(tmp_path / "file", shapes))


PREFIXES = [  # of the UNet, the VAE and the text encoder
    ("", "", "text_model."),
    ("unet.", "vae.", "text_encoders.clip_l.transformer.text_model."),
    (UNET, VAE, "cond_stage_model.transformer."),
]


@pytest.mark.parametrize("prefixes", PREFIXES)
def test_parts_are_found_behind_every_prefix_in_use(prefixes, official, tmp_path):
    parts = {}
    for ours, theirs, part in zip((UNET, VAE, TEXT), prefixes, ("unet", "vae", "text"), strict=True):
        renamed = {theirs + n.removeprefix(ours): s for n, s in official.items() if n.startswith(ours)}
        parts[part] = write_hollow(tmp_path / part, renamed)
    whole = merge(open_source(parts["unet"]), {"vae": parts["vae"], "text_encoder": parts["text"]})
    assert whole.config == SD15
    check_fits(whole, parts["unet"])


def test_diffusers_names_in_a_single_file_are_those_of_the_preset_that_has_them(tmp_path):
    model = hollow_model(SDXL_REFINER)
    unet = collect(model.unet, tables.diffusers_unet(SDXL_REFINER.unet))
    vae = collect(model.vae, tables.diffusers_vae())
    text = collect(model.text_encoder.towers[0], tables.hf_text())
    paths = {}
    for name, tensors in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        paths[name] = write_hollow(tmp_path / name, {n: tuple(value.shape) for n, value in tensors.items()})
    unet_file = paths.pop("unet")
    whole = merge(open_source(unet_file), paths)
    assert whole.config == SDXL_REFINER
    check_fits(whole, unet_file)


def test_a_vae_file_takes_the_scale_of_the_model_that_it_joins(tmp_path):
    base = write_hollow(tmp_path / "base", official_shapes("sdxl-base"))
    vae = {n.removeprefix(VAE): s for n, s in official_shapes("sd15").items() if n.startswith(VAE)}
    counters = {"model_ema.decay": (), "model_ema.num_updates": ()}
    source = merge(open_source(base), {"vae": write_hollow(tmp_path / "vae", vae | counters)})
    assert source.config == SDXL_BASE
    check_fits(source, base)


def test_parts_of_another_family_are_refused_in_its_place(official, tmp_path):
    base = write_hollow(tmp_path / "base", official)
    other = write_hollow(tmp_path / "other", official_shapes("sd21"))
    with pytest.raises(ValueError, match=r"text encoder of .*other is 1024 wide, that of sd15 768"):
        merge(open_source(base), {"text_encoder": other})
    mixed = merge(open_source(base), {"unet": other})
    with pytest.raises(ValueError, match="is 768 wide, its unet attends to 1024"):
        check_fits(mixed, base)
    vae = write_hollow(tmp_path / "vae", {n: s for n, s in official.items() if n.startswith(VAE)})
    with pytest.raises(ValueError, match="vae holds no unet, only vae: give one that does"):
        merge(open_source(base), {"unet": vae})
    with pytest.raises(ValueError, match="the parts of a model are unet, vae, text_encoder, got 'clip'"):
        merge(open_source(base), {"clip": vae})


def test_kohyas_sd2_with_a_text_encoder_of_used_blocks_only_loads(tmp_path):
    prefix = "cond_stage_model.model."
    shapes = {
        name: shape
        for name, shape in official_shapes("sd21").items()
        if not name.startswith((f"{prefix}transformer.resblocks.23.", f"{prefix}text_projection"))
        and name != f"{prefix}logit_scale"
    }
    path = write_hollow(tmp_path / "file", shapes)
    assert identify(path).config == SD21_BASE
    check_fits(open_source(path), path)


def test_a_checkpoint_without_a_tensor_that_tells_the_architecture_is_incomplete(official, tmp_path):
    for gone in (f"{UNET}input_blocks.1.0.in_layers.2.weight", f"{UNET}out.0.weight"):
        shapes = {name: shape for name, shape in official.items() if name != gone}
        with pytest.raises(ValueError, match=rf"(lacks|missing:) {gone}"):
            identify(write_hollow(tmp_path / "file", shapes))
    shapes = official | {f"{VAE}decoder.conv_in.weight": (512,)}
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.weight \[512\] instead of \[512, 4"):
        identify(write_hollow(tmp_path / "file", shapes))


def test_wrong_metadata_of_our_own_is_named(official, tmp_path):
    for text, message in (
        ("{", "metadata ldm.config is not valid JSON"),
        ("[" * 100_000, "metadata ldm.config is not valid JSON"),
        ("[]", "must hold a JSON object, got list"),
        (json.dumps({"nme": "x"}), "unknown 'nme'; valid keys: name, unet"),
    ):
        with pytest.raises(ValueError, match=message):
            identify(write_hollow(tmp_path / "file", official, {METADATA_KEY: text}))


def test_tensors_that_do_not_fit_their_metadata_are_named(official, tmp_path):
    config = dataclasses.asdict(SD15)
    config["unet"]["context_dim"] = config["text"][0]["width"] = 1024
    config["text"][0]["heads"] = 16
    path = write_hollow(tmp_path / "file", official, {METADATA_KEY: json.dumps(config)})
    with pytest.raises(ValueError, match=r"holds a text encoder 768 wide, and sd15 takes 1024"):
        load(path)
    config = dataclasses.asdict(SD15)
    config["vae"]["channels"] = (128, 256, 512, 256)
    path = write_hollow(tmp_path / "file", official, {METADATA_KEY: json.dumps(config)})
    with pytest.raises(ValueError, match=r"the vae in .* does not match its configuration \(.*shape"):
        load(path)
