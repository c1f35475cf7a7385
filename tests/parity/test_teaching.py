"""LoRAs and words that were trained here give diffusers the same pictures, and LoRAs of diffusers give us the same."""

import dataclasses

import pytest
import torch
from PIL import Image

import ldm
from ldm.lora import set_loras
from ldm.training.adapters import LoraConfig
from ldm.training.data import DataConfig
from ldm.training.diffusion import DiffusionLoss
from ldm.training.loop import LoopConfig
from ldm.training.recipes import LoraRecipe, TextualInversionRecipe
from tests.parity import compare, reference, tenants, test_parity
from tests.parity.test_parity import LEVELS

pytestmark = [*test_parity.pytestmark, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
CPU = torch.device("cpu")
LAYERS = LoraConfig(
    4,
    8.0,
    targets=("to_q", "to_k", "to_v", "to_out.0", "conv1"),
    text_targets=("q_proj", "k_proj", "v_proj", "out_proj"),
)


@pytest.fixture
def common(tmp_path, folder):
    """The values of a recipe that trains one of the families on two pictures for a few steps."""
    for i, color in enumerate(("red", "green")):
        Image.new("RGB", (64, 64), color).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"a {color} <toy>")
    loop = LoopConfig(4, batch_size=2, warmup=0, schedule="constant", learning_rate=0.03, ema=0.0)
    data = DataConfig(64, tmp_path)
    made = {"out": tmp_path / "run", "data": data, "loop": loop, "loss": DiffusionLoss(caption_dropout=0.0)}
    return lambda name: {"model": folder(name), **made}


def assert_same_pictures(ours, theirs, before, prompt=None):
    """Both make the same picture, which is not the one from before."""
    request = tenants.request(steps=4)
    if prompt:
        request = dataclasses.replace(request, prompt=prompt)
    got, expected = tenants._array(ours.generate(request)), reference.pictures(theirs, request)[0]
    assert compare.levels(got, expected) <= LEVELS
    assert compare.levels(got, tenants._array(before.generate(request))) > 2


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl-base"])
@pytest.mark.parametrize(("layout", "dora"), [("kohya", False), ("diffusers", False), ("diffusers", True)])
def test_diffusers_loads_a_lora_that_was_trained_here(name, layout, dora, common, folder):
    pytest.importorskip("peft")
    text = () if dora else LAYERS.text_targets  # transformers 5 does not read the norms of DoRA in a text encoder
    lora = dataclasses.replace(LAYERS, dora=dora, text_targets=text)
    path = LoraRecipe(recipe="lora", lora=lora, layout=layout, **common(name)).run(CPU)
    plain, theirs = ldm.load(folder(name), ldm.Placement("cpu")), reference.load(folder(name))
    ours = ldm.load(folder(name), ldm.Placement("cpu"), loras=[path])
    theirs.load_lora_weights(path)
    assert_same_pictures(ours, theirs, plain)


@pytest.mark.parametrize("name", ["sd15", "sdxl-base"])
def test_a_lora_of_peft_starts_as_ours_and_is_loaded_with_its_alpha(name, folder, tmp_path):
    peft = pytest.importorskip("peft")
    plain, ours, theirs = (
        *(ldm.load(folder(name), ldm.Placement("cpu")) for _ in range(2)),
        reference.load(folder(name)),
    )
    config = peft.LoraConfig(r=LAYERS.rank, lora_alpha=LAYERS.alpha, target_modules=list(LAYERS.targets))
    theirs.unet.add_adapter(config)
    chosen = {name for name, _ in theirs.unet.named_modules() if name.endswith("lora_A.default")}
    assert len(chosen) == len(
        dataclasses.replace(LAYERS, text_targets=()).choose({"unet": ours.unet}, ours.config.unet)
    )
    for i, (key, value) in enumerate(theirs.unet.named_parameters()):
        if "lora_B" in key:
            assert not value.any()
            value.data = 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(i))
    theirs.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(theirs.unet, adapter_name="default"),
        unet_lora_adapter_metadata=theirs.unet.peft_config["default"].to_dict(),
    )
    set_loras(ours, [tmp_path])
    assert_same_pictures(ours, theirs, plain)


def test_diffusers_loads_a_word_that_was_learned_here(common, folder):
    recipe = TextualInversionRecipe(recipe="textual_inversion", word="<toy>", start="dog", vectors=2, **common("sd15"))
    path = recipe.run(CPU)
    plain = ldm.load(folder("sd15"), ldm.Placement("cpu"), embeddings=[])
    for file, token in (("learned_embeds.safetensors", None), ("toy.safetensors", "<toy>"), ("toy.pt", "<toy>")):
        ours = ldm.load(folder("sd15"), ldm.Placement("cpu"), embeddings=[f"<toy>={path / file}"])
        theirs = reference.load(folder("sd15"))
        theirs.load_textual_inversion(path / file, token=token)
        assert_same_pictures(ours, theirs, plain, "a <toy> on the beach")


def test_diffusers_loads_a_word_of_both_encoders_of_sdxl(common, folder):
    from safetensors.torch import load_file

    recipe = TextualInversionRecipe(recipe="textual_inversion", word="<toy>", start="dog", **common("sdxl-base"))
    path = recipe.run(CPU) / "toy.safetensors"
    plain, theirs = ldm.load(folder("sdxl-base"), ldm.Placement("cpu")), reference.load(folder("sdxl-base"))
    ours = ldm.load(folder("sdxl-base"), ldm.Placement("cpu"), embeddings=[f"<toy>={path}"])
    pooled = theirs.text_encoder_2  # its published config lets it pool at the largest id, which is the new word's
    getattr(pooled, "text_model", pooled).eos_token_id = theirs.tokenizer_2.eos_token_id
    held = load_file(path)
    for key, i in (("clip_l", ""), ("clip_g", "_2")):
        tower, tokenizer = (getattr(theirs, f"{kind}{i}") for kind in ("text_encoder", "tokenizer"))
        theirs.load_textual_inversion(held[key], token="<toy>", text_encoder=tower, tokenizer=tokenizer)
    assert_same_pictures(ours, theirs, plain, "a <toy> on the beach")
