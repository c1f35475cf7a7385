"""A copy of a UNet with attention of its own shares the weights and leaves the original as it is."""

import threading

import torch

import ldm
from ldm.models.attention import math_attention, sdpa
from ldm.models.own_attention import with_attention


def layers(network):
    return {name: layer for name, layer in network.named_modules() if hasattr(layer, "attend")}


def test_a_copy_shares_all_weights_and_changes_no_function_of_the_original(pipe):
    own = with_attention(pipe.unet, lambda name, attend: math_attention)
    assert all(a is b for a, b in zip(own.parameters(), pipe.unet.parameters(), strict=True))
    assert all(a is b for a, b in zip(own.buffers(), pipe.unet.buffers(), strict=True))
    assert {layer.attend for layer in layers(own).values()} == {math_attention}
    assert {layer.attend for layer in layers(pipe.unet).values()} == {sdpa}


def test_each_layer_is_named_and_the_copy_makes_the_same_latents(pipe):
    named = {}

    def choose(name, attend):
        def watched(q, k, v):
            named[name] = k.shape[-2]
            return attend(q, k, v)

        return watched

    plan = pipe.plan(ldm.Request("a frog", steps=2))
    conditions, x = pipe.conditions(plan), pipe.start(plan)
    own = with_attention(pipe.unet, choose)
    denoise = pipe.denoiser(plan, conditions, bind=own.bind)
    assert torch.equal(denoise(x, plan.sigmas[0]), pipe.denoiser(plan, conditions)(x, plan.sigmas[0]))
    assert named.keys() == layers(pipe.unet).keys()
    words = conditions[0].context.shape[1]
    assert {number for name, number in named.items() if name.endswith("attn2")} == {words}


def test_the_copies_of_two_threads_do_not_disturb_each_other(pipe):
    plan = pipe.plan(ldm.Request("a frog", steps=2))
    conditions, x = pipe.conditions(plan), pipe.start(plan)
    results, ready = {}, threading.Barrier(2)

    def run(factor):
        own = with_attention(pipe.unet, lambda name, attend: lambda q, k, v: factor * attend(q, k, v))
        denoise = pipe.denoiser(plan, conditions, bind=own.bind)
        ready.wait()
        results[factor] = denoise(x, plan.sigmas[0])

    threads = [threading.Thread(target=run, args=(factor,)) for factor in (0.0, 1.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plain = pipe.denoiser(plan, conditions)(x, plan.sigmas[0])
    assert torch.equal(results[1.0], plain)
    assert not torch.equal(results[0.0], plain)
