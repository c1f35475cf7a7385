"""IP-Adapter and `ImagePrompted`: the attention of the paper, weights, sums, and IP-Adapters that do not fit."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from ldm.conditioning import Condition, join
from ldm.diffusion.denoiser import classifier_free, guided
from ldm.models.attention import math_attention, set_attention
from ldm.models.controlnet import Applied as AppliedControl
from ldm.models.controlnet import Controlled
from ldm.models.ip_adapter import Applied, ImagePrompted, cross_attentions
from ldm.models.transformer import Attention, KeysValues
from ldm.models.unet import UNet
from tests.tiny import TINY_RANDOM, TINY_SDXL, random_controlnet, random_ip_adapter


@pytest.fixture(params=[TINY_RANDOM, TINY_SDXL], ids=lambda c: c.name)
def given(request):
    """A UNet, the conditions of a prompt and a negative prompt, z and timesteps, and two image prompts."""
    config = request.param
    torch.manual_seed(0)
    unet = UNet(config.unet).eval().requires_grad_(False)
    vector = torch.randn(2, config.unet.vector_dim) if config.unet.vector_dim else None
    texts = Condition(torch.randn(2, 7, config.unet.context_dim), vector, is_prompt=torch.tensor([True, False])).rows()
    one, two = (
        Applied(random_ip_adapter(config, seed), *torch.randn(2, 1, n, config.unet.context_dim), 0.7)
        for seed, n in ((1, 4), (2, 5))
    )
    z, t = torch.randn(1, config.unet.in_channels, 8, 8), torch.tensor([300.0])
    return SimpleNamespace(config=config, unet=unet, texts=texts, z=z, t=t, one=one, two=two)


def close(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-5)  # fp32, another order of summation


def test_the_attention_is_that_of_the_paper():
    torch.manual_seed(0)
    attention = Attention(12, 3, 10).double().requires_grad_(False)
    x, text, tokens = (torch.randn(2, n, d, dtype=torch.float64) for n, d in ((5, 12), (7, 10), (4, 10)))
    to_k, to_v = torch.randn(2, 12, 10, dtype=torch.float64)

    def attend(keys, values):  # head by head: softmax(q k^T / sqrt(d)) v
        heads = []
        for q, k, v in zip(attention.to_q(x).split(4, -1), keys.split(4, -1), values.split(4, -1), strict=True):
            heads.append((q @ k.transpose(1, 2) / 2).softmax(-1) @ v)
        return torch.cat(heads, -1)

    both = attend(attention.to_k(text), attention.to_v(text)) + 0.6 * attend(tokens @ to_k.T, tokens @ to_v.T)
    keys, values = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (tokens @ to_k.T, 0.6 * tokens @ to_v.T))
    bound = KeysValues(*attention.project(text)[:2], ((keys, values),))
    assert torch.allclose(attention(x, bound), attention.to_out(both), rtol=0, atol=1e-12)


def test_the_layers_are_taken_in_the_order_encoder_decoder_middle(given):
    names = {id(part): name for name, part in given.unet.named_modules()}
    order = [names[id(part)].split(".")[0] for part in cross_attentions(given.unet)]
    assert order == sorted(order, key=["down", "up", "mid"].index)
    assert set(order) == {"down", "up", "mid"}
    bound, seen = ImagePrompted(given.unet, [given.one]), []
    for attention in cross_attentions(given.unet):
        attention.register_forward_pre_hook(lambda _, args: seen.append(args[1].added))
    bound.bind(given.texts[0])(given.z, given.t)
    *front, last = range(len(order))  # called in the order down, mid, up
    called = [i for i in front if order[i] == "down"] + [last] + [i for i in front if order[i] == "up"]
    for i, added in zip(called, seen, strict=True):
        ((keys, values),) = added
        adapter, flat = given.one.adapter, [t.transpose(1, 2).flatten(2) for t in (keys, values)]
        assert torch.equal(flat[0], adapter.to_k[i](given.one.tokens))
        assert torch.equal(flat[1], 0.7 * adapter.to_v[i](given.one.tokens))


def test_a_weight_of_zero_gives_the_bits_of_the_unet(given):
    none = ImagePrompted(given.unet, [given.one._replace(weight=0.0)]).bind(given.texts[0])(given.z, given.t)
    some = ImagePrompted(given.unet, [given.one]).bind(given.texts[0])(given.z, given.t)
    plain = given.unet.bind(given.texts[0])(given.z, given.t)
    assert torch.equal(none, plain)
    assert not close(some, plain)


def test_the_rows_of_the_prompt_and_of_the_negative_prompt_have_their_own_tokens(given):
    prompted = ImagePrompted(given.unet, [given.one, given.two])
    alone = [prompted.bind(text)(given.z, given.t) for text in given.texts]
    together = prompted.bind(join(given.texts))(torch.cat([given.z] * 2), given.t.repeat(2))
    assert close(together, torch.cat(alone))
    swapped = [p._replace(tokens=p.negative, negative=p.tokens) for p in (given.one, given.two)]
    other = [dataclasses.replace(text, is_prompt=~text.is_prompt) for text in given.texts]
    for text, expected in zip(other, alone, strict=True):
        assert torch.equal(ImagePrompted(given.unet, swapped).bind(text)(given.z, given.t), expected)
    unmarked = dataclasses.replace(given.texts[0], is_prompt=None)
    assert torch.equal(prompted.bind(unmarked)(given.z, given.t), alone[0])


def test_guidance_in_one_batch_and_in_two_passes_agree(given):
    prompted = ImagePrompted(given.unet, [given.one])
    both = [
        guided(prompted.bind, given.texts, classifier_free(4.0), batched=batched)(given.z, given.t)
        for batched in (True, False)
    ]
    assert close(*both)


def test_each_picture_may_have_its_own_tokens(given):
    tokens, negative = torch.randn(2, 2, 4, given.config.unet.context_dim)
    prompt = Applied(given.one.adapter, tokens, negative)
    text = given.texts[0]
    both = ImagePrompted(given.unet, [prompt]).bind(join([text, text]))(torch.cat([given.z] * 2), given.t.repeat(2))
    for i in range(2):
        own = prompt._replace(tokens=tokens[i : i + 1], negative=negative[i : i + 1])
        assert close(both[i : i + 1], ImagePrompted(given.unet, [own]).bind(text)(given.z, given.t))


def test_several_image_prompts_are_added_in_any_order(given):
    text = given.texts[0]
    both, swapped, one = (
        ImagePrompted(given.unet, prompts).bind(text)(given.z, given.t)
        for prompts in ([given.one, given.two], [given.two, given.one], [given.one])
    )
    assert close(both, swapped)
    assert not close(both, one)
    halves = ImagePrompted(given.unet, [given.one._replace(weight=0.35)] * 2).bind(text)(given.z, given.t)
    assert close(halves, one)


def test_keys_and_values_are_computed_once_for_all_steps(given):
    calls = []
    for layer in (*given.one.adapter.to_k, *given.one.adapter.to_v):
        layer.register_forward_hook(lambda *_: calls.append(1))
    network = ImagePrompted(given.unet, [given.one]).bind(given.texts[0])
    assert len(calls) == 2 * len(cross_attentions(given.unet))
    network(given.z, given.t)
    assert len(calls) == 2 * len(cross_attentions(given.unet))


def test_another_attention_gives_the_same_numbers(given):
    network = ImagePrompted(given.unet, [given.one]).bind(given.texts[0])
    before = network(given.z, given.t)
    set_attention(given.unet, math_attention)
    assert close(network(given.z, given.t), before)


def test_controlnets_and_image_prompts_work_together(given):
    network, text = random_controlnet(given.config), given.texts[0]
    hint = torch.rand(1, 3, 32, 32)
    prompted = ImagePrompted(given.unet, [given.one])
    together = Controlled(prompted, [AppliedControl(network, hint)]).bind(text)(given.z, given.t)
    residuals = network(given.z, given.t, text.context, hint, text.vector)
    assert close(together, prompted.bind(text)(given.z, given.t, residuals))
    assert not close(together, Controlled(given.unet, [AppliedControl(network, hint)]).bind(text)(given.z, given.t))


def test_an_ip_adapter_of_another_family_is_refused(given):
    for changes, message in (
        ({"context_dim": 16}, "has text of width 16, and the UNet of the model 32"),
        ({"depth": (1, 1)}, "has this many cross-attentions: 7, and the UNet of the model 4"),
        ({"channels": (16, 48)}, r"cross-attentions of the widths .*48.*, and the UNet of the model .*32"),
    ):
        other = dataclasses.replace(given.config, unet=dataclasses.replace(given.config.unet, **changes))
        with pytest.raises(ValueError, match=message):
            ImagePrompted(given.unet, [given.one._replace(adapter=random_ip_adapter(other))])
