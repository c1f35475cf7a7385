"""The loss terms of the VAE, each against its formula, and that they train."""

import torch
from torch.distributions import Normal, kl_divergence

from ldm.config import VAEConfig
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.vae import VAE, Gaussian
from ldm.training.vae import VAELoss, VAEObjective, gradient_l1, hinge_losses, init, kl, latent_std, noisy, random_crop

SMALL = VAEConfig(channels=(8, 16), res_blocks=1, norm_groups=2, scaling_factor=1.0)


def pictures(n=4, side=8):
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, 3, side, side, generator=g) * 2 - 1


def test_kl_is_the_divergence_from_a_standard_normal_per_latent_value():
    mean, std = torch.randn(2, 4, 3, 3), torch.rand(2, 4, 3, 3) + 0.1
    expected = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl(Gaussian(mean, std)), expected)


def test_the_gradient_loss_sees_edges_and_not_brightness():
    images = pictures()
    assert gradient_l1(images, images + 0.3) < 1e-6  # a constant has no gradient, but for rounding
    error = (images - images.flip(-1)).double()
    across = (error[..., :, 1:] - error[..., :, :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    torch.testing.assert_close(gradient_l1(images, images.flip(-1)).double(), across + down)


def test_the_noise_of_each_picture_has_its_own_deviation_up_to_the_largest():
    torch.manual_seed(0)
    latents = torch.randn(64, 8, 16, 16)
    deviations = (noisy(latents, 0.4) - latents).std(dim=(1, 2, 3))
    assert deviations.max() < 0.42
    assert abs(deviations.mean() - 0.2) < 0.03
    assert torch.equal(noisy(latents, 0.0), latents)


def test_the_decoder_sees_the_noise_and_the_divergence_does_not():
    losses = {}
    for largest in (0.0, 1.0):
        torch.manual_seed(0)
        objective = VAEObjective(SMALL, VAELoss(latent_noise=largest))
        torch.manual_seed(1)
        losses[largest] = objective((pictures(), []))[1]
    assert losses[1.0]["l1"] != losses[0.0]["l1"]
    assert losses[1.0]["kl"] == losses[0.0]["kl"]


def test_crops_are_parts_of_their_images_each_at_its_own_place():
    torch.manual_seed(0)
    ramp = torch.arange(64.0).view(1, 1, 8, 8).repeat(20, 1, 1, 1)
    crops = random_crop(ramp, 3)
    corners = crops[:, 0, 0, 0]
    assert crops.shape == (20, 1, 3, 3)
    assert (crops[:, 0] - corners[:, None, None] == ramp[0, 0, :3, :3]).all()
    assert len(set(corners.tolist())) > 5


def test_each_player_of_the_hinge_game_gets_gradients_only_from_its_own_loss():
    torch.manual_seed(0)
    judge, fake = PatchDiscriminator(8, 1), pictures().requires_grad_()
    learn, fool = hinge_losses(judge, pictures(), fake)
    fool.backward()
    assert fake.grad.abs().sum() > 0
    assert all(p.grad is None for p in judge.parameters())
    fake.grad = None
    learn.backward()
    assert fake.grad is None
    assert all(p.grad is not None for p in judge.parameters())


def test_the_hinge_losses_reward_a_right_judgment_and_a_fooled_judge():
    class Judge(torch.nn.Module):
        def forward(self, images):
            return images.mean(dim=(1, 2, 3))

    real, fake = torch.full((2, 3, 4, 4), 0.25), torch.full((2, 3, 4, 4), -3.0)
    learn, fool = hinge_losses(Judge(), real, fake)
    assert learn.item() == 0.5 * (0.75 + 0)  # real: 1 - 0.25; fake: below -1 costs nothing
    assert fool.item() == 3.0
    learn, fool = hinge_losses(Judge(), fake, real)
    assert learn.item() == 0.5 * (4 + 1.25)
    assert fool.item() == -0.25


def test_the_loss_terms_compare_the_decoded_with_the_true_images():
    torch.manual_seed(0)
    objective = VAEObjective(SMALL, VAELoss(gradient=0.5, kl=0.01))
    decoded, posterior = [], []
    decode, encode = objective.vae.decode, objective.vae.encode
    objective.vae.decode = lambda latents: decoded.append(decode(latents)) or decoded[0]
    objective.vae.encode = lambda images: posterior.append(encode(images)) or posterior[0]
    loss, logs = objective((pictures(), []))
    difference = (decoded[0] - pictures()).double()
    mean, std = (part.double() for part in posterior[0])
    expected = {
        "l1": difference.abs().mean(),
        "edges": difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean(),
        "kl": kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).mean(),
        # the levels go from -1 to 1, so the peak is 2
        "psnr": 20 * torch.log10(2 / (decoded[0].double().clamp(-1, 1) - pictures()).square().mean().sqrt()),
    }
    assert logs.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(logs[name].double(), value, msg=name, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.double(), expected["l1"] + 0.5 * expected["edges"] + 0.01 * expected["kl"])


def test_the_adversarial_term_counts_from_its_start():
    torch.manual_seed(0)
    objective = VAEObjective(SMALL, VAELoss(adversarial=10.0, adversarial_start=1))
    torch.manual_seed(1)
    before, logs = objective((pictures(), []))
    expected = logs["l1"] + logs["edges"] + 1e-4 * logs["kl"] + logs["discriminator"]
    torch.testing.assert_close(before, expected)
    after, logs = objective((pictures(), []))
    expected = logs["l1"] + logs["edges"] + 1e-4 * logs["kl"] + logs["discriminator"]
    torch.testing.assert_close(after, expected + 10 * logs["fool"])


def test_the_first_autoencoder_has_a_narrow_posterior_and_loses_no_color():
    torch.manual_seed(0)
    posterior = init(VAE(SMALL)).encode(pictures())
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, -2.5).exp())
    assert posterior.mean.std() > 0.2  # much more than the noise that sampling adds


def test_training_lowers_the_loss_and_shows_images_beside_reconstructions():
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(pictures(4, 2), size=8, mode="bilinear")
    objective = VAEObjective(SMALL, VAELoss(crop=4))
    optimizer = torch.optim.Adam(objective.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        loss, _ = objective((smooth, []))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    shown = objective.sample((pictures(), []))
    assert shown.shape == (8, 3, 8, 8)
    assert torch.equal(shown[::2], pictures())


def test_one_over_the_measured_deviation_scales_latents_to_one():
    torch.manual_seed(0)
    vae = init(VAE(SMALL))
    std = latent_std(vae, pictures(16))
    scaled = VAE(VAEConfig(**{**vars(SMALL), "scaling_factor": 1 / std}))
    scaled.load_state_dict(vae.state_dict())
    assert abs(latent_std(scaled, pictures(16)) - 1) < 0.02  # two draws of the posterior
