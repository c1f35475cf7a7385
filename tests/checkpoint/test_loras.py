"""LoRA files in every style of names: which layers they change, by how much, and for which model they are."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ldm
from ldm.checkpoint.loras import Target, layers_of, names_of, read_lora
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from ldm.presets import PRESETS
from tests.tiny import TINY_RANDOM, TINY_SDXL, byte_tokenizer

BLOCK = "transformer_blocks.0"
LAYERS = ("attn2.to_q", "attn2.to_k", "attn1.to_out")
Q, K, OUT = (Target("unet", f"down.3.transformer.blocks.0.{name}") for name in LAYERS)
TEXT = Target("text_encoder", "blocks.1.attn.to_q")
RANK, WIDTH = 4, 32  # of all layers here; the context is as wide


def hollow(config):
    """The networks of `config`, without memory."""
    with torch.device("meta"):
        encoder = TextEncoder(config.text, [byte_tokenizer()] * len(config.text))
        unet = UNet(config.unet)
    return {"unet": unet, **dict(zip(("text_encoder", "text_encoder_2"), encoder.towers, strict=False))}


@pytest.fixture(scope="module")
def networks():
    return hollow(TINY_RANDOM)


def pair(down, up, name, width=WIDTH, inputs=None):
    """The two factors of a layer, with numbers."""
    generator = torch.Generator().manual_seed(len(name))
    shapes = {f"{name}{down}": (RANK, inputs or width), f"{name}{up}": (width, RANK)}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def read(tensors, networks, tmp_path, metadata=None, name="lora.safetensors", config=TINY_RANDOM):
    path = tmp_path / name
    save_file(tensors, path, metadata)
    return read_lora(path, networks, config.unet)


DIFFUSERS, LDM = "down_blocks.1.attentions.0", "input_blocks.3.1"
HF = "text_model.encoder.layers.1.self_attn.q_proj"
KOHYA = ".lora_down.weight", ".lora_up.weight"
PEFT = ".lora_A.weight", ".lora_B.weight"
STYLES = {
    "kohya with diffusers' names": (KOHYA, f"lora_unet_{DIFFUSERS}.{BLOCK}.attn2.to_q".replace(".", "_"), Q),
    "kohya with LDM's names": (KOHYA, f"lora_unet_{LDM}.{BLOCK}.attn2.to_q".replace(".", "_"), Q),
    "kohya, an output": (KOHYA, f"lora_unet_{DIFFUSERS}.{BLOCK}.attn1.to_out.0".replace(".", "_"), OUT),
    "kohya, a text encoder": (KOHYA, f"lora_te_{HF}".replace(".", "_"), TEXT),
    "LyCORIS around a network": (KOHYA, f"lycoris_{DIFFUSERS}.{BLOCK}.attn2.to_q".replace(".", "_"), Q),
    "diffusers": (PEFT, f"unet.{DIFFUSERS}.{BLOCK}.attn2.to_q", Q),
    "diffusers, with the name of an adapter": (
        (".lora_A.default_0.weight", ".lora_B.default_0.weight"),
        f"unet.{DIFFUSERS}.{BLOCK}.attn2.to_q",
        Q,
    ),
    "diffusers, a text encoder": (PEFT, f"text_encoder.{HF}", TEXT),
    "diffusers, a text encoder without its level": (PEFT, f"text_encoder.{HF.removeprefix('text_model.')}", TEXT),
    "old diffusers": (("_lora.down.weight", "_lora.up.weight"), f"unet.{DIFFUSERS}.{BLOCK}.attn2.processor.to_q", Q),
    "the oldest diffusers": (
        ("_lora.down.weight", "_lora.up.weight"),
        f"{DIFFUSERS}.{BLOCK}.attn1.processor.to_out",
        OUT,
    ),
    "old diffusers, other layers": (
        (".lora.down.weight", ".lora.up.weight"),
        f"unet.{DIFFUSERS}.{BLOCK}.attn2.to_q",
        Q,
    ),
    "old diffusers, a text encoder": (
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        f"text_encoder.{HF}",
        TEXT,
    ),
    "older diffusers, a text encoder": (
        (".down.weight", ".up.weight"),
        f"text_encoder.{HF.removesuffix('.q_proj')}.to_q_lora",
        TEXT,
    ),
    "ComfyUI": (PEFT, f"diffusion_model.{LDM}.{BLOCK}.attn2.to_q", Q),
}


@pytest.mark.parametrize("style", STYLES)
def test_the_layer_is_found_under_every_name(style, networks, tmp_path):
    ends, name, target = STYLES[style]
    tensors = pair(*ends, name)
    found = read(tensors, networks, tmp_path)
    assert (found.count, found.unknown) == (1, ())
    ((layer, change),) = found.changes.items()
    assert layer == target
    assert change.scale == 1.0
    weight = torch.zeros(WIDTH, WIDTH)
    assert torch.equal(change.of("weight", weight), tensors[name + ends[1]] @ tensors[name + ends[0]])
    assert change.of("bias", weight[0]) is None


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "tiny"])
def test_no_two_layers_of_an_official_model_share_a_name(preset):
    config = PRESETS[preset]
    found = names_of(layers := layers_of(hollow(config)), config.unet)
    shared = {name: targets for name, targets in found.items() if len(targets) > 1}
    assert all(name.startswith("base_model.model.") for name in shared)
    assert {target for targets in found.values() for target in targets} == set(layers)
    for name, targets in found.items():
        assert targets[0] in layers, name


@pytest.mark.parametrize(
    ("preset", "counts"),
    [("sd15", (192, 72, 0)), ("sdxl-base", (722, 72, 192))],  # as the files of kohya's scripts
)
def test_the_numbers_of_modules_are_those_of_published_files(preset, counts):
    config = PRESETS[preset]
    found = names_of(layers_of(hollow(config)), config.unet)
    one = "lora_te_" if preset == "sd15" else "lora_te1_"
    unet = {t for name, ts in found.items() if name.startswith("lora_unet_") for t in ts if "transformer" in t.layer}
    unet = {t for t in unet if "norm" not in t.layer}
    texts = [{t for n, ts in found.items() if n.startswith(p) for t in ts} for p in (one, "lora_te2_")]
    texts = [{t for t in text if "norm" not in t.layer and t.layer != "projection"} for text in texts]
    assert (len(unet), *map(len, texts)) == counts


def test_the_scale_is_alpha_over_the_rank(networks, tmp_path):
    name = STYLES["kohya with LDM's names"][1]
    for alpha, scale in ((2.0, 0.5), (0.0, 1.0)):
        tensors = pair(*KOHYA, name) | {f"{name}.alpha": torch.tensor(alpha)}
        assert read(tensors, networks, tmp_path).changes[Q].scale == scale
    with pytest.raises(ValueError, match=r"alpha of lora_unet_.* must be one finite number, got nan"):
        read(pair(*KOHYA, name) | {f"{name}.alpha": torch.tensor(math.nan)}, networks, tmp_path)


def test_alpha_comes_from_the_metadata_of_diffusers(networks, tmp_path):
    names = [f"unet.{DIFFUSERS}.{BLOCK}.{name}" for name in ("attn2.to_q", "attn2.to_k")]
    tensors = pair(*PEFT, names[0]) | pair(*PEFT, names[1]) | pair(*PEFT, f"text_encoder.{HF}")
    table = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_k": 1}, "text_encoder.lora_alpha": 2}
    found = read(tensors, networks, tmp_path, {"lora_adapter_metadata": json.dumps(table)})
    assert [found.changes[target].scale for target in (Q, K, TEXT)] == [2.0, 0.25, 0.5]
    table["unet.use_rslora"] = True
    found = read(tensors, networks, tmp_path, {"lora_adapter_metadata": json.dumps(table)})
    assert [found.changes[target].scale for target in (Q, K, TEXT)] == [4.0, 0.5, 0.5]
    table["unet.alpha_pattern"] = {"attn[12].to_k": 1}
    with pytest.raises(ValueError, match=r"alpha_pattern must name layers, got the pattern 'attn\[12\].to_k'"):
        read(tensors, networks, tmp_path, {"lora_adapter_metadata": json.dumps(table)})


def test_a_folder_of_peft_has_alpha_in_its_config(networks, tmp_path):
    name = f"base_model.model.{DIFFUSERS}.{BLOCK}.attn2.to_q"
    with pytest.raises(ValueError, match=r"needs the file adapter_config.json of its folder, which holds alpha"):
        read(pair(*PEFT, name), networks, tmp_path, name="adapter_model.safetensors")
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 12, "use_rslora": True}))
    found = read_lora(tmp_path, networks, TINY_RANDOM.unet)
    assert {target: change.scale for target, change in found.changes.items()} == {Q: 6.0}
    config.write_text(json.dumps({"peft_type": "LOHA"}))
    with pytest.raises(ValueError, match=r"describes an adapter of kind LOHA: of PEFT's, only LORA is supported"):
        read_lora(tmp_path, networks, TINY_RANDOM.unet)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds neither of pytorch_lora_weights.safetensors and adapter_model"):
        read_lora(tmp_path, networks, TINY_RANDOM.unet)


def test_names_of_two_towers_lead_to_the_tower_that_fits(tmp_path):
    networks = hollow(TINY_SDXL)
    tensors = {}
    for i, name in enumerate(("lora_te1_", "lora_te2_"), 1):
        tensors |= pair(*KOHYA, f"{name}{HF}".replace(".", "_"), 16)
        tensors |= pair(*KOHYA, f"{name}text_model_encoder_layers_{i - 1}_mlp_fc1", 32, 16)
    tensors |= pair(*KOHYA, "lora_te2_text_projection", 24, 16)
    found = read(tensors, networks, tmp_path, config=TINY_SDXL)
    assert set(found.changes) == {
        TEXT,
        Target("text_encoder_2", TEXT.layer),
        Target("text_encoder", "blocks.0.fc1"),
        Target("text_encoder_2", "blocks.1.fc1"),
        Target("text_encoder_2", "projection"),
    }


def test_files_of_cloneofsimo_number_the_layers(networks, tmp_path):
    tensors = {}
    for i, name in enumerate("q k v o f q k v o".split()):
        tensors |= pair(f"unet:{i}:down", f"unet:{i}:up", "", 256 if name == "f" else 32, 32)
    for i in range(8):
        tensors |= pair(f"text_encoder:{i}:down", f"text_encoder:{i}:up", "")
    tensors["<s1>"] = torch.randn(32)
    classes = {
        "unet": '["CrossAttention", "Attention", "GEGLU"]',
        "text_encoder": '["CLIPAttention"]',
        "<s1>": "<embed>",
    }
    found = read(tensors, networks, tmp_path, classes)
    assert {name: value.shape for name, value in found.words.items()} == {"<s1>": (1, 32)}
    above = "down.3.transformer.blocks.0."
    layers = [target.layer.removeprefix(above) for target in found.changes if target.part == "unet"]
    attention = ["to_q", "to_k", "to_v", "to_out"]
    assert layers == [*(f"attn1.{n}" for n in attention), "ff.proj", *(f"attn2.{n}" for n in attention)]
    layers = [target.layer for target in found.changes if target.part == "text_encoder"]
    assert layers == [f"blocks.{i}.attn.to_{n}" for i in range(2) for n in ("k", "v", "q", "out")]
    with pytest.raises(ValueError, match=r"numbers the layers of ResnetBlock2D: only those of Attention, CrossAtt"):
        read(tensors, networks, tmp_path, classes | {"unet": '["ResnetBlock2D", "GEGLU"]'})


def test_the_numbers_of_cloneofsimo_follow_diffusers_order_of_blocks(networks):
    """diffusers builds the list of the decoder's blocks before the middle, so that the middle has the last numbers."""
    found = names_of(layers_of(networks), TINY_RANDOM.unet)
    numbered = [found[f"unet:{i}"][0].layer for i in range(0, 36, 9)]
    assert [name.split(".")[0] for name in numbered] == ["down", "up", "up", "mid"]


def test_a_layer_that_the_model_lacks_is_counted_and_named(networks, tmp_path):
    name = STYLES["kohya with LDM's names"][1]
    found = read(pair(*KOHYA, name) | pair(*KOHYA, "lora_unet_input_blocks_99_1_proj_in"), networks, tmp_path)
    assert (len(found.changes), found.count, found.unknown) == (1, 2, ("lora_unet_input_blocks_99_1_proj_in",))


NAME = STYLES["kohya with LDM's names"][1]
FACTORS = pair(*KOHYA, NAME)
OTHERS = pair(*KOHYA, NAME.replace("to_q", "to_k"), 64, 768)
WRONG = [
    (
        OTHERS,
        r"is a LoRA for Stable Diffusion 1.x, 768 wide; the model is a custom model, 32 wide: give a LoRA for this",
    ),
    (pair(*KOHYA, NAME, 64), r"1 changes of another size .* \[64, 64\]; give another"),
    (pair(*KOHYA, "lora_unet_double_blocks_0_img_attn_proj"), r"changes none of the model's layers, but lora_unet_dou"),
    (FACTORS | pair(*KOHYA, STYLES["kohya with diffusers' names"][1]), r"changes down.3.*attn2.to_q twice"),
    (dict([*FACTORS.items()][:1]), r"has factors that do not fit together: down \[4, 32\]; fetch the file again"),
    (
        FACTORS | {"x.lora_down.weight": torch.zeros(3, 3), "x.lora_up.weight": torch.zeros(3, 2)},
        r"do not fit together",
    ),
    (FACTORS | {f"{NAME}.diff": torch.zeros(32, 32)}, r"are of two kinds"),
    (FACTORS | {"x.lora_C.weight": torch.zeros(1)}, r"holds 1 tensors that no known kind of LoRA has: x.lora_C.weight"),
    ({"x.oft_blocks": torch.zeros(1), "x.alpha": torch.zeros(())}, r"holds OFT, which is not supported: LoRA, LoCon"),
    ({"x.weight": torch.zeros(1), "x.on_input": torch.zeros(())}, r"holds IA3, which is not supported"),
    ({"x.a1.weight": torch.zeros(1), "x.b1.weight": torch.zeros(1)}, r"holds GLoRA, which is not supported"),
    (FACTORS | {"x.bias_indices": torch.zeros(1)}, r"a sparse change of biases, which is not supported"),
    (FACTORS | {"bundle_emb.a.emb_params": torch.zeros(1)}, r"embeddings beside its LoRA, which is not supported"),
    (FACTORS | {"lora_controlnet": torch.zeros(1)}, r"is a Control-LoRA: give a LoRA"),
    ({"emb_params": torch.zeros(1, 768)}, r"is a textual-inversion embedding for Stable Diffusion 1.x: give a LoRA"),
    ({"first.weight": torch.zeros(1, 8)}, r"is no LoRA, it holds first.weight: give a LoRA"),
    (
        {"first_stage_model.encoder.down.0.block.0.conv1.weight": torch.zeros(1, 8, 3, 3)},
        r"is a model or a part of one, and no LoRA: give it with --model",
    ),
    ({name: value.int() for name, value in FACTORS.items()}, r"holds factors of I32, allowed are F64"),
]


@pytest.mark.parametrize(("tensors", "message"), WRONG)
def test_a_file_that_cannot_be_used_is_refused_by_name(tensors, message, networks, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tensors, networks, tmp_path)


def test_a_lora_for_sdxl_is_named_so(tmp_path):
    networks = hollow(PRESETS["sd15"])
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    with pytest.raises(
        ValueError,
        match=r"for Stable Diffusion XL, 2048 wide; the model is Stable Diffusion 1.x, 768 wide: give a LoRA",
    ):
        read(pair(*KOHYA, name, 640, 2048), networks, tmp_path, config=PRESETS["sd15"])


def test_a_model_given_as_a_lora_and_a_lora_given_as_a_model_are_named_so(networks, model_folder, tmp_path):
    with pytest.raises(ValueError, match=r"is a model and no LoRA: give it with --model"):
        read_lora(model_folder, networks, TINY_RANDOM.unet)
    read(FACTORS, networks, tmp_path, name="pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"is a LoRA: give a full checkpoint or a model folder; a LoRA is given with"):
        ldm.load(tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"is a LoRA and no model: give it with --lora, and the model with --model"):
        ldm.load(tmp_path)


def test_a_missing_file_is_named(networks, tmp_path):
    with pytest.raises(ValueError, match=r"none.safetensors does not exist"):
        read_lora(Path(tmp_path) / "none.safetensors", networks, TINY_RANDOM.unet)
