"""Classifiers in transformers' files: trained here, saved, loaded by `ldm.classifier`, and used by `ldm batch`."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from ldm import classifier, cli
from ldm.classifier import Classifier
from ldm.pictures import read_picture

WHERE = "in the snow|on the grass"


def scene(seed, where):
    """A picture whose lower half is white or green, with a spot of any color."""
    rng = np.random.default_rng(seed)
    levels = np.full((32, 32, 3), [170, 200, 250]) + rng.integers(-30, 30, 3)
    levels[14:] = np.array({"in the snow": [225, 225, 240], "on the grass": [70, 150, 30]}[where]) + rng.integers(
        -25, 25, 3
    )
    levels[10:22, 10:22] = rng.integers(0, 256, 3)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small vision transformer that tells snow from grass, trained and saved by transformers itself."""
    transformers = pytest.importorskip("transformers")
    names = WHERE.split("|")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).train()
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    pixels = processor([scene(i, names[i % 2]) for i in range(64)], return_tensors="pt")["pixel_values"]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        loss = F.cross_entropy(model(pixels).logits, torch.arange(64) % 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("classifiers") / "ground"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_a_saved_classifier_names_what_it_sees_in_pictures_of_any_size(folder, capfd):
    classify = Classifier(folder)
    for i in range(100, 120):
        for where in WHERE.split("|"):
            assert classify(scene(i, where).resize((50, 40))) == where
    assert capfd.readouterr() == ("", "")  # no progress bar of transformers


def test_what_is_no_whole_classifier_is_an_error(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"google/vit has no config\.json: name a folder"):
        Classifier("google/vit")  # nothing is fetched
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights classifier\.bias: transformers would draw them at random"):
        Classifier(broken)
    (broken / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"broken holds no image classifier of transformers: "):
        Classifier(broken)
    (tmp_path / "config.json").write_text('{"model_type": "clip_text_model"}')
    with pytest.raises(ValueError, match="holds no image classifier of transformers: "):
        Classifier(tmp_path)
    monkeypatch.setattr(classifier, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'ldm\[vision\]'"):
        Classifier(folder)


def test_ldm_batch_reports_what_the_classifiers_of_the_balance_file_say(folder, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(f"a {{cat|dog}} {{{WHERE}}}\na fox\n")
    Path("balance.toml").write_text(f'[classifiers]\n"{WHERE}" = "{folder}"\n')
    words = "batch a.txt out --steps 1 --width 32 --height 32 --balance balance.toml".split()
    code, out, _ = run(*words, "--json")
    report = json.loads(out)["report"]
    assert (code, report["pictures"]) == (0, 5)
    assert report["asked"][WHERE] == {"in the snow": 2, "on the grass": 2}
    answers = Counter(Classifier(folder)(read_picture(path)) for path in Path("out").glob("*.png"))
    assert report["found"] == {WHERE: answers}
    rows = [json.loads(line) for line in Path("out/manifest.jsonl").read_text().splitlines()]
    pairs = Counter(
        (row["choices"]["cat|dog"], Classifier(folder)(read_picture(Path("out") / row["file"])))
        for row in rows
        if "choices" in row
    )
    assert {
        (animal, answer): n
        for animal, others in report["crossed"]["cat|dog"].items()
        for answer, n in others[WHERE].items()
    } == pairs
    assert run(*words)[1].endswith(json.dumps(report, indent=1) + "\n")  # a second call judges the same pictures
    Path("balance.toml").write_text('[classifiers]\nage = "nothing"\n')
    code, _, err = run(*words)
    assert (code, "nothing has no config.json" in err) == (2, True)


@pytest.mark.slow
def test_snow_and_grass_come_out_as_asked_with_the_bundled_model(folder, tmp_path, monkeypatch, capsys):
    """The example of docs/operate.md."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(f"a 3D {{fox|frog}} {{{WHERE}}}\n")
    Path("balance.toml").write_text(f'[classifiers]\n"{WHERE}" = "{folder}"\n')
    assert cli.main("batch a.txt out --steps 10 --device cpu --balance balance.toml --json".split()) == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert report["right"] == {WHERE: 1.0}
    assert report["crossed"]["fox|frog"] == {
        animal: {WHERE: {"in the snow": 1, "on the grass": 1}} for animal in ("fox", "frog")
    }
