"""LoRAs give the weights of `lycoris-lora`, and through diffusers and `peft` the same predictions and pictures."""

import dataclasses

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ldm
from ldm.checkpoint.loras import read_lora
from ldm.lora import Lora, set_loras
from ldm.lora_tools import extract, merge_loras
from ldm.models.low_rank import Cut
from tests.parity import compare, loras, reference, tenants, test_parity
from tests.parity.loras import adapt, difference, drawn, kohya, write
from tests.parity.reference import FAMILIES
from tests.parity.test_parity import LEVELS, RELATIVE
from tests.tiny import TINY_RANDOM, random_networks

pytestmark = [*test_parity.pytestmark, pytest.mark.slow]
STAGE = "lora_unet_input_blocks_3_"
LAYERS = {  # names in files, and in the tiny random model
    f"{STAGE}1_transformer_blocks_0_attn2_to_q": "3.transformer.blocks.0.attn2.to_q",
    f"{STAGE}0_in_layers_2": "3.res.conv1",
    f"{STAGE}1_proj_in": "3.transformer.proj_in",
}
OPTIONS = {
    "locon": [{}, {"use_tucker": True}, {"weight_decompose": True}, {"weight_decompose": True, "wd_on_out": False}],
    "loha": [{}, {"use_tucker": True}, {"weight_decompose": True}],
    "lokr": [
        {},
        {"use_tucker": True},
        {"decompose_both": True},
        {"full_matrix": True},
        {"weight_decompose": True, "wd_on_out": False},
    ],
    "full": [{}],
    "norms": [{}],
}
CASES = [pytest.param(kind, given, id=f"{kind} {given}") for kind, options in OPTIONS.items() for given in options]


def effective(kind, module, layer):
    """The weight and bias that LyCORIS trains with. Its merging applies the scale of LoHa twice, its training once."""
    if kind == "loha":
        merged = layer.weight + module.get_weight(layer.weight.shape)
        return (module.apply_weight_decompose(merged) if module.wd else merged), None
    if kind == "full":
        return layer.weight + module.weight, None if layer.bias is None else layer.bias + module.bias
    if kind == "norms":
        return layer.weight + module.w_norm, layer.bias + module.b_norm
    return module.get_merged_weight(shape=layer.weight.shape)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_the_weights_are_those_of_lycoris(kind, options, tmp_path):
    pytest.importorskip("lycoris")
    from lycoris.modules import full, locon, loha, lokr, norms

    made = {
        "locon": locon.LoConModule,
        "loha": loha.LohaModule,
        "lokr": lokr.LokrModule,
        "full": full.FullModule,
        "norms": norms.NormModule,
    }
    unet, _, text = random_networks()
    layers = {f"{STAGE}0_in_layers_0": "3.res.norm1"} if kind == "norms" else LAYERS
    tensors, expected = {}, {}
    torch.manual_seed(0)
    for name, ours in layers.items():
        layer = unet.down.get_submodule(ours).requires_grad_(False)
        module = made[kind](name, layer, 1.0, *(() if kind == "norms" else (4, 2)), factor=4, **options)
        for parameter in module.parameters():
            parameter.data += 0.3 * torch.rand_like(parameter)
        with torch.no_grad():
            expected[ours] = effective(kind, module, layer)
            held = {"w_norm": module.w_norm, "b_norm": module.b_norm} if kind == "norms" else module.custom_state_dict()
            if kind == "full":  # until the module is used, its parameters are the differences
                held = {"diff": module.weight, "diff_b": module.bias}
            tensors |= {f"{name}.{key}": v.detach().clone().contiguous() for key, v in held.items() if v is not None}
    save_file(tensors, tmp_path / "a.safetensors")
    found = read_lora(tmp_path / "a.safetensors", {"unet": unet, "text_encoder": text.towers[0]}, TINY_RANDOM.unet)
    assert len(found.changes) == len(layers)
    for target, change in found.changes.items():
        weight, bias = expected[target.layer.removeprefix("down.")]
        layer = unet.get_submodule(target.layer)
        merged = layer.weight + change.of("weight", layer.weight)
        assert (merged - layer.weight).abs().max() > 1e-3
        print(kind, options, target.layer, f"{(merged - weight).abs().max():.1e} of {weight.abs().max():.1f}")
        torch.testing.assert_close(merged, weight, rtol=1e-5, atol=1e-5)
        if bias is not None:
            torch.testing.assert_close(layer.bias + change.of("bias", layer.bias), bias, rtol=1e-5, atol=1e-5)


def assert_same(name, ours, theirs, before):
    """The networks predict the same, the picture is the same, and both differ from those without a LoRA."""
    given = compare.draw(reference.small(FAMILIES[name]), 0, 64)
    got, expected = compare.of_ours(ours, given), compare.of_diffusers(theirs, given)
    differences = {what: compare.relative(got[what], expected[what]) for what in expected}
    moved = {what: compare.relative(got[what], before[what]) for what in expected}
    print(name, {what: f"{value:.1e} (moved {moved[what]:.1e})" for what, value in differences.items()})
    assert max(differences.values()) < RELATIVE, differences
    assert max(moved.values()) > 0.01
    request = tenants.request(steps=4)
    pictures = ours.generate(request), reference.pictures(theirs, request)[0]
    assert compare.levels(tenants._array(pictures[0]), pictures[1]) <= LEVELS
    return got


@pytest.fixture
def pair(folder):
    """A model in both libraries, of its own because a LoRA changes it."""
    return lambda name: (ldm.load(folder(name), ldm.Placement("cpu")), reference.load(folder(name)))


def without(name, ours):
    return compare.of_ours(ours, compare.draw(reference.small(FAMILIES[name]), 0, 64))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl-base"])
def test_a_file_of_kohya_computes_what_diffusers_computes(name, pair, tmp_path):
    pytest.importorskip("peft")
    ours, theirs = pair(name)
    before, count = without(name, ours), kohya(theirs, tmp_path / "a.safetensors")
    (applied,) = set_loras(ours, [tmp_path / "a.safetensors"])
    assert (applied.applied, applied.total, applied.unknown) == (count, count, ())
    theirs.load_lora_weights(tmp_path / "a.safetensors")
    assert_same(name, ours, theirs, before)
    set_loras(ours, [])
    after = without(name, ours)
    assert all(torch.equal(after[what], before[what]) for what in before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_a_file_that_diffusers_saves_computes_what_diffusers_computes(options, pair, tmp_path):
    peft = pytest.importorskip("peft")
    ours, theirs = pair("sd15")
    before = without("sd15", ours)
    named = ["to_q", "to_k", "to_out.0", "conv1"]
    patterns = {"rank_pattern": {"attn2.to_q": 2}, "alpha_pattern": {"attn2.to_q": 1, "attn1.to_k": 16}}
    theirs.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=named, **patterns, **options))
    text = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj", "fc2"], **options)
    theirs.text_encoder.add_adapter(text)
    for network in (theirs.unet, theirs.text_encoder):
        for i, (key, value) in enumerate(network.named_parameters()):
            if "lora_B" in key:
                value.data = 0.1 * drawn(value.shape, i)
    theirs.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(theirs.unet, adapter_name="default"),
        text_encoder_lora_layers=peft.get_peft_model_state_dict(theirs.text_encoder, adapter_name="default"),
        unet_lora_adapter_metadata=theirs.unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=theirs.text_encoder.peft_config["default"].to_dict(),
    )
    (applied,) = set_loras(ours, [tmp_path])
    assert applied.applied == applied.total > 50
    assert_same("sd15", ours, theirs, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", loras.CASES)
def test_weighted_loras_make_the_pictures_of_diffusers(case, folder, both, tmp_path):
    pytest.importorskip("peft")
    ours, theirs = both("sd15")
    assert difference(ours, theirs, write(tmp_path, theirs), case, tenants.request(steps=4)) <= LEVELS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["sd15", "sdxl-base"])
def test_an_extracted_lora_computes_in_diffusers_what_it_computes_here(name, folder, pair, tmp_path):
    """Every kind of layer that `extract` changes is among the names that diffusers reads."""
    pytest.importorskip("peft")
    ours, theirs = pair(name)
    before = without(name, ours)
    for network in (ours.unet, *ours.text_encoder.towers):
        for i, (key, value) in enumerate(network.named_parameters()):
            if key.endswith("weight") and value.dim() > 1 and "embedding" not in key:
                value += 0.1 * value.std() * drawn(value.shape, i)
    ours.save(tmp_path / "tuned")
    written = extract(tmp_path / "tuned", folder(name), tmp_path / "a.safetensors", Cut(8), convolutions=True)
    print(written)
    ours = ldm.load(folder(name), ldm.Placement("cpu"))
    (applied,) = set_loras(ours, [tmp_path / "a.safetensors"])
    assert applied.applied == applied.total == written.modules
    theirs.load_lora_weights(tmp_path / "a.safetensors")
    assert_same(name, ours, theirs, before)


@pytest.mark.filterwarnings("ignore")
def test_loras_merged_into_one_compute_what_diffusers_computes_with_all(folder, pair, tmp_path):
    pytest.importorskip("peft")
    ours, theirs = pair("sd15")
    before, files = without("sd15", ours), write(tmp_path, theirs)
    merge_loras([Lora(files[0], 0.7), Lora(files[1], -0.4)], tmp_path / "m.safetensors", model=folder("sd15"))
    set_loras(ours, [tmp_path / "m.safetensors"])
    adapt(theirs, files, (0.7, -0.4))
    assert_same("sd15", ours, theirs, before)


@pytest.mark.parametrize("name", ["sd15", "sdxl-base"])
def test_an_lcm_lora_makes_the_picture_of_diffusers_in_four_steps(name, pair, tmp_path):
    """The real files change all layers of the UNet but the first and the last, with kohya's names, and no text."""
    pytest.importorskip("peft")
    ours, theirs = pair(name)
    tensors = {}
    for i, (layer_name, layer) in enumerate(theirs.unet.named_modules()):
        if not isinstance(layer, nn.Linear | nn.Conv2d) or layer_name in ("conv_in", "conv_out"):
            continue
        stem, (out, inside, *kernel) = f"lora_unet_{layer_name.replace('.', '_')}", layer.weight.shape
        tensors[f"{stem}.lora_down.weight"] = drawn((4, inside, *kernel), i) / inside**0.5
        tensors[f"{stem}.lora_up.weight"] = 0.01 * drawn((out, 4, *(1 for _ in kernel)), i + 1)
        tensors[f"{stem}.alpha"] = torch.tensor(4.0)
    save_file(tensors, tmp_path / "lcm.safetensors")
    request = dataclasses.replace(
        tenants.request(steps=4), sampler="lcm", spacing="lcm", guidance_scale=1.0, negative_prompt=None
    )
    before = tenants._array(ours.generate(request))
    (applied,) = set_loras(ours, [tmp_path / "lcm.safetensors"])
    assert applied.applied == applied.total == len(tensors) // 3
    theirs.load_lora_weights(tmp_path / "lcm.safetensors")
    theirs.scheduler = diffusers.LCMScheduler.from_config(theirs.scheduler.config)
    found, expected = tenants._array(ours.generate(request)), reference.pictures(theirs, request)[0]
    print(name, compare.levels(found, expected), compare.levels(found, before))
    assert compare.levels(found, expected) <= LEVELS
    assert compare.levels(found, before) > 10
