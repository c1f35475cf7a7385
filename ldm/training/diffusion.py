"""The latent diffusion objective: predict noise or velocity in the latents of a fixed autoencoder."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import DiffusionConfig, UNetConfig
from ldm.diffusion.denoiser import guided, parametrize
from ldm.diffusion.samplers import ddim
from ldm.diffusion.schedule import NoiseSchedule, to_ve, to_vp
from ldm.models.text import TextEncoder
from ldm.models.transformer import SpatialTransformer
from ldm.models.unet import Stage, UNet
from ldm.models.vae import VAE
from ldm.training.loop import Batch, Objective


@dataclass(frozen=True)
class DiffusionLoss:
    """How the prediction error is weighted, and how often the caption is left out."""

    caption_dropout: float = 0.1  # share of images trained without text, for guidance (Ho & Salimans 2022)
    min_snr_gamma: float = 0.0  # 0: every timestep counts the same; 5 is Hang et al.'s choice

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout < 1 or self.min_snr_gamma < 0:
            raise ValueError(
                "caption_dropout must be in 0 <= p < 1 and min_snr_gamma >= 0, "
                f"got {self.caption_dropout} and {self.min_snr_gamma}"
            )


class Networks(nn.Module):
    """The two networks that learn together."""

    def __init__(self, unet: UNet, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder


class DiffusionObjective(Objective):
    """Train a UNet and its text encoder on a fixed VAE (Rombach et al. 2022, eq. 3)."""

    def __init__(
        self,
        unet: UNetConfig,
        text_encoder: TextEncoder,
        vae: VAE,
        diffusion: DiffusionConfig,
        weights: DiffusionLoss,
        *,
        sample_prompts: Sequence[str] = (),
        sample_guidance: float = 4.0,
    ) -> None:
        super().__init__()
        self.networks = Networks(zero_init(UNet(unet)), text_encoder)
        self.vae = vae.eval().requires_grad_(False)
        self.weights, self.prediction = weights, diffusion.prediction
        self.schedule = NoiseSchedule(
            betas=diffusion.betas,
            beta_start=diffusion.beta_start,
            beta_end=diffusion.beta_end,
            timesteps=diffusion.timesteps,
            zero_terminal_snr=diffusion.zero_terminal_snr,
        )
        self.sample_prompts, self.sample_guidance = list(sample_prompts), sample_guidance

    @property
    def trained(self) -> Networks:
        """The UNet and the text encoder."""
        return self.networks

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean weighted squared error of one batch at random timesteps."""
        images, captions = batch
        with torch.no_grad():
            x0 = self.vae.encode(images).sample()
        keep = (torch.rand(len(captions)) >= self.weights.caption_dropout).tolist()
        shown = [caption if kept else "" for caption, kept in zip(captions, keep, strict=True)]
        condition = self.networks.text_encoder.encode(shown)

        t = torch.randint(len(self.schedule), (len(images),), device=images.device)
        noise = torch.randn_like(x0)
        noisy = self.schedule.add_noise(x0, noise, t)
        predicted = self.networks.unet(noisy, t, condition.context, condition.vector)

        targets = {"eps": noise, "v": self.schedule.velocity(x0, noise, t), "x0": x0}
        errors = F.mse_loss(predicted, targets[self.prediction], reduction="none").mean(dim=(1, 2, 3))
        weights = loss_weights(self.schedule.snr(t), self.prediction, self.weights.min_snr_gamma)
        return (weights * errors).mean(), {"mse": errors.mean()}

    def sample(self, trained: nn.Module, batch: Batch) -> Tensor:
        """Return one guided picture per sample prompt, always from the same noise."""
        assert isinstance(trained, Networks)
        prompts = self.sample_prompts or batch[1][:16]
        height, width = (side // self.vae.config.factor for side in batch[0].shape[-2:])
        noise = torch.randn(
            len(prompts), self.vae.config.latent_channels, height, width, generator=torch.Generator().manual_seed(0)
        ).to(batch[0].device)
        sigmas = self.schedule.steps(25, "trailing")
        shown, empty = (trained.text_encoder.encode(texts) for texts in (prompts, [""] * len(prompts)))
        predict = guided(
            trained.unet, (shown.context, shown.vector), (empty.context, empty.vector), scale=self.sample_guidance
        )
        denoise = parametrize(predict, self.schedule, self.prediction)
        x = to_ve(noise, sigmas[0])
        for step in ddim(denoise, x, sigmas):
            x = step.x
        return self.vae.decode(to_vp(x, sigmas[-1]))


def loss_weights(snr: Tensor, prediction: str, gamma: float) -> Tensor:
    """Weigh each image's error: min(SNR, gamma) in terms of x0 (Hang et al. 2023, eq. 8 and section 3.4).

    snr: b. An error of eps is SNR times that of x0, an error of v is SNR + 1 times, hence the divisions.
    gamma 0: no weighting.
    """
    if gamma == 0:
        return torch.ones_like(snr)
    divisor = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[prediction]
    return snr.clamp(max=gamma) / divisor


def zero_init(unet: UNet) -> UNet:
    """Zero the last layer of every residual branch, so that training starts from the identity (LDM)."""
    for part in unet.modules():
        if isinstance(part, SpatialTransformer):
            zeroed: nn.Module = part.proj_out
        elif isinstance(part, Stage) and part.res is not None:
            zeroed = part.res.conv2
        else:
            continue
        for parameter in zeroed.parameters():
            nn.init.zeros_(parameter)
    nn.init.zeros_(unet.conv_out.weight)
    return unet
