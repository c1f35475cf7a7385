"""From a prompt to pictures: the stages of sampling, and two functions that run all stages.

    plan = pipe.plan(request)                       # all settings, with defaults filled in: sizes, seeds, noise levels
    conditions = pipe.conditions(plan)              # the encoded prompt and, for guidance, the negative prompt
    denoise = pipe.denoiser(plan, conditions)       # a function (x, sigma) -> x0
    x = pipe.start(plan)                            # noise, or an encoded picture plus noise
    for step in pipe.walk(plan, denoise, x): ...    # the sampler, one step at a time
    pictures = pipe.decode(step.latents)            # for inpainting, then plan.request.region.paste(pictures)

`Pipeline.stream` runs all lines but the last, `Pipeline.generate` all lines. Each stage can be used alone or replaced.
"""

import dataclasses
import inspect
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.conditioning import Condition, condition
from ldm.config import Layout, ModelConfig
from ldm.diffusion.denoiser import Bind, Denoiser, classifier_free, guided, parametrize, within
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

    unet, vae, text_encoder: plain modules, which you can replace. Another UNet needs a method `bind(condition)`, or the
      arguments of `UNet.forward`.
    schedule: the noise schedule of the UNet's training. why: how `config` and its prediction type were found.
    placement: device, precision and memory. `load` has applied it to the networks (default: leave them as they are).
    paths: the file or folder of "unet", "vae" and "text_encoder", if known.
    controlnets, adapters: the networks of controls and image prompts by their paths, loaded at their first use.
    loras: the LoRAs in the weights, see `ldm.lora.set_loras`.

    All stages except `decode` support gradients, `encode_image` only with the whole VAE. Weights from `load` do not
    require gradients.
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
        self.controlnets, self.adapters = dict[str, Any](), dict[str, Any]()
        self.loras: Any = None
        self._at_work: dict[str, tuple[nn.Module, AbstractContextManager[object]]] = {}

    @torch.no_grad()
    def stream(
        self,
        request: Request,
        *,
        latents: Tensor | None = None,
        sigmas: Tensor | Sequence[float] | None = None,
        sampler: Sampler | None = None,
    ) -> Generator[Step]:
        """Encode the prompt, then return a generator of the denoising steps. Its `close()` stops and frees the device.

        latents: x at the first noise level, b c h w, to start from instead of noise or the request's picture.
        sigmas: falling noise levels to use instead of the plan's.
        sampler: a function to use instead of the plan's sampler, see `ldm.diffusion.samplers`. `functools.partial` sets
          its options. The plan's sampler still decides the noise levels and the scale of the initial noise.
        The tensors of a step are fp32: b c h w. Pass `step.latents` of the last step, or any `step.x0`, to `decode`.
        Raises ValueError for a request that this model does not support. The iterator raises FloatingPointError if x is
        not finite. A CPU checks each step, a GPU only the last, because a check waits for the GPU.
        """
        plan = self.plan(request)
        if isinstance(sampler, str):
            raise ValueError(f"the sampler must be a function, got {sampler!r}: name a sampler in the request")
        if sigmas is not None:
            plan = dataclasses.replace(plan, sigmas=torch.as_tensor(sigmas, dtype=torch.float64, device="cpu"))
        conditions = self.conditions(plan)
        x = self.start(plan) if latents is None else latents
        if x.shape != (shape := (request.images, *plan.latent_shape)):
            raise ValueError(f"latents of the size and images of this request are {shape}, got {tuple(x.shape)}")
        return self._steps(plan, conditions, x, sampler)

    @torch.no_grad()
    def _steps(self, plan: Plan, conditions: list[Condition], x: Tensor, sampler: Sampler | None) -> Generator[Step]:
        with self.at_work("unet", plan.request.controls):  # so that it is moved once for `denoiser` and `walk`
            yield from self.walk(plan, self.denoiser(plan, conditions), x, sampler=sampler)

    def generate(self, request: Request) -> list[Image.Image]:
        """Make the pictures of `request`. Raises ValueError and FloatingPointError as `stream` and `decode` do."""
        *_, last = self.stream(request)
        pictures = self.decode(last.latents)
        return request.region.paste(pictures) if request.region else pictures

    def plan(self, request: Request) -> Plan:
        """Fill in the model's default for each setting that `request` leaves open.

        Raises ValueError for a request that this model does not support.
        """
        if not isinstance(request, Request):
            raise ValueError(f"the request must be an ldm.Request, such as ldm.Request('a frog'), got {request!r}")
        config, task = self.config, request.task
        plain = config.unet.in_channels == config.vae.latent_channels
        if not (config.edits if task == "edit" else plain or (config.inpaints and task == "inpaint")):
            from ldm.diagnosis import unfit  # only this error needs it

            raise unfit(config, task)
        return request.resolved(config, self.schedule)

    def conditions(self, plan: Plan) -> list[Condition]:
        """Encode the texts and sizes: a condition for the prompt and, with guidance, one for the negative prompt.

        Each condition has one row per picture. If the texts change, the conditions of the phases follow one another.
        Raises FloatingPointError if an encoded text is not finite.
        """
        encoder: Any = self.text_encoder
        if plan.request.emphasis is not None:
            from ldm.prompts import Emphasized  # only prompts with syntax need it

            encoder = Emphasized(encoder, plan.request.emphasis)
        with self.at_work("text_encoder"):
            encoded = condition(encoder, plan.texts, plan.scalars, clip_skip=plan.request.clip_skip)
        if not encoded.context.isfinite().all():
            raise self._not_finite("text_encoder")
        if self.config.unet.guidance_dim is not None:
            scales = encoded.context.new_full((len(plan.texts),), plan.guidance_scale - 1, dtype=torch.float32)
            encoded = dataclasses.replace(encoded, guidance=scales)
        rows = [encoded.map(lambda part, which=which: part[list(which)]) for which in plan.which]  # type: ignore[misc]
        return plan.request.variation.conditions(rows, self, plan) if plan.request.variation else rows

    def encode_image(self, image: Image.Image | Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode a PIL picture, or images: b 3 h w in [-1, 1], as fp32 latents: b c h/f w/f.

        noise: b c h/f w/f of unit variance, to sample from the VAE's distribution (default: return its mode).
        Raises ValueError if a side is not a multiple of f, the VAE's downsampling factor.
        """
        images = to_tensor(image) if isinstance(image, Image.Image) else image
        with self.at_work("vae"):
            distribution = self.placement.encoder()(self.vae, images.to(next(self.vae.parameters())))
            return (distribution.mode() if noise is None else distribution.sample(noise.to(distribution.mean))).float()

    def start(self, plan: Plan) -> Tensor:
        """Return x at the level plan.sigmas[0], b c h w: noise, or the latents of the request's picture plus noise."""
        noise, source = plan.initial_noise(), plan.request.source
        if source is None or (source.from_noise and source.mask is None):
            return start(noise(), plan.sigmas[0], sampler=plan.sampler, spacing=plan.spacing)
        if source.mask is not None:
            from ldm import inpainting

            return inpainting.start(self, plan)
        picture = source.resized(plan.width, plan.height)
        latents = self.encode_image(picture, noise())  # the VAE's noise is drawn first, as in diffusers
        return latents + float(plan.sigmas[0]) * noise().to(latents)

    def denoiser(self, plan: Plan, conditions: Sequence[Condition], bind: Bind | None = None) -> Denoiser:
        """Make the denoiser (x, sigma) -> x0 from the UNet, the conditions and the guidance of `plan`.

        bind: makes the network of a condition (default: `binding()`, with the request's controls and image prompts).
        """
        if plan.request.regions:
            from ldm.regions import regional

            return regional(self, plan, conditions, bind)
        if plan.changes:
            from ldm.phases import in_turn

            return in_turn(lambda own, texts: self.denoiser(own, texts, bind), plan, conditions)
        if bind is None and (plan.request.controls or plan.request.image_prompts):
            from ldm.control import controlled  # only ControlNets and image prompts need it

            return controlled(self, plan, conditions)
        weight, kind = next(self.unet.parameters()), self.config.diffusion.prediction
        conditions = [dataclasses.replace(c, context=c.context.to(weight.dtype)) for c in conditions]
        bind, batched = bind or self.binding(), self.placement.guidance == "batched"
        if plan.request.region:
            from ldm.inpainting import bound, keep

            bind = bound(self, plan, bind)
        rule = classifier_free(plan.guidance_scale, plan.request.guidance_rescale)
        if plan.request.task == "edit":
            from ldm.editing import edit

            conditions, bind, rule = edit(self, plan, conditions, bind)
        with self.at_work("unet"):  # `guided` calls `bind`, which projects the context
            network = guided(bind, conditions, rule, batched=batched)
            denoise = parametrize(network, self.schedule, kind, dtype=weight.dtype)
            if plan.guidance_interval != (0.0, math.inf):
                unguided = parametrize(bind(conditions[0]), self.schedule, kind, dtype=weight.dtype)
                denoise = within(plan.guidance_interval, denoise, unguided)
        if conventions(plan.sampler).consistency:
            from ldm.diffusion.consistency import consistency  # only lcm needs it

            denoise = consistency(denoise, self.schedule)
        return keep(self, plan, denoise) if plan.request.region else denoise

    def walk(
        self, plan: Plan, denoise: Denoiser, x: Tensor, *, noise: Noise | None = None, sampler: Sampler | None = None
    ) -> Iterator[Step]:
        """Run the plan's sampler from x down the plan's noise levels.

        noise: draws the sampler's noise (default: `plan.noise()`). sampler: a function instead of the plan's sampler.
        Raises FloatingPointError as the iterator of `stream` does.
        """
        run, options = sampler or SAMPLERS[plan.sampler], plan.request.sampler_options
        with self.at_work("unet", plan.request.controls):
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
        Raises FloatingPointError for latents or pictures that are not finite; the message names the usual causes.
        """
        if not latents.isfinite().all():
            raise FloatingPointError("the latents hold NaN or Inf, so there is no picture to decode")
        pictures, decode = [], self.placement.decoder()
        with self.at_work("vae"):
            for latent in latents.to(next(self.vae.parameters())):
                image = decode(self.vae, latent[None])
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
        """Save the model to `path`. The arguments are those of `ldm.checkpoint.files.save`."""
        from ldm.checkpoint.files import save  # only saving needs it

        save(self, path, layout=layout, dtype=dtype, overwrite=overwrite)

    def at_work(self, name: str, controls: Sequence[Any] = ()) -> AbstractContextManager[object]:
        """Return the context manager that keeps the network `name` on the device. It can be nested.

        controls: the `ldm.Control`s whose ControlNets to keep there, too.
        """
        if controls:
            from ldm.control import all_at_work

            return all_at_work(self, name, controls)
        network = getattr(self, name)
        if name not in self._at_work or self._at_work[name][0] is not network:
            self._at_work[name] = network, self.placement.at_work(network)
        return self._at_work[name][1]

    def binding(self, unet: Any = None) -> Bind:
        """Return the function (condition) -> network: `unet.bind`, or a version of it that replays CUDA graphs."""
        unet = self.unet if unet is None else unet
        # A replaced UNet may only have the arguments of `UNet.forward`. A module of `torch.compile` also passes on the
        # `bind` of the module inside, which would not call the compiled one.
        if inspect.getattr_static(unet, "bind", None) is None:
            return lambda c: lambda z, timesteps: unet(z, timesteps, c.context, c.vector, None, c.guidance)
        if self.placement.cuda_graph:
            from ldm.placement.graphs import Recorded

            return Recorded(unet).bind
        return unet.bind

    def _not_finite(self, name: str, **known: Any) -> FloatingPointError:
        from ldm.diagnosis import not_finite  # only this error needs it

        return not_finite(self, name, **known)
