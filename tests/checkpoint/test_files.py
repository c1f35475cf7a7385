"""Loading and saving: bit for bit, strict, frozen, nothing overwritten, nothing left behind."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ldm
from ldm.checkpoint import files, tables
from ldm.checkpoint.files import identify, load, save
from ldm.checkpoint.parts import Model, Part, collect, compare
from ldm.checkpoint.tensors import TensorFiles
from ldm.config import ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.models.text import TextEncoder
from ldm.models.tokens import BOS, EOS, Tokenizer, byte_alphabet
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.placement.packing import PLAIN, Packed, can_pack, pack

LAYOUTS = ("ldm", "diffusers")


def state(model: Model) -> dict[str, torch.Tensor]:
    networks = zip(("unet", "vae", "text_encoder"), model[1:4], strict=True)
    return {f"{n}.{key}": value for n, network in networks for key, value in network.state_dict().items()}


def assert_same_bits(one: Model, other: Model) -> None:
    ours, theirs = state(one), state(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(ours[key].dtype == theirs[key].dtype for key in ours)


@pytest.fixture(params=LAYOUTS)
def saved(request, small_file, small_folder) -> Path:
    """The small model on disk, in each layout."""
    return small_file if request.param == "ldm" else small_folder


def test_what_is_loaded_is_what_was_saved_bit_for_bit(saved, small):
    model = load(saved)
    assert model.config == small.config
    assert_same_bits(model, small)
    tower = model.text_encoder.towers[0]
    assert tower.tokenizer.vocab == small.text_encoder.towers[0].tokenizer.vocab
    assert tower.tokenizer.merges == small.text_encoder.towers[0].tokenizer.merges


def test_a_loaded_model_is_real_frozen_and_evaluates(saved):
    for network in load(saved)[1:4]:
        assert not network.training
        tensors = [*network.parameters(), *network.buffers()]
        assert not any(tensor.is_meta or tensor.requires_grad for tensor in tensors)


def test_a_loaded_model_computes_what_the_saved_one_does(saved, small):
    model = load(saved)
    context = model.text_encoder.encode(["a red apple"]).context
    torch.testing.assert_close(context, small.text_encoder.encode(["a red apple"]).context)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    # Not bit for bit: mapped tensors are aligned as in the file, and kernels for other alignments round otherwise.
    torch.testing.assert_close(model.unet(x, t, context), small.unet(x, t, context))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_goes_through_the_other_layout_unchanged(layout, saved, small, tmp_path):
    save(load(saved), tmp_path / "copy", layout=layout)
    assert_same_bits(load(tmp_path / "copy"), small)
    assert load(tmp_path / "copy").config == small.config


def test_saving_a_loaded_model_writes_the_same_bytes(small_file, tmp_path):
    save(load(small_file), tmp_path / "copy.safetensors", layout="ldm")
    assert (tmp_path / "copy.safetensors").read_bytes() == small_file.read_bytes()


def test_dtypes_are_those_asked_for(saved, small, tmp_path):
    model = load(saved, dtype=torch.float16, vae_dtype=torch.bfloat16)
    assert {p.dtype for p in [*model.unet.parameters(), *model.text_encoder.parameters()]} == {torch.float16}
    assert {p.dtype for p in model.vae.parameters()} == {torch.bfloat16}
    want = small.unet.conv_out.weight.to(torch.float16)
    assert torch.equal(model.unet.conv_out.weight, want)

    save(small, tmp_path / "half", dtype=torch.float16)
    assert torch.equal(load(tmp_path / "half").unet.conv_out.weight, want.float())
    assert small.unet.conv_out.weight.dtype == torch.float32
    with safe_open(tmp_path / "half/vae/diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.get_slice("decoder.conv_in.weight").get_dtype() == "F16"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells where memory is mapped")
def test_tensors_that_need_no_cast_are_memory_mapped_and_survive_the_file(small, tmp_path):
    save(small, tmp_path / "model", layout="ldm")
    model = load(tmp_path / "model")
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("/model")]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    for parameter in model.unet.parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in spans)
    save(model, tmp_path / "model", layout="ldm", overwrite=True)
    (tmp_path / "model").unlink()
    assert_same_bits(model, small)


def test_writing_into_a_loaded_model_does_not_touch_its_file(small_file, small):
    model = load(small_file)
    model.unet.conv_out.weight.zero_()
    assert_same_bits(load(small_file), small)


def test_identify_says_what_loads(saved, small):
    identity = identify(saved)
    assert identity.config == small.config
    assert (identity.preset, identity.prediction) == ("small", "v")
    assert "says v" in identity.why
    assert identity.source.layout == ("ldm" if saved.is_file() else "diffusers")
    assert all(p.is_meta for network in identity.networks for p in network.parameters())


# Strictness.


def edited(saved: Path, target: Path, edit) -> Path:
    """A copy of a saved model with `edit` applied to the tensors of its unet file, kept metadata included."""
    inner = "" if saved.is_file() else "unet/diffusion_pytorch_model.safetensors"
    (shutil.copy if saved.is_file() else shutil.copytree)(saved, target)
    with safe_open(target / inner if inner else target, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(target / inner if inner else target)
    edit(tensors)
    save_file(tensors, target / inner if inner else target, metadata=metadata)
    return target


def output_conv(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if name.endswith(("out.2.weight", "conv_out.weight")) and "stage" not in name)


def test_surplus_missing_and_misshapen_tensors_are_named_together(saved, tmp_path):
    def edit(tensors):
        name = output_conv(tensors)
        block = next(n for n in tensors if n.endswith("transformer_blocks.0.norm1.weight"))
        tensors[block.replace("blocks.0.norm1", "blocks.1.norm1")] = torch.zeros(2)  # a layer more
        del tensors[name.replace("weight", "bias")]
        tensors[name] = torch.zeros(1, 2, 3, 3)

    with pytest.raises(ValueError, match=r"the unet in .* does not match its configuration") as caught:
        load(edited(saved, tmp_path / "model", edit))
    message = str(caught.value)
    assert "1 missing: " in message
    assert "bias" in message
    assert "1 unexpected: " in message
    assert "transformer_blocks.1.norm1.weight" in message
    assert "1 misshapen: " in message
    assert "[1, 2, 3, 3] instead of [4, 32, 3, 3]" in message


@pytest.mark.parametrize("field", ["mid", "vector_dim"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_module_that_only_the_file_has_is_unexpected(layout, field, small, tmp_path):
    change = {"mid": "full"} if field == "mid" else {"vector_dim": 2816}
    with torch.device("meta"):
        unet = UNet(dataclasses.replace(small.config.unet, **change))
    rules = (tables.ldm_unet if layout == "ldm" else tables.diffusers_unet)(unet.config)
    tensors = {name: torch.zeros(value.shape) for name, value in collect(unet, rules, "unet.").items()}
    save_file(tensors, tmp_path / "unet.safetensors")
    lacking = UNet(dataclasses.replace(small.config.unet, **{field: "none" if field == "mid" else None}))
    part = Part(TensorFiles([tmp_path / "unet.safetensors"]), rules, "unet.")
    surplus = compare({"unet": lacking}, {"unet": part})[0]["unet"]["unexpected"]
    assert surplus == sorted(tensors.keys() - collect(lacking, rules, "unet.").keys())
    assert len(surplus) > 3
    assert compare({"unet": unet}, {"unet": part}) == ({}, [])


def test_a_long_list_is_cut(saved, tmp_path):
    def edit(tensors):
        for name in [name for name in tensors if "proj_in" in name or "time_emb" in name]:
            del tensors[name]

    with pytest.raises(ValueError, match=r"\d+ missing: \S+, \S+, \S+, \.\.\.\)"):
        load(edited(saved, tmp_path / "model", edit))


def test_numbers_that_need_a_scale_are_an_error(small_file, tmp_path):
    path = edited(small_file, tmp_path / "m", lambda tensors: tensors.update({"scaled_fp8": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"m is quantized, its numbers need scales \(scaled_fp8\)"):
        load(path)


def test_known_useless_tensors_are_ignored(small_file, small, tmp_path):
    useless = (
        "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
        "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance "
        "posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 logvar denoiser.sigmas "
        "model_ema.decay model_ema.num_updates model_ema.diffusion_modelinput_blocks00weight "
        "first_stage_model.loss.logvar cond_stage_model.logit_scale"
    )

    def edit(tensors):
        tensors.update({name: torch.full((3,), torch.nan) for name in useless.split()})
        name = next(name for name in tensors if name.endswith("position_ids"))
        tensors[name] = tensors[name].float() - 0.5  # merged files hold such

    assert_same_bits(load(edited(small_file, tmp_path / "m", edit)), small)


def test_clip_names_without_text_model_load_too(small_file, small, tmp_path):
    def edit(tensors):
        for name in [name for name in tensors if ".text_model." in name]:
            tensors[name.replace(".text_model.", ".")] = tensors.pop(name)

    assert_same_bits(load(edited(small_file, tmp_path / "m", edit)), small)


def test_one_by_one_convolutions_saved_as_matrices_load_too(saved, small, tmp_path):
    def edit(tensors):
        for name, value in tensors.items():
            if value.shape[2:] == (1, 1) and ("proj_" in name or ".attn_1." in name):
                tensors[name] = value[..., 0, 0].contiguous()

    assert_same_bits(load(edited(saved, tmp_path / "m", edit)), small)


# Saving.


def test_nothing_is_overwritten_without_being_asked(saved, small, tmp_path):
    layout = "ldm" if saved.is_file() else "diffusers"
    save(small, tmp_path / "model", layout=layout)
    with pytest.raises(ValueError, match=r"model exists( already)?: give another path, or overwrite=True"):
        save(small, tmp_path / "model", layout=layout)
    save(small, tmp_path / "model", layout=layout, dtype=torch.float16, overwrite=True)
    assert torch.equal(load(tmp_path / "model").unet.conv_out.bias, small.unet.conv_out.bias.half().float())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_only_models_are_overwritten(small, tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="photos is no model folder, so it is not overwritten"):
        save(small, tmp_path / "photos", overwrite=True)
    with pytest.raises(ValueError, match="photos is a folder and the ldm layout is one file"):
        save(small, tmp_path / "photos", layout="ldm", overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is no model folder"):
        save(small, tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_else_lies_in_an_overwritten_folder_stays(small, tmp_path):
    save(small, tmp_path / "model")
    (tmp_path / "model/README.md").write_text("a model card")
    (tmp_path / "model/samples").mkdir()
    save(small, tmp_path / "model", overwrite=True)
    assert (tmp_path / "model/README.md").read_text() == "a model card"
    assert (tmp_path / "model/samples").is_dir()
    assert_same_bits(load(tmp_path / "model"), small)


@pytest.mark.skipif(not can_pack(), reason="needs PyTorch's oneDNN operators for CPUs")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pipeline_with_packed_layers_is_saved_with_plain_weights(layout, small, tmp_path):
    pipe = ldm.Pipeline(small.config, *(copy.deepcopy(network) for network in small[1:4]))
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        pack(network)
    with torch.no_grad():  # a layer is packed at its first call
        context = pipe.text_encoder.encode(["a frog"]).context
        pipe.vae.decode(pipe.unet(torch.randn(1, 4, 8, 8), torch.tensor([500.0]), context))
    orders = {layer.held[1] for layer in pipe.unet.modules() if isinstance(layer, Packed)}
    assert orders - {PLAIN}
    save(pipe, tmp_path / "model", layout=layout)
    assert_same_bits(load(tmp_path / "model"), small)


class Quantized(torch.Tensor):
    """Stands for the tensors of torchao, whose numbers need scales."""


def test_a_quantized_model_is_not_saved(small, tmp_path):
    unet = copy.deepcopy(small.unet)
    weight = unet.conv_out.weight.data.as_subclass(Quantized)
    unet.conv_out.weight = torch.nn.Parameter(weight, requires_grad=False)
    message = r"conv_out\.weight has the type Quantized, which no file can hold: save the model before quantizing it"
    with pytest.raises(ValueError, match=message):
        save(small._replace(unet=unet), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_weights_may_be_read_by_whom_a_configuration_may(small_folder):
    config, weights = (small_folder / "vae" / name for name in ("config.json", "diffusion_pytorch_model.safetensors"))
    assert weights.stat().st_mode == config.stat().st_mode


def test_missing_parents_are_made(small, tmp_path):
    save(small, tmp_path / "a/b/model", layout="ldm")
    assert_same_bits(load(tmp_path / "a/b/model"), small)


def test_an_unknown_layout_is_an_error(small, tmp_path):
    with pytest.raises(ValueError, match=r"layout must be 'ldm' \(a file\) or 'diffusers' \(a folder\), got 'onnx'"):
        save(small, tmp_path / "model", layout="onnx")


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("model.safetensors", None, r"a folder, got .*model.safetensors: give layout='ldm' to write one file"),
        ("model", torch.int8, r"a torch dtype of real numbers, such as torch.float16, got torch.int8"),
        ("model", "float16", r"a torch dtype of real numbers, such as torch.float16, got 'float16'"),
    ],
)
def test_a_folder_named_like_a_file_and_a_dtype_of_no_weights_are_refused(small, tmp_path, name, dtype, message):
    with pytest.raises(ValueError, match=message):
        save(small, tmp_path / name, dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_models_that_a_layout_cannot_express_are_refused(small, tmp_path):
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), BOS, EOS]
    own = Tokenizer({token: i for i, token in enumerate(tokens)}, [])
    text = (TextConfig(width=32, layers=1, heads=2, mlp=32, vocab_size=514, pad_id=513),)
    config = ModelConfig("own", small.config.unet, small.config.vae, text)
    with pytest.raises(
        ValueError, match="no place for a tokenizer, and that of own is not CLIP's own: save in the diff"
    ):
        save(Model(config, small.unet, small.vae, TextEncoder(text, [own])), tmp_path / "m", layout="ldm")
    odd = dataclasses.replace(small.config, text=(TextConfig(width=32, output_layer=-2),))
    with pytest.raises(ValueError, match=r"cannot express TextConfig.*save in the ldm layout"):
        save(Model(odd, *small[1:4]), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_its_own_vocabulary_and_padding_comes_back(tmp_path):
    tokens = [*byte_alphabet(), *(c + "</w>" for c in byte_alphabet()), "th", BOS, EOS]
    tokenizer = Tokenizer({token: i for i, token in enumerate(tokens)}, [("t", "h")])
    text = (TextConfig(width=32, layers=1, heads=2, mlp=32, vocab_size=600, max_length=20, pad_id=0),)
    unet = UNetConfig(channels=(32,), depth=(1,), heads=(2,), context_dim=32, in_channels=9, res_blocks=1)
    config = ModelConfig("own", unet, VAEConfig(channels=(32,), res_blocks=1), text, image_size=20)
    model = Model(config, UNet(unet), VAE(config.vae), TextEncoder(text, [tokenizer]).eval())
    save(model, tmp_path / "own")
    loaded = load(tmp_path / "own")
    assert loaded.config == config
    assert_same_bits(loaded, model)
    tokenize = model.text_encoder.towers[0].tokenize
    assert torch.equal(loaded.text_encoder.towers[0].tokenize(["the moth"]), tokenize(["the moth"]))
    assert tokenize(["the moth"])[0, -1] == 0


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("unet", {"cross_attention_dim": 64}, "the text encoder of .* is 32 wide, its unet attends to 64"),
        ("unet", {"block_out_channels": [32, -64]}, "the configuration of .* describes no model"),
        ("text_encoder", {"num_attention_heads": 5}, "the configuration of .* describes no model"),
        ("text_encoder", {"vocab_size": 100}, "the tokenizer of .* has 49408 tokens, its text encoder knows 100"),
    ],
)
def test_configs_that_describe_no_model_are_an_error(part, values, message, small_folder, tmp_path):
    shutil.copytree(small_folder, tmp_path / "m")
    path = tmp_path / "m" / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "m")


def test_a_pipeline_or_anything_with_the_four_parts_can_be_saved(small, tmp_path):
    class Pipeline:
        config, unet, vae, text_encoder = small[:4]

    save(Pipeline(), tmp_path / "m")
    assert_same_bits(load(tmp_path / "m"), small)
    assert files.Model is Model
