"""The VAE's objective: reconstruction, a KL term and, optionally, a perceptual distance and a discriminator."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ldm.config import VAEConfig
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.layers import ResBlock
from ldm.models.vae import VAE, Gaussian, PixelAttention
from ldm.training.loop import Batch, Objective

Perceptual = Callable[[Tensor, Tensor], Tensor]  # two images, b 3 h w in [-1, 1] -> their distances, any shape


@dataclass(frozen=True)
class VAELoss:
    """The weights of the loss terms. The L1 terms are means over pixels, the KL term is a mean over latent values."""

    gradient: float = 1.0  # L1 of the image gradients, which sharpens edges without a perceptual network
    kl: float = 1e-4
    perceptual: Path | None = None  # a TorchScript file of a perceptual distance such as LPIPS, see `Perceptual`
    perceptual_weight: float = 0.1
    adversarial: float = 0.0  # 0: no discriminator
    adversarial_start: int = 0  # the number of batches before the adversarial term is added
    discriminator_channels: int = 32  # of its first layer; each further layer has twice as many
    discriminator_layers: int = 2  # after the first one; each halves the resolution
    decoder_only: bool = False  # keep the encoder, so that a UNet that was trained on its latents stays valid
    latent_noise: float = 0.0  # largest deviation of noise that is added to the latents before they are decoded
    crop: int = 0  # side in pixels of the random squares to train on; 0: whole images


class VAEObjective(Objective):
    """Train a VAE (Rombach et al. 2022, section 3.1, with an L1 loss of image gradients beside or instead of LPIPS)."""

    def __init__(self, config: VAEConfig, weights: VAELoss, perceptual: Perceptual | None = None) -> None:
        """perceptual: no nn.Module, so that neither the optimizer nor the checkpoint holds its weights."""
        super().__init__()
        self.weights, self.perceptual = weights, perceptual
        self.vae = init(VAE(config))
        if weights.decoder_only:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        size = weights.discriminator_channels, weights.discriminator_layers
        self.discriminator = PatchDiscriminator(*size) if weights.adversarial else None
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @property
    def trained(self) -> VAE:
        """The VAE. The discriminator learns, too, but is not part of the result."""
        return self.vae

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss of one batch, and its terms without weights. The PSNR is in dB."""
        images = random_crop(batch[0], self.weights.crop) if self.weights.crop else batch[0]
        posterior = self.vae.encode(images)
        decoded = self.vae.decode(noisy(posterior.sample(), self.weights.latent_noise)).float()

        l1, edges, divergence = ((images - decoded).abs().mean(), gradient_l1(images, decoded), kl(posterior))
        loss = l1 + self.weights.gradient * edges + self.weights.kl * divergence
        mse = F.mse_loss(decoded.detach().clamp(-1, 1), images)
        logs = {"l1": l1, "edges": edges, "kl": divergence, "psnr": 10 * torch.log10(4 / mse)}

        if self.perceptual is not None:
            distance = self.perceptual(images, decoded).mean()
            loss = loss + self.weights.perceptual_weight * distance
            logs |= {"perceptual": distance}
        if self.discriminator is not None:
            learn, fool = hinge_losses(self.discriminator, images, decoded)
            started = (self.steps >= self.weights.adversarial_start).float()
            loss = loss + learn + started * self.weights.adversarial * fool
            logs |= {"discriminator": learn, "fool": fool}
        self.steps += 1
        return loss, logs

    def sample(self, batch: Batch) -> Tensor:
        """Return the first 8 images of the batch, each followed by its reconstruction."""
        images = batch[0][:8]
        decoded = self.vae.decode(self.vae.encode(images).mode())
        return torch.stack([images, decoded], dim=1).flatten(0, 1)


def init(vae: VAE) -> VAE:
    """Initialize for fast training: 21 dB after 200 steps, where PyTorch's default initialization reaches 13 dB.

    Convolutions are orthogonal, and residual branches and the attention start at zero: the VAE is nearly linear and
    keeps most of the image. The posterior starts with log-variance -5, so that its noise does not hide the image.
    """
    for part in vae.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.orthogonal_(part.weight)
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]
    for part in vae.modules():
        if isinstance(part, ResBlock):
            nn.init.zeros_(part.conv2.weight)
        elif isinstance(part, PixelAttention):
            nn.init.zeros_(part.to_out.weight)
            nn.init.zeros_(part.to_out.bias)
    channels = vae.config.latent_channels
    nn.init.zeros_(vae.quant_conv.weight[channels:])
    nn.init.constant_(vae.quant_conv.bias[channels:], -5.0)  # type: ignore[index]
    return vae


def random_crop(images: Tensor, size: int) -> Tensor:
    """Cut a square of `size` pixels from each image, at a random place: b c h w to b c size size."""
    height, width = images.shape[-2:]
    tops = torch.randint(0, height - size + 1, (len(images),)).tolist()
    lefts = torch.randint(0, width - size + 1, (len(images),)).tolist()
    parts = zip(images, tops, lefts, strict=True)
    return torch.stack([im[:, t : t + size, le : le + size] for im, t, le in parts])


def noisy(latents: Tensor, largest: float) -> Tensor:
    """Add noise to each image's latents, b c h w, with a deviation between 0 and `largest` that is drawn at random.

    The decoder then also learns to draw from latents with errors, as a diffusion model makes them (noise-augmented
    decoding, Zheng et al. 2025, section 4.3). With `largest` 0 no random number is drawn.
    """
    if not largest:
        return latents
    deviations = largest * torch.rand(len(latents), 1, 1, 1, device=latents.device)
    return latents + deviations * torch.randn_like(latents)


def gradient_l1(images: Tensor, decoded: Tensor) -> Tensor:
    """Return the mean absolute error of the differences between horizontal neighbors, plus the vertical one."""
    error = images - decoded
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def kl(posterior: Gaussian) -> Tensor:
    """Return KL(posterior || N(0, 1)) per latent value (Kingma & Welling 2014, appendix B)."""
    mean, std = posterior
    return 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()


def hinge_losses(discriminator: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hinge loss of the discriminator and the adversarial loss of the VAE (Lim & Ye 2017).

    The first has gradients for the discriminator only, the second for the VAE only (through `fake`). Their sum can
    therefore be one loss with one optimizer. Esser et al. 2021, eq. 6, use them for an autoencoder.
    """
    learn = F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake.detach())).mean()
    frozen = {name: p.detach() for name, p in discriminator.named_parameters()}
    fool: Tensor = -functional_call(discriminator, frozen, (fake,)).mean()
    return 0.5 * learn, fool


@torch.no_grad()
def latent_std(vae: VAE, images: Tensor) -> float:
    """Measure the standard deviation of sampled latents. The scaling factor is 1 over this number."""
    return vae.encode(images).sample().std().item()
