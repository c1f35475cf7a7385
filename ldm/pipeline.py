"""From a prompt to pictures: the stages of sampling, and the two functions that compose them.

    plan = pipe.plan(request)                       # every choice made: sizes, seeds, noise levels
    conditions = pipe.conditions(plan)              # the encoded prompt, and the negative one for guidance
    denoise = pipe.denoiser(plan, conditions)       # (x, sigma) -> x0
    x = pipe.start(plan)                            # noise, or a picture with noise on it
    for step in pipe.walk(plan, denoise, x): ...    # the sampler, one step at a time
    pictures = pipe.decode(step.latents)

`Pipeline.stream` is this without the last line, and `Pipeline.generate` is all of it. Each stage can be used alone or
replaced.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.conditioning import Condition, condition
from ldm.config import Layout, ModelConfig
from ldm.diffusion.denoiser import Bind, Denoiser, classifier_free, consistency, guided, parametrize, within
from ldm.diffusion.samplers import SAMPLERS, Noise, Sampler, Step, conventions, start
from ldm.diffusion.schedule import NoiseSchedule
from ldm.images import to_pil, to_tensor
from ldm.models.text import TextEncoder
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.placement.memory import Placement
from ldm.request import Plan, Request


class Pipeline:
    """A model, and the stages that turn a `Request` into pictures.

    unet, vae, text_encoder: plain modules, which can be replaced. A wrapper around the UNet needs `bind(condition)`, or
      the UNet's arguments. schedule: the `NoiseSchedule` of the training. config: the `ModelConfig`.
    why: the reason for the configuration and for the UNet's kind of prediction.
    placement: device, precision and memory, as `load` has applied it. The default leaves the networks as they are.
    paths: the file or folder of "unet", "vae" and "text_encoder", if known.

    The stages compute gradients if the inputs or weights require them. `load` makes weights that do not.
    """

    def __init__(
        self,
        config: ModelConfig,
        unet: UNet,
        vae: VAE,
        text_encoder: TextEncoder,
        why: str = "",
        placement: Placement | None = None,
        paths: Mapping[str, Path] | None = None,
    ) -> None:
        self.config, self.why, self.placement = config, why, placement or Placement()
        self.paths = dict(paths or {})
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.schedule = NoiseSchedule.from_config(config.diffusion)
        self._at_work: dict[str, tuple[nn.Module, AbstractContextManager[object]]] = {}

    @torch.no_grad()
    def stream(
        self,
        request: Request,
        *,
        latents: Tensor | None = None,
        sigmas: Tensor | None = None,
        sampler: Sampler | None = None,
    ) -> Iterator[Step]:
        """Encode the prompt, then return an iterator over the denoising steps. The caller may stop at any step.

        latents: the x to start from, b c h w at the first noise level, instead of noise or the request's picture.
        sigmas: own falling noise levels. sampler: an own function, see `ldm.diffusion.samplers`.
        The tensors of a step are fp32: b c h w. `decode` takes `step.latents` of the last step, or `step.x0` of any.
        Raises ValueError for a request that this model cannot follow. The iterator raises FloatingPointError if x is
        not finite: on a CPU at this step, on a GPU at the last step, because each check waits for the device.
        """
        plan = self.plan(request)
        if sigmas is not None:
            plan = dataclasses.replace(plan, sigmas=sigmas)
        conditions = self.conditions(plan)
        x = self.start(plan) if latents is None else latents
        return self._steps(plan, conditions, x, sampler)

    @torch.no_grad()
    def _steps(self, plan: Plan, conditions: list[Condition], x: Tensor, sampler: Sampler | None) -> Iterator[Step]:
        with self.at_work("unet"):
            yield from self.walk(plan, self.denoiser(plan, conditions), x, sampler=sampler)

    def generate(self, request: Request) -> list[Image.Image]:
        """Make the pictures of `request`. Raises ValueError and FloatingPointError as `stream` and `decode` do."""
        *_, last = self.stream(request)
        return self.decode(last.latents)

    def plan(self, request: Request) -> Plan:
        """Make every choice that `request` leaves open.

        Raises ValueError for a request that this model cannot follow.
        """
        if not isinstance(request, Request):
            raise ValueError(f"the request must be an ldm.Request, such as ldm.Request('a frog'), got {request!r}")
        channels, latent_channels = self.config.unet.in_channels, self.config.vae.latent_channels
        if channels != latent_channels:
            raise ValueError(
                f"the UNet of {self.config.name} takes {channels} channels, and a prompt gives {latent_channels}: this "
                "model is for inpainting or editing; use a text-to-image model"
            )
        return request.resolved(self.config, self.schedule)

    def conditions(self, plan: Plan) -> list[Condition]:
        """Encode the texts and sizes: the condition of the prompt, then those that guidance combines with it.

        Each has one row per picture. Guidance needs a second one, for the negative prompt.
        Raises FloatingPointError if they are not finite.
        """
        with self.at_work("text_encoder"):
            encoded = condition(self.text_encoder, plan.texts, plan.scalars, clip_skip=plan.request.clip_skip)
        if not encoded.context.isfinite().all():
            raise self._not_finite("text_encoder")
        if self.config.unet.guidance_dim is not None:
            scales = encoded.context.new_full((len(plan.texts),), plan.guidance_scale - 1, dtype=torch.float32)
            encoded = dataclasses.replace(encoded, guidance=scales)
        return [row.repeat(plan.request.images) for row in encoded.rows()]

    def encode_image(self, image: Image.Image | Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode a picture, or images: b 3 h w in [-1, 1], as latents: b c h/f w/f, fp32.

        noise: b c h/f w/f of unit variance, to sample the VAE's distribution. Without noise: its mode.
        Raises ValueError if a side is not a multiple of f.
        """
        images = to_tensor(image) if isinstance(image, Image.Image) else image
        with self.at_work("vae"):
            distribution = self.placement.encoder()(self.vae, images.to(next(self.vae.parameters())))
            return (distribution.mode() if noise is None else distribution.sample(noise.to(distribution.mean))).float()

    def start(self, plan: Plan) -> Tensor:
        """Make the x to start from, b c h w at the level plan.sigmas[0]: noise, or the request's picture with noise."""
        noise, source = plan.initial_noise(), plan.request.source
        if source is None:
            return start(noise(), plan.sigmas[0], sampler=plan.sampler, spacing=plan.spacing)
        from ldm.geometry import fit  # only image to image needs it

        picture = fit(source.picture, plan.width, plan.height, source.resize)
        latents = self.encode_image(picture, noise())  # the VAE's noise is drawn first, as in diffusers
        return latents + float(plan.sigmas[0]) * noise().to(latents)

    def denoiser(self, plan: Plan, conditions: Sequence[Condition]) -> Denoiser:
        """Make the denoiser (x, sigma) -> x0: the UNet with its conditions, guided as `plan` says."""
        weight, kind = next(self.unet.parameters()), self.config.diffusion.prediction
        bind, batched = self.binding(), self.placement.guidance == "batched"
        rule = classifier_free(plan.guidance_scale, plan.request.guidance_rescale)
        with self.at_work("unet"):
            network = guided(bind, conditions, rule, batched=batched)
            denoise = parametrize(network, self.schedule, kind, dtype=weight.dtype)
            if plan.request.guidance_interval is not None:
                unguided = parametrize(bind(conditions[0]), self.schedule, kind, dtype=weight.dtype)
                denoise = within(plan.guidance_interval, denoise, unguided)
        return consistency(denoise, self.schedule) if conventions(plan.sampler).consistency else denoise

    def walk(
        self, plan: Plan, denoise: Denoiser, x: Tensor, *, noise: Noise | None = None, sampler: Sampler | None = None
    ) -> Iterator[Step]:
        """Run the sampler from x down the noise levels of `plan`.

        noise: draws the sampler's noise (default: `plan.noise`). sampler: an own function instead of the plan's.
        Raises FloatingPointError as `stream` does.
        """
        run, options = sampler or SAMPLERS[plan.sampler], plan.request.sampler_options
        with self.at_work("unet"):
            x = x.to(next(self.unet.parameters()).device)
            finite: list[Tensor] = []
            for step in run(denoise, x, plan.sigmas, noise=noise or plan.noise(), **options):
                finite.append(step.x.isfinite().all())
                if (step.index == step.total - 1 or x.device.type == "cpu") and not finite[-1]:
                    first = [bool(each) for each in finite].index(False)
                    raise self._not_finite("unet", plan=plan, index=first)
                yield step

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Turn clean latents, b c h w, into pictures: `step.latents` of the last step, or `step.x0` of any.

        The pictures are decoded one at a time, so that memory does not grow with their number.
        Raises FloatingPointError for latents or pictures that are not finite, with the known causes.
        """
        if not latents.isfinite().all():
            raise FloatingPointError("the latents hold NaN or Inf, so there is no picture to decode")
        pictures = []
        with self.at_work("vae"):
            for latent in latents.to(next(self.vae.parameters())):
                image = self.placement.decoder()(self.vae, latent[None])
                if not image.isfinite().all():
                    raise self._not_finite("vae", peak=float(latent.abs().max()))
                pictures += to_pil(image)
        return pictures

    def save(
        self,
        path: str | Path,
        *,
        layout: Layout = "diffusers",
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the model; see `ldm.checkpoint.files.save`."""
        from ldm.checkpoint.files import save  # only saving needs it

        save(self, path, layout=layout, dtype=dtype, overwrite=overwrite)

    def at_work(self, name: str) -> AbstractContextManager[object]:
        """Return a context manager in which the network `name` is on the device; it may be entered again inside."""
        network = getattr(self, name)
        if name not in self._at_work or self._at_work[name][0] is not network:
            self._at_work[name] = network, self.placement.at_work(network)
        return self._at_work[name][1]

    def binding(self) -> Bind:
        """Return the function that makes the network of a condition: `unet.bind`, or its recorded form on a GPU."""
        unet = self.unet
        if not hasattr(unet, "bind"):  # a wrapper with the UNet's arguments
            return lambda c: lambda z, timesteps: unet(z, timesteps, c.context, c.vector, None, c.guidance)
        if self.placement.cuda_graph:
            from ldm.placement.graphs import Recorded

            return Recorded(unet).bind
        return unet.bind

    def _not_finite(self, name: str, **known: Any) -> FloatingPointError:
        from ldm.diagnosis import not_finite  # it reads all weights

        return not_finite(self, name, **known)
