"""UNets that differ from the official ones in depth, middle or guidance compute what diffusers computes."""

import dataclasses
import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

import ldm
from ldm.checkpoint import configs, files, identify, tables
from ldm.checkpoint.keymap import key_map
from ldm.models.unet import UNet
from ldm.presets import RELATIVES, SD15, SDXL_BASE
from tests.parity import compare, reference
from tests.sparse import sparse

RELATIVE = 1e-5  # of the largest value, in fp32: both may sum in their own order
PUBLISHED = reference.RELATIVES | {
    "LCM of SD 1.5": reference.LCM.unet,
    "LCM of SDXL": reference.FAMILIES["sdxl-base"].unet | {"time_cond_proj_dim": 256},
}
OURS = RELATIVES | {
    "LCM of SD 1.5": dataclasses.replace(SD15.unet, guidance_dim=256),
    "LCM of SDXL": dataclasses.replace(SDXL_BASE.unet, guidance_dim=256),
}


def narrow(unet):
    """The same UNet with few channels, and 5 transformer blocks at most."""

    def capped(layers):
        return [capped(n) for n in layers] if isinstance(layers, list | tuple) else min(layers, 5)

    levels = len(unet.get("block_out_channels", range(4)))
    small = {"block_out_channels": [32, 64, 96, 96][:levels], "cross_attention_dim": 24}
    small["attention_head_dim"] = [1, 2, 3, 3][:levels]
    for key in ("transformer_layers_per_block", "reverse_transformer_layers_per_block"):
        if key in unet:
            small[key] = capped(unet[key])
    if "projection_class_embeddings_input_dim" in unet:
        small["projection_class_embeddings_input_dim"] = 16 + 6 * 256
    return unet | small


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_diffusers_and_we_build_the_same_network_from_the_published_config(name):
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**PUBLISHED[name])
        config = configs.unet_from_json(json.loads(theirs.to_json_string()), name)
        ours = UNet(config)
        again = UNet2DConditionModel.from_config(configs.unet_to_json(config, 64))
    assert config == OURS[name]
    names = key_map(ours.state_dict(), tables.diffusers_unet(config))
    assert {names[key].name: tuple(value.shape) for key, value in ours.state_dict().items()} == shapes(
        theirs.state_dict()
    )
    assert shapes(again.state_dict()) == shapes(theirs.state_dict())


@pytest.mark.parametrize("style", ["ldm", "diffusers"])
@pytest.mark.parametrize("name", OURS)
@pytest.mark.slow
def test_a_single_file_tells_the_same_network_by_its_names_and_shapes(name, style):
    with torch.device("meta"):
        state = UNet(OURS[name]).state_dict()
    rules = {"ldm": tables.ldm_unet, "diffusers": tables.diffusers_unet}[style](OURS[name])
    names = key_map(state, rules, "unet.")
    file = SimpleNamespace(shapes=shapes({names[key].name: state[key] for key in state}))
    assert identify.unet_of(file, identify.Place("unet.", style))[0] == OURS[name]


@pytest.mark.parametrize("name", sparse(PUBLISHED, 2))
@pytest.mark.slow
def test_a_folder_of_diffusers_gives_a_unet_that_computes_the_same(name, tmp_path):
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**narrow(PUBLISHED[name])).eval()
    theirs.save_pretrained(tmp_path)
    config = configs.unet_from_json(json.loads((tmp_path / "config.json").read_text()), name)
    assert config.mid == OURS[name].mid
    ours = load(UNet(config), load_file(tmp_path / "diffusion_pytorch_model.safetensors"))

    x, t = torch.randn(2, 4, 12, 10), torch.tensor([999.0, 250.0])
    context = torch.randn(2, 7, config.context_dim)
    given, vector, guidance = {}, None, None
    if config.vector_dim:
        pooled, sizes = (torch.randn(2, 16), torch.tensor([[1024.0, 768.0, 0.0, 16.0, 512.0, 640.0]] * 2))
        given["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
        embedded = compare.timestep_embedding(sizes.flatten(), 256).reshape(2, -1)
        vector = torch.cat([pooled, embedded], dim=1)
    if config.guidance_dim:
        guidance = torch.tensor([7.5, 0.25])
        embed = reference.LCM.pipeline.get_guidance_scale_embedding
        given["timestep_cond"] = embed(None, guidance, embedding_dim=config.guidance_dim)
    with torch.no_grad():
        middle, skips = ours.encode(x, ours.embed(t, vector, x.dtype, guidance), context)
        residuals = [torch.randn_like(h) for h in (*skips, middle)]
        controlled = given | {
            "down_block_additional_residuals": residuals[:-1],
            "mid_block_additional_residual": residuals[-1],
        }
        for what, one, other in (("alone", None, given), ("with a ControlNet's residuals", residuals, controlled)):
            expected = theirs(x, t, context, **other).sample
            got = ours(x, t, context, vector, one, guidance)
            difference = compare.relative(got, expected)
            print(name, what, f"{float((got - expected).abs().max()):.1e}, relative {difference:.1e}")
            assert difference < RELATIVE


def load(unet, tensors):
    """Give our UNet the tensors of a diffusers folder, every one of them."""
    state = unet.state_dict()
    names = key_map(state, tables.diffusers_unet(unet.config))
    assert {stored.name for stored in names.values()} == tensors.keys()
    unet.load_state_dict({key: names[key].form.restore(tensors[names[key].name], state[key].shape) for key in state})
    return unet.eval()


# ------------------------------------------------------------------ whole models


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Small models with such UNets, loaded by us and by diffusers."""
    families = {
        "LCM": reference.LCM,
        "SSD-1B": dataclasses.replace(reference.FAMILIES["sdxl-base"], unet=reference.RELATIVES["SSD-1B"]),
    }

    @cache
    def load(name):
        folder = tmp_path_factory.mktemp(name)
        reference.build(folder, reference.small(families[name]))
        return ldm.load(folder, ldm.Placement("cpu")), reference.load(folder)

    return load


@pytest.fixture
def lcm(both):
    """A latent consistency model."""
    return both("LCM")


@pytest.mark.slow
def test_pictures_of_ssd_1b_equal_those_of_diffusers(both):
    ours, theirs = both("SSD-1B")
    assert ours.unet.config.mid == "residual"
    assert ours.unet.config.depths()[1][1] == (2, 1, 1)
    request = ldm.Request(
        *reference.PROMPTS, steps=4, guidance_scale=7.5, sampler="euler", spacing="leading", width=64, height=64
    )
    (got, _), (expected, _) = compare.pictures(ours, request), reference.pictures(theirs, request)
    assert expected.std() > 20  # flat pictures would be equal whatever the networks did
    print("levels of 255:", compare.levels(got, expected))
    assert compare.levels(got, expected) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
@pytest.mark.parametrize("name", ["LCM", "SSD-1B"])
def test_saved_in_either_layout_they_are_the_same_models(name, layout, both, tmp_path):
    ours, theirs = both(name)
    path = tmp_path / ("model.safetensors" if layout == "ldm" else "model")
    files.save(ours, path, layout=layout)
    again = ldm.load(path, ldm.Placement("cpu"))
    assert again.config == ours.config
    state = again.unet.state_dict()
    assert all(torch.equal(state[key], value) for key, value in ours.unet.state_dict().items())
    if layout == "diffusers":
        read = reference.load(path)
        assert isinstance(read, type(theirs))
        state = read.unet.state_dict()
        assert all(torch.equal(state[key], value) for key, value in theirs.unet.state_dict().items())


def made(pipe, request):
    return np.stack([np.asarray(picture) for picture in pipe.generate(request)])


@pytest.mark.parametrize(
    "change",
    sparse([{}, {"guidance_scale": 1.0}, {"guidance_scale": 12.3, "steps": 7}, {"seed": 5, "images": 1}], 4),
    ids=str,
)
def test_a_latent_consistency_model_makes_the_pictures_of_diffusers(lcm, change):
    ours, theirs = lcm
    asked = {"steps": 4, "guidance_scale": 8.5, "seed": 42, "images": 2} | change
    prompt, seeds = reference.PROMPTS[0], range(asked["seed"], asked["seed"] + asked["images"])
    expected = theirs(
        [prompt] * asked["images"],
        num_inference_steps=asked["steps"],
        guidance_scale=asked["guidance_scale"],
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        width=64,
        height=64,
    ).images
    expected = np.stack([np.asarray(picture) for picture in expected])
    assert expected.std() > 20  # flat pictures would be equal whatever the networks did
    assert isinstance(theirs.scheduler, LCMScheduler)
    # sampler, spacing, steps and guidance where nothing is asked are the model's own
    got = made(ours, ldm.Request(prompt, width=64, height=64, **({"seed": 42, "images": 2} | change)))
    print(change, "levels of 255:", compare.levels(got, expected))
    assert compare.levels(got, expected) <= 1


def test_such_a_model_is_told_its_guidance_in_one_call_a_step(lcm):
    ours, _ = lcm
    calls = []
    hook = ours.unet.register_forward_hook(lambda unet, args, out: calls.append(args))
    request = ldm.Request(reference.PROMPTS[0], width=64, height=64, seed=1, images=2)
    plain = made(ours, request)
    hook.remove()
    assert [len(args[0]) for args in calls] == [2] * 4
    assert all(args[5].tolist() == [7.5, 7.5] for args in calls)
    other = made(ours, dataclasses.replace(request, guidance_scale=2.0))
    assert compare.levels(plain, other) > 3  # so that the test above would see it ignored


@pytest.mark.parametrize(
    "change", [{"negative_prompt": "b"}, {"guidance_interval": (0.5, 5.0)}, {"guidance_rescale": 0.7}], ids=str
)
def test_what_needs_two_predictions_is_refused_where_there_is_one(lcm, change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} needs classifier-free guidance"):
        lcm[0].generate(ldm.Request("a", width=64, height=64, **change))


def test_a_request_whose_defaults_are_filled_in_can_be_made_again(lcm):
    request = ldm.Request("a", width=64, height=64)
    plan = lcm[0].plan(request)
    assert (plan.sampler, plan.spacing, plan.steps) == ("lcm", "lcm", 4)
    assert (plan.texts, plan.guidance_scale) == (("a",), 8.5)
    names = ("sampler", "spacing", "steps", "guidance_scale")
    filled_in = dataclasses.replace(request, **{name: getattr(plan, name) for name in names})
    again = lcm[0].plan(filled_in)
    assert torch.equal(again.sigmas, plan.sigmas)
    assert [getattr(again, name) for name in names] == [getattr(plan, name) for name in names]
    assert np.array_equal(made(lcm[0], filled_in), made(lcm[0], request))
