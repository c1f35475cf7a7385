"""Merged, extracted and resized LoRAs change the weights as the formulas say, and other programs' files fit."""

import hashlib
import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ldm
from ldm.checkpoint.sampling import LCM_LORA, said
from ldm.cli import _parser, main
from ldm.lora_tools import Base, extract, merge_loras, resize
from ldm.models.low_rank import Cut
from tests.test_lora import CONV, TEXT, Q, all_weights, assert_same, differences, lora_file, simo_file, weights

PLAIN = ldm.Placement(device="cpu")
KOHYA = {  # the names that the tools write
    Q: "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q",
    CONV: "lora_unet_down_blocks_1_resnets_0_conv1",
    TEXT: "lora_te_text_model_encoder_layers_0_mlp_fc1",
}


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return lora_file(folder / "a.safetensors"), lora_file(folder / "b.safetensors", seed=1, rank=2)


def products(path):
    """s B A of the three layers, as matrices, from a file under the names that the tools write."""
    held = load_file(path)
    found = []
    for name in KOHYA.values():
        up, down = (held[f"{name}.lora_{role}.weight"].float() for role in ("up", "down"))
        assert held[f"{name}.alpha"] == len(down)
        assert up.dim() == down.dim()
        found.append(up.flatten(1) @ down.flatten(1))
    return found


def close(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.flatten(1), **({"rtol": 0, "atol": 1e-5} | tolerance))


def cut(matrix, rank):
    u, values, v = torch.linalg.svd(matrix.flatten(1).double(), full_matrices=False)
    return (u[:, :rank] * values[:rank] @ v[:rank]).float()


def test_merged_loras_are_their_weighted_sum_and_their_ranks_add_up(model_folder, loras, tmp_path):
    a, b = loras
    out = tmp_path / "m.safetensors"
    written, applied = merge_loras([f"{a}:0.5", f"{b}:-1.5"], out, model=model_folder)
    assert (written.modules, written.ranks, [each.applied for each in applied]) == (3, (6, 6, 6), [3, 3])
    close(products(out), [0.5 * x - 1.5 * y for x, y in zip(differences(a), differences(b), strict=True)])
    merged = weights(ldm.load(model_folder, PLAIN, loras=[out]))
    stacked = weights(ldm.load(model_folder, PLAIN, loras=[f"{a}:0.5", f"{b}:-1.5"]))
    for one, other in zip(merged, stacked, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    with safe_open(out, "pt") as file:
        made = json.loads(file.metadata()["ldm.merge"])
    assert made["C_2"] == {"file": "b.safetensors", "sha256": hashlib.sha256(b.read_bytes()).hexdigest()}
    assert (made["w_1"], made["w_2"]) == ([0.5, {}], [-1.5, {}])


def test_merging_adds_whole_differences_and_names_what_is_left_out(model_folder, tmp_path):
    norm = "lora_unet_input_blocks_3_0_in_layers_0"
    for i in (1, 2):
        tensors = {f"{norm}.w_norm": torch.full((16,), float(i)), f"{norm}.b_norm": torch.full((16,), 10.0 * i)}
        tensors |= {f"lora_unet_x.lora_{name}.weight": torch.zeros(4, 4) for name in ("up", "down")}
        save_file(tensors, tmp_path / f"{i}.safetensors")
    files = [f"{tmp_path / '1.safetensors'}:0.5", tmp_path / "2.safetensors", simo_file(tmp_path / "s", 0, s1=(32,))]
    written, _ = merge_loras(files, tmp_path / "m.safetensors", model=model_folder)
    assert written.left_out == ("lora_unet_x", "lora_unet_x", "<s1>")
    held = load_file(tmp_path / "m.safetensors")
    name = "lora_unet_down_blocks_1_resnets_0_norm1"
    assert (held[f"{name}.diff"] == 2.5).all()
    assert (held[f"{name}.diff_b"] == 25).all()
    assert f"{KOHYA[Q].replace('attn2', 'attn1')}.alpha" in held  # of cloneofsimo's file


def test_resized_loras_have_the_largest_singular_values(model_folder, loras, tmp_path):
    a, _ = loras
    same = resize(a, tmp_path / "4.safetensors", Cut(4), model=model_folder)
    assert (same.ranks, same.energy) == ((4, 4, 4), 1.0)
    close(products(tmp_path / "4.safetensors"), differences(a))
    half = resize(a, tmp_path / "2.safetensors", Cut(2), model=model_folder, dtype=torch.float16)
    close(products(tmp_path / "2.safetensors"), [cut(change, 2) for change in differences(a)], atol=5e-3)
    lost = sum((change.flatten(1) - cut(change, 2)).square().sum() for change in differences(a))
    assert half.energy == pytest.approx(1 - float(lost / sum(change.square().sum() for change in differences(a))))
    assert str(half).endswith(f"2.safetensors: 3 modules of rank 2, with {100 * half.energy:.2f} % of the energy")


def test_the_steps_of_an_lcm_lora_stay_in_what_is_made_from_it(model_folder, loras, tmp_path):
    a, b = loras
    lcm = tmp_path / "lcm.safetensors"
    save_file(load_file(a), lcm, LCM_LORA.metadata())
    merge_loras([lcm, f"{b}:0.5"], tmp_path / "both.safetensors", model=model_folder)
    merge_loras([f"{lcm}:0", b], tmp_path / "off.safetensors", model=model_folder)
    resize(lcm, tmp_path / "small.safetensors", Cut(2), model=model_folder)
    names = ("both", "small", "off")
    assert [said([tmp_path / f"{name}.safetensors"]) for name in names] == [LCM_LORA, LCM_LORA, None]


def test_other_kinds_become_lora_by_resizing(model_folder, tmp_path):
    generator = torch.Generator().manual_seed(0)
    factors = {f"{Q}.hada_w{i}_{n}": (32, 2) if n == "a" else (2, 32) for i in (1, 2) for n in "ab"}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in factors.items()}
    save_file(tensors | {f"{Q}.alpha": torch.tensor(1.0)}, tmp_path / "loha.safetensors")
    first, second = (tensors[f"{Q}.hada_w{i}_a"] @ tensors[f"{Q}.hada_w{i}_b"] for i in (1, 2))
    with pytest.raises(
        ValueError, match=r"to_q is of the kind LoHa: make it a LoRA with `ldm lora resize`, or merge it"
    ):
        merge_loras([tmp_path / "loha.safetensors"], tmp_path / "m.safetensors", model=model_folder)
    written = resize(tmp_path / "loha.safetensors", tmp_path / "m.safetensors", Cut(energy=0.99999), model=model_folder)
    assert written.ranks == (4,)  # the elementwise product of two matrices of rank 2
    held = load_file(tmp_path / "m.safetensors")
    found = held[f"{KOHYA[Q]}.lora_up.weight"] @ held[f"{KOHYA[Q]}.lora_down.weight"]
    torch.testing.assert_close(found, 0.5 * first * second, rtol=0, atol=1e-4)


def test_a_dora_is_not_resized(model_folder, loras, tmp_path):
    save_file(load_file(loras[0]) | {f"{Q}.dora_scale": torch.ones(32, 1)}, tmp_path / "dora.safetensors")
    with pytest.raises(
        ValueError, match=r"is a DoRA, whose change depends on the model's weights: merge it into the mo"
    ):
        resize(tmp_path / "dora.safetensors", tmp_path / "m.safetensors", Cut(2), model=model_folder)
    with pytest.raises(ValueError, match=r"is of the kind DoRA: make it"):
        merge_loras([tmp_path / "dora.safetensors"], tmp_path / "m.safetensors", model=model_folder)


def test_the_rules_of_a_cut_are_those_of_kohyas_scripts():
    values = torch.tensor([4.0, 3.0, 2.0, 1.0])  # squares 16, 9, 4, 1: 30; sum 10
    assert [Cut(energy=share).of(values) for share in (0.5, 16 / 30, 0.54, 0.84, 0.99, 1.0)] == [1, 1, 2, 3, 4, 4]
    assert [Cut(total=share).of(values) for share in (0.4, 0.41, 0.7, 0.91, 1)] == [1, 2, 2, 4, 4]
    assert [Cut(ratio=ratio).of(values) for ratio in (1, 1.5, 2.5, 5)] == [1, 2, 3, 4]  # above 4, 2.67, 1.6 and 0.8
    assert [Cut(rank).of(values) for rank in (1, 3, 9)] == [1, 3, 4]
    assert Cut(2, energy=1).of(values) == 2
    assert Cut(energy=0.9).of(torch.zeros(3)) == 1
    for given in ({}, {"rank": 2, "energy": 0.5, "ratio": 2}):
        with pytest.raises(ValueError, match=r"give a rank, or one of energy, total and ratio, or both; got"):
            Cut(**given)
    with pytest.raises(ValueError, match=r"energy must be a finite number from 0 to 1, got 1.5"):
        Cut(energy=1.5)


@pytest.fixture(scope="module")
def tuned(model_folder, loras, tmp_path_factory):
    """The tiny random model with a LoRA of rank 4 merged, and one more bias changed."""
    pipe = ldm.load(model_folder, PLAIN, loras=[loras[0]])
    pipe.unet.conv_out.bias += 1
    path = tmp_path_factory.mktemp("tuned") / "model"
    pipe.save(path)
    return path


def test_what_was_merged_is_extracted_with_its_rank(model_folder, loras, tuned, tmp_path):
    out = tmp_path / "m.safetensors"
    written = extract(tuned, model_folder, out, Cut(energy=1 - 1e-9), convolutions=True)
    assert (written.modules, written.ranks) == (3, (4, 4, 4))
    assert written.left_out == ("unet: conv_out.bias",)
    close(products(out), differences(loras[0]))
    merged, expected = (
        weights(ldm.load(path, PLAIN, loras=found)) for path, found in ((model_folder, [out]), (tuned, []))
    )
    for one, other in zip(merged, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    without = extract(tuned, model_folder, tmp_path / "2.safetensors", Cut(2), dtype=torch.bfloat16)
    assert (without.modules, without.ranks) == (2, (2, 2))
    assert without.left_out == ("unet: down.3.res.conv1.weight", "unet: conv_out.bias")
    held = load_file(tmp_path / "2.safetensors")
    assert {value.dtype for name, value in held.items() if not name.endswith("alpha")} == {torch.bfloat16}
    with safe_open(out, "pt") as file:
        made = json.loads(file.metadata()["ldm.merge"])
    assert made["cut"] == {"energy": 1 - 1e-9}
    assert made["A"]["file"] == model_folder.name
    assert made["A"]["sha256"] != made["B"]["sha256"]


def test_equal_models_and_outputs_that_are_inputs_are_refused(model_folder, loras, tuned, tmp_path):
    out = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match=r"have the same weights in all layers that the LoRA would change"):
        extract(model_folder, model_folder, out, Cut(4))
    with pytest.raises(ValueError, match=r"a LoRA is one file, whose name ends in .safetensors, got .*m: give such"):
        extract(tuned, model_folder, tmp_path / "m", Cut(4))
    with pytest.raises(ValueError, match=r"is or holds the input .*a.safetensors, which is never overwritten"):
        resize(loras[0], loras[0], Cut(2), model=model_folder, overwrite=True)
    out.touch()
    with pytest.raises(ValueError, match=r"m.safetensors exists already: give another path, or overwrite=True"):
        merge_loras([loras[0]], out, model=model_folder)
    kohya = {f"{KOHYA[Q].replace('to_q', 'to_k')}.lora_{n}.weight": torch.zeros(32, 32) for n in ("up", "down")}
    save_file(kohya, tmp_path / "k.safetensors")
    with pytest.raises(ValueError, match=r"no known family has text 32 wide: give the model that it is for with --mod"):
        Base.find(tmp_path / "k.safetensors")
    with pytest.raises(ValueError, match=r"no layer tells its family: give the model"):
        Base.find(loras[0])


def test_the_family_of_a_lora_is_found_by_its_text(tmp_path):
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    save_file(
        {f"{name}.lora_down.weight": torch.zeros(1, 2048), f"{name}.lora_up.weight": torch.zeros(640, 1)},
        tmp_path / "x",
    )
    assert Base.find(tmp_path / "x").name == "sdxl-base"
    save_file({"unet:6:down": torch.zeros(1, 768), "unet:6:up": torch.zeros(320, 1)}, tmp_path / "y")
    assert Base.find(tmp_path / "y").name == "sd15"


def test_every_command_of_the_document_is_one_that_the_parser_knows():
    text = (Path(__file__).parent.parent / "docs" / "lora.md").read_text(encoding="utf-8")
    commands = [line for line in text.splitlines() if line.startswith("ldm ")]
    assert {command.split()[1] for command in commands} == {"txt2img", "lora", "merge"}
    for command in commands:
        _parser().parse_args(shlex.split(command)[1:])


# ------------------------------------------------------------------ the commands


def run(capsys, *words):
    code = main(["lora", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()[-1] if code else ""


def test_the_commands_make_and_show_loras(model_folder, loras, tuned, tmp_path, capsys):
    a, b = loras
    out = tmp_path / "m.safetensors"
    code, text, _ = run(capsys, "merge", f"{a}:0.5", b, out, "--model", model_folder)
    assert (code, text.splitlines()) == (
        0,
        [
            f"{a}: LoRA with weight 0.5, 3 of 3 modules",
            f"{b}: LoRA with weight 1, 3 of 3 modules",
            f"{out}: 3 modules of rank 6",
        ],
    )
    code, text, _ = run(
        capsys, "resize", out, tmp_path / "r.safetensors", "--rank", "3", "--model", model_folder, "--json"
    )
    assert code == 0
    assert json.loads(text)["ranks"] == [3, 3, 3]
    words = [tuned, model_folder, tmp_path / "e.safetensors", "--rank", "8", "--energy", "0.999999", "--convolutions"]
    code, text, _ = run(capsys, "extract", *words)
    assert code == 0
    assert "e.safetensors: 3 modules of rank 4, with 100.00 % of the energy; left out 1: unet: conv_out.bias" in text
    simo = simo_file(tmp_path / "s", 0, s1=(32,))
    words = [f"{a}:0.5", f"{simo}:0", tmp_path / "model", "--into", model_folder, "--layout", "diffusers"]
    code, text, _ = run(capsys, "merge", *words)
    assert (code, text.splitlines()[1:]) == (
        0,
        [
            f"{simo}: LoRA with weight 0, 1 of 1 modules",
            f"left out the learned words <s1> of {simo}",
            str(tmp_path / "model"),
        ],
    )
    assert_same(
        all_weights(ldm.load(tmp_path / "model", PLAIN)), all_weights(ldm.load(model_folder, PLAIN, loras=[f"{a}:0.5"]))
    )
    for words, message in (
        (["merge", a, tmp_path / "x", "--layout", "ldm"], "--layout is that of a model: add --into MODEL, or leave it"),
        (["merge", a, tmp_path / "x", "--into", model_folder], "--into needs --layout, and no --model"),
        (
            ["resize", a, tmp_path / "x.safetensors"],
            "give a rank, or one of energy, total and ratio, or both; got nothing",
        ),
    ):
        code, _, err = run(capsys, *words)
        assert (code, message in err) == (2, True), err


def test_inspect_shows_kinds_ranks_norms_and_unknown_names(model_folder, loras, tmp_path, capsys):
    more = load_file(loras[0]) | {f"lora_unet_x.lora_{n}.weight": torch.zeros(4, 4) for n in ("up", "down")}
    save_file(more, tmp_path / "a.safetensors", {"ss_note": "a note"})
    code, text, _ = run(capsys, "inspect", tmp_path / "a.safetensors", "--model", model_folder)
    norms = sorted(change.norm().item() for change in differences(loras[0]))
    lines = text.splitlines()
    assert (code, lines[0]) == (0, f"{tmp_path / 'a.safetensors'}: a LoRA")
    assert [line.split(maxsplit=1) for line in lines[1:]] == [
        ["for", "random"],
        ["dtypes", "11 F32"],
        ["kinds", "LoRA (2), LoCon (1)"],
        ["modules", "text_encoder (1), unet (2)"],
        ["ranks", "4 (3)"],
        ["alphas", "2 (3)"],
        ["norms", f"median {norms[1]:.3g}, largest {norms[2]:.3g} (unet down.3.res.conv1)"],
        ["unknown", "lora_unet_x (1)"],
        ["metadata", "ss_note: a note"],
        ["usable", "yes"],
    ]
    _, text, _ = run(capsys, "inspect", tmp_path / "a.safetensors", "--model", model_folder, "--json")
    report = json.loads(text)
    assert sorted(module["norm"] for module in report["modules"]) == pytest.approx(norms)
    save_file(load_file(loras[0]) | {"lora_unet_x.oft_blocks": torch.zeros(1)}, tmp_path / "oft.safetensors")
    code, text, _ = run(capsys, "inspect", tmp_path / "oft.safetensors", "--model", model_folder)
    assert code == 0
    assert "  unknown      lora_unet_x.oft_blocks (1)\n" in text
    assert text.splitlines()[-1].startswith(
        f"  usable       no: {tmp_path / 'oft.safetensors'} holds OFT, which is not"
    )
