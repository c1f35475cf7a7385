"""The UNet: its shapes, its counts, and what a residual does."""

import dataclasses

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from ldm.conditioning import Condition, guidance_embedding, timestep_embedding
from ldm.config import UNetConfig
from ldm.models.unet import Stage, UNet
from ldm.presets import PRESETS, RELATIVES

SMALL = UNetConfig(channels=(16, 32), depth=(1, 1), heads=(2, 4), context_dim=12, norm_groups=4)

# Parameters and tensors of the official networks (counted on their checkpoints' tensor lists).
OFFICIAL = {
    "sd15": (859_520_964, 686),
    "sd21-base": (865_910_724, 686),
    "sd21": (865_910_724, 686),
    "sdxl-base": (2_567_463_684, 1680),
    "sdxl-refiner": (2_259_526_660, 1220),
}
# Parameters in thousand millions, as their authors give them: rounded, some of them up.
DISTILLED = {
    "SSD-1B": 1.3,
    "Segmind-Vega": 0.74,
    "KOALA-700M": 0.782,
    "KOALA-1B": 1.161,
    "BK-SDM-Base": 0.58,
    "BK-SDM-Small": 0.49,
    "BK-SDM-Tiny": 0.33,
}


def inputs(config, height=8, width=8, batch=2):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, config.in_channels, height, width, generator=g)
    return (x, torch.tensor([1.0, 500.5][:batch]), torch.randn(batch, 5, config.context_dim, generator=g))


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_presets_have_the_official_number_of_parameters_and_tensors(name):
    with torch.device("meta"):
        state = UNet(PRESETS[name].unet).state_dict()
    assert (sum(t.numel() for t in state.values()), len(state)) == OFFICIAL[name]


def test_the_norms_have_ldms_epsilon():
    norms = torch.nn.GroupNorm | torch.nn.LayerNorm
    epsilons = {name: part.eps for name, part in UNet(SMALL).named_modules() if isinstance(part, norms)}
    before_transformers = {name for name in epsilons if name.endswith("transformer.norm")}
    assert {name for name, eps in epsilons.items() if eps == 1e-6} == before_transformers
    assert set(epsilons.values()) == {1e-5, 1e-6}


@pytest.mark.parametrize("name", RELATIVES)
def test_the_distilled_networks_have_as_many_parameters_as_their_authors_count(name):
    with torch.device("meta"):
        unet = UNet(RELATIVES[name])
    count = sum(p.numel() for p in unet.parameters()) / 1e9
    print(name, f"{count:.3f}")
    assert count == pytest.approx(DISTILLED[name], abs=0.035)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5), (1, 3), (9, 16)])
def test_latent_sizes_that_the_levels_do_not_divide_work(height, width):
    torch.manual_seed(0)
    x, t, context = inputs(SMALL, height, width)
    assert UNet(SMALL)(x, t, context).shape == (2, 4, height, width)


def test_an_upsampling_stage_repeats_pixels_up_to_the_size_of_the_skip():
    x = torch.randn(1, 2, 4, 3)
    out = Stage(upsample=torch.nn.Identity())(x, None, None, size=(7, 5))
    rows, columns = [i * 4 // 7 for i in range(7)], [i * 3 // 5 for i in range(5)]  # as diffusers: not to the nearest
    assert torch.equal(out, x[:, :, rows][:, :, :, columns])


def test_an_image_does_not_depend_on_the_batch_around_it():
    torch.manual_seed(0)
    unet = UNet(SMALL)
    x, t, context = inputs(SMALL)
    alone = unet(x[1:], t[1:], context[1:])
    # convolutions may sum in another order for another batch size
    torch.testing.assert_close(unet(x, t, context)[1:], alone, rtol=1e-4, atol=1e-5)


def test_a_vector_is_needed_exactly_where_the_config_has_one():
    config = UNetConfig(channels=(16,), depth=(1,), heads=(2,), context_dim=12, norm_groups=4, vector_dim=6)
    torch.manual_seed(0)
    unet = UNet(config)
    x, t, context = inputs(config)
    with pytest.raises(ValueError, match="needs vector= of width 6"):
        unet(x, t, context)
    vectors = torch.zeros(2, 6), torch.ones(2, 6)
    assert not torch.equal(*(unet(x, t, context, vector) for vector in vectors))


def test_each_residual_is_added_to_its_own_skip_and_the_last_one_to_the_middle():
    torch.manual_seed(0)
    unet, entering = UNet(SMALL), []
    x, t, context = inputs(SMALL)
    for stage in unet.up:
        stage.register_forward_pre_hook(lambda stage, args: entering.append(args[0]))

    def entering_up(residuals):
        entering.clear()
        unet(x, t, context, residuals=residuals)
        return list(entering)

    middle, skips = unet.encode(x, unet.embed(t, None, x.dtype), context)
    zeros = [torch.zeros_like(h) for h in [*skips, middle]]
    plain = entering_up(None)
    assert all(map(torch.equal, entering_up(zeros), plain))
    for i, zero in enumerate(zeros):
        residual = torch.randn_like(zero)
        changed = entering_up([residual if j == i else z for j, z in enumerate(zeros)])
        stage = 0 if i == len(skips) else len(skips) - 1 - i  # the last skip is used first
        # each stage takes what came before it, and then its skip
        channels = slice(0, residual.shape[1]) if i == len(skips) else slice(-residual.shape[1], None)
        assert all(map(torch.equal, changed[:stage], plain[:stage]))
        expected = plain[stage].clone()
        expected[:, channels] += residual
        assert torch.equal(changed[stage], expected)


def test_the_wrong_number_of_residuals_is_an_error():
    unet = UNet(SMALL)
    x, t, context = inputs(SMALL)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        unet(x, t, context, residuals=[torch.zeros(1)])


def test_guidance_is_needed_exactly_where_the_config_has_it_and_changes_the_prediction():
    torch.manual_seed(0)
    unet = UNet(dataclasses.replace(SMALL, guidance_dim=16))
    x, t, context = inputs(SMALL)
    with pytest.raises(ValueError, match="needs guidance="):
        unet(x, t, context)
    both = unet(x, t, context, guidance=torch.tensor([0.0, 7.5]))
    each = [unet(x, t, context, guidance=torch.full((2,), w)) for w in (0.0, 7.5)]
    assert not torch.allclose(*each)
    # each image has its own; convolutions may sum in another order
    torch.testing.assert_close(both, torch.stack([each[0][0], each[1][1]]), rtol=1e-4, atol=1e-5)


def test_guidance_embedding_is_that_of_diffusers_latent_consistency_models():
    w = torch.tensor([-1.0, 0.0, 6.5, 7.5, 13.0])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)
    assert torch.equal(guidance_embedding(w, 256), theirs)


def test_timestep_embedding_is_cosines_then_sines_of_falling_frequencies():
    t = torch.tensor([0.0, 7.25, 999.0], dtype=torch.float64)
    frequencies = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    angles = t[:, None] * frequencies
    expected = torch.cat([angles.cos(), angles.sin()], dim=-1)
    out = timestep_embedding(t, 8)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)  # fp32 angle of ~1000


def test_one_level_and_unlike_depths_build_and_run():
    config = UNetConfig(
        channels=(8, 16, 24), res_blocks=1, depth=(0, 2, 0), mid_depth=3, heads=(1, 2, 3), norm_groups=4,
        context_dim=6, linear_projection=True,
    )  # fmt: skip
    torch.manual_seed(0)
    x, t, context = inputs(config)
    assert UNet(config)(x, t, context).shape == x.shape


@pytest.mark.parametrize("vector_dim", [None, 6])
def test_a_bound_condition_gives_the_same_numbers_with_its_projections_made_once(vector_dim):
    config = dataclasses.replace(SMALL, vector_dim=vector_dim, guidance_dim=16, depth=(2, 1), mid_depth=3)
    torch.manual_seed(0)
    unet = UNet(config)
    x, t, context = inputs(config)
    vector = None if vector_dim is None else torch.randn(2, vector_dim)
    guidance = torch.tensor([0.5, 7.0])
    projections = [m.to_k for m in unet.modules() if getattr(m, "to_k", None) is not None]
    calls = []
    for layer in projections:
        layer.register_forward_hook(lambda layer, args, out: calls.append(args[0].shape[1]))
    network = unet.bind(Condition(context, vector, guidance))
    blocks = len(projections) // 2  # each with a self-attention and a cross-attention
    assert calls == [context.shape[1]] * blocks
    calls.clear()
    predicted = network(x, t)
    assert len(calls) == blocks
    assert context.shape[1] not in calls  # self-attention only: pixels of a level are not as many as there are tokens
    assert torch.equal(predicted, unet(x, t, context, vector, None, guidance))
    assert torch.equal(network(x, t), predicted)
    residuals = [torch.randn_like(h) for h in skips_and_middle(unet, x, t, context, vector, guidance)]
    assert torch.equal(network(x, t, residuals), unet(x, t, context, vector, residuals, guidance))
    assert not torch.equal(network(x, t, residuals), predicted)


def skips_and_middle(unet, x, t, context, vector, guidance):
    middle, skips = unet.encode(x, unet.embed(t, vector, x.dtype, guidance), context)
    projected = unet.project(context)[: len(skips) + 1]
    assert torch.equal(middle, unet.encode(x, unet.embed(t, vector, x.dtype, guidance), projected)[0])
    return [*skips, middle]


def test_a_bound_network_carries_gradients_to_the_weights_and_to_the_condition():
    torch.manual_seed(0)
    unet = UNet(SMALL)
    x, t, context = inputs(SMALL)
    context.requires_grad_()
    unet.bind(Condition(context))(x, t).square().mean().backward()
    assert context.grad.abs().max() > 0
    assert all(parameter.grad is not None for parameter in unet.parameters())
