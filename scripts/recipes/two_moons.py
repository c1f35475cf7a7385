"""Diffusion of points in the plane (Ho et al. 2020): the library's training and samplers on a toy that can be drawn.

    python scripts/recipes/two_moons.py

Two moons are arcs with Gaussian noise of standard deviation STD. A network learns v = sqrt(a) noise - sqrt(1 - a) x0,
and samplers follow the field dx/dsigma = (x - x0(x, sigma)) / sigma downward. The plot needs the extra `plots`.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning import timestep_embedding
from ldm.diffusion.denoiser import parametrize
from ldm.diffusion.samplers import SAMPLERS, seeded_noise
from ldm.diffusion.schedule import NoiseSchedule, to_ve
from ldm.training.loop import Batch, LoopConfig, Objective, train

SCHEDULE, STD, ANGLES = NoiseSchedule(), 0.1, torch.linspace(0, torch.pi, 500)
MOONS = torch.stack([ANGLES.cos() - 0.5, ANGLES.sin() - 0.25], dim=1).mul(1.5)  # 500 2, the upper arc
MOONS = torch.cat([MOONS, -MOONS])


def moons(count: int) -> Tensor:
    """Draw points of the data: count 2."""
    return MOONS[torch.randint(len(MOONS), (count,))] + STD * torch.randn(count, 2)


class Velocity(Objective):
    """The squared error of v at random timesteps. A point is a picture of one pixel with two channels: b 2 1 1."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(n, width), nn.SiLU()) for n in (2 + 32, width, width)]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    trained = property(lambda self: self)  # the network is the objective itself

    def predict(self, z: Tensor, timesteps: Tensor) -> Tensor:
        return self.layers(torch.cat([z.flatten(1), timestep_embedding(timesteps, 32)], dim=1)).reshape(z.shape)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x0, noise, t = batch[0], torch.randn_like(batch[0]), torch.randint(len(SCHEDULE), (len(batch[0]),))
        predicted = self.predict(SCHEDULE.add_noise(x0, noise, t), t)
        return (predicted - SCHEDULE.velocity(x0, noise, t)).square().mean(), {}

    def sample(self, batch: Batch) -> Tensor:
        return torch.zeros(1, 3, 8, 8)  # the picture is drawn after the training


def share_near(points: Tensor) -> float:
    """Return the share of points, n 2, within 3 STD of a moon."""
    return float((torch.cdist(points, MOONS).amin(dim=1) < 3 * STD).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a diffusion model of two moons, and draw what it learned.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", default="two_moons.png")
    args = parser.parse_args()
    from matplotlib.figure import Figure  # the functions above work without it

    torch.manual_seed(0)
    config = LoopConfig(args.steps, batch_size=512, learning_rate=2e-2, warmup=args.steps // 50, ema=0.99)
    points = [(point, "") for point in moons(20_000)[..., None, None]]
    with tempfile.TemporaryDirectory() as out:
        field = train(Velocity(), points, config, Path(out), recipe={}).requires_grad_(False)
    denoise, sigmas = parametrize(field.predict, SCHEDULE, "v"), SCHEDULE.steps(25, "karras")
    figure, x = Figure(figsize=(9, 6), layout="constrained"), torch.cartesian_prod(*[torch.linspace(-2.8, 2.8, 21)] * 2)
    above, below = figure.subplots(2, 3, sharex=True, sharey=True, subplot_kw={"aspect": "equal"})
    for axes, sigma in zip(above, (2.0, 0.7, 0.2), strict=True):
        axes.set_title(f"from x to x0 at sigma = {sigma}")
        axes.scatter(*MOONS.T, s=1, color="tab:orange")
        axes.quiver(*x.T, *F.normalize(denoise(x[..., None, None], torch.tensor(sigma)).flatten(1) - x).T)
    for axes, name in zip(below, ("euler", "dpmpp_2m", "euler_ancestral"), strict=True):
        noise = seeded_noise(range(1000), (2, 1, 1))
        *_, last = SAMPLERS[name](denoise, to_ve(noise(), sigmas[0]), sigmas, noise=noise)
        axes.set_title(name)
        axes.scatter(*last.x.flatten(1).T, s=1)
        print(f"{name}: {share_near(last.x.flatten(1)):.1%} of the samples lie within 3 standard deviations of a moon")
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
