"""FID, KID, precision and recall, and CLIP score against their formulas in numpy, and `ldm evaluate --metrics`."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ldm import cli
from ldm.cli.metrics import NAMES
from ldm.models.token_files import save_tokenizer
from ldm.training import metrics
from ldm.training.data import Folder
from ldm.training.kid import kid
from ldm.training.loop import collate
from ldm.training.metrics import MEASURES, clip_score, compare, feature_network, fid, pictures_in, precision_recall
from tests.tiny import byte_tokenizer

CPU = torch.device("cpu")


def two_sets(n=60, m=50, d=6):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 0.5, 2 * rng.normal(size=(m, d))


def root(matrix):
    """The square root of a symmetric matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(np.sqrt(values.clip(min=0))) @ vectors.T


@pytest.mark.slow  # its import takes seconds
def test_fid_is_the_distance_of_two_fitted_normal_distributions():
    pytest.importorskip("torchmetrics")
    made, true = two_sets()
    one, other = np.cov(made.T), np.cov(true.T)
    expected = ((made.mean(0) - true.mean(0)) ** 2).sum() + np.trace(one) + np.trace(other)
    expected -= 2 * np.trace(root(root(one) @ other @ root(one)))  # its trace is that of (one other)^(1/2)
    assert fid(torch.tensor(made), torch.tensor(true)) == pytest.approx(expected, rel=1e-9)


def test_kid_of_features_as_they_are_is_the_papers_estimate_in_blocks():
    made, true = (side[:40] for side in two_sets())

    def mean_kernel(x, y, own):
        values = [(x[i] @ y[j] / 6 + 1) ** 3 for i in range(10) for j in range(10) if not (own and i == j)]
        return np.mean(values)

    blocks = []
    for start in range(0, 40, 10):
        x, y = made[start : start + 10], true[start : start + 10]
        blocks.append(mean_kernel(x, x, True) + mean_kernel(y, y, True) - 2 * mean_kernel(x, y, False))
    found, error = kid(torch.tensor(made), torch.tensor(true), block=10, standardize=False)
    assert found == pytest.approx(np.mean(blocks))
    assert error == pytest.approx(np.std(blocks, ddof=1) / 2)


@pytest.mark.slow  # its import takes seconds
def test_kid_of_a_block_is_that_of_torchmetrics():
    module = pytest.importorskip("torchmetrics.image.kid")
    made, true = (torch.tensor(side[:20]) for side in two_sets())
    theirs = [module.poly_mmd(true[i : i + 10], made[i : i + 10]).item() for i in (0, 10)]
    assert kid(made, true, block=10, standardize=False)[0] == pytest.approx(np.mean(theirs))


@pytest.mark.parametrize("rows", [7, 1024])
def test_precision_and_recall_count_the_points_within_the_reach_of_the_other_set(monkeypatch, rows):
    monkeypatch.setattr(metrics, "ROWS", rows)
    made, true = two_sets()

    def share(points, others):
        count = 0
        for point in points:
            for one in others:
                reach = sorted(np.linalg.norm(others - one, axis=1))[3]  # 0 is the point itself
                if np.linalg.norm(point - one) <= reach:
                    count += 1
                    break
        return count / len(points)

    found = precision_recall(torch.tensor(made), torch.tensor(true))
    assert found == (share(made, true), share(true, made))
    assert 0 < found[0] < 1
    assert found[0] != found[1]


def test_the_measures_see_that_sets_of_one_kind_are_near_and_that_files_are_sorted():
    data = torch.randn(400, 4, generator=torch.Generator().manual_seed(0)) + 3 * torch.arange(400)[:, None] / 400
    same = compare(["kid", "precision_recall"], data[::2], data[1::2])
    far = compare(["kid", "precision_recall"], data[:200], data[200:])
    assert abs(same["kid"]) < 4 * same["kid_error"]
    assert far["kid"] > 5 * far["kid_error"]
    assert same["precision"] > 0.9 > far["precision"]
    again = compare(["kid"], data[::2].flip(0), data[1::2])
    assert abs(again["kid"]) < 4 * again["kid_error"]  # the order of the files does not matter


def test_few_pictures_are_refused():
    with pytest.raises(ValueError, match="two sets of at least 20 pictures can be compared, got 19 and 40"):
        compare(["kid"], torch.zeros(19, 2), torch.zeros(40, 2))


# ------------------------------------------------------------------ the networks


class Inception(nn.Module):
    """Takes uint8 pictures and the option of the published file: the mean of each channel, or two class scores."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert img.dtype == torch.uint8
        assert img.shape[-1] == 299
        features = img.float().mean(dim=(2, 3))
        return features if return_features else features[:, :2]


class Plain(nn.Module):
    def forward(self, img: torch.Tensor) -> torch.Tensor:
        return img.float()[:, :, 0, 0]


def scripted(path, network):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript
        torch.jit.save(torch.jit.script(network), path)
    return path


def test_the_published_network_is_asked_for_its_features_of_scaled_pictures(tmp_path):
    network = feature_network(scripted(tmp_path / "inception.pt", Inception()), CPU)
    picture = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
    picture.save(tmp_path / "a.png")
    found = network([picture, tmp_path / "a.png"])
    expected = np.array(picture.resize((299, 299), Image.Resampling.BICUBIC)).mean((0, 1))
    torch.testing.assert_close(found, torch.tensor(np.array([expected] * 2)).float())
    assert feature_network(scripted(tmp_path / "plain.pt", Plain()), CPU)([picture] * 40).shape == (40, 3)


def test_a_network_that_gives_no_vectors_is_refused(tmp_path):
    network = feature_network(scripted(tmp_path / "image.pt", nn.Identity()), CPU)
    with pytest.raises(ValueError, match=r"a feature network gives b d numbers, this one gives \(1, 3, 299, 299\)"):
        network([Image.new("RGB", (8, 8))])
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(ValueError, match=r"text\.pt is no TorchScript file"):
        feature_network(tmp_path / "text.pt", CPU)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A folder with a small random CLIP model and a tokenizer of bytes."""
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower |= {"projection_dim": 8}
    text = {"vocab_size": 514, "max_position_embeddings": 12, "bos_token_id": 512, "eos_token_id": 513}
    config = transformers.CLIPConfig(
        text_config=tower | text, vision_config=tower | {"image_size": 8, "patch_size": 4}, projection_dim=8
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPModel(config).save_pretrained(folder)
    save_tokenizer(byte_tokenizer(), folder, 12)
    return folder


def pictures(count=6):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(256, size=(10, 12, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.mark.slow  # its import takes seconds
def test_a_folder_of_clip_gives_features_and_the_score_of_pictures_with_captions(clip_folder, monkeypatch, tmp_path):
    from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    monkeypatch.setattr(metrics, "BATCH", 4)
    captions = ["a", "frog", "a red wall that is too long", "", "x y", "cat"]
    vision = CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval()
    words = CLIPTextModelWithProjection.from_pretrained(clip_folder).eval()
    tokenizer, features, scores = byte_tokenizer(), [], []
    for picture, caption in zip(pictures(), captions, strict=True):
        with torch.no_grad():  # one by one, so that nothing is padded
            features.append(vision(metrics.pixels(picture, 8)).image_embeds[0].numpy())
            ids = torch.tensor([[512, *tokenizer.encode(caption)[:10], 513]])
            text = words(ids).text_embeds[0].numpy()
        cosine = features[-1] @ text / np.linalg.norm(features[-1]) / np.linalg.norm(text)
        scores.append(100 * cosine)
    np.testing.assert_allclose(feature_network(clip_folder, CPU)(pictures()), features, atol=1e-5)
    assert min(scores) > 0
    assert clip_score(clip_folder, pictures(), captions, CPU) == pytest.approx(np.mean(scores), abs=1e-3)
    opposite = CLIPModel.from_pretrained(clip_folder)
    opposite.visual_projection.weight.data.neg_()
    opposite.save_pretrained(tmp_path)
    save_tokenizer(byte_tokenizer(), tmp_path, 12)
    assert clip_score(tmp_path, pictures(), captions, CPU) == 0  # a negative cosine counts as 0
    with pytest.raises(ValueError, match="one caption per picture, got 1 for 6 pictures"):
        clip_score(clip_folder, pictures(), ["a"], CPU)


# ------------------------------------------------------------------ the command


@pytest.fixture
def folders(tmp_path):
    """Two folders of pictures: one with captions, one without."""
    for name, shift in (("true", 0), ("made", 60)):
        (tmp_path / name / "more").mkdir(parents=True)
        for i in range(24):
            path = tmp_path / name / ("more" if i % 2 else "") / f"{i}.png"
            Image.new("RGB", (12, 10), (8 * i + shift, 100, 5 * i)).save(path)
            if name == "true":
                path.with_suffix(".txt").write_text(f"wall {i}")
    scripted(tmp_path / "inception.pt", Inception())
    return tmp_path


def evaluate(folders, capsys, words):
    words = words.replace("TMP", str(folders)).split()
    code = cli.main(["evaluate", *words, "--device", "cpu"])
    out, err = capsys.readouterr()
    return json.loads(out) if code == 0 and "--json" in words else (code, out, err)


def test_two_folders_are_compared(folders, capsys):
    network = feature_network(folders / "inception.pt", CPU)
    sides = [network(pictures_in(folders / name)) for name in ("made", "true")]
    words = "--metrics kid precision_recall --pictures TMP/made --reference TMP/true --features TMP/inception.pt"
    found = evaluate(folders, capsys, f"{words} --json")
    expected = compare(["kid", "precision_recall"], *sides)
    assert found == {"pictures": 24, "reference": 24} | expected
    code, out, _ = evaluate(folders, capsys, words)
    assert (code, [line.split()[0] for line in out.splitlines()]) == (0, list(found))


def test_a_model_makes_a_picture_for_each_caption_of_the_reference(folders, model_folder, pipe, capsys, monkeypatch):
    import ldm

    shown = {}

    def score(folder, made, captions, device):
        shown.update(folder=folder, made=made, captions=captions)
        return 21.5

    monkeypatch.setattr(metrics, "clip_score", score)
    words = f"--metrics clip_score --reference TMP/true --clip TMP --model {model_folder} --steps 1 --seed 5 --count 2"
    assert evaluate(folders, capsys, f"{words} --json") == {"pictures": 2, "clip_score": 21.5}
    assert shown["captions"] == ["wall 0", "wall 10"]  # in the order of the file names
    (second,) = pipe.generate(ldm.Request("wall 10", steps=1, seed=6))
    assert np.array_equal(shown["made"][1], second)


def test_the_loss_on_a_folder_is_that_of_the_objective_at_fixed_timesteps(folders, model_folder, pipe, capsys):
    for path in [*(folders / "true").glob("*.png")][2:] + [*(folders / "true" / "more").glob("*.png")]:
        path.unlink()
    found = evaluate(folders, capsys, f"--loss TMP/true --model {model_folder} --json")
    folder = Folder(folders / "true", pipe.config.image_size)
    errors = []
    for i in range(len(folder)):
        images, captions = collate([folder[i]])[:2]
        x0, noise = pipe.vae.encode(images).mean, torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        for j, eps in enumerate(noise):
            t = int((j + 0.5) * 1000 / 8)
            signal = 1 / (1 + pipe.schedule.sigmas[t].item() ** 2)
            noisy = signal**0.5 * x0 + (1 - signal) ** 0.5 * eps
            with torch.no_grad():
                predicted = pipe.unet(noisy, torch.tensor([t]), pipe.text_encoder.encode(captions).context)
            errors.append((predicted[0] - eps).square().mean().item())
    assert found == {"loss": pytest.approx(np.mean(errors), rel=1e-4), "pictures": 2}
    assert evaluate(folders, capsys, f"--loss TMP/true --model {model_folder}")[1].startswith("loss ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("kid --reference TMP/true", "kid need --features and --reference"),
        ("clip_score --pictures TMP/true", "clip_score needs --clip"),
        ("clip_score --clip TMP", "give --pictures to measure a folder, or --reference"),
        ("clip_score --clip TMP --pictures TMP/true --count 3", "--count is the number of pictures that the model"),
        ("clip_score --clip TMP --pictures TMP/made", "24 of 24 pictures in"),  # they have no captions
        ("kid --pictures TMP/no --reference TMP/true --features TMP/inception.pt", "there are no pictures in"),
        ("lpips", "invalid choice: 'lpips'"),
    ],
)
def test_what_is_missing_is_named(folders, capsys, words, message):
    code, _, err = evaluate(folders, capsys, f"--metrics {words}")
    assert code == 2
    assert message in err


def test_the_command_offers_the_measures_of_the_library():
    assert NAMES == MEASURES


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"FID needs torchmetrics, .* pip install 'ldm\[metrics\]'"):
        fid(torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"the CLIP score needs transformers, .* pip install 'ldm\[metrics\]'"):
        clip_score(tmp_path, pictures(1), ["a"], CPU)
