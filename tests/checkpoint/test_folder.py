"""Model folders: those that diffusers writes load here, ours load there, and broken ones are named.

The differences of the networks are printed: pytest -s.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.checkpoint.files import Model, identify, load, load_vae, save, save_vae
from ldm.config import DiffusionConfig, TextConfig, UNetConfig, VAEConfig
from ldm.models.token_files import save_tokenizer
from ldm.models.tokens import EOS, Tokenizer

TEXTS = ["a photo of a frog on the beach!", "", "café 🙂 123"]
RELATIVE = 1e-5  # of the largest value, in fp32: both sum in their own order


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer, tmp_path_factory) -> diffusers.StableDiffusionPipeline:
    """A small pipeline of SD 1.5's architecture made by diffusers, with random weights."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, folder, 77)
    torch.manual_seed(1)
    text = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=3,
        eos_token_id=2,  # as the official configs say, wrongly
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=2,
            norm_num_groups=8,
        ),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(folder),
        unet=diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64, 64),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=2,
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=16,
        ),
        scheduler=diffusers.PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        for parameter in network.requires_grad_(False).parameters():
            parameter += 0.05 * torch.randn_like(parameter)  # no bias is zero and no norm is one
    return pipeline


@pytest.fixture(scope="module")
def their_folder(theirs, tmp_path_factory) -> Path:
    """What diffusers saves of it, not to be changed."""
    folder = tmp_path_factory.mktemp("theirs") / "model"
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(small_folder, tmp_path) -> Path:
    """A folder of ours, to be damaged."""
    return Path(shutil.copytree(small_folder, tmp_path / "model"))


@torch.no_grad()
def differences(ours: Model, theirs: diffusers.StableDiffusionPipeline) -> dict[str, float]:
    """The largest difference of each network's outputs, relative to the largest output."""
    ids = theirs.tokenizer(TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ours.text_encoder.towers[0].tokenize(TEXTS), ids)
    torch.manual_seed(2)
    images, latents = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(3, 4, 16, 16)
    t, context = torch.tensor([1.0, 500.0, 981.0]), torch.randn(3, 77, ours.config.unet.context_dim)
    scale = ours.config.vae.scaling_factor
    moments = theirs.vae.encode(images).latent_dist
    pairs = {
        "text": (ours.text_encoder.encode(TEXTS).context, theirs.text_encoder(ids)[0]),
        "unet": (ours.unet(latents, t, context), theirs.unet(latents, t, context).sample),
        "vae encode, mean": (ours.vae.encode(images).mean, moments.mean * scale),
        "vae encode, std": (ours.vae.encode(images).std, moments.std * scale),
        "vae decode": (ours.vae.decode(latents), theirs.vae.decode(latents / scale).sample),
    }
    found = {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}
    print(*(f"{name}: {value:.1e}" for name, value in found.items()), sep=", ")
    return found


def test_a_folder_of_diffusers_loads_with_its_architecture(their_folder):
    config = load(their_folder).config
    assert config.unet == UNetConfig(
        channels=(32, 64, 64), depth=(1, 1, 0), heads=(4, 4, 4), context_dim=32, norm_groups=16
    )
    assert config.vae == VAEConfig(channels=(16, 32), norm_groups=8)
    assert config.text == (TextConfig(width=32, layers=3, heads=4, mlp=64),)
    assert config.diffusion == DiffusionConfig()
    assert (config.name, config.image_size) == ("custom", 32)
    assert identify(their_folder).why.startswith("the configs of its StableDiffusionPipeline;")


def test_networks_of_a_diffusers_folder_equal_diffusers(their_folder, theirs):
    assert max(differences(load(their_folder), theirs).values()) < RELATIVE


def test_networks_of_our_folder_equal_ours_in_diffusers(small_folder, small):
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(small_folder, safety_checker=None, local_files_only=True)
    assert max(differences(small, theirs).values()) < RELATIVE
    assert isinstance(theirs.scheduler, diffusers.DDIMScheduler)
    config = theirs.scheduler.config
    assert (config.prediction_type, config.timestep_spacing) == ("v_prediction", "trailing")
    assert config.rescale_betas_zero_snr
    assert not config.set_alpha_to_one
    assert not config.clip_sample
    assert theirs.unet.config.sample_size * theirs.vae_scale_factor == small.config.image_size


def test_a_diffusers_folder_saved_by_us_is_the_same_model_to_diffusers(their_folder, theirs, tmp_path):
    save(load(their_folder), tmp_path / "copy")
    copy = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "copy", safety_checker=None, local_files_only=True
    )
    for name in ("unet", "vae", "text_encoder"):
        ours, want = (getattr(pipeline, name).state_dict() for pipeline in (copy, theirs))
        assert ours.keys() == want.keys()
        assert all(torch.equal(ours[key], want[key]) for key in want)
    assert copy.tokenizer(TEXTS).input_ids == theirs.tokenizer(TEXTS).input_ids


@pytest.mark.parametrize("in_channels", [8, 9])
def test_models_with_conditioned_inputs_are_the_pipelines_that_diffusers_has_for_them(in_channels, small, tmp_path):
    config = dataclasses.replace(small.config.unet, in_channels=in_channels)
    unet = type(small.unet)(config)
    model = small._replace(unet=unet, config=dataclasses.replace(small.config, unet=config))
    save(model, tmp_path / "model")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    name = {8: "StableDiffusionInstructPix2PixPipeline", 9: "StableDiffusionInpaintPipeline"}
    assert type(pipeline).__name__ == name[in_channels]
    assert load(tmp_path / "model").config == model.config


# What older or larger folders look like.


def rename(path: Path, names: dict[str, str]) -> None:
    tensors = load_file(path)
    for old in list(tensors):
        new = old
        for a, b in names.items():
            new = new.replace(a, b)
        tensors[new] = tensors.pop(old)
    save_file(tensors, path, metadata={"format": "pt"})


def same(one: Model, other: Model) -> bool:
    pairs = [(a.state_dict(), b.state_dict()) for a, b in zip(one[1:4], other[1:4], strict=True)]
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


def test_old_names_of_the_vaes_attention_load(folder, small):
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    rename(folder / "vae/diffusion_pytorch_model.safetensors", old)
    assert same(load(folder), small)


def test_text_encoders_with_and_without_the_level_text_model_load(folder, small):
    path = folder / "text_encoder/model.safetensors"
    assert all(name.startswith("text_model.") for name in load_file(path))
    tensors = load_file(path) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(tensors, path)
    assert same(load(folder), small)
    rename(path, {"text_model.": ""})
    assert same(load(folder), small)


def test_the_fp16_variant_loads_where_there_is_no_other(folder, small):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert same(load(folder), small)


def test_a_tokenizer_json_is_enough(folder, small):
    tokenizer = folder / "tokenizer"
    merges = [list(pair) for pair in small.text_encoder.towers[0].tokenizer.merges]
    vocab = json.loads((tokenizer / "vocab.json").read_text())
    model = {"model": {"vocab": vocab, "merges": merges}}
    (tokenizer / "tokenizer.json").write_text(json.dumps(model))
    (tokenizer / "vocab.json").unlink()
    assert load(folder).config == small.config


@pytest.mark.parametrize("token", [EOS, {"content": EOS, "special": True}, None])
def test_the_padding_is_the_tokenizers(token, folder, small):
    path = folder / "tokenizer/tokenizer_config.json"
    path.write_text(json.dumps({"pad_token": token}))
    assert load(folder).config == small.config
    path.write_text(json.dumps({"pad_token": "!"}))
    assert load(folder).config.text[0].pad_id == 0
    path.write_text(json.dumps({"pad_token": "<nothing>"}))
    with pytest.raises(ValueError, match="pads with '<nothing>', which is not in its vocabulary"):
        load(folder)
    path.write_text(json.dumps({"pad_token": ["!"]}))
    with pytest.raises(ValueError, match=r"pads with \['!'\], which is not in its vocabulary"):
        load(folder)


def shard(folder: Path, edit=lambda weight_map: None) -> None:
    """Cut the folder's unet in two shards with an index, to which `edit` is applied."""
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors, weight_map = load_file(path), {}
    for part, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        name = f"diffusion_pytorch_model-0000{part}-of-00002.safetensors"
        save_file({n: tensors[n] for n in names}, path.with_name(name))
        weight_map |= dict.fromkeys(names, name)
    path.unlink()
    edit(weight_map)
    index = path.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": weight_map}))


def test_shards_load(folder, small):
    shard(folder)
    assert same(load(folder), small)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(x="../vae/model.safetensors"), "names '../vae/model.safetensors', which is not"),
        (lambda m: m.update(x="/etc/passwd"), "names '/etc/passwd', which is not a .safetensors file beside it"),
        (lambda m: m.update(x="..\\model.safetensors"), "which is not a .safetensors file beside it"),
        (lambda m: m.update(x="none.safetensors"), r"none\.safetensors does not exist: .*index.json names it; fetch"),
        (dict.clear, "must hold a weight_map of tensor names to file names"),
    ],
)
def test_a_shard_index_is_confined_to_its_folder(edit, message, folder):
    shard(folder, edit)
    with pytest.raises(ValueError, match=message):
        load(folder)


# Broken folders.


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "model is not a model folder, it has no model_index.json: give"),
        (lambda f: (f / "model_index.json").write_text("[]"), "must hold a JSON object, got list"),
        (lambda f: (f / "vae/config.json").write_text("{"), "vae/config.json is not valid JSON"),
        (lambda f: (f / "vae/config.json").unlink(), r"vae/config\.json does not exist: fetch the folder again"),
        (lambda f: shutil.rmtree(f / "text_encoder"), "model lacks its text_encoder: fetch the whole folder"),
        (lambda f: shutil.rmtree(f / "scheduler"), "model lacks its scheduler"),
        (lambda f: edit_json(f / "model_index.json", vae=[None, None]), "model lacks its vae"),
        (
            lambda f: edit_json(f / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]),
            "model lacks its text_encoder_2: fetch the whole folder",
        ),
        (
            lambda f: edit_json(f / "model_index.json", motion_adapter=["diffusers", "MotionAdapter"]),
            "is a StableDiffusionPipeline with motion_adapter, which is not supported",
        ),
        (
            lambda f: edit_json(f / "vae/config.json", _class_name="AutoencoderTiny"),
            r"vae/config\.json describes AutoencoderTiny, supp",
        ),
        (
            lambda f: edit_json(f / "model_index.json", unet=["diffusers", "UNetMotionModel"]),
            "the unet of .*model is UNetMotionModel, supported are UNet2DConditionModel",
        ),
        (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), "unet has no weights: it needs diff"),
        (
            lambda f: (f / "unet/diffusion_pytorch_model.safetensors").rename(f / "unet/model.bin"),
            "unet has only model.bin, a pickle, which `ldm convert` makes",
        ),
        (
            lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"version https://git-lfs"),
            "is a Git LFS pointer",
        ),
        (lambda f: (f / "tokenizer/merges.txt").unlink(), "tokenizer holds no tokenizer"),
        (lambda f: (f / "tokenizer/vocab.json").write_text('{"a": 1}'), "holds no tokenizer of CLIP"),
        (
            lambda f: (f / "tokenizer/vocab.json").write_text('{"<|endoftext|>": 1}'),
            "tokenizer holds no tokenizer of CLIP",
        ),
        (lambda f: edit_json(f / "ldm.json", speed=3), r"ldm\.json: unknown 'speed'; valid keys: name, image_size"),
        (lambda f: edit_json(f / "unet/config.json", attention_head_dim=3), "32 channels are not divisible by 3 heads"),
    ],
)  # fmt: skip
def test_a_broken_folder_is_called_by_what_is_wrong_with_it(damage, message, folder):
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_part_of_a_model_points_to_the_whole(folder):
    with pytest.raises(ValueError, match=r"it is a part of the model in .*model: give that"):
        load(folder / "unet")
    with pytest.raises(ValueError, match="is no family known here"):
        load(folder / "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"has no unet, only vae: it is a part of the model in"):
        load(folder / "vae/diffusion_pytorch_model.safetensors")
    (folder / "unet").rename(folder.parent / "alone")
    (folder.parent / "alone/config.json").unlink()
    with pytest.raises(ValueError, match=r"give a file in it, such as .*diffusion_pytorch_model\.safetensors"):
        load(folder.parent / "alone")


def test_weights_of_another_model_are_named(folder):
    edit_json(folder / "unet/config.json", cross_attention_dim=64)
    edit_json(folder / "text_encoder/config.json", hidden_size=64)
    with pytest.raises(ValueError, match=r"the unet in .* \(8 misshapen: .*to_k\.weight \["):
        load(folder)


def test_a_component_that_is_of_no_use_here_is_noted(folder):
    for name in ("image_encoder", "watermarker"):
        edit_json(folder / "model_index.json", **{name: ["transformers", "CLIPVisionModel"]})
    assert "its image_encoder, watermarker is not used" in identify(folder).why


def test_a_broken_link_a_named_pipe_and_a_cache_are_called_what_they_are(folder, tmp_path):
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to("../../blobs/0123")
    with pytest.raises(ValueError, match=r"is a broken link, its target \.\./\.\./blobs/0123 is miss"):
        identify(folder)
    weights.unlink()
    (tmp_path / "elsewhere").rename(weights)
    for name in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(ValueError, match=r"is not a (regular file|model folder)"):
            identify(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(content)
    snapshot = tmp_path / "models--a--b/snapshots/0123abc"
    shutil.copytree(folder, snapshot)
    with pytest.raises(ValueError, match=r"a cache of Hugging Face, give .*snapshots/0123abc"):
        identify(tmp_path / "models--a--b")
    assert identify(snapshot).config.name == "small"


# A VAE alone.


def test_a_vae_alone_comes_back_bit_for_bit_and_loads_in_diffusers(small, tmp_path):
    save_vae(small.vae, tmp_path / "runs/vae", image_size=64)
    vae = load_vae(tmp_path / "runs/vae")
    assert vae.config == small.config.vae
    wanted = small.vae.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in vae.state_dict().items())
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "runs/vae", local_files_only=True)
    latents = torch.randn(1, 4, 4, 4)
    decoded = theirs.decode(latents / vae.config.scaling_factor).sample
    torch.testing.assert_close(vae.decode(latents), decoded, rtol=1e-4, atol=1e-4)


def test_a_vae_alone_is_that_of_a_models_folder_too(small_folder, small):
    assert load_vae(small_folder / "vae").config == small.config.vae


def test_saving_a_vae_replaces_a_vae_and_nothing_else(small, tmp_path):
    save_vae(small.vae, tmp_path / "vae", image_size=64)
    (tmp_path / "vae/log.txt").write_text("mine")
    save_vae(small.vae, tmp_path / "vae", image_size=32)
    assert json.loads((tmp_path / "vae/config.json").read_text())["sample_size"] == 32
    assert (tmp_path / "vae/log.txt").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="photos is not a VAE folder, so it is not overwritten"):
        save_vae(small.vae, tmp_path / "photos", image_size=64)


def test_a_folder_that_is_no_vae_is_named(small_folder, tmp_path):
    with pytest.raises(ValueError, match="is not a model folder"):
        load_vae(tmp_path)
    with pytest.raises(ValueError, match="unet holds no vae, only unet: give one that does"):
        load_vae(small_folder / "unet")
