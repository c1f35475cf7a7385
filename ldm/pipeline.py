"""From a prompt to pictures: the loop that makes what a `Request` asks for."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint import files
from ldm.conditioning import timestep_embedding
from ldm.config import ModelConfig, Prediction
from ldm.diagnosis import not_finite
from ldm.diffusion.denoiser import Denoiser, consistency, guided, parametrise, within
from ldm.diffusion.samplers import SAMPLERS, Noise, Step, seeded_noise, start
from ldm.diffusion.schedule import NoiseSchedule, to_vp
from ldm.images import to_pil
from ldm.models.text import TextEncoder
from ldm.models.transformer import Context
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.placement.graphs import Graphs
from ldm.placement.memory import DECODE, Placement, find_device
from ldm.request import Request

BUNDLED = "weights/tiny"
Condition = tuple[Tensor, ...]  # what follows the timesteps in a call of the UNet
Conditions = tuple[Condition, Condition | None]  # with the prompt, and without it


class Pipeline:
    """A model with everything around it that turns a `Request` into pictures.

    unet, vae, text_encoder: plain modules. schedule: the `NoiseSchedule` they were trained on. config: `ModelConfig`.
    why: the reason for the configuration and for what the UNet predicts.
    placement: as `load` has applied it to the networks; the default leaves them where they are.
    paths: the file or folder that each of "unet", "vae" and "text_encoder" came from, as far as that is known.
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
        networks = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
        self._at_work = {name: self.placement.at_work(part) for name, part in networks.items()}
        self._graphs: Graphs | None = None
        process = config.diffusion
        self.schedule = NoiseSchedule(
            betas=process.betas,
            beta_start=process.beta_start,
            beta_end=process.beta_end,
            timesteps=process.timesteps,
            zero_terminal_snr=process.zero_terminal_snr,
        )

    @torch.no_grad()
    def stream(self, request: Request) -> Iterator[Step]:
        """Encode the prompt, then return an iterator over the denoising steps; leave it at any time.

        A step's x is x0 + sigma noise, and its x0 the current estimate; both are latents, fp32: b c h w. Of the last
        step, x are the finished latents that `decode` takes.
        Raises ValueError for a request that this model cannot follow. The iterator raises FloatingPointError where x
        is no longer finite: on a CPU at that step, elsewhere at the last one, because each look waits for the device.
        """
        if not isinstance(request, Request):
            raise ValueError(f"the request must be an ldm.Request, such as ldm.Request('a frog'), got {request!r}")
        request = request.resolved(self.config)
        channels, latent_channels = self.config.unet.in_channels, self.config.vae.latent_channels
        if channels != latent_channels:
            raise ValueError(
                f"the UNet of {self.config.name} takes {channels} channels, of which a prompt gives {latent_channels}: "
                "it is made for inpainting or editing; use a text-to-image model"
            )
        assert request.steps is not None  # as those below: resolved fills them in
        assert request.sampler is not None
        assert request.spacing is not None
        assert request.width is not None
        assert request.height is not None
        with self._at_work["text_encoder"]:
            conditions = self._conditions(request)

        # CompVis' DDIM, and every scheduler config published since, ends at the first timestep, not at zero noise.
        final: Literal["zero", "first"] = "first" if request.sampler == "ddim" else "zero"
        offset = self.config.diffusion.offset
        sigmas = self.schedule.steps(request.steps, request.spacing, offset=offset, final=final)

        factor = self.config.vae.factor
        shape = (latent_channels, request.height // factor, request.width // factor)
        noise = seeded_noise(request.seeds, shape)
        x = start(noise(), sigmas[0], sampler=request.sampler, spacing=request.spacing)
        return self._walk(request, conditions, x, sigmas, noise)

    def generate(self, request: Request) -> list[Image.Image]:
        """Make the pictures that `request` asks for.

        Raises ValueError and FloatingPointError as `stream` and `decode` do.
        """
        for step in self.stream(request):
            latents = step.x
        return self.decode(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Turn clean latents, b c h w, into pictures: the x of the last step, or the x0 of any.

        One picture at a time, so that memory does not grow with their number.
        Raises FloatingPointError for latents or pictures with numbers that are not finite, and says what is known of
        the reason.
        """
        if not latents.isfinite().all():
            raise FloatingPointError("the latents hold NaN or Inf, of which no picture can be made")
        pictures = []
        with self._at_work["vae"]:
            for latent in latents.to(next(self.vae.parameters())):
                image = DECODE[self.placement.vae_memory](self.vae, latent[None])
                if not image.isfinite().all():
                    peak = float(latent.abs().max())
                    causes = f"latents that reach {peak:.3g}, where 5 is usual, or a VAE of another kind of model"
                    raise not_finite("vae", self.vae, self.paths.get("vae"), causes=causes)
                pictures += to_pil(image)
        return pictures

    @torch.no_grad()
    def _walk(
        self, request: Request, conditions: Conditions, x: Tensor, sigmas: Tensor, noise: Noise
    ) -> Iterator[Step]:
        """The steps from x down the sigmas; the UNet is on the device until the last, or until the caller leaves.

        The last one's x is scaled from noise level sigma (0, but for DDIM) to the latents it stands for.
        """
        assert request.sampler is not None
        with self._at_work["unet"]:
            denoise = self._denoiser(request, *conditions)
            x = x.to(next(self.unet.parameters()).device)
            finite: list[Tensor] = []
            for step in SAMPLERS[request.sampler](denoise, x, sigmas, noise=noise):
                last = step.index == step.total - 1
                finite.append(step.x.isfinite().all())
                if (last or x.device.type == "cpu") and not finite[-1]:
                    first = [bool(each) for each in finite].index(False)
                    raise self._diverged(request, conditions, first, float(sigmas[first]))
                yield dataclasses.replace(step, x=to_vp(step.x, step.sigma)) if last else step

    def _denoiser(self, request: Request, cond: Condition, uncond: Condition | None) -> Denoiser:
        """The UNet, guided as `request` says."""
        assert request.guidance_scale is not None
        weight = next(self.unet.parameters())
        network = self._network(weight.device)
        predict = guided(
            self._told(network, request),
            cond,
            uncond,
            1.0 if uncond is None else request.guidance_scale,
            rescale=request.guidance_rescale,
            batched=self.placement.guidance == "batched",
            prepare=network.prepare,
        )
        kind, dtype = self.config.diffusion.prediction, weight.dtype
        denoise = parametrise(predict, self.schedule, kind, dtype=dtype)
        if request.guidance_interval is not None:
            predict = guided(network, cond, None, 1.0, prepare=network.prepare)
            unguided = parametrise(predict, self.schedule, kind, dtype=dtype)
            denoise = within(request.guidance_interval, denoise, unguided)
        return consistency(denoise, self.schedule) if request.sampler == "lcm" else denoise

    def _told(self, network: UNet | Graphs, request: Request) -> Callable[..., Tensor]:
        """`network`, told the guidance scale if it was distilled with it: one call then stands for guidance's two."""
        if self.config.unet.guidance_dim is None:
            return network
        assert request.guidance_scale is not None
        device = next(self.unet.parameters()).device
        guidance = torch.full((request.images,), request.guidance_scale - 1, device=device)

        def told(z: Tensor, timesteps: Tensor, context: Context, vector: Tensor | None = None) -> Tensor:
            return network(z, timesteps, context, vector, None, guidance)

        return told

    def _network(self, device: torch.device) -> UNet | Graphs:
        """The UNet, or its recorded calls, where it stays on a CUDA device and is no wrapper around one."""
        stays = self.placement.offload is None and device.type == "cuda"
        if not (stays and self.placement.cuda_graph and type(self.unet) is UNet):
            return self.unet
        if self._graphs is None or self._graphs.unet is not self.unet:
            self._graphs = Graphs(self.unet)
        return self._graphs

    def _conditions(self, request: Request) -> Conditions:
        """What follows the timesteps in a call of the UNet: with the prompt, and without it where guidance needs that.

        Both are a context, b n d, and for a model that takes one a vector, b p.
        """
        assert request.guidance_scale is not None
        texts = [request.prompt]
        if request.guidance_scale > 1 and self.config.unet.guidance_dim is None:
            texts.append(request.negative_prompt or "")
        outputs = self.text_encoder.encode(texts, request.clip_skip)
        encoded = [part for part in (outputs.context, outputs.vector) if part is not None]
        if request.negative_prompt is None:  # zeros, not the empty text
            for part in encoded:
                part[1:] = 0
        if self.config.micro_conditioning:
            scalars = torch.tensor(request.scalars(self.config)[: len(texts)])  # b n
            embedded = timestep_embedding(scalars.flatten(), 256).to(encoded[1])  # (b n) 256
            encoded[1] = torch.cat([encoded[1], embedded.reshape(len(texts), -1)], dim=1)
        repeated = [part.repeat_interleave(request.images, dim=0) for part in encoded]
        cond, *uncond = zip(*(part.chunk(len(texts)) for part in repeated), strict=True)
        return cond, uncond[0] if uncond else None

    def _diverged(self, request: Request, conditions: Conditions, index: int, sigma: float) -> FloatingPointError:
        """The error of a picture that is not finite from the step `index` on, which starts at noise level `sigma`."""
        encoded = [part for condition in conditions for part in condition or ()]
        if not all(part.isfinite().all() for part in encoded):
            part, file = "text_encoder", self.paths.get("text_encoder")
            return not_finite(part, self.text_encoder, file, causes="damaged numbers in its file")
        where = f" at step {index + 1} of {request.steps}, from noise level {sigma:.3g}"
        kind = self.config.diffusion.prediction
        causes = f"a UNet that does not predict {kind} (see `prediction`), or parts of different models"
        if conditions[1] is not None:
            causes = f"too strong a guidance (guidance_scale {request.guidance_scale:g}), {causes}"
        return not_finite("unet", self.unet, self.paths.get("unet"), causes=causes, where=where)


def load(
    path: str | Path = BUNDLED,
    placement: Placement | None = None,
    *,
    prediction: Prediction | None = None,
    ema: bool = False,
    vae: str | Path | None = None,
    unet: str | Path | None = None,
    text_encoder: str | Path | None = None,
) -> Pipeline:
    """Load a model: a folder of ours or of diffusers, or a single .safetensors file of the official layout.

    path: by default the small model that ships with the package, wherever that is installed.
    placement: device, precision and memory, see `Placement`.
    prediction: what its UNet predicts, where the file does not say it or is wrong.
    ema: take the averaged copy of the UNet that a full single file holds.
    vae, unet, text_encoder: a file or folder to take that part from instead, or that `path` lacks.
    Raises ValueError for a model that is absent, damaged or not supported, for parts that do not fit together, and for
    a placement that cannot be used.
    """
    if placement is not None and not isinstance(placement, Placement):
        raise ValueError(
            f"the placement must be an ldm.Placement, such as ldm.Placement(device='cuda'), got {placement!r}"
        )
    placement = (placement or Placement()).resolve()
    parts = {"vae": vae, "unet": unet, "text_encoder": text_encoder}
    paths = {name: locate(path if part is None else part) for name, part in parts.items()}
    replace = {name: paths[name] for name, part in parts.items() if part is not None}
    found = files.identify(locate(path), prediction=prediction, ema=ema, replace=replace)
    placement = placement.resolve(found.config)
    model = files.read(
        found,
        dtype=placement.dtype,
        vae_dtype=placement.vae_dtype,
        device="cpu" if placement.offload else find_device(placement.device),
    )
    networks = model.unet, model.vae, model.text_encoder
    placement.apply(*networks)
    return Pipeline(model.config, *networks, model.why, placement, paths)


def locate(path: str | Path) -> Path:
    """Return `path`, or where the bundled model is if `path` is its name and nothing here has that name.

    Raises ValueError for what is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"a model's path must be a str or a pathlib.Path, got {path!r}")
    if Path(path) == Path(BUNDLED) and not Path(path).exists():
        package = Path(__file__).parent
        for root in (package.parent, package):  # the repository; the installed package
            if (root / BUNDLED).is_dir():
                return root / BUNDLED
    return Path(path)
