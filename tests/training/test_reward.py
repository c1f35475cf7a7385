"""The policy gradient by a reward: paths, probabilities and advantages by the formulas, and a reward that rises."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import ldm
from ldm.checkpoint.parts import Model
from ldm.config import DiffusionConfig
from ldm.diffusion.samplers import ddpm
from ldm.images import to_tensor
from ldm.training.adapters import LoraConfig
from ldm.training.checker import Checker
from ldm.training.data import DataConfig
from ldm.training.recipes import read_recipe
from ldm.training.reward import Prompts, RewardLoss, RewardObjective, SceneReward, advantages, clipped, score
from ldm.training.scenes import Scene, Scenes
from tests.tiny import TINY_RANDOM, random_networks
from tests.training.drawn import drawn_sprites

PROMPTS = ["a frog", "an apple"]
BATCH = torch.tensor([[4], [7]]), PROMPTS


def redness(pictures, indices):
    """A reward that any model can get: how much of the pictures is red."""
    return torch.tensor([float((to_tensor(p)[0, 0] - to_tensor(p)[0, 1:].mean(0)).mean()) for p in pictures])


def objective(reward=redness, **loss):
    model = Model(TINY_RANDOM, *random_networks())
    given = {"pictures": 4, "sampling_steps": 4, "updates": 2, "guidance_scale": 2.0, **loss}
    return RewardObjective(model, model.unet, reward, RewardLoss(**given))


def test_pictures_are_drawn_as_by_the_sampler_ddpm_and_their_probabilities_are_normal():
    o = objective()
    torch.manual_seed(1)
    drawn = o.collect([4, 7], PROMPTS)
    assert drawn["prompts"] == ["a frog"] * 4 + ["an apple"] * 4
    torch.manual_seed(1)
    x = torch.randn(8, 4, 8, 8) * (1 + o.sigmas[0] ** 2).sqrt().float()
    denoise = o.denoiser(drawn["prompts"])
    with torch.no_grad():
        steps = list(ddpm(denoise, x, o.sigmas, noise=lambda: torch.randn(8, 4, 8, 8)))
    for point, step in zip(drawn["points"][1:], steps[:3], strict=True):
        torch.testing.assert_close(point, step.x, rtol=1e-5, atol=1e-5)

    levels = o.sigmas.tolist()
    for i in range(3):  # the posterior of Ho et al. 2020, eq. 7, in sigma space
        high, low = levels[i], levels[i + 1]
        points, keep = drawn["points"], (low / high) ** 2
        normal = torch.distributions.Normal(keep * points[i] + (1 - keep) * steps[i].x0, low * math.sqrt(1 - keep))
        logs = normal.log_prob(points[i + 1])
        constant = -math.log(low * math.sqrt(1 - keep) * math.sqrt(2 * math.pi))
        expected = (logs - constant).flatten(1).mean(1)
        torch.testing.assert_close(drawn["log_p"][i], expected, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            again = o.log_p(denoise, points[i], points[i + 1], i)
        torch.testing.assert_close(again, drawn["log_p"][i], rtol=1e-5, atol=1e-5)


def test_the_first_update_is_the_policy_gradient_and_all_steps_but_the_last_are_trained_once():
    o = objective()
    torch.manual_seed(1)
    drawn = o.collect([4, 7], PROMPTS)
    shares = [list(share) for share in drawn["shares"]]
    assert sorted(i for share in shares for i in share) == [0, 1, 2]
    torch.manual_seed(1)
    loss, logs = o(BATCH)
    torch.testing.assert_close(loss, -drawn["advantages"].mean(), rtol=0, atol=1e-5)  # all ratios are 1
    assert logs["reward"] == drawn["reward"].mean()
    loss.backward()
    found = o.learned.conv_out.weight.grad.clone()
    o.learned.zero_grad()
    denoise, points = o.denoiser(drawn["prompts"]), drawn["points"]
    total = sum((o.log_p(denoise, points[i], points[i + 1], i) * drawn["advantages"]).mean() for i in shares[0])
    (-total / len(shares[0])).backward()  # REINFORCE
    torch.testing.assert_close(found, o.learned.conv_out.weight.grad, rtol=1e-4, atol=1e-6)

    old, o.reward = o.drawn, None  # the second update draws nothing
    o(BATCH)
    assert o.drawn is old
    o.reward = redness
    o(BATCH)
    assert o.drawn is not old


def test_the_ratio_is_clipped_where_the_advantage_would_push_it_further():
    ratio = torch.tensor([1.2, 1.2, 0.8, 0.8], requires_grad=True)
    loss = clipped(ratio, torch.tensor([2.0, -2.0, 2.0, -2.0]), 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.1 * 2 - 1.2 * 2 + 0.8 * 2 - 0.9 * 2) / 4)
    assert ratio.grad.tolist() == [0.0, 0.5, -0.5, 0.0]


def test_pictures_of_one_prompt_are_compared_with_each_other():
    found = advantages(torch.tensor([1.0, 0.0, 0.5, 0.5, 9.0, 9.0, 9.0, 9.0]), 4, 5.0)
    deviation = torch.tensor([1.0, 0.0, 0.5, 0.5]).std()
    torch.testing.assert_close(found[:4], torch.tensor([0.5, -0.5, 0.0, 0.0]) / deviation, rtol=1e-3, atol=0)
    assert not found[4:].any()
    assert advantages(torch.tensor([1.0, *[0.0] * 99]), 100, 5.0).max() == 5


class Linear(nn.Module):
    """Stands for a UNet: v is a linear map of each latent pixel, at first 0."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def bind(self, condition):
        return lambda z, timesteps: self.conv(z)


def test_the_reward_of_the_same_noise_rises():
    config = dataclasses.replace(TINY_RANDOM, diffusion=DiffusionConfig(prediction="v"))
    _, vae, text_encoder = random_networks()
    model = Model(config, Linear(), vae, text_encoder)
    o = RewardObjective(model, model.unet, redness, RewardLoss(pictures=128, sampling_steps=5, updates=2))
    vae.decode = lambda latents: latents[:, :3] / 3

    def mean():
        torch.manual_seed(99)
        return o.collect([4], PROMPTS[:1])["reward"].mean().item()

    before, optimizer = mean(), torch.optim.Adam(o.learned.parameters(), lr=0.02)
    for step in range(20):
        torch.manual_seed(step)
        loss, _ = o((BATCH[0][:1], PROMPTS[:1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = mean()
    print(before, after)
    assert after > before + 0.05


def test_the_style_counts_only_if_the_caption_names_one():
    verdict = {"ground": True, "object": True, "style": False, "size": True, "place": False}
    assert score(Scene(("apple",), "grass", "3D"), verdict) == 3 / 5
    assert score(Scene(("apple",), "grass"), verdict) == 3 / 4


@pytest.mark.slow
def test_true_pictures_get_a_high_reward_and_those_of_other_captions_a_low_one():
    scenes = Scenes(drawn_sprites(), 64)
    reward, prompts = SceneReward(scenes, Checker(drawn_sprites())), Prompts(scenes)
    pictures = [ldm.images.to_pil(scenes[i][0][None] / 127.5 - 1)[0] for i in range(12)]
    assert prompts[3][0].tolist() == [3]
    assert prompts[3][1] == scenes[3][1]
    right, wrong = reward(pictures, range(12)), reward(pictures, [(i + 1) % 12 for i in range(12)])
    print(right, wrong)
    assert right.mean() > 0.9
    assert wrong.mean() < 0.5


TOML = """
recipe = "reward"
out = "{out}/run"
model = "{model}"
sample_prompts = ["a frog"]
[data]
size = 32
[loss]
pictures = 2
sampling_steps = 4
updates = 3
[loop]
steps = 5
batch_size = 2
warmup = 0
checkpoint_every = 2
"""


class Fewer(SceneReward):
    """Rewards without the checker, which takes a second to build."""

    def __call__(self, pictures, indices):
        return redness(pictures, indices)


@pytest.fixture
def recipe(tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(DataConfig, "open", lambda self: Scenes(drawn_sprites(), self.size))
    monkeypatch.setattr("ldm.training.recipes.reward.Checker", lambda sprites: None)
    monkeypatch.setattr("ldm.training.recipes.reward.SceneReward", Fewer)
    (tmp_path / "recipe.toml").write_text(TOML.format(out=tmp_path, model=model_folder))
    return read_recipe(tmp_path / "recipe.toml")


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_pictures_it_had_drawn_bit_for_bit(recipe, model_folder, tmp_path, monkeypatch):
    def weights():
        folder = recipe.run(torch.device("cpu"))
        return (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()

    calls, forward = [], RewardObjective.forward

    def killed(self, batch):
        calls.append(bool(self.drawn))
        if len(calls) == 4:
            raise RuntimeError("killed")
        return forward(self, batch)

    whole = weights()
    (tmp_path / "run").rename(tmp_path / "whole")
    monkeypatch.setattr(RewardObjective, "forward", killed)
    with pytest.raises(RuntimeError, match="killed"):
        weights()
    assert weights() == whole
    assert calls == [False, True, True, True, True, True, True]
    before = ldm.load(model_folder, ldm.Placement("cpu")).unet.conv_out.weight
    after = ldm.load(tmp_path / "run" / "model", ldm.Placement("cpu"))
    assert (after.unet.conv_out.weight - before).abs().max() > 0
    assert after.config.sampler == "dpmpp_2m"  # as before: the model is no student

    file = dataclasses.replace(recipe, out=tmp_path / "lora", lora=LoraConfig(rank=2)).run(torch.device("cpu"))
    (applied,) = ldm.load(model_folder, ldm.Placement("cpu"), loras=[file]).loras.applied
    assert applied.applied == applied.total > 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pictures": 1}, "pictures must be at least 2 for each prompt, got 1"),
        ({"updates": 10}, "updates must be at least 1 and less than sampling_steps = 10, got 10"),
        ({"guidance_scale": -1.0}, "guidance_scale must be at least 0, got -1.0"),
        ({"clip": 0.0}, "clip must be above 0, got 0.0"),
        ({"largest_advantage": 0.0}, "largest_advantage must be above 0, got 0.0"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        RewardLoss(**given)


def test_pictures_of_a_folder_have_no_checker(tmp_path, model_folder):
    picture = tmp_path / "a.png"
    ldm.images.to_pil(torch.zeros(1, 3, 32, 32))[0].save(picture)
    picture.with_suffix(".txt").write_text("a wall")
    text = TOML.replace("size = 32", 'size = 32\nfolder = "{out}"')
    (tmp_path / "recipe.toml").write_text(text.format(out=tmp_path, model=model_folder))
    with pytest.raises(ValueError, match="the checker knows emoji scenes only: omit folder = "):
        read_recipe(tmp_path / "recipe.toml").run(torch.device("cpu"))
