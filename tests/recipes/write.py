"""Make docs/recipes.md and its pictures again: `python -m tests.recipes.write [NAME ...]`.

The command runs each script of scripts/recipes that takes `--out`, with its defaults and the bundled model. With names,
it runs only these, and keeps what the page says of the others.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER, PAGE = ROOT / "scripts" / "recipes", ROOT / "docs" / "recipes.md"
HEAD = """# Research recipes

Each recipe is one file of at most 90 lines that implements one paper with the parts of this library. Import its
functions, or run it: the commands below need only the installed package and its bundled model, and made these pictures
and numbers. Those that draw curves need the extra `plots`, too: `pip install -e ".[plots]"`.
`python -m tests.recipes.write` runs all commands and writes this page.
"""


def names() -> list[str]:
    """Return the recipes that make a picture."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if '"--out"' in path.read_text(encoding="utf-8"))


def about(name: str) -> str:
    """Return the first paragraph of a recipe's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8")))
    assert docstring, name
    return " ".join(docstring.split("\n\n")[0].split())


def run(name: str, picture: Path) -> str:
    """Run a recipe, let it write `picture`, and return the lines that it prints. Raises CalledProcessError."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--out", str(picture)]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.rstrip()


def section(name: str, printed: str) -> str:
    """Return the part of the page on one recipe."""
    path = FOLDER / f"{name}.py"
    lines = len(path.read_text(encoding="utf-8").splitlines())
    return f"""## {name}

{about(name)} [{path.relative_to(ROOT)}](../{path.relative_to(ROOT)}), {lines} lines.

```bash
python {path.relative_to(ROOT)}
```

```text
{printed}
```

![The picture of {name}](recipes/{name}.png)
"""


def sections(page: str) -> dict[str, str]:
    """Return the parts of a page by the names of their recipes."""
    return dict(re.findall(r"^(?=## (\w+)\n)(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE))


def main(chosen: list[str]) -> None:
    """Run the chosen recipes, or all, and write the page."""
    if unknown := set(chosen) - set(names()):
        raise SystemExit(f"recipes with a picture are {', '.join(names())}; got {', '.join(sorted(unknown))}")
    found = sections(PAGE.read_text(encoding="utf-8")) if chosen and PAGE.exists() else {}
    pictures = PAGE.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    for name in chosen or names():
        found[name] = section(name, run(name, pictures / f"{name}.png"))
    parts = [found[name].rstrip() + "\n" for name in sorted(found)]
    PAGE.write_text("\n".join([HEAD, *parts]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
