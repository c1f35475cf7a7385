"""The commands of docs/gallery.md are right, and its pictures are there."""

import argparse

import pytest

from ldm import cli
from tests import gallery


def test_every_picture_of_the_gallery_exists_and_is_made_by_a_command():
    text = "".join(text for _, text in gallery.blocks())
    assert gallery.pictures()
    for name in gallery.pictures():
        assert (gallery.ROOT / "docs" / "gallery" / name).is_file(), name
        assert name in text


def test_every_command_of_the_gallery_is_one_that_the_parser_knows(monkeypatch):
    set_defaults, parsed = argparse.ArgumentParser.set_defaults, []

    def set_no_run(parser, **defaults):
        set_defaults(parser, **defaults | {"run": parsed.append})

    monkeypatch.setattr(argparse.ArgumentParser, "set_defaults", set_no_run)
    commands = [
        words for language, text in gallery.blocks() if language != "python" for words in gallery.commands(text)
    ]
    for words in commands:
        assert cli.main(words) == 0, words
    assert len(parsed) == len(commands) > 5


@pytest.mark.slow
def test_the_gallery_can_be_made_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gallery.run(tmp_path)
    for name in gallery.renewed():
        assert (tmp_path / name).is_file()
