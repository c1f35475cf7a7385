"""The diffusion objective: its targets, its weights and what it leaves untouched."""

import pytest
import torch

from ldm.config import DiffusionConfig, TextConfig, UNetConfig, VAEConfig
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.text import TextEncoder
from ldm.models.tokens import Tokenizer
from ldm.models.vae import VAE
from ldm.training.diffusion import DiffusionLoss, DiffusionObjective, loss_weights
from ldm.training.vocabulary import build_vocabulary

UNET = UNetConfig(channels=(8, 16), depth=(0, 1), heads=(1, 2), context_dim=8, norm_groups=2, res_blocks=1)
VAE_ = VAEConfig(channels=(8, 8), res_blocks=1, norm_groups=2, scaling_factor=1.0)
CAPTIONS = ["a frog", "an apple", "a frog", "a car"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(*build_vocabulary(CAPTIONS, 600))


def objective(tokenizer, prediction="v", **loss):
    torch.manual_seed(0)
    text = TextConfig(
        width=8, layers=1, heads=2, mlp=16, max_length=8,
        vocab_size=len(tokenizer.vocab), pad_id=tokenizer.eos_id,
    )  # fmt: skip
    encoder = TextEncoder((text,), (tokenizer,))
    diffusion = DiffusionConfig(prediction=prediction)
    return DiffusionObjective(UNET, encoder, VAE(VAE_), diffusion, DiffusionLoss(**loss))


def batch():
    g = torch.Generator().manual_seed(0)
    return torch.rand(4, 3, 8, 8, generator=g) * 2 - 1, CAPTIONS


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_an_untrained_network_predicts_zero_so_its_loss_is_the_targets_power(prediction, tokenizer):
    torch.manual_seed(1)
    loss, logs = objective(tokenizer, prediction)(batch())
    assert torch.equal(loss, logs["mse"])  # unweighted
    if prediction == "eps":
        assert 0.8 < loss.item() < 1.2  # noise of 256 standard normal values
    assert loss > 0


def test_weighting_by_min_snr_is_one_weighting_of_x0_whatever_is_predicted():
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
    seen = {}

    def oracle(noisy, t, context, vector):
        x0 = seen["x0"]
        a = o.schedule.alphas_cumprod[t].float()[:, None, None, None]
        noise = (noisy - a.sqrt() * x0) / (1 - a).sqrt()
        return a.sqrt() * noise - (1 - a).sqrt() * x0

    encode = o.vae.encode

    def remember(images):
        posterior = encode(images)
        seen["x0"] = posterior.mode()
        return posterior._replace(std=torch.zeros_like(posterior.std))

    o.vae.encode, o.networks.unet.forward = remember, oracle
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
    changed = {name.split(".")[0] for name, p in o.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"networks"}
    texts = [name for name, p in o.named_parameters() if "blocks.0.attn.to_q.weight" in name]
    assert texts
    assert not torch.equal(dict(o.named_parameters())[texts[0]], before[texts[0]])


def test_caption_dropout_trains_on_the_empty_text(tokenizer, monkeypatch):
    o = objective(tokenizer, caption_dropout=0.5)
    shown = []
    encode = o.networks.text_encoder.encode
    monkeypatch.setattr(
        type(o.networks.text_encoder), "encode", lambda self, texts: shown.extend(texts) or encode(texts)
    )
    torch.manual_seed(0)
    for _ in range(20):
        o(batch())
    assert 0.3 < shown.count("") / len(shown) < 0.7  # 80 fair coins
    assert set(shown) == {"", *CAPTIONS}


def test_samples_are_pictures_of_the_captions_from_fixed_noise(tokenizer):
    o = objective(tokenizer)
    torch.manual_seed(3)
    first = o.sample(o.trained, batch())
    torch.manual_seed(4)
    assert first.shape == (4, 3, 8, 8)
    assert torch.equal(o.sample(o.trained, batch()), first)


@pytest.mark.parametrize("loss", [{"caption_dropout": 1.0}, {"min_snr_gamma": -1.0}])
def test_a_bad_loss_configuration_is_refused(loss):
    with pytest.raises(ValueError, match="caption_dropout must be in"):
        DiffusionLoss(**loss)
