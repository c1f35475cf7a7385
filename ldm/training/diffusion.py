"""The latent diffusion objective: predict noise, velocity or clean latents in the latents of a fixed VAE."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning import Condition, condition
from ldm.config import BASE_CONDITIONING, ModelConfig
from ldm.diffusion.denoiser import Bind, Network, classifier_free, guided, parametrize
from ldm.diffusion.samplers import ddim
from ldm.diffusion.schedule import NoiseSchedule, to_ve
from ldm.models.text import TextEncoder
from ldm.models.transformer import SpatialTransformer
from ldm.models.unet import Stage, UNet
from ldm.models.vae import VAE, Gaussian
from ldm.training.draws import for_the_whole_batch
from ldm.training.loop import Batch, Dataset, Objective, collate, extras, to_device

LEVELS = 8  # noise levels at which each kept-out picture is measured


@dataclass(frozen=True)
class DiffusionLoss:
    """The prediction errors and their weights, the noise, and the share of images without caption."""

    caption_dropout: float = 0.1  # share of images trained without caption, for guidance (Ho & Salimans 2022)
    min_snr_gamma: float = 0.0  # see `loss_weights`; 0: no weighting; Hang et al. take 5
    error: Literal["squared", "huber", "pseudo_huber"] = "squared"  # see `pointwise`
    huber_delta: float = 0.1  # errors that are larger count less than their square; the unit is that of the latents
    offset_noise: float = 0.0  # std of a number that is added to the noise of a whole channel (Guttenberg 2023); 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout must be at least 0 and less than 1, got {self.caption_dropout}")
        if not self.min_snr_gamma >= 0:
            raise ValueError(f"min_snr_gamma must be at least 0, got {self.min_snr_gamma}")
        if not self.huber_delta > 0:
            raise ValueError(f"huber_delta must be larger than 0, got {self.huber_delta}")
        if not self.offset_noise >= 0:
            raise ValueError(f"offset_noise must be at least 0, got {self.offset_noise}")


class Networks(nn.Module):
    """A UNet and a text encoder."""

    def __init__(self, unet: UNet, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder


class DiffusionObjective(Objective):
    """Train a UNet and a text encoder in the latents of a fixed VAE (Rombach et al. 2022, eq. 3).

    The batches have images, or the moments of their latents (see `ldm.training.latents`). They may have more tensors:
      "sizes"   b 4, the original height and width and the top and left of the crop, for SDXL; without them, SDXL is
                told that the images are whole pictures
      "mask"    b 1 h w in [0, 1], of the images or of their latents: where the prediction counts
      "context" b n d, and "pooled": b p, the encoded captions, for a text encoder that stays
    Networks stay whose parameters need no gradient.
    """

    def __init__(
        self,
        config: ModelConfig,
        networks: Networks,
        vae: VAE,
        weights: DiffusionLoss,
        *,
        sample_prompts: Sequence[str] = (),
        kept_out: Dataset | None = None,
    ) -> None:
        """Build the noise schedule of `config`.

        sample_prompts: for the sample pictures; none: the captions of the last batch, at most 16.
        kept_out: examples that `validate` measures.
        Raises ValueError for a UNet that takes an aesthetic score (SDXL's refiner) or the guidance scale, and for eps
        with zero terminal SNR.
        """
        super().__init__()
        if "aesthetic_score" in config.micro_conditioning:
            raise ValueError(
                f"the UNet of {config.name} takes an aesthetic score, and training data have none: SDXL's refiner "
                "cannot be trained"
            )
        if config.unet.guidance_dim is not None:
            raise ValueError(
                f"the UNet of {config.name} was distilled with guidance, and training here gives it no guidance scale: "
                "start from the model that it was distilled from"
            )
        if config.diffusion.zero_terminal_snr and config.diffusion.prediction == "eps":
            raise ValueError(
                "with zero_terminal_snr the last timestep is pure noise, and eps tells nothing about the picture there "
                '(Lin et al. 2023, section 3.2): set prediction to "v" or "x0"'
            )
        self.config, self.weights = config, weights
        self.kept_out = kept_out
        self.networks = networks
        self.vae = vae.eval().requires_grad_(False)
        self.prediction = config.diffusion.prediction
        self.schedule = NoiseSchedule.from_config(config.diffusion)
        self.sample_prompts = list(sample_prompts)

    @property
    def trained(self) -> nn.Module:
        """The UNet and the text encoder as `Networks`, or the one of them that is trained."""
        parts = [part for part in (self.networks.unet, self.networks.text_encoder) if learns(part)]
        return parts[0] if len(parts) == 1 else self.networks

    def complete(self, trained: nn.Module) -> Networks:
        """Return both networks, with `trained` in place of those that are trained."""
        if isinstance(trained, UNet):
            return Networks(trained, self.networks.text_encoder)
        if isinstance(trained, TextEncoder):
            return Networks(self.networks.unet, trained)
        assert isinstance(trained, Networks)
        return trained

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean weighted squared error of one batch at random timesteps. The log has it without weights."""
        return self._errors(batch, lambda z, t, c: self.networks.unet(z, t, c.context, c.vector))

    def _errors(
        self, batch: Batch, predict: Callable[[Tensor, Tensor, Condition], Tensor], keep: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the log of a batch. keep: b, whether a caption is shown; None: chosen at random."""
        images, captions, more = batch[0], batch[1], extras(batch)
        with torch.no_grad():
            x0 = self._posterior(images).sample()
        if keep is None:
            keep = torch.rand(len(captions)) >= self.weights.caption_dropout
        shown = [caption if kept else None for caption, kept in zip(captions, keep.tolist(), strict=True)]
        given = self._given(self.networks.text_encoder, shown, images, more)

        t = spread_timesteps(len(images), len(self.schedule)).to(images.device)
        noise = torch.randn_like(x0)
        if self.weights.offset_noise:
            noise = noise + self.weights.offset_noise * torch.randn_like(noise[:, :, :1, :1])
        predicted = predict(self.schedule.add_noise(x0, noise, t), t, given)

        target, mask = self._target(x0, noise, t), more.get("mask")
        errors = mean_error(pointwise(predicted, target, self.weights.error, self.weights.huber_delta), mask)
        weights = loss_weights(self.schedule.snr(t), self.prediction, self.weights.min_snr_gamma)
        squares = mean_error((predicted.detach() - target) ** 2, mask)
        return (weights * errors).mean(), {"mse": squares.mean()}

    @property
    def validates(self) -> bool:
        """Whether pictures are kept out."""
        return self.kept_out is not None

    def validate(self) -> dict[str, Tensor]:
        """Return the mean squared error on the kept-out pictures, each at LEVELS timesteps, as "validation".

        The timesteps, the noise and the latents, which are the means of the VAE's posterior, are always the same.
        """
        assert self.kept_out is not None
        device = next(self.trained.parameters()).device
        t = ((torch.arange(LEVELS, device=device) + 0.5) * len(self.schedule) / LEVELS).long()
        errors = []
        for i in range(len(self.kept_out)):
            batch = to_device(collate([self.kept_out[i]]), device)
            images, captions, more = batch[0], batch[1], extras(batch)
            x0 = self._posterior(images).mode()
            noise = torch.randn(LEVELS, *x0.shape[1:], generator=torch.Generator().manual_seed(i)).to(x0)
            given = self._given(self.networks.text_encoder, captions, images, more)
            given = given.map(lambda row: row.expand(LEVELS, *row.shape[1:]))
            x0 = x0.expand(LEVELS, *x0.shape[1:])
            predicted = self.networks.unet(self.schedule.add_noise(x0, noise, t), t, given.context, given.vector)
            errors.append(mean_error((predicted - self._target(x0, noise, t)) ** 2, more.get("mask")).mean())
        return {"validation": torch.stack(errors).mean()}

    def _posterior(self, images: Tensor) -> Gaussian:
        moments = images.chunk(2, dim=1) if _are_moments(images) else self.vae.encode(images)
        return Gaussian(*(part.contiguous() for part in moments))  # the random numbers depend on the memory format

    def _target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return {"eps": noise, "v": self.schedule.velocity(x0, noise, t), "x0": x0}[self.prediction]

    def _given(
        self, text_encoder: TextEncoder, texts: Sequence[str | None], images: Tensor, more: Mapping[str, Tensor]
    ) -> Condition:
        """Make the condition of each image of a batch. None is a left-out text."""
        encoder = Encoded(text_encoder, more["context"], more.get("pooled")) if "context" in more else text_encoder
        return self._condition(encoder, texts, self._size(images), more.get("sizes"))

    def _size(self, images: Tensor) -> tuple[int, int]:
        """Return the height and width in pixels of images, or of the images that moments belong to."""
        height, width = images.shape[-2:]
        factor = self.vae.config.factor if _are_moments(images) else 1
        return height * factor, width * factor

    def _condition(
        self, text_encoder: Any, texts: Sequence[str | None], size: Sequence[int], sizes: Tensor | None = None
    ) -> Condition:
        """Make the condition of each text as the pipeline does; None is a left-out text.

        size: height and width of the images in pixels. sizes: see the class; None: whole pictures of this size.
        """
        left_out = None if self.config.zero_negative else ""
        shown = [left_out if text is None else text for text in texts]
        names = self.config.micro_conditioning
        originals = [[*size, 0, 0]] * len(shown) if sizes is None else sizes.tolist()
        rows = [dict(zip(BASE_CONDITIONING, [*original, *size], strict=True)) for original in originals]
        return condition(text_encoder, shown, [[row[name] for name in names] for row in rows] if names else ())

    def sample(self, batch: Batch) -> Tensor:
        """Return one guided picture for each sample prompt. The noise is the same at each call."""
        prompts = self.sample_prompts or batch[1][:16]
        return self._sampled(self.networks.unet.bind, self.networks.text_encoder, prompts, batch)

    def _sampled(self, bind: Bind, text_encoder: TextEncoder, prompts: Sequence[str], batch: Batch) -> Tensor:
        return self.draw(bind, text_encoder, prompts, self._noise(len(prompts), batch[0]))

    def _noise(self, count: int, images: Tensor) -> Tensor:
        """Return the noise of `count` sample pictures, as large as `images`. It is the same at each call."""
        height, width = (side // self.vae.config.factor for side in self._size(images))
        shape = count, self.vae.config.latent_channels, height, width
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(images.device)

    def draw(self, bind: Bind, text_encoder: TextEncoder, prompts: Sequence[str], noise: Tensor) -> Tensor:
        """Return one guided picture for each prompt, n 3 h w, from noise: n c h/f w/f of unit variance."""
        size = [side * self.vae.config.factor for side in noise.shape[-2:]]
        conditions = [self._condition(text_encoder, t, size) for t in (prompts, [None] * len(prompts))]
        return self._decoded(guided(bind, conditions, classifier_free(self.config.guidance_scale)), noise)

    def _decoded(self, network: Network, noise: Tensor) -> Tensor:
        """Return the pictures that a guided network makes in 25 steps from noise of unit variance."""
        sigmas = self.schedule.steps(25, "trailing")
        denoise = parametrize(network, self.schedule, self.prediction)
        *_, last = ddim(denoise, to_ve(noise, sigmas[0]), sigmas)
        return self.vae.decode(last.latents)


class Encoded:
    """Captions that were encoded before: it stands for the text encoder in `condition`, for the texts of one batch."""

    def __init__(self, text_encoder: TextEncoder, context: Tensor, pooled: Tensor | None) -> None:
        self.text_encoder, self.rows = text_encoder, Condition(context, pooled)

    def encode(self, texts: list[str], clip_skip: int | None = None) -> Condition:
        """Return the rows of the texts. The empty text, which replaces left-out captions, is encoded now."""
        empty = torch.tensor([not text for text in texts], device=self.rows.context.device)
        if not empty.any():
            return self.rows
        replaced = self.text_encoder.encode([""], clip_skip)
        context = torch.where(empty[:, None, None], replaced.context, self.rows.context)
        if self.rows.vector is None:
            return Condition(context)
        assert replaced.vector is not None
        return Condition(context, torch.where(empty[:, None], replaced.vector, self.rows.vector))


def learns(network: nn.Module) -> bool:
    """Return whether any parameter of a network requires a gradient."""
    return any(parameter.requires_grad for parameter in network.parameters())


def _are_moments(images: Tensor) -> bool:
    return images.shape[1] != 3  # an image has 3 channels; moments have 2 for each latent channel


@for_the_whole_batch
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
    squared error in v is SNR + 1 times. Their weights are divided by these factors.
    snr: b. gamma 0: all weights are 1.
    """
    if gamma == 0:
        return torch.ones_like(snr)
    divisor = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[prediction]
    return snr.clamp(max=gamma) / divisor


def pointwise(predicted: Tensor, target: Tensor, error: str, delta: float) -> Tensor:
    """Return the error of each number. Small errors give their square with every choice of `error`.

    "squared"       e^2, where e = predicted - target
    "huber"         e^2 up to |e| = delta, and delta (2 |e| - delta) beyond it: twice Huber's loss (1964)
    "pseudo_huber"  2 delta (sqrt(e^2 + delta^2) - delta) (Khrapov et al. 2024)
    """
    if error == "huber":
        return 2 * F.huber_loss(predicted, target, reduction="none", delta=delta)
    squared = F.mse_loss(predicted, target, reduction="none")
    return squared if error == "squared" else 2 * delta * ((squared + delta**2).sqrt() - delta)


def mean_error(errors: Tensor, mask: Tensor | None) -> Tensor:
    """Average errors: b c h w over each image, with the weights `mask`: b 1 H W if given, to b.

    The mask is scaled to h w. An image whose mask is 0 everywhere gives 0.
    """
    if mask is None:
        return errors.mean(dim=(1, 2, 3))
    weights = F.interpolate(mask.to(errors), errors.shape[-2:], mode="area")
    total = weights.sum(dim=(1, 2, 3)).clamp(min=1e-6)
    return (errors.mean(dim=1, keepdim=True) * weights).sum(dim=(1, 2, 3)) / total


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
