"""scripts/campaign.py: each stage between a brief and a sheet of pictures."""

import json
import os
import runpy
import sys
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm.checkpoint.controlnets import save_controlnet
from ldm.pictures import read_texts
from ldm.record import PARTS, recall
from ldm.safety import credentials, watermark
from ldm.strict import from_dict, read_toml
from tests.tiny import random_controlnet

ROOT = Path(__file__).parents[1]
BRIEF = """
[model]
model = "{model}"
[concepts]
prompt = "a {{cat|dog}} {{at night|on the beach|in a box}}"
steps = 1
seed = 5
[refine]
steps = 2
"""


def call(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["campaign.py", "brief.toml", "out", "--device", "cpu", *words])
        return runpy.run_path(str(ROOT / "scripts" / "campaign.py"), run_name="__main__")


@pytest.fixture(scope="module")
def first(model_folder, tmp_path_factory):
    """What the script defines, after a call without --choose in a folder of its own, which is the current one."""
    with chdir(tmp_path_factory.mktemp("campaign")):
        Path("brief.toml").write_text(BRIEF.format(model=model_folder))
        yield call()


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def made_by(path):
    """The prompt and seed of a picture."""
    record = recall(path)
    number = record.picture or 0
    return record.request.prompts[number % len(record.request.prompts)], record.request.seeds[number]


def test_the_groups_of_the_prompt_give_concepts_and_the_most_colorful_one_is_refined(first):
    files = sorted(Path("out/concepts").glob("*.png"))
    assert {made_by(file)[0] for file in files} == {
        f"a {animal} {where}" for animal in ("cat", "dog") for where in ("at night", "on the beach", "in a box")
    }
    best = max(files, key=lambda file: first["colorfulness"](Image.open(file)))
    assert [file.name for file in Path("out/refined").glob("*.png")] == [best.name]
    enlarged = Image.open(f"out/refined/{best.name}").resize((128, 128), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels(f"out/finished/{best.name}"), np.asarray(enlarged))
    sheet = pixels("out/sheet.png")
    assert sheet.shape == (3 * 296, 3 * 272, 3)
    cells = [np.s_[296 * row : 296 * (row + 1), 272 * column : 272 * (column + 1)] for row, column in np.ndindex(3, 3)]
    assert [i for i, cell in enumerate(cells) if np.array_equal(sheet[cell][2, 2], [255, 215, 0])] == [
        files.index(best)
    ]
    assert [i for i, cell in enumerate(cells) if sheet[cell].min() == 255] == [8]  # six concepts and two pictures
    expected = np.asarray(Image.open(best).convert("RGB").resize((256, 256), Image.Resampling.BICUBIC))
    assert np.array_equal(sheet[cells[files.index(best)]][8:264, 8:264], expected)


def test_a_choice_is_refined_under_control_finished_and_signed_and_all_pictures_have_records(
    first, pipe, monkeypatch, capsys
):
    signed = []
    monkeypatch.setattr(credentials, "sign", lambda *names: signed.append(names))
    save_controlnet(random_controlnet(), "net")
    Image.new("RGBA", (20, 10), (255, 0, 0, 255)).save("logo.png")
    brief = Path("brief.toml").read_text() + 'strength = 0.8\ncontrolnet = "net"\n[finish]\nscale = 4.0\n'
    brief += 'logo = "logo.png"\nwatermark = "ours"\ntext = "Hello"\ncertificates = "signer.pem"\nkey = "signer.key"\n'
    Path("brief.toml").write_text(brief)
    number = next(i for i in range(1, 7) if not Path(f"out/refined/concept-{i}.png").exists())
    concept, refined, finished = (f"out/{name}/concept-{number}.png" for name in ("concepts", "refined", "finished"))
    before = os.stat(concept).st_mtime_ns
    call("--choose", str(number))
    assert capsys.readouterr().out == f"{finished}\n"
    assert os.stat(concept).st_mtime_ns == before

    asked = recall(refined).request
    assert (made_by(refined), asked.steps) == (made_by(concept), 2)
    assert (str(asked.source.image), asked.source.strength) == (concept, 0.8)
    assert [(str(control.model), str(control.image)) for control in asked.controls] == [("net", concept)]
    assert np.array_equal(pixels(refined), np.asarray(pipe.generate(asked)[0]))

    assert recall(finished).request == asked
    finish = json.loads(read_texts(finished)["ldm-finish"])
    assert (finish["text"], finish["key"]) == ("Hello", "")
    assert watermark.detect(Image.open(finished), "ours").share == 1
    assert np.abs(pixels(finished)[8, 110] - [255, 0, 0]).max() < 60  # the logo, under the watermark
    assert signed == [(Path(finished), "signer.pem", "signer.key")]


def test_colors_and_text_change_the_picture_where_they_should(first):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))

    def finished(**more):
        return np.asarray(first["finished"](picture, first["Finish"](scale=3.0, **more))).astype(int)

    changed = np.abs(finished(text="Hello") - finished()).max(2) > 0
    assert changed[80:].any()
    assert not changed[:80].any()
    assert np.ptp(finished(saturation=0.0), axis=2).max() == 0
    assert finished(contrast=0.5).std() < 0.6 * finished().std()


def test_colorfulness_is_that_of_its_paper(first):
    assert first["colorfulness"](Image.new("RGB", (4, 4), "gray")) == 0
    assert first["colorfulness"](Image.new("RGB", (4, 4), "red")) == pytest.approx(0.3 * np.hypot(255, 127.5))
    both = Image.new("RGB", (2, 1), "red")
    both.putpixel((1, 0), (0, 255, 0))  # red - green: +-255; (red + green) / 2 - blue: 127.5
    assert first["colorfulness"](both) == pytest.approx(255 + 0.3 * 127.5)


@pytest.mark.parametrize("number", ["0", "7"])
def test_a_choice_that_is_not_there_is_an_error(first, number, capsys):
    with pytest.raises(SystemExit):
        call("--choose", number)
    assert f"--choose must be from 1 to 6, got {number}" in capsys.readouterr().err


def test_the_brief_of_the_repository_is_one_that_the_script_reads(first):
    brief = from_dict(read_toml(ROOT / "configs" / "campaign.toml"), first["Brief"], names=PARTS)
    assert isinstance(brief.concepts, ldm.Request)
    assert brief.finish.watermark


@pytest.mark.slow
def test_the_sheet_of_the_docs_is_what_the_command_beside_it_makes(tmp_path, monkeypatch):
    command = "python scripts/campaign.py configs/campaign.toml campaign "
    monkeypatch.chdir(ROOT)  # the brief names weights/addons/edges
    assert command in (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
    assert (ROOT / "docs" / "campaign.png").stat().st_size <= 400_000
    monkeypatch.setattr(sys, "argv", ["campaign.py", str(ROOT / "configs" / "campaign.toml"), str(tmp_path / "out")])
    runpy.run_path(str(ROOT / "scripts" / "campaign.py"), run_name="__main__")
    shown, made = pixels(ROOT / "docs" / "campaign.png"), pixels(tmp_path / "out" / "sheet.png")
    assert np.abs(shown - made).mean() < 1  # of 255 levels; another processor rounds differently
