"""The command that writes docs/recipes.md."""

import re

import pytest

from tests.recipes import write

SCRIPT = '''"""A paper (Author 2020): what it
shows.

More words.
"""
import sys
from PIL import Image
assert sys.argv[1] == "--out" or add_argument("--out")
Image.new("RGB", (8, 8)).save(sys.argv[2])
print("3 of 4")
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, value in {"ROOT": tmp_path, "FOLDER": tmp_path, "PAGE": tmp_path / "docs" / "recipes.md"}.items():
        monkeypatch.setattr(write, name, value)
    for name in ("first", "second"):
        (tmp_path / f"{name}.py").write_text(SCRIPT)
    (tmp_path / "third.py").write_text('"""A script without a picture."""\n')
    return tmp_path


def test_the_page_has_the_idea_the_command_the_number_and_the_picture_of_each_recipe(folder):
    write.main([])
    page = write.PAGE.read_text()
    parts = write.sections(page)
    assert list(parts) == ["first", "second"]
    for name in parts:
        assert f"A paper (Author 2020): what it shows. [{name}.py](../{name}.py), 10 lines." in parts[name]
        assert f"```bash\npython {name}.py\n```\n\n```text\n3 of 4\n```" in parts[name]
        assert f"](recipes/{name}.png)" in parts[name]
        assert (folder / "docs" / "recipes" / f"{name}.png").is_file()
    write.main([])
    assert write.PAGE.read_text() == page


def test_a_chosen_recipe_changes_only_its_own_part(folder):
    write.main([])
    before = write.sections(write.PAGE.read_text())
    for name in ("first", "second"):
        (folder / f"{name}.py").write_text(SCRIPT.replace("3 of 4", "4 of 4"))
    write.main(["second"])
    after = write.sections(write.PAGE.read_text())
    assert after["first"] == before["first"]
    assert after["second"] == before["second"].replace("3 of 4", "4 of 4")


def test_an_unknown_recipe_is_refused_before_any_runs(folder):
    with pytest.raises(SystemExit, match="recipes with a picture are first, second; got third"):
        write.main(["first", "third"])
    assert not write.PAGE.exists()


def test_every_recipe_with_a_picture_names_its_paper():
    for name in write.names():
        assert len(write.about(name)) > 30, name


def test_the_head_of_the_page_leads_to_every_recipe():
    assert sorted(re.findall(r"\(#(\w+)\)", write.HEAD)) == write.names()


def test_every_picture_of_the_page_is_explained():
    assert sorted(write.SHOWN) == write.names()


@pytest.mark.skipif(not write.PAGE.exists(), reason="docs/recipes.md is not written yet")
def test_the_page_shows_every_recipe_with_its_present_number_of_lines():
    parts = write.sections(write.PAGE.read_text(encoding="utf-8"))
    assert list(parts) == write.names()
    for name, part in parts.items():
        printed = part.split("```text\n")[1].split("\n```")[0]
        assert part.rstrip() == write.section(name, printed).rstrip()
        assert (write.PAGE.with_suffix("") / f"{name}.png").is_file()
