"""The diffusion objective: its targets, weights and conditions, and the networks that it changes."""

import copy
import dataclasses

import pytest
import torch

import ldm
from ldm.config import DiffusionConfig, ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.text import TextEncoder
from ldm.models.tokens import Tokenizer
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.training import diffusion
from ldm.training.diffusion import (
    DiffusionLoss,
    DiffusionObjective,
    Networks,
    loss_weights,
    spread_timesteps,
    zero_init,
)
from ldm.training.vocabulary import build_vocabulary
from tests.tiny import TINY_RANDOM, TINY_REFINER, TINY_SDXL, random_networks

UNET = UNetConfig(channels=(8, 16), depth=(0, 1), heads=(1, 2), context_dim=8, norm_groups=2, res_blocks=1)
VAE_ = VAEConfig(channels=(8, 8), res_blocks=1, norm_groups=2, scaling_factor=1.0)
CAPTIONS = ["a frog", "an apple", "a frog", "a car"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(*build_vocabulary(CAPTIONS, 600))


def objective(tokenizer, prediction="v", *, zero_terminal_snr=False, **loss):
    torch.manual_seed(0)
    text = TextConfig(
        width=8, layers=1, heads=2, mlp=16, max_length=8,
        vocab_size=len(tokenizer.vocab), pad_id=tokenizer.eos_id,
    )  # fmt: skip
    encoder = TextEncoder((text,), (tokenizer,))
    diffusion = DiffusionConfig(prediction=prediction, zero_terminal_snr=zero_terminal_snr)
    config = ModelConfig(unet=UNET, vae=VAE_, text=(text,), diffusion=diffusion, guidance_scale=4.0)
    return DiffusionObjective(config, Networks(zero_init(UNet(UNET)), encoder), VAE(VAE_), DiffusionLoss(**loss))


def batch():
    g = torch.Generator().manual_seed(0)
    return torch.rand(4, 3, 8, 8, generator=g) * 2 - 1, CAPTIONS


def without_vae_noise(o):
    """Make the VAE's posterior a point; return a dict that receives these latents as "x0"."""
    seen, encode = {}, o.vae.encode

    def remember(images):
        posterior = encode(images)
        seen["x0"] = posterior.mode()
        return posterior._replace(std=torch.zeros_like(posterior.std))

    o.vae.encode = remember
    return seen


@pytest.mark.parametrize("gamma", [0.0, 5.0])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_loss_of_a_network_that_predicts_zero_is_the_weighted_power_of_the_target(prediction, gamma, tokenizer):
    o = objective(tokenizer, prediction, min_snr_gamma=gamma)
    seen = without_vae_noise(o)

    def zero(noisy, t, context, vector):
        seen["noisy"], seen["t"] = noisy, t
        return torch.zeros_like(noisy)

    o.networks.unet.forward = zero
    torch.manual_seed(1)
    loss, logs = o(batch())

    # In fp64 and without the schedule's code: SD's betas, and the noise as the difference of the noisy latents from x0.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a = (1 - betas).cumprod(0)[seen["t"]][:, None, None, None]
    x0 = seen["x0"].double()
    noise = (seen["noisy"].double() - a.sqrt() * x0) / (1 - a).sqrt()
    assert 0.8 < noise.std() < 1.2  # 256 standard normal numbers: four standard deviations
    target = {"eps": noise, "v": a.sqrt() * noise - (1 - a).sqrt() * x0, "x0": x0}[prediction]
    power = target.square().mean(dim=(1, 2, 3))
    snr = (a / (1 - a)).flatten()
    factor = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[prediction]
    weights = snr.clamp(max=gamma) / factor if gamma else torch.ones_like(snr)
    # fp32 latents, divided by noise levels of at least 0.03
    torch.testing.assert_close(loss.double(), (weights * power).mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(logs["mse"].double(), power.mean(), rtol=1e-4, atol=0)


def test_an_untrained_network_predicts_the_same_number_everywhere(tokenizer):
    o = objective(tokenizer)
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([3, 700])
    with torch.no_grad():
        predicted = o.networks.unet(x, t, torch.randn(2, 8, 8))
    assert torch.equal(predicted, o.networks.unet.conv_out.bias[:, None, None].expand(2, 4, 4, 4))


def test_zero_initialization_makes_every_residual_branch_start_at_zero():
    unet = zero_init(random_networks(TINY_RANDOM)[0])
    added = []
    for stage in [*unet.down, *unet.up]:
        added += [stage.res.conv2] if stage.res is not None else []
        added += [stage.transformer.proj_out] if stage.transformer is not None else []
    assert len(added) == 9  # 2 + 4 residual blocks, 1 + 2 transformers
    assert not any(parameter.any() for layer in added for parameter in layer.parameters())


def test_weighting_by_min_snr_is_one_weighting_of_x0_for_every_prediction():
    schedule = NoiseSchedule()
    t = torch.arange(0, 1000, 37)
    snr = schedule.snr(t).double()
    # errors of eps and v are multiples of the error of x0: SNR and SNR + 1 times
    in_x0 = [loss_weights(snr, "eps", 5.0) * snr, loss_weights(snr, "v", 5.0) * (snr + 1), loss_weights(snr, "x0", 5.0)]
    for weight in in_x0:
        torch.testing.assert_close(weight, snr.clamp(max=5.0))
    assert torch.equal(loss_weights(snr, "v", 0.0), torch.ones_like(snr))


def test_a_perfect_network_has_no_loss(tokenizer):
    o = objective(tokenizer, caption_dropout=0.0)
    seen = without_vae_noise(o)

    def oracle(noisy, t, context, vector):
        x0 = seen["x0"]
        a = o.schedule.alphas_cumprod[t].float()[:, None, None, None]
        noise = (noisy - a.sqrt() * x0) / (1 - a).sqrt()
        return a.sqrt() * noise - (1 - a).sqrt() * x0

    o.networks.unet.forward = oracle
    loss, _ = o(batch())
    assert loss < 1e-5  # fp32 division by the smallest noise level


def test_unet_and_text_encoder_learn_while_the_vae_stays(tokenizer):
    o = objective(tokenizer, caption_dropout=0.0)
    before = {name: p.clone() for name, p in o.named_parameters()}
    optimizer = torch.optim.Adam([p for p in o.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(25):
        torch.manual_seed(step % 5)
        loss, _ = o(batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    after = dict(o.named_parameters())
    changed = {name.split(".")[0] for name in before if not torch.equal(after[name], before[name])}
    assert changed == {"networks"}
    for name in ("unet.conv_out.weight", "text_encoder.towers.0.blocks.0.attn.to_q.weight"):
        assert not torch.equal(after[f"networks.{name}"], before[f"networks.{name}"])


@pytest.mark.parametrize(("dropout", "low", "high"), [(0.0, 0, 0), (0.25, 0.08, 0.42)])
def test_caption_dropout_trains_its_share_of_images_on_the_empty_text(tokenizer, monkeypatch, dropout, low, high):
    o = objective(tokenizer, caption_dropout=dropout)
    shown = []
    encode = o.networks.text_encoder.encode

    def watched(self, texts, clip_skip=None):
        shown.append(texts)
        return encode(texts, clip_skip)

    monkeypatch.setattr(TextEncoder, "encode", watched)
    torch.manual_seed(0)
    for _ in range(30):
        o(batch())
    texts = [text for texts in shown for text in texts]
    assert low <= texts.count("") / len(texts) <= high  # of 120 images: four standard deviations about a quarter
    for texts in shown:  # each image keeps its own caption
        assert all(text in ("", caption) for text, caption in zip(texts, CAPTIONS, strict=True))


def test_samples_are_pictures_of_the_captions_from_fixed_noise(tokenizer):
    o = objective(tokenizer)
    for parameter in o.networks.unet.parameters():  # the new network ignores its texts
        torch.nn.init.normal_(parameter, std=0.2)
    torch.manual_seed(3)
    with torch.no_grad():
        first = o.sample(batch())
        torch.manual_seed(4)
        assert first.shape == (4, 3, 8, 8)
        assert torch.equal(o.sample(batch()), first)
        images, captions = batch()
        changed = o.sample((images, ["a car", *captions[1:]]))
        o.sample_prompts = ["a car", *captions[1:]]
        assert torch.equal(o.sample(batch()), changed)
        o.config = dataclasses.replace(o.config, guidance_scale=1.0)
        assert not torch.equal(o.sample(batch()), changed)
    assert torch.equal(changed[1:], first[1:])
    assert not torch.equal(changed[0], first[0])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"caption_dropout": 1.0}, "caption_dropout must be at least 0 and less than 1, got 1.0"),
        ({"min_snr_gamma": -1.0}, "min_snr_gamma must be at least 0, got -1.0"),
        ({"huber_delta": 0.0}, "huber_delta must be larger than 0, got 0.0"),
        ({"offset_noise": -0.1}, "offset_noise must be at least 0, got -0.1"),
    ],
)
def test_a_bad_loss_configuration_is_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        DiffusionLoss(**loss)


def vectors_of(unet):
    """Return a list that receives the vector of each pass of `unet`."""
    seen = []
    unet.vector_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    return seen


def test_one_step_trains_sdxl_on_the_vector_that_the_pipeline_makes_for_the_same_text_and_size():
    unet, vae, text_encoder = random_networks(TINY_SDXL)
    pipe = ldm.Pipeline(TINY_SDXL, unet, vae, text_encoder)
    seen, expected = vectors_of(unet), []
    captions = ["a frog", "a car"]
    for caption in captions:
        pipe.generate(ldm.Request(caption, width=32, height=24, steps=1, guidance_scale=1.0))
        expected.append(seen[0])
        seen.clear()

    o = DiffusionObjective(TINY_SDXL, Networks(zero_init(unet), text_encoder), vae, DiffusionLoss(caption_dropout=0.0))
    seen = vectors_of(o.networks.unet)
    optimizer = torch.optim.AdamW([p for p in o.parameters() if p.requires_grad], lr=1e-3)
    before = o.networks.unet.conv_out.weight.clone()
    loss, _ = o((torch.rand(2, 3, 24, 32) * 2 - 1, captions))
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(seen[0], torch.cat(expected))
    assert not torch.equal(*seen[0])
    assert loss.isfinite()
    assert not torch.equal(o.networks.unet.conv_out.weight, before)


def test_sdxl_is_trained_without_caption_on_the_vector_that_guidance_takes_and_makes_samples():
    unet, vae, text_encoder = random_networks(TINY_SDXL)
    seen = vectors_of(unet)
    pipe = ldm.Pipeline(TINY_SDXL, unet, vae, text_encoder)
    pipe.generate(ldm.Request("a frog", width=32, height=32, steps=1, guidance_scale=2.0))
    (left_out,) = (row for row in torch.cat(seen) if not row[:24].any())  # zeros in place of the pooled text

    o = DiffusionObjective(
        TINY_SDXL, Networks(zero_init(unet), text_encoder), vae, DiffusionLoss(caption_dropout=0.999)
    )
    seen = vectors_of(o.networks.unet)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    torch.manual_seed(0)
    o((images, ["a frog", "a car"]))
    torch.testing.assert_close(seen[0], left_out.expand(2, -1))
    with torch.no_grad():
        assert o.sample((images, ["a frog", "a car"])).shape == (2, 3, 32, 32)


def test_a_refiner_cannot_be_trained_for_lack_of_aesthetic_scores():
    unet, vae, text_encoder = random_networks(TINY_REFINER)
    with pytest.raises(ValueError, match=r"random-refiner takes an aesthetic score, and training data have none"):
        DiffusionObjective(TINY_REFINER, Networks(unet, text_encoder), vae, DiffusionLoss())


def test_moments_train_as_the_images_do_that_they_belong_to(tokenizer):
    o = objective(tokenizer)
    images, captions = batch()
    without_vae_noise(o)
    torch.manual_seed(1)
    expected, _ = o((images, captions))
    mean, std = o.vae.encode(images)
    torch.manual_seed(1)
    loss, _ = o((torch.cat([mean, std], dim=1), captions))
    torch.testing.assert_close(loss, expected)
    assert o.sample((torch.cat([mean, std], dim=1), captions)).shape == images.shape


def test_the_timesteps_of_a_batch_are_spread_evenly_and_each_is_uniform():
    drawn = torch.stack([spread_timesteps(8, 1000) for _ in range(4000)])
    distances = drawn.sort(dim=1).values.diff(dim=1)
    assert distances.min() == 125 == distances.max()
    counts = torch.bincount(drawn[:, 3] // 100, minlength=10)
    assert counts.sum() == 4000
    assert counts.min() > 320  # of 400; the standard deviation is 19
    assert 0 <= drawn.min() < drawn.max() < 1000


def predicting(o, network):
    """Let the UNet of `o` be `network`: (noisy, t) -> prediction. Return a dict that receives its last arguments."""
    seen = {}

    def forward(noisy, t, context, vector=None):
        seen.update(noisy=noisy, t=t, context=context)
        return network(noisy, t)

    o.networks.unet.forward = forward
    return seen


@pytest.mark.parametrize("error", ["huber", "pseudo_huber"])
def test_large_errors_count_less_than_their_square(tokenizer, error):
    o = objective(tokenizer, "x0", error=error, huber_delta=0.3)
    seen = without_vae_noise(o)
    predicting(o, lambda noisy, t: torch.zeros_like(noisy))
    loss, logs = o(batch())
    e = seen["x0"].double()
    expected = {
        "huber": torch.where(e.abs() <= 0.3, e**2, 0.6 * e.abs() - 0.09),
        "pseudo_huber": 0.6 * ((e**2 + 0.09).sqrt() - 0.3),
    }[error].mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(logs["mse"].double(), (e**2).mean(), rtol=1e-5, atol=0)
    assert (e.abs() > 0.3).float().mean() > 0.1


def test_offset_noise_shifts_each_channel_of_each_image_and_is_part_of_the_target(tokenizer):
    o = objective(tokenizer, "eps", offset_noise=2.0)
    latents = without_vae_noise(o)
    seen = predicting(o, lambda noisy, t: torch.zeros_like(noisy))
    means, losses = [], []
    for seed in range(20):
        torch.manual_seed(seed)
        loss, _ = o(batch())
        a = o.schedule.alphas_cumprod[seen["t"]][:, None, None, None]
        noise = (seen["noisy"].double() - a.sqrt() * latents["x0"]) / (1 - a).sqrt()
        means.append(noise.mean(dim=(2, 3)))
        losses.append((loss.double(), noise.square().mean()))
    # 16 pixels: the variance of a mean is 1 / 16 without the offset, and 4 more with it; 320 means
    assert 1.7 < torch.cat(means).std() < 2.4
    for loss, power in losses:
        torch.testing.assert_close(loss, power, rtol=1e-3, atol=0)  # division by the smallest noise level


def test_a_mask_weights_the_error_of_each_latent_pixel(tokenizer):
    o = objective(tokenizer, "x0", caption_dropout=0.0)
    seen = without_vae_noise(o)
    predicting(o, lambda noisy, t: torch.zeros_like(noisy))
    images, captions = batch()
    mask = torch.ones(4, 1, 8, 8)
    mask[0, :, :, 4:] = 0  # half of the image
    mask[1] = 0.25  # equal everywhere: as without a mask
    mask[2, :, :2, :2] = 0.5
    mask[2, :, 2:] = mask[2, :, :, 2:] = 0
    mask[3] = 0
    torch.manual_seed(1)
    loss, logs = o((images, captions, {"mask": mask}))
    x0 = seen["x0"].square()  # 4 x 4 latent pixels
    parts = [x0[0, :, :, :2].mean(), x0[1].mean(), x0[2, :, 0, 0].mean(), torch.zeros(())]
    torch.testing.assert_close(loss, torch.stack(parts).mean())
    torch.testing.assert_close(logs["mse"], loss)
    torch.manual_seed(1)
    whole, _ = o((images, captions, {"mask": torch.ones(4, 1, 4, 4)}))  # a mask of the latents
    torch.manual_seed(1)
    torch.testing.assert_close(whole, o((images, captions))[0])


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_with_zero_terminal_snr_the_last_timestep_trains_the_picture_from_pure_noise(
    tokenizer, prediction, monkeypatch
):
    o = objective(tokenizer, prediction, zero_terminal_snr=True)
    latents = without_vae_noise(o)
    seen = predicting(o, lambda noisy, t: torch.zeros_like(noisy))
    monkeypatch.setattr(diffusion, "spread_timesteps", lambda count, timesteps: torch.full((count,), timesteps - 1))
    torch.manual_seed(1)
    loss, _ = o(batch())
    x0 = latents["x0"]
    correlation = torch.corrcoef(torch.stack([seen["noisy"].flatten(), x0.flatten()]))[0, 1]
    assert abs(correlation) < 0.3  # 256 numbers
    torch.testing.assert_close(loss, x0.square().mean(), rtol=1e-3, atol=1e-3)  # v is -x0 there; a is 2^-24, not 0


def test_eps_with_zero_terminal_snr_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the last timestep is pure noise, and eps tells nothing about the picture"):
        objective(tokenizer, "eps", zero_terminal_snr=True)


def test_a_unet_that_takes_the_guidance_scale_is_refused(tokenizer):
    o = objective(tokenizer)
    config = dataclasses.replace(o.config, unet=dataclasses.replace(UNET, guidance_dim=8))
    with pytest.raises(ValueError, match="was distilled with guidance, and training here gives it no guidance scale"):
        DiffusionObjective(config, o.networks, o.vae, DiffusionLoss())


def test_sdxl_is_conditioned_on_the_sizes_and_the_crop_of_each_image_as_the_pipeline_is():
    unet, vae, text_encoder = random_networks(TINY_SDXL)
    pipe = ldm.Pipeline(TINY_SDXL, unet, vae, text_encoder)
    seen, expected = vectors_of(unet), []
    sizes = [(300, 400, 0, 17), (50, 40, 3, 0)]
    for height, width, top, left in sizes:
        given = ldm.Sizes(original_height=height, original_width=width, crop_top=top, crop_left=left)
        pipe.generate(ldm.Request("a frog", width=32, height=24, steps=1, guidance_scale=1.0, sizes=given))
        expected.append(seen[0])
        seen.clear()
    o = DiffusionObjective(TINY_SDXL, Networks(unet, text_encoder), vae, DiffusionLoss(caption_dropout=0.0))
    o((torch.rand(2, 3, 24, 32) * 2 - 1, ["a frog"] * 2, {"sizes": torch.tensor(sizes)}))
    torch.testing.assert_close(seen[0], torch.cat(expected))


@pytest.mark.parametrize(("config", "dropout"), [(TINY_RANDOM, 0.5), (TINY_SDXL, 0.5), (TINY_SDXL, 0.0)])
def test_captions_that_were_encoded_before_train_as_their_texts_do_with_caption_dropout_too(config, dropout):
    unet, vae, text_encoder = random_networks(config)
    o = DiffusionObjective(config, Networks(unet, text_encoder), vae, DiffusionLoss(caption_dropout=dropout))
    images, captions = torch.rand(4, 3, 32, 32) * 2 - 1, ["a frog", "a car", "", "an owl"]
    encoded = text_encoder.encode(captions)
    more = (
        {"context": encoded.context, "pooled": encoded.vector} if config.unet.is_sdxl else {"context": encoded.context}
    )
    losses = []
    for each in ((images, captions), (images, ["?"] * 2 + [""] + ["?"], more)):
        torch.manual_seed(0)  # drops two of the captions
        losses.append(o(each)[0])
    torch.testing.assert_close(*losses)


def test_the_networks_whose_parameters_need_no_gradient_stay_and_are_no_part_of_the_average(tokenizer):
    o = objective(tokenizer)
    assert o.trained is o.networks
    o.networks.text_encoder.requires_grad_(False)
    assert o.trained is o.networks.unet
    unet = copy.deepcopy(o.trained)
    assert o.complete(unet).unet is unet
    assert o.complete(unet).text_encoder is o.networks.text_encoder
    o.networks.requires_grad_(True)
    o.networks.unet.requires_grad_(False)
    assert o.trained is o.networks.text_encoder
    text_encoder = copy.deepcopy(o.trained)
    assert o.complete(text_encoder).unet is o.networks.unet
    assert o.complete(text_encoder).text_encoder is text_encoder


def test_validation_measures_the_weights_at_fixed_timesteps_with_fixed_noise(tokenizer):
    class KeptOut:
        def __len__(self):
            return 2

        def __getitem__(self, i):
            generator = torch.Generator().manual_seed(7 + i)
            return torch.randint(256, (3, 8, 8 + 4 * i), generator=generator, dtype=torch.uint8), CAPTIONS[i]

    o = objective(tokenizer, "x0", min_snr_gamma=5.0, caption_dropout=0.9, error="huber")
    assert not o.validates
    o.kept_out = KeptOut()
    assert o.validates
    seen = []

    def watched(noisy, t, context, vector=None):
        seen.append((noisy, t, context))
        return torch.zeros_like(noisy)

    o.networks.unet.forward = watched
    values = []
    with torch.no_grad():
        for seed in (1, 2):
            torch.manual_seed(seed)
            values.append(o.validate()["validation"])
        images = [o.kept_out[i][0].float()[None] / 127.5 - 1 for i in range(2)]
        expected = torch.stack([o.vae.encode(image).mode().square().mean() for image in images]).mean()
    torch.testing.assert_close(values[0], expected)  # squared errors without weights
    assert values[0] == values[1]
    assert all(
        torch.equal(a, b)
        for first, second in zip(seen[:2], seen[2:], strict=True)
        for a, b in zip(first, second, strict=True)
    )
    assert seen[0][1].tolist() == [62, 187, 312, 437, 562, 687, 812, 937]
    torch.testing.assert_close(seen[1][2], o.networks.text_encoder.encode(["an apple"] * 8).context)

    o.networks.unet.forward = lambda noisy, t, context, vector=None: torch.ones_like(noisy)
    with torch.no_grad():
        assert o.validate()["validation"] != values[0]
