"""The recipes: short scripts of one paper each, exact where the paper's method changes nothing."""

import dataclasses
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ldm
from ldm.conditioning import Condition
from ldm.diffusion.denoiser import classifier_free, guided
from ldm.models.unet import UNet
from scripts.recipes.deepcache import DeepCache
from tests.models.test_unet import SMALL, inputs

RECIPES = sorted((Path(__file__).parents[1] / "scripts" / "recipes").glob("*.py"))
FROG = ldm.Request("a frog", steps=4, seed=3)
STAGES = 6  # of SMALL's `up`, and of `down`


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_at_most_90_lines(path):
    assert len(path.read_text().splitlines()) <= 90


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(SMALL).eval().requires_grad_(False)


def latents(pipe: ldm.Pipeline, unet: nn.Module, request: ldm.Request = FROG) -> torch.Tensor:
    """The latents of the request, with this UNet instead of the pipeline's own."""
    *_, last = ldm.Pipeline(pipe.config, unet, pipe.vae, pipe.text_encoder).stream(request)
    return last.latents


def test_deepcache_makes_a_picture_with_and_without_and_compares_them(model_folder, monkeypatch, capsys):
    script = next(path for path in RECIPES if path.stem == "deepcache")
    differences = []
    for every in ("1", "2"):
        monkeypatch.setattr(sys, "argv", [str(script), "a frog", "--model", str(model_folder), "--every", every])
        runpy.run_path(str(script), run_name="__main__")
        without, with_cache, difference = capsys.readouterr().out.splitlines()
        assert re.fullmatch(r"without DeepCache: \d+\.\d\d s", without)
        assert re.fullmatch(r"with DeepCache: \d+\.\d\d s", with_cache)
        differences.append(float(re.fullmatch(r"mean difference: (\d+\.\d\d) of 255 levels", difference)[1]))
    assert differences[0] == 0  # every call is full
    assert differences[1] > 0


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "euler_ancestral"])
def test_a_cache_of_every_call_changes_no_bit_of_a_picture(pipe, sampler):
    request = dataclasses.replace(FROG, sampler=sampler)
    plain = latents(pipe, pipe.unet, request)
    assert torch.equal(latents(pipe, DeepCache(pipe.unet, every=1), request), plain)
    assert not torch.equal(latents(pipe, DeepCache(pipe.unet, every=2), request), plain)


@pytest.mark.parametrize("depth", range(1, STAGES))
@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_nothing_is_lost_while_the_input_stays_the_same(unet, depth, size):
    z, t, context = inputs(SMALL, *size)
    network = DeepCache(unet, every=3, depth=depth).bind(Condition(context))
    plain = unet(z, t, context)
    assert all(torch.equal(network(z, t), plain) for _ in range(5))


@pytest.mark.parametrize("depth", range(1, STAGES))
def test_a_short_call_is_the_unet_with_the_kept_features_in_the_deep_part(unet, depth):
    z, t, context = inputs(SMALL)
    network, kept = DeepCache(unet, every=2, depth=depth).bind(Condition(context)), []
    with unet.up[-depth - 1].register_forward_hook(lambda module, args, out: kept.append(out)):
        network(z, t)
    short = network(z + 1, t - 1)
    with unet.up[-depth - 1].register_forward_hook(lambda module, args, out: kept[0]):
        assert torch.equal(short, unet(z + 1, t - 1, context))
    assert not torch.equal(short, unet(z + 1, t - 1, context))


def test_a_network_without_middle_that_is_told_its_guidance_can_be_cached():
    torch.manual_seed(0)
    unet = UNet(dataclasses.replace(SMALL, mid="none", guidance_dim=16)).requires_grad_(False)
    z, t, context = inputs(SMALL)
    guidance = torch.tensor([7.5, 1.0])
    network = DeepCache(unet, every=2).bind(Condition(context, guidance=guidance))
    plain = unet(z, t, context, guidance=guidance)
    for _ in range(4):
        assert torch.equal(network(z, t), plain)


def test_only_every_nth_call_runs_the_deep_part(unet):
    z, t, context = inputs(SMALL)
    calls = []
    for stage in unet.stages():
        stage.register_forward_hook(lambda module, args, out: calls.append(module))
    network = DeepCache(unet, every=3, depth=2).bind(Condition(context))
    for _ in range(7):
        network(z, t)
    short = [*unet.down[:2], *unet.up[-2:]]
    assert calls == unet.stages() + 2 * short + unet.stages() + 2 * short + unet.stages()


def test_each_binding_has_its_own_cache(pipe):
    other = dataclasses.replace(FROG, prompt="a cat")
    cache = DeepCache(pipe.unet, every=3)
    alone, other_alone = latents(pipe, cache), latents(pipe, cache, other)
    assert not torch.equal(alone, other_alone)
    cached = ldm.Pipeline(pipe.config, cache, pipe.vae, pipe.text_encoder)
    next(cached.stream(FROG))  # left after one step
    assert torch.equal(latents(pipe, cache, other), other_alone)
    *_, (last, other_last) = zip(cached.stream(FROG), cached.stream(other), strict=True)
    assert torch.equal(last.latents, alone)
    assert torch.equal(other_last.latents, other_alone)


def test_an_interval_and_guidance_in_two_calls_cache_each_condition(pipe):
    cache = DeepCache(pipe.unet, every=2)
    interval = dataclasses.replace(FROG, guidance_interval=(0, 5))
    assert latents(pipe, cache, interval).isfinite().all()  # batches of one, then of two

    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    conditions = [Condition(context) for context in torch.randn(2, 1, 7, 32)]
    plain, cached = (guided(u.bind, conditions, classifier_free(3.0), batched=False) for u in (pipe.unet, cache))
    with torch.no_grad():
        assert all(torch.equal(cached(x, t), plain(x, t)) for _ in range(3))


def test_another_shape_starts_again(unet):
    z, t, context = inputs(SMALL)
    wide, _, _ = inputs(SMALL, 8, 12)
    network = DeepCache(unet, every=9).bind(Condition(context))
    network(z, t)
    assert torch.equal(network(wide, t), unet(wide, t, context))
    assert not torch.equal(network(wide + 1, t), unet(wide + 1, t, context))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"every": 0}, "every must be 1 call or more, got 0"),
        ({"every": 2, "depth": 0}, "depth must be 1 to 3 of this UNet's 4 stages, got 0"),
        ({"every": 2, "depth": 4}, "depth must be 1 to 3 of this UNet's 4 stages, got 4"),
    ],
)
def test_a_cache_that_cannot_work_is_refused(pipe, choice, message):
    with pytest.raises(ValueError, match=message):
        DeepCache(pipe.unet, **choice)
