"""Diffusion on two-dimensional data: the training loop and the samplers of the library, with the learned field drawn.

A network learns eps by ||eps - eps(z_t, t)||^2 (Ho et al. 2020, eq. 14). Points are the pixels of "images" with two
channels, and 1 x 1 convolutions treat each point alone. Above, each line goes from x, at its dot, to x0, at three noise
levels. Below are samples of three samplers. The numbers are their mean distances from the arcs of the data.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ldm.conditioning import timestep_embedding
from ldm.diffusion.denoiser import parametrize
from ldm.diffusion.samplers import SAMPLERS, seeded_noise
from ldm.diffusion.schedule import NoiseSchedule, to_ve
from ldm.geometry import grid
from ldm.pictures import save_png
from ldm.training.batches import Batch, Example
from ldm.training.loop import Objective, train
from ldm.training.settings import LoopConfig

SCHEDULE = NoiseSchedule()


def arcs(angles: Tensor) -> Tensor:
    """Return the points of the upper and the lower arc at n angles in 0 .. pi, 2 2n."""
    upper = torch.stack([angles.cos() - 0.5, angles.sin() - 0.25])
    return torch.cat([upper, -upper], dim=1)


def moons(count: int) -> list[Example]:
    """Return `count` examples, each with 64 points near the arcs, 2 8 8, and no caption."""
    points = torch.stack([arcs(torch.pi * torch.rand(32)) for _ in range(count)]) + 0.05 * torch.randn(count, 2, 64)
    return [(each.reshape(2, 8, 8), "") for each in points]


class Eps(Objective):  # the network, and its squared error at random timesteps
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(66, 96, 1), nn.SiLU(), nn.Conv2d(96, 96, 1), nn.SiLU(), nn.Conv2d(96, 2, 1))

    trained = property(lambda self: self)  # the network is the objective itself

    def eps(self, z: Tensor, timesteps: Tensor) -> Tensor:
        embedded = timestep_embedding(timesteps, 64)[:, :, None, None].expand(-1, -1, *z.shape[2:])
        return self.net(torch.cat([z, embedded], dim=1))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        noise, t = torch.randn_like(batch[0]), torch.randint(len(SCHEDULE), batch[0].shape[:1])
        return (self.eps(SCHEDULE.add_noise(batch[0], noise, t), t) - noise).square().mean(), {}

    def sample(self, trained: nn.Module, batch: Batch) -> Tensor:
        return batch[0][:1, [0, 0, 1]]  # the picture is drawn after the training


def panel(starts: Tensor, ends: Tensor, side: int = 200) -> Image.Image:
    """Draw dots at `starts`, and lines from there to `ends`: both 1 2 h w. The panel spans -2.5 .. 2.5."""
    image = Image.new("RGB", (side, side), "white")
    for x, y, u, v in (torch.cat([starts, ends], dim=1)[0].flatten(1).T / 5 + 0.5).mul(side).tolist():
        ImageDraw.Draw(image).line([x, side - y, u, side - v], "lightgray")
        ImageDraw.Draw(image).ellipse([x - 1, side - y - 1, x + 1, side - y + 1], "darkblue")
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a diffusion model of two moons, and draw what it learned.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", default="two_moons.png")
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as out:
        model = train(Eps(), moons(2000), LoopConfig(args.steps, learning_rate=3e-3, warmup=10), Path(out), recipe={})
    denoise, noise = parametrize(model.requires_grad_(False).eps, SCHEDULE), seeded_noise([0], (2, 20, 20))
    sigmas, curve = SCHEDULE.steps(40, "exponential"), arcs(torch.linspace(0, torch.pi, 500))
    x = torch.cartesian_prod(*2 * [torch.linspace(-2.4, 2.4, 20)]).T.reshape(1, 2, 20, 20)
    panels = [panel(x, denoise(x, torch.tensor(sigma))) for sigma in (1.0, 0.4, 0.1)]
    for name in ("euler", "dpmpp_2m", "ddpm"):
        *_, last = SAMPLERS[name](denoise, to_ve(noise(), sigmas[0]), sigmas, noise=noise)
        print(f"{name}: {torch.cdist(last.x[0].flatten(1).T, curve.T).min(dim=1).values.mean():.3f}")
        panels.append(panel(last.x, last.x))
    save_png(grid(panels), args.out, overwrite=True)


if __name__ == "__main__":
    main()
