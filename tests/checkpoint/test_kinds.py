"""Files as people have them: with tensors too many, odd towers, unknown words, and configurations of earlier versions.

Each is another instance of a kind of file that was refused, or read wrongly without a word. The files are hollow.
"""

import dataclasses
import json
import typing

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoint import tables
from ldm.checkpoint.files import convert, identify, load, save
from ldm.checkpoint.parts import collect
from ldm.checkpoint.pickles import TORCH_NEEDED
from ldm.checkpoint.single import METADATA_KEY, ldm_tensors
from ldm.checkpoint.tables import UNET_PREFIX, VAE_PREFIX
from ldm.config import ModelConfig, UNetConfig
from ldm.models.unet import UNet
from ldm.presets import PRESETS, RELATIVES, SD15, SD21_BASE, SDXL_BASE, recognize
from tests.checkpoint.families import small_model
from tests.checkpoint.standin import ema_shapes, hollow_model, official_shapes, write_hollow

CLIP = "cond_stage_model.transformer.text_model."
OPEN_CLIP = "cond_stage_model.model."


def shapes_of(tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


# Tensors that no network uses.

LEFTOVERS = {
    "notes of several programs": {"x": (1,), "exporter.version": (2,), "meta/hash": (8,)},
    "a ControlNet of version 1.0": {f"control_model.input_blocks.{i}.0.weight": (320, 320, 3, 3) for i in range(9)},
    "the other half of CLIP": {
        "cond_stage_model.transformer.visual_projection.weight": (768, 1024),
        "cond_stage_model.transformer.text_projection.weight": (768, 768),
    },
    "ComfyUI's projection of 2023": {"cond_stage_model.transformer.text_projection": (768, 768)},
    "a baked VAE's training": {f"{VAE_PREFIX}model_ema.decay": (), f"{VAE_PREFIX}model_ema.num_updates": ()},
    "a LoRA that was not merged": {"lora_unet_mid_block.lora_down.weight": (4, 1280)},
    "a safety checker": {"safety_checker.concept_embeds": (17, 768)},
    "a dtype that is no float": {"first_stage_model.quantize.indices": (3,)},
}


@pytest.mark.parametrize("name", LEFTOVERS)
def test_what_no_network_uses_is_noted_and_left_out(name, tmp_path):
    path = write_hollow(tmp_path / "m.safetensors", official_shapes("sd15") | LEFTOVERS[name])
    found = identify(path)
    assert found.config == SD15
    (note,) = found.source.notes
    assert note.startswith(f"left out {len(LEFTOVERS[name])} tensors that no network here uses: ")
    assert min(LEFTOVERS[name]) in note
    assert note in found.why


@pytest.mark.parametrize(
    "name",
    [
        f"{UNET_PREFIX}input_blocks.12.0.in_layers.2.weight",
        f"{UNET_PREFIX}middle_block.1.transformer_blocks.1.attn2.to_k.weight",
        f"{UNET_PREFIX}output_blocks.3.1.transformer_blocks.1.ff.net.2.weight",
        f"{VAE_PREFIX}encoder.down.4.block.0.conv1.weight",
        f"{VAE_PREFIX}decoder.mid.attn_2.q.weight",
        f"{CLIP}encoder.layers.12.self_attn.q_proj.weight",
    ],
)
def test_what_looks_like_another_layer_of_a_network_is_refused(name, tmp_path):
    path = write_hollow(tmp_path / "m.safetensors", official_shapes("sd15") | {name: (1280, 640)})
    with pytest.raises(ValueError, match=r"does not match its configuration|lacks"):
        identify(path)


def test_an_averaged_copy_is_noted(tmp_path):
    shapes = official_shapes("sd15")
    found = identify(write_hollow(tmp_path / "m.safetensors", shapes | ema_shapes(shapes)))
    assert "it also holds an averaged copy of the UNet, used with ema only" in found.why


# Towers.


@pytest.mark.parametrize(
    "prefix", ["embedding_manager.embedder.", "loss.perceptual_loss.", "frozen_clip.", "teacher.cond_stage_model."]
)
def test_a_second_clip_in_odd_places_is_not_taken(prefix, tmp_path):
    shapes = official_shapes("sd15")
    clip = {prefix + n.removeprefix("cond_stage_model."): s for n, s in shapes.items() if n.startswith(CLIP)}
    found = identify(write_hollow(tmp_path / "m.safetensors", clip | shapes))
    assert found.config == SD15
    assert found.source.parts["text_encoder"].prefix == CLIP.removesuffix("text_model.")


@pytest.mark.parametrize(
    "gone",
    [
        (),
        ("transformer.resblocks.23.",),  # OneTrainer
        ("transformer.resblocks.23.", "text_projection", "logit_scale"),  # EveryDream, older kohya
        ("logit_scale",),
        ("text_projection",),
    ],
)
def test_the_layers_of_an_sd2_tower_are_those_of_its_unet_whatever_else_is_there(gone, tmp_path):
    gone = tuple(OPEN_CLIP + name for name in gone)
    shapes = {n: s for n, s in official_shapes("sd21").items() if not gone or not n.startswith(gone)}
    found = identify(write_hollow(tmp_path / "m.safetensors", shapes))
    assert found.config == SD21_BASE
    assert len(found.networks[2].towers[0].blocks) == 23
    assert found.source.notes == ()


def test_a_tower_that_lacks_a_layer_that_is_used_is_refused(tmp_path):
    gone = f"{OPEN_CLIP}transformer.resblocks.22."
    shapes = {n: s for n, s in official_shapes("sd21").items() if not n.startswith(gone)}
    with pytest.raises(ValueError, match=r"text_encoder in .* \(12 missing: .*resblocks\.22"):
        identify(write_hollow(tmp_path / "m.safetensors", shapes))


def test_playgrounds_projection_is_read_the_way_that_it_is_held(tmp_path):
    model = small_model("sdxl-base")
    save(model, tmp_path / "m", layout="ldm")
    tensors, metadata = load_file(tmp_path / "m"), {METADATA_KEY: json.dumps(dataclasses.asdict(model.config))}
    held = tensors.pop("conditioner.embedders.1.model.text_projection")
    torch.manual_seed(0)
    assert not torch.equal(held, held.T)
    tensors["conditioner.embedders.1.model.text_projection.weight"] = held.T.contiguous()
    save_file(tensors, tmp_path / "m", metadata=metadata)
    found = load(tmp_path / "m").text_encoder.towers[1].projection.weight
    assert torch.equal(found, model.text_encoder.towers[1].projection.weight)


# Our own configuration.

OLD = {  # a file of version 0.1 lacks what came later, and has one field more
    "unet": ("up_depth", "mid", "guidance_dim"),
    "vae": ("overflows_fp16",),
}


def fields(kind: type, above: tuple[str | int, ...] = ()):
    """The path to every field of ModelConfig, and whether it may be absent."""
    for name, hint in typing.get_type_hints(kind).items():
        yield (*above, name), type(None) in typing.get_args(hint) or name in (*OLD["unet"], *OLD["vae"])
        inner, place = hint, (*above, name)
        if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(typing.get_args(hint)[0]):
            inner, place = typing.get_args(hint)[0], (*place, 0)
        if dataclasses.is_dataclass(inner):
            yield from fields(inner, place)


@pytest.mark.parametrize("place", [place for place, may_lack in fields(ModelConfig) if not may_lack])
def test_a_field_that_was_removed_from_our_metadata_is_an_error(place, tmp_path):
    config = json.loads(json.dumps(dataclasses.asdict(SD15)))
    holder = config
    for step in place[:-1]:
        holder = holder[step]
    del holder[place[-1]]
    path = write_hollow(
        tmp_path / "m", {f"{VAE_PREFIX}encoder.down.0.block.0.conv1.weight": ()}, {METADATA_KEY: json.dumps(config)}
    )
    with pytest.raises(ValueError, match=rf"m, metadata ldm\.config.*lacks .*{place[-1]}"):
        identify(path)


@pytest.mark.parametrize("preset", ["sd15", "sd21", "sdxl-base", "sdxl-refiner"])
def test_a_file_of_version_0_1_loads(preset, tmp_path):
    config = json.loads(json.dumps(dataclasses.asdict(PRESETS[preset])))
    for network, names in OLD.items():
        for name in names:
            del config[network][name]
    config["micro_conditioning"] = list(PRESETS[preset].micro_conditioning)
    path = write_hollow(tmp_path / "m", official_shapes(preset), {METADATA_KEY: json.dumps(config)})
    found = identify(path)
    assert found.config == PRESETS[preset]
    assert found.source.notes == ()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_what_version_0_1_padded_wrongly_is_read_with_a_note_and_converted_right(layout, tmp_path):
    model = small_model("sd21")
    wrong = dataclasses.replace(model.config.text[0], pad_id=49407)
    save(model._replace(config=dataclasses.replace(model.config, text=(wrong,))), tmp_path / "old", layout=layout)
    found = identify(tmp_path / "old")
    assert found.config.text[0].pad_id == 0
    assert "an earlier version of ldm wrote the wrong padding token into it" in found.why
    new = tmp_path / ("new.safetensors" if layout == "ldm" else "new")
    convert(tmp_path / "old", new, layout=layout)
    again = identify(new)
    assert again.config.text[0].pad_id == 0
    assert again.source.notes == ()
    assert load(new).text_encoder.towers[0].tokenize(["a"])[0, -1] == 0


@pytest.mark.slow
def test_metadata_of_300_000_values_loads(tmp_path):
    tags = json.dumps({f"tag {i}": i for i in range(300_000)})
    path = write_hollow(tmp_path / "m", official_shapes("sd15"), {"ss_tag_frequency": tags})
    assert identify(path).config == SD15


# Parts of another family.


@pytest.mark.parametrize(("stem", "preset"), [("sdxl_vae", "sd15"), ("xl", "sd21-base"), ("sdxl.vae", "sdxl-base")])
def test_sdxls_vae_in_another_model_is_noted(stem, preset, tmp_path):
    vae = {n.removeprefix(VAE_PREFIX): s for n, s in official_shapes("sd15").items() if n.startswith(VAE_PREFIX)}
    path = write_hollow(tmp_path / f"{stem}.safetensors", vae)
    found = identify(write_hollow(tmp_path / "model", official_shapes(preset)), replace={"vae": path})
    note = "made for latents scaled by 0.13025, the model's are scaled by 0.18215: it may belong to another family"
    assert (note in found.why) == (preset != "sdxl-base")
    assert found.config.unet == PRESETS[preset].unet


# Files that are called what they are.


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["model.diffusion_model.x.weight.quant_state.bitsandbytes__nf4"], r"quantized by bitsandbytes \(NF4"),
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"], "a LoRA"),
        (["unet.mid_block.attentions.0.to_q.lora.down.weight"], "a LoRA"),
        (["input_hint_block.0.weight", "input_blocks.0.0.weight"], "a ControlNet"),
        (["lllite_unet_down_blocks_0.depth1"], "a ControlNet-LLLite"),
        (["encoder.layers.0.conv.weight", "decoder.layers.1.weight"], "a TAESD, a tiny autoencoder"),
        (["taesd_decoder.1.weight"], "a TAESD, a tiny autoencoder"),
        (["down_blocks.0.motion_modules.0.norm.weight"], "an AnimateDiff motion module"),
    ],
)
def test_what_is_no_model_is_called_what_it_is(names, what, tmp_path):
    path = write_hollow(tmp_path / "m.safetensors", dict.fromkeys(names, (4, 4)))
    with pytest.raises(ValueError, match=rf"m\.safetensors is .*{what}"):
        identify(path)


def test_a_quantized_model_is_refused_by_its_scales(tmp_path):
    name = f"{UNET_PREFIX}input_blocks.1.1.proj_in.weight"
    for scale in ("absmax", "quant_map"):
        path = write_hollow(tmp_path / "m", official_shapes("sd15") | {f"{name}.{scale}": (16,)})
        with pytest.raises(ValueError, match=rf"is quantized.*{scale}\): give one in fp32"):
            identify(path)


@pytest.mark.skipif(torch.__version__ < TORCH_NEEDED, reason="this torch does not read pickles safely")
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_tied_tensors_and_views_in_a_pickle_become_each_its_own_copy(dtype, tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    views = {"tied": whole, "a": whole, "row": whole[2], "transposed": whole.T, "half": whole[:, ::2]}
    content = {f"lora_unet_{name}": value for name, value in views.items()}
    torch.save({"state_dict": content}, tmp_path / "m.ckpt")
    convert(tmp_path / "m.ckpt", tmp_path / "m.safetensors", layout="ldm", dtype=dtype)
    found = load_file(tmp_path / "m.safetensors")
    assert found.keys() == content.keys()
    assert all(torch.equal(value, content[name].to(dtype or value.dtype)) for name, value in found.items())


# Distilled and relative UNets in single files.

UNETS = RELATIVES | {
    "LCM": dataclasses.replace(SD15.unet, guidance_dim=256),
    "LCM of SDXL": dataclasses.replace(SDXL_BASE.unet, guidance_dim=256),
}


def whole(unet: UNetConfig) -> ModelConfig:
    """The model around a UNet."""
    like = SD15 if unet.vector_dim is None else SDXL_BASE
    return recognize(unet, like.vae, like.text, like.diffusion)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNETS)
def test_a_relative_in_one_file_is_exactly_that_network(name, tmp_path):
    config = whole(UNETS[name])
    path = write_hollow(tmp_path / "m", shapes_of(ldm_tensors(hollow_model(config))))
    found = identify(path)
    assert found.config.unet == UNETS[name]
    assert found.config == config
    assert found.source.notes == ()


@pytest.mark.slow
@pytest.mark.parametrize("style", ["diffusers", "ldm"])
@pytest.mark.parametrize("name", UNETS)
def test_a_relatives_unet_alone_is_exactly_that_network(name, style, tmp_path):
    with torch.device("meta"):
        unet = UNet(UNETS[name])
    rules = tables.diffusers_unet(unet.config) if style == "diffusers" else tables.ldm_unet(unet.config)
    path = write_hollow(tmp_path / "unet", shapes_of(collect(unet, rules)))
    like = "sd15" if UNETS[name].vector_dim is None else "sdxl-base"
    rest = write_hollow(tmp_path / "m", official_shapes(like))
    assert identify(rest, replace={"unet": path}).config.unet == UNETS[name]


def test_both_names_of_an_embedded_guidance_scale_are_read(tmp_path):
    config = whole(UNETS["LCM"])
    shapes = shapes_of(ldm_tensors(hollow_model(config)))
    name = f"{UNET_PREFIX}time_embedding.cond_proj.weight"
    shapes[f"{UNET_PREFIX}time_embed.cond_proj.weight"] = shapes.pop(name)
    assert identify(write_hollow(tmp_path / "m", shapes)).config == config
