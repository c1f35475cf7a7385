"""docs/training.md is true: its commands, its recipes, its folders and its code."""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image

import ldm
from ldm import cli
from ldm.checkpoint.files import save
from ldm.checkpoint.parts import Model
from ldm.strict import from_dict, read_toml
from ldm.training.data import SUFFIXES, DataConfig, Folder
from ldm.training.diffusion import DiffusionLoss
from ldm.training.loop import LoopConfig
from ldm.training.objects import FLUENT, FONT, OBJECTS, UNSEEN
from ldm.training.recipes import FREE, RECIPES, LDMRecipe
from ldm.training.settings import SPLITTABLE, OptimizerName
from tests.tiny import TINY_SDXL, random_networks

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def blocks(language):
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", TEXT, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 32), "green").save(path)


def test_every_command_is_one_that_the_parser_knows():
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("ldm ")]
    commands += re.findall(r"`(ldm (?:train|evaluate|txt2img) [^`]*)`", TEXT.replace("ldm train RECIPE", ""))
    assert len(commands) > 5
    for command in commands:
        cli._parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize(("base", "block"), [("train_vae", 0), ("train_ldm", 1)])
def test_the_changes_for_own_pictures_fit_the_recipes(tmp_path, base, block):
    (tmp_path / "changes.toml").write_text(blocks("toml")[block])
    table, changes = read_toml(ROOT / "configs" / f"{base}.toml"), read_toml(tmp_path / "changes.toml")
    recipe = from_dict(table | changes, RECIPES[table["recipe"]])
    assert recipe.data.folder == Path("my_pictures")


def test_the_values_that_may_change_are_those_of_the_code():
    listed = TEXT.split("may change before you resume")[1].split("Any other change")[0]
    assert {name.split(".")[-1] for name in FREE} <= set(re.findall(r"`(\w+)`", listed))


def test_the_font_the_archive_and_the_suffixes_are_those_of_the_code():
    assert f"as `{FONT}`" in TEXT
    assert f"writes `{FLUENT}` into the current folder" in TEXT
    package, version = re.search(r"npm pack (\S+)@([\d.]+)\n", TEXT).groups()
    assert f"{package.lstrip('@').replace('/', '-')}-{version}.tgz" == str(FLUENT)
    *others, last = SUFFIXES
    assert f"{', '.join(f'`{suffix}`' for suffix in others)} or `{last}`" in TEXT


def test_the_keys_of_the_data_are_those_of_the_code():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \| ", TEXT.split("all keys of `[data]`")[1], re.MULTILINE))
    fields = {field.name: field.default for field in dataclasses.fields(DataConfig)}
    assert {"size", "folder", "font", "fluent"} <= fields.keys() <= rows.keys()
    for name in fields.keys() - {"folder", "font", "fluent"}:
        assert rows[name] == f"`{json.dumps(fields[name])}`"
    assert f"instead of the {len(OBJECTS)} with names" in TEXT
    assert (len(UNSEEN), "Ten emoji with names are kept out" in TEXT) == (10, True)


def test_the_keys_of_the_loss_are_those_of_the_code():
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \| ", TEXT.split("keys stand under `[loss]`")[1], re.MULTILINE))
    fields = {field.name: json.dumps(field.default) for field in dataclasses.fields(DiffusionLoss)}
    assert rows == fields


def test_the_keys_of_a_fine_tuning_are_those_of_the_code():
    keys = set(re.findall(r"^\| `(\w+)` \| ", TEXT.split("## Fine-tuning")[1].split("### The loss")[0], re.MULTILINE))
    assert keys == {"start", "train", "latents", "texts", "layout"}
    assert keys <= {field.name for field in dataclasses.fields(LDMRecipe)}


def test_the_settings_of_the_loop_are_those_of_the_code():
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \| ", TEXT.split("## Optimizer and average")[1], re.MULTILINE))
    config = LoopConfig(300)
    assert {"optimizer", "betas", "schedule", "ema"} <= rows.keys()
    for name in ("optimizer", "betas", "schedule", "ema"):
        assert json.loads(rows[name]) == json.loads(json.dumps(getattr(config, name)))
    assert all(f'"{name}"' in TEXT for name in get_args(OptimizerName))
    for name in ("fp16", "gradient_checkpointing", "tensorboard"):
        assert f"`{name} = true`" in TEXT
        assert getattr(config, name) is False
    assert config.parallel == "ddp"
    assert all(f"`{name}`" in TEXT.split("(FSDP2)")[1].split("\n")[0] for name in SPLITTABLE)


def test_the_training_in_bfloat16_is_off_by_default_and_fixed_in_a_run():
    assert "`bf16 = true` under `[loop]`" in TEXT
    assert LoopConfig(300).bf16 is False
    assert "loop.bf16" not in FREE


def test_both_folders_of_the_example_are_read(tmp_path):
    (table,) = blocks("text")
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.strip().splitlines()]
    for path, text, caption in rows:
        picture(tmp_path / path)
        (tmp_path / text).write_text(caption)
    by_text = Folder(tmp_path / "my_pictures")
    (tmp_path / "my_pictures" / "metadata.jsonl").write_text(blocks("json")[0])
    by_list = Folder(tmp_path / "my_pictures")
    assert sorted(by_text.items) == sorted(by_list.items)
    assert sorted(caption for _, caption in by_list.items) == sorted(row[2] for row in rows)


@pytest.mark.slow
def test_the_code_trains_a_small_sdxl(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Model(TINY_SDXL, *random_networks(TINY_SDXL)), "my_sdxl")
    for i in range(2):
        picture(tmp_path / "my_pictures" / f"{i}.png")
        (tmp_path / "my_pictures" / f"{i}.txt").write_text(f"wall {i}")
    (code,) = blocks("python")
    code = code.replace("1024", "32").replace("steps=1000", "steps=2, warmup=1")
    names = {}
    exec(compile(code, "docs/training.md", "exec"), names)
    before, after = ldm.load("my_sdxl", ldm.Placement(device="cpu")).unet, names["average"].unet
    assert not torch.equal(after.vector_embed[0].weight, before.vector_embed[0].weight)
    torch.testing.assert_close(after.vector_embed[0].weight, before.vector_embed[0].weight, rtol=0, atol=1e-3)
    (line,) = (tmp_path / "runs" / "xl" / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 2
