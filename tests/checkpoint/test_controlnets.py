"""ControlNets on disk: official names by digest, files and folders of each family, and what is refused by name."""

import dataclasses
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoint import tables
from ldm.checkpoint.controlnets import identify_controlnet, load_controlnet, save_controlnet
from ldm.checkpoint.files import convert
from ldm.checkpoint.parts import collect
from ldm.cli.inspect import inspect
from ldm.models.controlnet import ControlNet
from ldm.models.unet import UNet
from ldm.presets import SD15, SD21, SD21_BASE, SDXL_BASE
from tests.checkpoint.standin import write_hollow
from tests.tiny import TINY_RANDOM, TINY_SDXL, random_controlnet

DIGEST = "97447235acb015407fe303417928fa1136d86d270cac90eceecb5645e07f4378"  # of the official files for SD 1.5
MID = dataclasses.replace(SDXL_BASE.unet, depth=(0, 1, 1), mid_depth=1)  # published by diffusers
SMALL = dataclasses.replace(SDXL_BASE.unet, depth=(0, 0, 0), mid="residual")
CONFIGS = {"sd15": SD15.unet, "sd21": SD21_BASE.unet, "sdxl": SDXL_BASE.unet, "sdxl-mid": MID, "sdxl-small": SMALL}


def shapes_of(config, style="ldm", prefix=""):
    """The names and shapes of a ControlNet at full size."""
    with torch.device("meta"):
        network = ControlNet(config)
    rules = tables.ldm_controlnet(config) if style == "ldm" else tables.diffusers_controlnet(config, 8)
    return {name: tuple(value.shape) for name, value in collect(network, rules, prefix).items()}


def test_the_names_and_shapes_for_sd15_are_the_official_ones():
    shapes = shapes_of(SD15.unet, prefix="control_model.")
    lines = "".join(f"{name} {list(shape)}\n" for name, shape in sorted(shapes.items()))
    assert len(shapes) == 340
    assert hashlib.sha256(lines.encode()).hexdigest() == DIGEST


@pytest.mark.parametrize("name", CONFIGS)
def test_the_names_of_diffusers_are_those_of_its_own_class(name):
    from diffusers import ControlNetModel

    config = CONFIGS[name]
    down = [f"{'CrossAttn' * bool(depth)}DownBlock2D" for depth in config.depth]
    with torch.device("meta"):
        theirs = ControlNetModel(
            block_out_channels=config.channels,
            down_block_types=down,
            mid_block_type="UNetMidBlock2DCrossAttn" if config.mid == "full" else "UNetMidBlock2D",
            transformer_layers_per_block=[*(depth or 1 for depth in config.depth[:-1]), config.mid_depth or 1],
            attention_head_dim=config.heads,
            cross_attention_dim=config.context_dim,
            use_linear_projection=config.linear_projection,
            **({"addition_embed_type": "text_time", "addition_time_embed_dim": 256} if config.vector_dim else {}),
            projection_class_embeddings_input_dim=config.vector_dim,
        )
    expected = {n: tuple(value.shape) for n, value in theirs.state_dict().items()}
    assert shapes_of(config, "diffusers") == expected


@pytest.mark.parametrize("style", ["ldm", "diffusers"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_single_file_is_identified_by_names_and_shapes(name, style, tmp_path):
    found = identify_controlnet(write_hollow(tmp_path / "file", shapes_of(CONFIGS[name], style)))
    family = {"sd15": "Stable Diffusion 1.x", "sd21": "Stable Diffusion 2.x"}.get(name, "Stable Diffusion XL")
    assert found.kind == f"a ControlNet for {family}"
    own = found.network.config
    for field in ("channels", "depth", "mid", "mid_depth", "heads", "context_dim", "vector_dim", "linear_projection"):
        assert getattr(own, field) == getattr(CONFIGS[name], field), field
    assert not found.network.pooled
    report = inspect(tmp_path / "file")
    assert (report.kind, report.problem) == (found.kind, "")
    assert "use it with --controlnet" in str(report)


def test_the_controlnet_in_a_whole_checkpoint_is_found(tmp_path):
    shapes = shapes_of(SD15.unet, prefix="control_model.")
    others = {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3), "betas": (1000,)}
    found = identify_controlnet(write_hollow(tmp_path / "file", shapes | others))
    assert found.part.prefix == "control_model."


@pytest.mark.parametrize(
    ("name", "pooled"),
    [
        ("control_v11e_sd15_shuffle", True),
        ("control_v11e_sd15_shuffle_fp16", True),
        ("control_v11p_sd15_canny", False),
        ("shuffled_faces", False),
    ],
)
def test_the_shuffle_controlnet_is_told_by_its_name(name, pooled, tmp_path):
    found = identify_controlnet(write_hollow(tmp_path / f"{name}.safetensors", shapes_of(SD15.unet)))
    assert found.network.pooled == pooled


def noisy(network):
    """Give every parameter a random value."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    return network


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("config", [TINY_RANDOM, TINY_SDXL], ids=lambda c: c.name)
def test_a_folder_comes_back_bit_for_bit(config, pooled, tmp_path):
    network = noisy(random_controlnet(config, pooled=pooled))
    save_controlnet(network, tmp_path / "net")
    again = load_controlnet(tmp_path / "net")
    assert same(network, again)
    assert (again.config, again.hint_channels, again.pooled) == (network.config, (8, 8, 16), pooled)
    assert not any(p.requires_grad for p in again.parameters())
    assert next(load_controlnet(tmp_path / "net", dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16
    save_controlnet(network, tmp_path / "net")  # a ControlNet is replaced, nothing else is
    (tmp_path / "else").mkdir()
    with pytest.raises(ValueError, match="else is not a folder of a ControlNet, so it is not overwritten"):
        save_controlnet(network, tmp_path / "else")
    assert inspect(tmp_path / "net").problem == ""


NARROW = dataclasses.replace(  # of SD 1.5's family by what is looked at, and small elsewhere
    SD15.unet, channels=(320, 32), depth=(1, 0), heads=(8, 8), res_blocks=1, mid_depth=1
)


@pytest.fixture
def narrow():
    torch.manual_seed(1)
    return ControlNet(NARROW).requires_grad_(False), UNet(NARROW).requires_grad_(False)


def test_a_difference_is_added_to_the_encoder_of_the_unet(narrow, tmp_path):
    network, unet = narrow
    tensors = collect(network, tables.ldm_controlnet(NARROW), "control_model.")
    save_file(tensors | {"difference": torch.zeros(1)}, tmp_path / "file.safetensors")
    loaded = load_controlnet(tmp_path / "file.safetensors", unet=unet)
    base, own = unet.state_dict(), network.state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, own[name] + base[name] if name in base else own[name]), name
    with pytest.raises(ValueError, match="the difference between a ControlNet and a UNet: give the UNet to add it to"):
        load_controlnet(tmp_path / "file.safetensors")
    wide = UNet(dataclasses.replace(NARROW, in_channels=9))
    with pytest.raises(ValueError, match="difference to a UNet of 4 input channels, the model's has 9"):
        load_controlnet(tmp_path / "file.safetensors", unet=wide)


def test_a_pickle_with_a_whole_model_becomes_a_file_with_the_same_names(narrow, tmp_path):
    tensors = collect(narrow[0], tables.ldm_controlnet(NARROW), "control_model.")
    torch.save({"state_dict": tensors | {"betas": torch.zeros(3)}}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match="is a PyTorch pickle"):
        identify_controlnet(tmp_path / "net.pth")
    convert(tmp_path / "net.pth", tmp_path / "net.safetensors", layout="ldm")
    assert load_file(tmp_path / "net.safetensors").keys() == tensors.keys() | {"betas"}
    assert same(load_controlnet(tmp_path / "net.safetensors"), narrow[0])


# ------------------------------------------------------------------ what is refused

HINT = {"control_model.input_hint_block.0.weight": (16, 3, 3, 3)}
EMBEDDING = {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        (
            EMBEDDING | {"task_embedding": (6, 320), "control_add_embedding.linear_1.bias": (1280,)},
            "a ControlNet Union",
        ),
        (HINT | {"lora_controlnet": ()}, "a Control-LoRA"),
        ({"lllite_unet_input_blocks_4_1.conditioning1.0.weight": (16, 3, 4, 4)}, "a ControlNet-LLLite"),
        (EMBEDDING | {"control_to_base_for_conv_in.weight": (320, 4, 1, 1)}, "a ControlNet-XS"),
        (HINT | {"control_model.enc_zero_convs_out.0.0.weight": (320, 4, 1, 1)}, "a ControlNet-XS"),
        ({"adapter.body.0.in_conv.weight": (320, 192, 3, 3)}, "a T2I-Adapter"),
    ],
)
def test_relatives_are_refused_by_name(shapes, kind, tmp_path):
    path = write_hollow(tmp_path / "file", shapes)
    with pytest.raises(ValueError, match=f"file is {kind}: give a ControlNet as it was first published"):
        identify_controlnet(path)
    assert inspect(path).kind == kind


def test_a_model_is_no_controlnet(tmp_path):
    path = write_hollow(tmp_path / "file", {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)})
    with pytest.raises(ValueError, match=r"file holds no ControlNet, but model\.diffusion_model\.input_blocks"):
        identify_controlnet(path)


@pytest.mark.parametrize("name", ["control_model.zero_convs.3.0.weight", "control_model.input_hint_block.4.bias"])
def test_a_missing_and_a_strange_tensor_are_named(name, tmp_path):
    shapes = shapes_of(SD15.unet, prefix="control_model.")
    gone = {n: s for n, s in shapes.items() if n != name}
    with pytest.raises(ValueError, match=rf"the controlnet in .* does not match .*1 missing: {name}"):
        identify_controlnet(write_hollow(tmp_path / "gone", gone))
    with pytest.raises(ValueError, match=r"control_model\.strange"):
        identify_controlnet(write_hollow(tmp_path / "more", shapes | {"control_model.strange": (3,)}))


def test_a_controlnet_for_another_model_is_refused_with_its_path(tmp_path, narrow):
    with pytest.raises(ValueError, match="file: the ControlNet has text of width 1024, and the UNet of the model 768"):
        load_controlnet(write_hollow(tmp_path / "file", shapes_of(SD21.unet)), unet=narrow[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "ControlNetUnionModel"}, "describes ControlNetUnionModel: allowed is ControlNetModel"),
        (
            {"controlnet_conditioning_channel_order": "bgr"},
            "controlnet_conditioning_channel_order 'bgr' is not supported",
        ),
        ({"conditioning_channels": 4}, "conditioning_channels 4 is not supported; allowed: 3"),
        ({"conditioning_embedding_out_channels": 16}, "conditioning_embedding_out_channels must be a list of channels"),
        ({"down_block_types": "DownBlock2D"}, "are not supported; allowed is one"),
    ],
)
def test_a_folder_that_says_something_else_is_refused(changes, message, tmp_path):
    save_controlnet(random_controlnet(), tmp_path / "net")
    config = tmp_path / "net/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        identify_controlnet(tmp_path / "net")
