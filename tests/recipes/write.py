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

- Inversion: [inversion](#inversion), [null_text](#null_text)
- Likelihood: [likelihood](#likelihood), [diffusion_classifier](#diffusion_classifier)
- Score distillation: [sds](#sds), [dds](#dds)
- Guidance by gradients: [dps](#dps), [universal_guidance](#universal_guidance)
- Attention: [daam](#daam), [prompt_to_prompt](#prompt_to_prompt), [attend_and_excite](#attend_and_excite),
  [style_aligned](#style_aligned)
- Features: [dift](#dift), [linear_probe](#linear_probe)
- Editing: [semantic_guidance](#semantic_guidance), [diffedit](#diffedit); SDEdit (Meng et al. 2022) is image to image,
  [scripts/img2img.py](../scripts/img2img.py)
- Composition: [compose](#compose), [panorama](#panorama), [tileable](#tileable); prompts for regions are
  [scripts/regions.py](../scripts/regions.py)
- Unlearning: [uce](#uce), [esd](#esd)
- Understanding: [sampler_orders](#sampler_orders), [prompt_swap](#prompt_swap), [guidance_curves](#guidance_curves),
  [two_moons](#two_moons)

Variational score distillation (ProlificDreamer, Wang et al. 2023) was tried and left out. After 60 steps its fox had
more detail than a sample: neighboring pixels differed by 4.9 of 255 levels, by 4.2 in a sample and by 2.4 with score
distillation. But its ears were too long and a second muzzle appeared below, where score distillation drew a clean
fox.
"""


SHOWN = {  # what a picture has in its rows
    "attend_and_excite": "Above: 'a 3D frog to the left of a 3D car' and seven more. Below: with Attend-and-Excite.",
    "compose": "A frog AND a red background; the same with NOT a red background.",
    "daam": "The picture, the map of the frog, and the map of the car.",
    "dds": "A frog, and its edit to a cat.",
    "diffedit": "The picture, the mask from both prompts, and the edit.",
    "diffusion_classifier": "The pictures that were named.",
    "dift": "One frog in two places on two grounds. Its points in the first scene are found in the second.",
    "dps": "The picture, what was measured of it, and what is restored from the measurement.",
    "esd": "Left: the original. Right: the fine-tuned model. Above: the erased object. Below: another object.",
    "guidance_curves": "Agreement with the prompt, saturation and contrast over the guidance scale.",
    "inversion": "DDIM, fixed point, edit-friendly. Above: the inverted picture again. Below: another prompt.",
    "likelihood": "The path of the ODE from the picture to noise.",
    "linear_probe": "Objects in their true boxes (white) and in the boxes that the probe reads (red).",
    "null_text": "The picture; guided sampling from its inversion; with null-text optimization; with another prompt.",
    "panorama": "One prompt, in windows that overlap.",
    "prompt_swap": "What follows the second prompt, over the level of the swap. Below: one pair at these levels.",
    "prompt_to_prompt": "A fox, its edit to a cat, and the cat without control.",
    "sampler_orders": "Errors for Gaussians (ddim is euler, ddpm is euler_ancestral) and the model; x0 along a run.",
    "sds": "The disc at first, and the disc that score distillation finds.",
    "semantic_guidance": "A frog, the edit to a fox, and the same edit without masks.",
    "style_aligned": "Above: each prompt alone. Below: in the style of the first picture. White grounds stay white.",
    "tileable": "Two by two copies of one tile.",
    "two_moons": "Above: the direction from x to x0 at three levels. Below: samples of three samplers.",
    "uce": "Left: the original. Right: the edited model. Above: the erased object. Below: another object.",
    "universal_guidance": "Above: a 3D frog without a ground. Below: guided to the beach, the night and the forest.",
}


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

![{SHOWN.get(name, name)}](recipes/{name}.png)

{SHOWN.get(name, name)}
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
