"""The latent diffusion objective: predict noise, velocity or clean latents in the latents of a fixed VAE."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning import Condition, condition
from ldm.config import ModelConfig
from ldm.diffusion.denoiser import Bind, classifier_free, guided, parametrize
from ldm.diffusion.samplers import ddim
from ldm.diffusion.schedule import NoiseSchedule, to_ve
from ldm.models.text import TextEncoder
from ldm.models.transformer import SpatialTransformer
from ldm.models.unet import Stage, UNet
from ldm.models.vae import VAE, Gaussian
from ldm.training.loop import Batch, Objective


@dataclass(frozen=True)
class DiffusionLoss:
    """The weights of the prediction errors, and the share of images without caption."""

    caption_dropout: float = 0.1  # share of images trained without caption, for guidance (Ho & Salimans 2022)
    min_snr_gamma: float = 0.0  # see `loss_weights`; 0: no weighting; Hang et al. take 5

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout must be at least 0 and less than 1, got {self.caption_dropout}")
        if not self.min_snr_gamma >= 0:
            raise ValueError(f"min_snr_gamma must be at least 0, got {self.min_snr_gamma}")


class Networks(nn.Module):
    """A UNet and a text encoder."""

    def __init__(self, unet: UNet, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder


class DiffusionObjective(Objective):
    """Train a UNet and a text encoder in the latents of a fixed VAE (Rombach et al. 2022, eq. 3).

    The batches have images, or the moments of their latents (see `ldm.training.latents`).
    """

    def __init__(
        self,
        config: ModelConfig,
        networks: Networks,
        vae: VAE,
        weights: DiffusionLoss,
        *,
        sample_prompts: Sequence[str] = (),
    ) -> None:
        """Build the noise schedule of `config`.

        sample_prompts: for the sample pictures; none: the captions of the last batch, at most 16.
        Raises ValueError for a UNet that takes an aesthetic score, as SDXL's refiner does.
        """
        super().__init__()
        if "aesthetic_score" in config.micro_conditioning:
            raise ValueError(
                f"the UNet of {config.name} takes an aesthetic score, and training data have none: SDXL's refiner "
                "cannot be trained"
            )
        self.config, self.weights = config, weights
        self.networks = networks
        self.vae = vae.eval().requires_grad_(False)
        diffusion = config.diffusion
        self.prediction = diffusion.prediction
        self.schedule = NoiseSchedule(
            betas=diffusion.betas,
            beta_start=diffusion.beta_start,
            beta_end=diffusion.beta_end,
            timesteps=diffusion.timesteps,
            zero_terminal_snr=diffusion.zero_terminal_snr,
        )
        self.sample_prompts = list(sample_prompts)

    @property
    def trained(self) -> nn.Module:
        """The UNet and the text encoder."""
        return self.networks

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean weighted squared error of one batch at random timesteps. The log has it without weights."""
        return self._errors(batch, lambda z, t, c: self.networks.unet(z, t, c.context, c.vector))

    def _errors(
        self, batch: Batch, predict: Callable[[Tensor, Tensor, Condition], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images, captions = batch
        with torch.no_grad():
            x0 = (Gaussian(*images.chunk(2, dim=1)) if _are_moments(images) else self.vae.encode(images)).sample()
        keep = (torch.rand(len(captions)) >= self.weights.caption_dropout).tolist()
        shown = [caption if kept else None for caption, kept in zip(captions, keep, strict=True)]
        given = self._condition(self.networks.text_encoder, shown, self._size(images))

        t = spread_timesteps(len(images), len(self.schedule)).to(images.device)
        noise = torch.randn_like(x0)
        noisy = self.schedule.add_noise(x0, noise, t)
        predicted = predict(noisy, t, given)

        targets = {"eps": noise, "v": self.schedule.velocity(x0, noise, t), "x0": x0}
        errors = F.mse_loss(predicted, targets[self.prediction], reduction="none").mean(dim=(1, 2, 3))
        weights = loss_weights(self.schedule.snr(t), self.prediction, self.weights.min_snr_gamma)
        return (weights * errors).mean(), {"mse": errors.mean()}

    def _size(self, images: Tensor) -> tuple[int, int]:
        """Return the height and width in pixels of images, or of the images that moments belong to."""
        height, width = images.shape[-2:]
        factor = self.vae.config.factor if _are_moments(images) else 1
        return height * factor, width * factor

    def _condition(self, text_encoder: TextEncoder, texts: Sequence[str | None], size: Sequence[int]) -> Condition:
        """Make the condition of each text as the pipeline does; None is a left-out text.

        size: height and width of the images in pixels. SDXL is told that they are whole pictures of this size.
        """
        left_out = None if self.config.zero_negative else ""
        shown = [left_out if text is None else text for text in texts]
        height, width = size
        scalars = {
            "original_height": height,
            "original_width": width,
            "crop_top": 0,
            "crop_left": 0,
            "target_height": height,
            "target_width": width,
        }
        row = [scalars[name] for name in self.config.micro_conditioning]
        return condition(text_encoder, shown, [row] * len(shown) if row else ())

    def sample(self, trained: nn.Module, batch: Batch) -> Tensor:
        """Return one guided picture for each sample prompt. The noise is the same at each call."""
        assert isinstance(trained, Networks)
        prompts = self.sample_prompts or batch[1][:16]
        return self._sampled(trained.unet.bind, trained.text_encoder, prompts, batch)

    def _sampled(self, bind: Bind, text_encoder: TextEncoder, prompts: Sequence[str], batch: Batch) -> Tensor:
        size = self._size(batch[0])
        height, width = (side // self.vae.config.factor for side in size)
        noise = torch.randn(
            len(prompts), self.vae.config.latent_channels, height, width, generator=torch.Generator().manual_seed(0)
        ).to(batch[0].device)
        return self.draw(bind, text_encoder, prompts, noise)

    def draw(self, bind: Bind, text_encoder: TextEncoder, prompts: Sequence[str], noise: Tensor) -> Tensor:
        """Return one guided picture for each prompt, n 3 h w, from noise: n c h/f w/f of unit variance."""
        size = [side * self.vae.config.factor for side in noise.shape[-2:]]
        sigmas = self.schedule.steps(25, "trailing")
        conditions = [self._condition(text_encoder, t, size) for t in (prompts, [None] * len(prompts))]
        network = guided(bind, conditions, classifier_free(self.config.guidance_scale))
        denoise = parametrize(network, self.schedule, self.prediction)
        *_, last = ddim(denoise, to_ve(noise, sigmas[0]), sigmas)
        return self.vae.decode(last.latents)


def _are_moments(images: Tensor) -> bool:
    return images.shape[1] != 3  # an image has 3 channels; moments have 2 for each latent channel


def spread_timesteps(count: int, timesteps: int) -> Tensor:
    """Draw `count` timesteps at equal distances around the circle 0 .. timesteps - 1, from a random start.

    Each one is uniform, and together they cover all noise levels: the loss of a batch varies less (Kingma et al. 2021,
    appendix I.1).
    """
    start = torch.randint(timesteps, ())
    return (start + torch.arange(count) * timesteps // count) % timesteps


def loss_weights(snr: Tensor, prediction: str, gamma: float) -> Tensor:
    """Return the weight of each image's squared error (min-SNR, Hang et al. 2023, eq. 8 and section 3.4).

    The weight of an error in x0 is min(SNR, gamma). The squared error in eps is SNR times the one in x0, and the
    squared error in v is SNR + 1 times the one in x0; their weights are divided by these factors.
    snr: b. gamma 0: all weights are 1.
    """
    if gamma == 0:
        return torch.ones_like(snr)
    divisor = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[prediction]
    return snr.clamp(max=gamma) / divisor


def zero_init(unet: UNet) -> UNet:
    """Set the last weights of every residual branch and of the network to zero, as LDM does before training."""
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
