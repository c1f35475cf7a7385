"""Shortcuts against the UNet that they shorten: exact where they are neutral, and undone without a trace."""

import dataclasses

import pytest
import torch
from torch import nn

import ldm
from ldm.diffusion.denoiser import guided
from ldm.models.shortcuts import DeepCache, _finest_transformers, merged_tokens, share_slots
from ldm.models.unet import UNet
from tests.models.test_unet import SMALL, inputs

FROG = ldm.Request("a frog", steps=4, seed=3)
STAGES = 6  # of SMALL's `up`, and of `down`


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(SMALL).eval().requires_grad_(False)


def latents(pipe: ldm.Pipeline, unet: nn.Module, request: ldm.Request = FROG) -> torch.Tensor:
    """What `pipe` makes of the request with this UNet in place of its own."""
    *_, last = ldm.Pipeline(pipe.config, unet, pipe.vae, pipe.text_encoder).stream(request)
    return last.x


# DeepCache


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "euler_ancestral"])
def test_a_cache_of_every_call_changes_no_bit_of_a_picture(pipe, sampler):
    request = dataclasses.replace(FROG, sampler=sampler)
    plain = latents(pipe, pipe.unet, request)
    assert torch.equal(latents(pipe, DeepCache(pipe.unet, every=1), request), plain)
    assert not torch.equal(latents(pipe, DeepCache(pipe.unet, every=2), request), plain)


@pytest.mark.parametrize("depth", range(1, STAGES))
@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_nothing_is_lost_while_the_input_stays_the_same(unet, depth, size):
    x, t, context = inputs(SMALL, *size)
    cache = DeepCache(unet, every=3, depth=depth)
    run, _ = cache.prepare(context)
    plain = unet(x, t, context)
    assert all(torch.equal(cache(x, t, run), plain) for _ in range(5))


@pytest.mark.parametrize("depth", range(1, STAGES))
def test_a_short_call_is_the_unet_with_the_kept_features_in_the_deep_part(unet, depth):
    x, t, context = inputs(SMALL)
    middle, skips = unet.encode(x, unet.embed(t, None, x.dtype), context)
    residuals = [torch.randn_like(h) for h in [*skips, middle]]
    cache = DeepCache(unet, every=2, depth=depth)
    run, _ = cache.prepare(context)
    kept = []
    with unet.up[-depth - 1].register_forward_hook(lambda module, args, out: kept.append(out)):
        cache(x, t, run, None, residuals)
    short = cache(x + 1, t - 1, run, None, residuals)
    with unet.up[-depth - 1].register_forward_hook(lambda module, args, out: kept[0]):
        assert torch.equal(short, unet(x + 1, t - 1, context, None, residuals))
    assert not torch.equal(short, unet(x + 1, t - 1, context, None, residuals))


def test_a_network_without_middle_that_is_told_its_guidance_can_be_shortened():
    torch.manual_seed(0)
    unet = UNet(dataclasses.replace(SMALL, mid="none", guidance_dim=16)).requires_grad_(False)
    x, t, context = inputs(SMALL)
    guidance = torch.tensor([7.5, 1.0])
    cache = DeepCache(unet, every=2)
    run, _ = cache.prepare(context)
    plain = unet(x, t, context, guidance=guidance)
    for _ in range(4):
        assert torch.equal(cache(x, t, run, guidance=guidance), plain)
    with merged_tokens(unet, 0.5):
        assert not torch.equal(unet(x, t, context, guidance=guidance), plain)


def test_only_every_so_many_calls_compute_the_deep_part(unet):
    x, t, context = inputs(SMALL)
    calls = []
    for stage in [*unet.down, unet.mid, *unet.up]:
        stage.register_forward_hook(lambda module, args, out: calls.append(module))
    cache = DeepCache(unet, every=3, depth=2)
    run, _ = cache.prepare(context)
    for _ in range(7):
        cache(x, t, run)
    full = [*unet.down, unet.mid, *unet.up]
    short = [*unet.down[:2], *unet.up[-2:]]
    assert calls == full + 2 * short + full + 2 * short + full


def test_a_run_never_sees_what_another_kept(pipe):
    other = dataclasses.replace(FROG, prompt="a cat")
    cache = DeepCache(pipe.unet, every=3)
    alone, other_alone = latents(pipe, cache), latents(pipe, cache, other)
    assert not torch.equal(alone, other_alone)
    cached = ldm.Pipeline(pipe.config, cache, pipe.vae, pipe.text_encoder)
    next(cached.stream(FROG))  # left after one step
    assert torch.equal(latents(pipe, cache, other), other_alone)
    *_, (last, other_last) = zip(cached.stream(FROG), cached.stream(other), strict=True)
    assert torch.equal(last.x, alone)
    assert torch.equal(other_last.x, other_alone)


def test_an_interval_and_guidance_in_two_calls_keep_features_for_each_condition(pipe):
    cache = DeepCache(pipe.unet, every=2)
    interval = dataclasses.replace(FROG, guidance_interval=(0, 5))
    assert latents(pipe, cache, interval).isfinite().all()  # batches of one, then of two

    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    cond, uncond = torch.randn(2, 1, 7, 32)
    plain = guided(pipe.unet, (cond,), (uncond,), 3.0, batched=False)
    predict = guided(cache, (cond,), (uncond,), 3.0, batched=False, prepare=cache.prepare)
    with torch.no_grad():
        assert all(torch.equal(predict(x, t), plain(x, t)) for _ in range(3))


def test_another_shape_starts_anew(unet):
    x, t, context = inputs(SMALL)
    wide, _, _ = inputs(SMALL, 8, 12)
    cache = DeepCache(unet, every=9)
    run, _ = cache.prepare(context)
    cache(x, t, run)
    assert torch.equal(cache(wide, t, run), unet(wide, t, context))
    assert not torch.equal(cache(wide + 1, t, run), unet(wide + 1, t, context))


def test_the_cache_leaves_nothing_on_the_unet(unet):
    x, t, context = inputs(SMALL)
    names = list(unet.state_dict())
    cache = DeepCache(unet, every=2)
    run, _ = cache.prepare(context)
    cache(x, t, run)
    run, _ = cache.prepare(context[:1].expand(3, -1, -1))
    with pytest.raises(RuntimeError):
        cache(x, t, run)  # three contexts for two latents
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
    assert list(unet.state_dict()) == names


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"every": 0}, "every must be 1 call or more, got 0"),
        ({"every": 2, "depth": 0}, "depth must be 1 to 3 of this UNet's 4 stages, got 0"),
        ({"every": 2, "depth": 4}, "depth must be 1 to 3 of this UNet's 4 stages, got 4"),
    ],
)
def test_a_cache_that_cannot_be_is_refused(pipe, choice, message):
    with pytest.raises(ValueError, match=message):
        DeepCache(pipe.unet, **choice)


def test_a_context_that_is_no_run_is_refused(unet):
    with pytest.raises(ValueError, match=r"context that its `prepare` returns.* got a Tensor"):
        DeepCache(unet, every=2)(*inputs(SMALL))


# Token merging


def test_merging_no_tokens_changes_no_bit_and_merging_some_is_undone(pipe):
    plain = latents(pipe, pipe.unet)
    with merged_tokens(pipe.unet, 0):
        assert torch.equal(latents(pipe, pipe.unet), plain)
    with merged_tokens(pipe.unet, 0.5):
        assert not torch.equal(latents(pipe, pipe.unet), plain)
    assert torch.equal(latents(pipe, pipe.unet), plain)
    with pytest.raises(KeyError), merged_tokens(pipe.unet, 0.5):
        raise KeyError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())
    assert torch.equal(latents(pipe, pipe.unet), plain)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75])
@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 7), (1, 4)])
def test_slots_are_those_of_the_matching_done_token_by_token(ratio, height, width):
    x = torch.randn(3, height * width, 8, generator=torch.Generator().manual_seed(0))
    slots, count = share_slots(x, height, width, ratio)
    for image, found in zip(x, slots, strict=True):
        hosts = [i * width + j for i in range(0, height, 2) for j in range(0, width, 2)]
        matches = []
        for guest in set(range(height * width)) - set(hosts):
            likeness = torch.cosine_similarity(image[guest, None], image[hosts], dim=-1)
            matches.append((likeness.max().item(), guest, hosts[likeness.argmax()]))
        merged = sorted(matches, reverse=True)[: int(ratio * height * width)]
        assert count == height * width - len(merged)
        assert sorted(found.unique().tolist()) == list(range(count))
        for _, guest, host in merged:
            assert found[guest] == found[host]


def test_equal_tokens_are_merged_without_loss(unet):
    transformer = unet.down[1].transformer
    _, _, context = inputs(SMALL)
    features = torch.randn(2, 16, 4, 4).repeat_interleave(2, -1).repeat_interleave(2, -2)
    plain = transformer(features, context)  # every 2 x 2 pixels are alike
    with merged_tokens(unet, 0.75):
        # The softmax over four equal keys is that over one of them; fp32 sums in another order.
        torch.testing.assert_close(transformer(features, context), plain, rtol=0, atol=1e-5)


def test_an_image_with_merged_tokens_does_not_depend_on_the_batch_around_it(unet):
    x, t, context = inputs(SMALL)
    with merged_tokens(unet, 0.5):
        alone = unet(x[1:], t[1:], context[1:])
        # convolutions may sum in another order for another batch size
        torch.testing.assert_close(unet(x, t, context)[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1)])
def test_the_self_attention_of_the_highest_resolution_sees_so_many_tokens_less(unet, size):
    finest = _finest_transformers(unet)
    stages = [unet.down[1], unet.down[2], unet.up[3], unet.up[4], unet.up[5]]
    assert finest == [stage.transformer for stage in stages]
    seen = {}
    for module in unet.modules():
        if hasattr(module, "attn1"):
            module.attn1.to_q.register_forward_hook(lambda module, args, out: seen.update({module: out.shape[1]}))
    x, t, context = inputs(SMALL, *size)
    unet(x, t, context)
    plain = dict(seen)
    with merged_tokens(unet, 0.5):
        unet(x, t, context)
    merged = [block.attn1.to_q for transformer in finest for block in transformer.blocks]
    tokens = size[0] * size[1]
    for layer, count in plain.items():
        assert seen[layer] == (tokens - tokens // 2 if layer in merged else count)


@pytest.mark.parametrize("ratio", [-0.1, 0.76, float("nan")])
def test_a_ratio_that_cannot_be_is_refused(unet, ratio):
    with pytest.raises(ValueError, match=r"merged tokens must lie in 0 \.\. 0.75, got"):
        merged_tokens(unet, ratio).__enter__()


def test_compiled_blocks_are_refused_because_they_would_not_merge(unet):
    unet.up[3].transformer.blocks[0].compile(backend="eager")
    with pytest.raises(ValueError, match=r"compiled blocks .* without compile"):
        merged_tokens(unet, 0.5).__enter__()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
