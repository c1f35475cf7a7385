"""Make the pictures of docs/gallery.md again: `python -m tests.gallery`.

The command runs all bash and Python blocks of the page in order, in a new folder that holds `weights`. Then it replaces
the pictures in docs/gallery/ by the new ones of the same names. Blocks of the language "sh" need a model that is not
bundled: they are not run, and their pictures stay.
"""

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ldm import cli

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "gallery.md"


def blocks() -> Iterator[tuple[str, str]]:
    """Return the language and the text of each block of code on the page."""
    yield from re.findall(
        r"^```(bash|python|sh)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def commands(text: str) -> list[list[str]]:
    """Return the words of each command in a bash block, without "ldm"."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    assert all(words[0] == "ldm" for words in found if words), text
    return [words[1:] for words in found if words]


def pictures() -> list[str]:
    """Return the names of the pictures that the page shows."""
    return sorted(set(re.findall(r"\bgallery/([\w.-]+\.(?:png|webp))", PAGE.read_text(encoding="utf-8"))))


def renewed() -> list[str]:
    """Return the names of the pictures that the bash and Python blocks make."""
    text = "".join(text for language, text in blocks() if language != "sh")
    return [name for name in pictures() if name in text]


def run(folder: Path) -> None:
    """Run all blocks in `folder`. Raises AssertionError for a command that fails."""
    (folder / "weights").symlink_to(ROOT / "weights")
    os.chdir(folder)
    for language, text in blocks():
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), {})
        elif language == "bash":
            for words in commands(text):
                assert cli.main(words) == 0, words


def main() -> None:
    """Renew the pictures."""
    with tempfile.TemporaryDirectory() as name:
        run(Path(name))
        target = ROOT / "docs" / "gallery"
        target.mkdir(exist_ok=True)
        for picture in renewed():
            shutil.copy(Path(name) / picture, target / picture)


if __name__ == "__main__":
    main()
