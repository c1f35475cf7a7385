"""IP-Adapters on disk: names as published, kinds that are refused, pickles, and vision towers in folders and files."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoint import ip_adapters
from ldm.checkpoint.files import convert
from ldm.checkpoint.ip_adapters import RULES, load_image_encoder, load_ip_adapter
from ldm.checkpoint.parts import collect
from ldm.models.unet import UNet
from tests.tiny import TINY_RANDOM, random_ip_adapter, save_ip_adapter

PLAIN = {  # of the file ip-adapter_sd15.safetensors, and with the sizes of TINY_RANDOM
    "image_proj.proj.weight": (128, 24),
    "image_proj.proj.bias": (128,),
    "image_proj.norm.weight": (32,),
    "image_proj.norm.bias": (32,),
    **{f"ip_adapter.{i}.to_{part}_ip.weight": (32, 32) for i in (1, 3, 5, 7) for part in "kv"},
}
LAYER = {  # of the file ip-adapter-plus_sd15.safetensors
    "0.norm1.weight": (64,),
    "0.norm1.bias": (64,),
    "0.norm2.weight": (64,),
    "0.norm2.bias": (64,),
    "0.to_q.weight": (64, 64),
    "0.to_kv.weight": (128, 64),
    "0.to_out.weight": (64, 64),
    "1.0.weight": (64,),
    "1.0.bias": (64,),
    "1.1.weight": (80, 64),
    "1.3.weight": (64, 80),
}
NO = "image_proj.proj.weight"  # which the other kinds lack
PLUS = {
    "image_proj.latents": (1, 5, 64),
    "image_proj.proj_in.weight": (64, 24),
    "image_proj.proj_in.bias": (64,),
    "image_proj.proj_out.weight": (32, 64),
    "image_proj.proj_out.bias": (32,),
    "image_proj.norm_out.weight": (32,),
    "image_proj.norm_out.bias": (32,),
    **{f"image_proj.layers.{i}.{name}": shape for i in (0, 1) for name, shape in LAYER.items()},
    **{name: shape for name, shape in PLAIN.items() if name.startswith("ip_adapter")},
}


@pytest.fixture(params=[False, True], ids=["plain", "plus"])
def saved(request, tmp_path):
    adapter = random_ip_adapter(plus=request.param)
    return adapter, save_ip_adapter(adapter, tmp_path / "ip.safetensors")


def test_the_names_are_the_published_ones_and_loading_gives_the_same_weights(saved):
    adapter, path = saved
    expected = PLUS if adapter.reads_patches else PLAIN
    assert {name: tuple(value.shape) for name, value in load_file(path).items()} == expected
    loaded = load_ip_adapter(path, unet=UNet(TINY_RANDOM.unet))
    assert loaded.reads_patches == adapter.reads_patches
    assert (loaded.image_dim, loaded.context_dim, loaded.widths) == (24, 32, (32,) * 4)
    assert loaded.state_dict().keys() == adapter.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in adapter.state_dict().items())
    features = torch.randn(2, 3, 24) if adapter.reads_patches else torch.randn(2, 24)
    assert torch.equal(loaded.image_proj(features), adapter.image_proj(features))


def test_a_dtype_is_applied(saved):
    assert {p.dtype for p in load_ip_adapter(saved[1], dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_the_published_pickle_becomes_the_same_safetensors_file(saved, tmp_path):
    path = saved[1]
    tensors = load_file(path)
    groups = ("image_proj", "ip_adapter")
    nested = {g: {n.removeprefix(f"{g}."): t for n, t in tensors.items() if n.startswith(g)} for g in groups}
    torch.save(nested, tmp_path / "ip.bin")
    with pytest.raises(ValueError, match=r"ip\.bin is a PyTorch pickle.*`ldm convert` reads it safely"):
        load_ip_adapter(tmp_path / "ip.bin")
    convert(tmp_path / "ip.bin", tmp_path / "new.safetensors", layout="ldm")
    converted = load_file(tmp_path / "new.safetensors")
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], value) for name, value in tensors.items())
    load_ip_adapter(tmp_path / "new.safetensors")


def zeros(shapes):
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {NO: None, "image_proj.perceiver_resampler.proj_in.weight": (8, 24)},
            "is an IP-Adapter of the kind FaceID Plus",
        ),
        ({NO: None, "image_proj.proj.0.weight": (8, 512)}, "of the kind FaceID, which is not"),
        ({NO: None, "image_proj.norm.weight": None, "image_proj.proj.3.weight": (32,)}, "of the kind full-face"),
        ({"image_proj.proj.bias": None}, r"does not match its configuration \(1 missing: image_proj.proj.bias"),
        ({"image_proj.extra": (3,)}, "holds 1 tensors that no IP-Adapter here has: image_proj.extra"),
        ({"ip_adapter.3.to_k_ip.weight": None}, "is no complete IP-Adapter: ip_adapter.3.to_k_ip.weight is missing"),
        ({"image_proj.proj.weight": (128,)}, r"image_proj.proj.weight has the shape \[128\]; fetch it again"),
        ({"ip_adapter.3.to_v_ip.weight": (32, 16)}, r"1 misshapen: ip_adapter.3.to_v_ip.weight \[32, 16\] instead of"),
    ],
)
def test_another_kind_or_an_incomplete_file_is_refused_by_name(changes, message, tmp_path):
    shapes = {name: shape for name, shape in (PLAIN | changes).items() if shape is not None}
    save_file(zeros(shapes), tmp_path / "ip.safetensors")
    with pytest.raises(ValueError, match=message):
        load_ip_adapter(tmp_path / "ip.safetensors")


def test_instant_id_and_other_files_are_refused_by_name(tmp_path):
    path = tmp_path / "ip.safetensors"
    save_file(zeros(PLUS | {"image_proj.proj_in.weight": (64, 512)}), path)
    with pytest.raises(ValueError, match="is of InstantID, which reads faces with another network"):
        load_ip_adapter(path)
    save_file(zeros({"lora_unet_mid.lora_down.weight": (4, 4)}), path)
    with pytest.raises(ValueError, match="is a LoRA: give an IP-Adapter as it was first published"):
        load_ip_adapter(path)
    with pytest.raises(ValueError, match=r"none\.safetensors does not exist"):
        load_ip_adapter(tmp_path / "none.safetensors")


def test_an_ip_adapter_of_another_family_is_refused(saved):
    other = UNet(dataclasses.replace(TINY_RANDOM.unet, context_dim=16))
    with pytest.raises(ValueError, match=r"ip\.safetensors: the IP-Adapter has text of width 32, .* 16: use"):
        load_ip_adapter(saved[1], unet=other)


# ------------------------------------------------------------------ the vision tower


@pytest.fixture
def tower(tmp_path):
    """A small tower saved by transformers, as wide as that of OpenAI's CLIP ViT-B."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.CLIPVisionConfig(**sizes, image_size=28, patch_size=14, projection_dim=24)
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    model.save_pretrained(tmp_path / "tower")
    return model, tmp_path / "tower"


def close(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-5)  # weights in mapped memory may be summed in another order


def test_a_folder_and_a_file_give_the_tower_of_transformers(tower):
    model, folder = tower
    pixels = torch.randn(1, 3, 28, 28)
    expected = model(pixels, output_hidden_states=True)
    for path in (folder, folder / "model.safetensors"):
        found = load_image_encoder(path)
        got = found(pixels, output_hidden_states=True)
        assert close(got.image_embeds, expected.image_embeds)
        assert close(got.hidden_states[-2], expected.hidden_states[-2])
        assert not found.training
        assert not any(p.requires_grad for p in found.parameters())


@pytest.mark.slow
def test_the_tower_of_a_whole_clip_is_found(tower):
    model, folder = tower
    tensors = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    more = {"text_model.final_layer_norm.weight": torch.zeros(8), "logit_scale": torch.zeros(())}
    more["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(tensors | more, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "clip", "vision_config": config, "projection_dim": config["projection_dim"]})
    )
    pixels = torch.randn(1, 3, 28, 28)
    for path in (folder, folder / "model.safetensors"):
        assert close(load_image_encoder(path)(pixels).image_embeds, model(pixels).image_embeds)


@pytest.mark.slow
def test_a_wrong_tower_is_refused_by_name(tower, monkeypatch):
    _, folder = tower
    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    save_file(tensors | {"vision_model.extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"holds 1 tensors that its vision tower lacks: vision_model\.extra"):
        load_image_encoder(folder)
    narrow = {name: value[..., :700].contiguous() for name, value in tensors.items()}
    narrow["vision_model.embeddings.patch_embedding.weight"] = torch.zeros(700, 3, 14, 14)
    save_file(narrow, path)
    with pytest.raises(ValueError, match="is a vision tower of width 700, and only of the widths 768, 1024, 1280"):
        load_image_encoder(path)
    save_file({"lora_unet_mid.lora_down.weight": torch.zeros(4, 4)}, path)
    with pytest.raises(ValueError, match="is a LoRA: give CLIP's vision tower with its projection"):
        load_image_encoder(path)
    (folder / "config.json").write_text('{"model_type": "siglip_vision_model"}')
    with pytest.raises(ValueError, match=r"config\.json describes siglip_vision_model: give a vision tower of CLIP"):
        load_image_encoder(folder)
    monkeypatch.setattr(ip_adapters, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"image prompts need transformers, .* pip install 'ldm\[vision\]'"):
        load_image_encoder(folder)


def test_every_rule_has_a_tensor(saved):
    adapter, path = saved
    assert collect(adapter, RULES).keys() == load_file(path).keys()
