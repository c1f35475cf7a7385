"""LoRAs in a pipeline: the weights are those of the formula, and removing a LoRA restores their bits."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ldm
from ldm.checkpoint.embeddings import load_embeddings
from ldm.checkpoint.loras import layers_of
from ldm.cli import main
from ldm.lora import Lora, set_loras
from ldm.models.textual_inversion import remove_embedding
from ldm.placement import packing

Q = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn2_to_q"
CONV = "lora_unet_input_blocks_3_0_in_layers_2"  # 32 channels from 16
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
ASKED = ldm.Request("a frog", steps=2, seed=1, guidance_scale=3.0)
PLAIN = ldm.Placement(device="cpu")


def lora_file(path: Path, seed: int = 0, rank: int = 4, size: float = 0.3) -> Path:
    """Write a LoRA of kohya's names for a projection, a convolution and a text tower of the tiny random model."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {Q: ((rank, 32), (32, rank)), CONV: ((rank, 16, 3, 3), (32, rank, 1, 1)), TEXT: ((rank, 32), (64, rank))}
    tensors = {}
    for name, (down, up) in shapes.items():
        tensors[f"{name}.lora_down.weight"] = size * torch.randn(down, generator=generator)
        tensors[f"{name}.lora_up.weight"] = size * torch.randn(up, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return lora_file(tmp_path_factory.mktemp("loras") / "a.safetensors")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return lora_file(tmp_path_factory.mktemp("loras") / "b.safetensors", seed=1, rank=2)


def weights(pipe):
    """Copies of the three weights that the files above change."""
    stage, tower = pipe.unet.down[3], pipe.text_encoder.towers[0]
    layers = stage.transformer.blocks[0].attn2.to_q, stage.res.conv1, tower.blocks[0].fc1
    return [layer.state_dict()["weight"].clone() for layer in layers]


def all_weights(pipe):
    return {k: v.clone() for n in (pipe.unet, pipe.text_encoder, pipe.vae) for k, v in n.state_dict().items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def differences(path):
    """The changes at weight 1, by the formula: alpha / rank is 1/2."""
    held = load_file(path)
    pairs = [(held[f"{name}.lora_up.weight"], held[f"{name}.lora_down.weight"]) for name in (Q, CONV, TEXT)]
    return [0.5 * torch.einsum("or,ri...->oi...", up.flatten(1), down) for up, down in pairs]


def bytes_of(pipe, request=ASKED):
    return [picture.tobytes() for picture in pipe.generate(request)]


def test_the_weights_are_the_sum_of_the_originals_and_the_weighted_changes(model_folder, lora, other):
    plain = ldm.load(model_folder, PLAIN)
    pipe = ldm.load(model_folder, PLAIN, loras=[f"{lora}:0.5", Lora(other, -1.5)])
    parts = zip(weights(pipe), weights(plain), differences(lora), differences(other), strict=True)
    for merged, weight, first, second in parts:
        torch.testing.assert_close(merged, weight + 0.5 * first - 1.5 * second, rtol=0, atol=1e-6)
        assert (merged - weight).abs().max() > 0.1
    assert [(str(each.lora.path), each.lora.weight, each.applied, each.total) for each in pipe.loras.applied] == [
        (str(lora), 0.5, 3, 3),
        (str(other), -1.5, 3, 3),
    ]
    assert bytes_of(pipe) != bytes_of(plain)


def test_removing_restores_all_bits_and_the_picture(model_folder, lora, other):
    for placement in (PLAIN, ldm.Placement(device="cpu", dtype="bfloat16"), ldm.Placement.fast(device="cpu")):
        plain, pipe = ldm.load(model_folder, placement), ldm.load(model_folder, placement, loras=[lora])
        set_loras(pipe, [other, f"{lora}:0.3"])
        assert bytes_of(pipe) != bytes_of(plain)
        assert set_loras(pipe, []) == ()
        assert_same(all_weights(pipe), all_weights(plain))
        assert not pipe.loras.originals  # no copy is kept for nothing
        assert bytes_of(pipe) == bytes_of(plain)


def test_another_weight_gives_the_bits_of_a_model_loaded_with_it(model_folder, lora, other):
    pipe = ldm.load(model_folder, PLAIN)
    for words in ([lora], [f"{lora}:0.2", other], [f"{lora}:0.7"]):
        set_loras(pipe, words)
        assert_same(all_weights(pipe), all_weights(ldm.load(model_folder, PLAIN, loras=words)))


def test_bfloat16_weights_are_rounded_once(model_folder, lora):
    pipe = ldm.load(model_folder, ldm.Placement(device="cpu", dtype="bfloat16"))
    before = weights(pipe)
    set_loras(pipe, [lora])
    for merged, weight, change in zip(weights(pipe), before, differences(lora), strict=True):
        assert merged.dtype == torch.bfloat16
        torch.testing.assert_close(merged, (weight.float() + change).bfloat16(), rtol=0.005, atol=0)


def test_packed_weights_take_loras_before_and_after_packing(model_folder, lora):
    packed = ldm.Placement(device="cpu", packed=True)
    loaded = ldm.load(model_folder, packed, loras=[lora])
    later = ldm.load(model_folder, packed)
    before = bytes_of(later)
    set_loras(later, [lora])
    assert any(isinstance(layer, packing.Packed) for layer in later.unet.modules())
    assert bytes_of(later) == bytes_of(loaded) != before
    assert_same(all_weights(later), all_weights(ldm.load(model_folder, PLAIN, loras=[lora])))
    set_loras(later, [])
    assert bytes_of(later) == before


def test_factors_weigh_parts_of_the_model(model_folder, lora):
    plain, full = (weights(ldm.load(model_folder, PLAIN, loras=loras)) for loras in ([], [lora]))
    pipe = ldm.load(model_folder, PLAIN, loras=[f"{lora}:1:down=0,down.3.transformer=0.5,text_encoder=0"])
    q, conv, text = weights(pipe)
    assert torch.equal(conv, plain[1])
    assert torch.equal(text, plain[2])
    torch.testing.assert_close(q, (plain[0] + full[0]) / 2)
    with pytest.raises(ValueError, match=r"a factor for 'dowm', and the model has time_embed, down, mid, up, .*, text"):
        set_loras(pipe, [Lora(lora, blocks={"dowm": 1})])
    assert torch.equal(weights(pipe)[0], q)  # an error changes nothing


def test_words_name_a_file_and_its_weights(tmp_path):
    assert Lora.parse("a/b.safetensors") == Lora("a/b.safetensors")
    assert Lora.parse("a:0.5") == Lora("a", 0.5)
    assert Lora.parse("C:\\loras\\a.safetensors:-.5") == Lora("C:\\loras\\a.safetensors", -0.5)
    assert Lora.parse("a:2:mid=0,up.3=1.5") == Lora("a", 2.0, {"mid": 0.0, "up.3": 1.5})
    named_so = tmp_path / "a:0.5"
    named_so.touch()
    assert Lora.parse(str(named_so)) == Lora(str(named_so))
    with pytest.raises(ValueError, match="the weight of the LoRA a must be a finite number, got nan"):
        Lora("a", float("nan"))


def test_an_error_in_the_second_file_changes_nothing(model_folder, lora, tmp_path):
    pipe = ldm.load(model_folder, PLAIN, loras=[lora])
    before = all_weights(pipe)
    with pytest.raises(ValueError, match=r"none.safetensors does not exist"):
        set_loras(pipe, [f"{lora}:0.1", tmp_path / "none.safetensors"])
    assert_same(all_weights(pipe), before)


def test_weights_that_are_not_finite_are_refused_and_the_lora_is_removed(model_folder, lora, tmp_path):
    pipe, plain = (ldm.load(model_folder, PLAIN) for _ in range(2))
    with pytest.raises(ValueError, match=r"is not finite with the LoRA: give a lower weight"):
        set_loras(pipe, [lora, lora_file(tmp_path / "large.safetensors", size=1e30)])
    assert_same(all_weights(pipe), all_weights(plain))
    assert pipe.loras.applied == ()


def test_a_network_that_the_user_replaced_keeps_its_own_weights(model_folder, lora):
    pipe = ldm.load(model_folder, PLAIN, loras=[lora])
    pipe.unet = copy.deepcopy(pipe.unet)
    before = copy.deepcopy(pipe.unet.state_dict())
    set_loras(pipe, [])
    assert_same(dict(pipe.unet.state_dict()), dict(before))
    plain = ldm.load(model_folder, PLAIN)
    assert_same(dict(pipe.text_encoder.state_dict()), dict(plain.text_encoder.state_dict()))


def test_layers_that_a_lora_does_not_name_keep_their_memory(model_folder, lora):
    pipe = ldm.load(model_folder, PLAIN)
    before = {target: layer.weight for target, layer in layers_of({"unet": pipe.unet}).items()}
    set_loras(pipe, [lora])
    after = {target: layer.weight for target, layer in layers_of({"unet": pipe.unet}).items()}
    assert sum(after[target] is not before[target] for target in before) == 2


def test_a_lora_with_weight_0_changes_no_bit(model_folder, lora):
    pipe = ldm.load(model_folder, PLAIN, loras=[f"{lora}:0"])
    assert_same(all_weights(pipe), all_weights(ldm.load(model_folder, PLAIN)))


def test_all_weights_stay_without_gradients(model_folder, lora):
    pipe = ldm.load(model_folder, PLAIN, loras=[lora])
    assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())


def test_the_report_names_what_was_not_used(model_folder, lora, tmp_path):
    more = load_file(lora) | {f"lora_unet_x.lora_{n}.weight": torch.zeros(4, 4) for n in ("up", "down")}
    save_file(more, tmp_path / "more.safetensors")
    (applied,) = set_loras(ldm.load(model_folder, PLAIN), [tmp_path / "more.safetensors"])
    assert str(applied).endswith("more.safetensors: LoRA with weight 1, 3 of 4 modules; the model has no lora_unet_x")
    text = str(applied._replace(words=("<s1>",)))
    assert text.endswith("; prompts may use its learned words: <s1>")


def simo_file(path, seed, **words):
    """Write a LoRA of cloneofsimo's names for the tiny random model, with learned words."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"unet:0:{name}": torch.randn(32, 32, generator=generator) for name in ("up", "down")}
    tensors |= {f"<{name}>": torch.randn(shape, generator=generator) for name, shape in words.items()}
    save_file(tensors, path, {"unet": '["CrossAttention"]'} | {f"<{name}>": "<embed>" for name in words})
    return path


def encoded(pipe, text):
    return pipe.text_encoder.encode([text]).context


def test_learned_words_are_vectors_in_prompts_and_leave_with_their_lora(model_folder, tmp_path):
    simo = simo_file(tmp_path / "a.safetensors", 1, s1=(32,), s2=(2, 32))
    plain, pipe = ldm.load(model_folder, PLAIN), ldm.load(model_folder, PLAIN, loras=[simo])
    (applied,) = pipe.loras.applied
    assert applied.words == ("<s1>", "<s2>")
    vectors = load_file(simo)
    save_file({"emb_params": vectors["<s1>"][None]}, tmp_path / "s1.safetensors")
    save_file({"emb_params": vectors["<s2>"]}, tmp_path / "s2.safetensors")
    words = [f"<{name}>={tmp_path / f'{name}.safetensors'}" for name in ("s1", "s2")]
    learned = ldm.load(model_folder, PLAIN, embeddings=words)
    assert torch.equal(encoded(pipe, "a <s1> <s2>"), encoded(learned, "a <s1> <s2>"))
    assert not torch.equal(encoded(pipe, "a <s1>"), encoded(plain, "a <s1>"))
    save_file({"emb_params": torch.randn(3, 32)}, tmp_path / "mine.safetensors")
    load_embeddings(pipe.text_encoder, [(None, tmp_path / "mine.safetensors")])
    mine = encoded(pipe, "a mine frog")
    set_loras(pipe, [])
    assert torch.equal(encoded(pipe, "a <s1> <s2>"), encoded(plain, "a <s1> <s2>"))
    assert torch.equal(encoded(pipe, "a mine frog"), mine)
    assert not torch.equal(mine, encoded(plain, "a mine frog"))
    remove_embedding(pipe.text_encoder, "mine")
    assert type(pipe.text_encoder.towers[0].tokenizer) is type(plain.text_encoder.towers[0].tokenizer)
    assert type(pipe.text_encoder.towers[0].token_embedding) is torch.nn.Embedding
    assert_same(all_weights(pipe), all_weights(plain))


def test_learned_words_that_clash_or_do_not_fit_change_nothing(model_folder, tmp_path):
    first, second = (simo_file(tmp_path / f"{i}.safetensors", i, s1=(32,)) for i in range(2))
    pipe = ldm.load(model_folder, PLAIN, loras=[first])
    before, context = all_weights(pipe), encoded(pipe, "a <s1>")
    with pytest.raises(ValueError, match="two LoRAs bring along the learned word <s1>: use one of them"):
        set_loras(pipe, [first, second])
    with pytest.raises(ValueError, match="the learned words of the LoRA cannot be used: the embedding is 16 wide"):
        set_loras(pipe, [simo_file(tmp_path / "narrow.safetensors", 3, s2=(32,), s3=(16,))])
    assert torch.equal(encoded(pipe, "a <s1>"), context)
    assert_same(all_weights(pipe), before)
    set_loras(pipe, [second])
    assert not torch.equal(encoded(pipe, "a <s1>"), context)


def test_the_public_name_of_a_lora_is_imported_at_its_first_use():
    code = "import sys, ldm; assert 'ldm.lora' not in sys.modules; print(ldm.Lora('a:0.5').weight, hasattr(ldm, 'x'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["1.0", "False"]


def test_quantized_weights_take_no_lora(model_folder, lora):
    class Quantized(torch.Tensor):
        pass

    pipe = ldm.load(model_folder, PLAIN)
    layer = pipe.unet.down[3].res.conv1
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Quantized), requires_grad=False)
    before = weights(pipe)
    with pytest.raises(
        ValueError, match=r"the weight of down.3.res.conv1 is quantized: set the LoRAs before you quant"
    ):
        set_loras(pipe, [lora])
    assert all(torch.equal(a, b) for a, b in zip(weights(pipe), before, strict=True))


@pytest.mark.slow
def test_compiled_blocks_use_the_new_weights(model_folder, lora):
    from ldm.placement.compiled import compile_blocks

    pipe, expected = ldm.load(model_folder, PLAIN), ldm.load(model_folder, PLAIN, loras=[lora])
    compile_blocks(pipe.unet, backend="eager")
    before = bytes_of(pipe)
    set_loras(pipe, [lora])
    assert bytes_of(pipe) == bytes_of(expected) != before
    set_loras(pipe, [])
    assert bytes_of(pipe) == before


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"offload": "model"}, {"offload": "blocks"}, {"cuda_graph": True}], ids=str)
def test_on_a_gpu_loras_come_and_go_without_another_load(options, model_folder, lora):
    placement = ldm.Placement(device="cuda", dtype="float32", **options)
    plain, pipe, later = (ldm.load(model_folder, placement, loras=loras) for loras in ([], [lora], []))
    before = bytes_of(plain)
    set_loras(later, [lora])
    assert bytes_of(later) == bytes_of(pipe) != before
    set_loras(pipe, [])
    assert bytes_of(pipe) == before


# ------------------------------------------------------------------ the command


@pytest.fixture
def run(model_folder, capsys, tmp_path, monkeypatch):
    """Run `ldm txt2img` in a folder with two LoRAs; returns exit code, stdout, and what stderr says of LoRAs."""
    monkeypatch.chdir(tmp_path)
    lora_file(Path("a.safetensors"))
    Path("loras", "styles").mkdir(parents=True)
    lora_file(Path("loras", "styles", "my.style.safetensors"), seed=1)

    def run(*words):
        given = [] if "--from" in words else ["--model", str(model_folder), "--device", "cpu", "--steps", "1"]
        code = main(["txt2img", *given, *words])
        out, err = capsys.readouterr()
        return code, out, [line for line in err.splitlines() if "LoRA" in line or "error" in line]

    return run


def pixels(name):
    return Image.open(name).tobytes()


def test_the_command_reports_its_loras_and_the_record_repeats_the_picture(run, model_folder):
    words = ["--lora", "a.safetensors:0.5", "--lora", "loras/styles/my.style.safetensors"]
    code, out, err = run("a frog", "--seed", "1", *words, "--out", "a.png", "--json")
    assert (code, err) == (
        0,
        [
            "ldm: a.safetensors: LoRA with weight 0.5, 3 of 3 modules",
            "ldm: loras/styles/my.style.safetensors: LoRA with weight 1, 3 of 3 modules",
        ],
    )
    settings = json.loads(out)["settings"]
    assert settings["model"]["loras"] == words[1::2]
    assert {"lora_1", "lora_2"} <= settings["sha256"].keys()
    assert run("--from", "a.png", "--out", "b.png")[::2] == (0, err)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    run("--from", "a.png", "--lora", "a.safetensors:0.5", "--out", "c.png")
    run("a frog", "--seed", "1", "--out", "d.png")
    assert len({pixels(f"{name}.png") for name in "acd"}) == 3
    assert run("--from", "a.png", "--model", str(model_folder), "--out", "e.png")[2] == err
    assert pixels("e.png") == pixels("a.png")
    lora_file(Path("a.safetensors"), seed=7)
    message = "a.safetensors is not the LoRA that made the picture; to use it all the same, name it with --lora"
    assert run("--from", "a.png", "--out", "f.png")[::2] == (2, [*err, f"ldm: error: {message}"])


def test_names_in_the_prompt_are_files_of_the_folder(run):
    code, out, err = run("a frog <lora:my.style:0.5>", "--lora-dir", "loras", "--seed", "1", "--out", "a.png", "--json")
    assert (code, err) == (0, ["ldm: loras/styles/my.style.safetensors: LoRA with weight 0.5, 3 of 3 modules"])
    settings = json.loads(out)["settings"]
    assert settings["request"]["prompt"] == "a frog"
    assert settings["model"]["loras"] == ["loras/styles/my.style.safetensors:0.5"]
    run("a frog", "--lora", "loras/styles/my.style.safetensors:0.5", "--seed", "1", "--out", "b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    run("--prompts", "a <lora:my.style> frog", "a dog<lora:my.style>", "--lora-dir", "loras", "--out", "c.png")
    assert Path("c-00001.png").is_file()
    assert run("--from", "a.png", "--out", "d.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("d.png").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a <lora:my.style:0.5>"], "the prompt names the LoRA 'my.style': add --lora-dir with the folder of its file"),
        (
            ["a <lora:x>", "--lora-dir", "loras"],
            "the prompt names the LoRA 'x', and loras holds only my.style: correct",
        ),
        (["a <lora:../a>", "--lora-dir", "loras"], "the prompt names the LoRA '../a', and loras holds only my.style"),
        (["a <lora:a:b>", "--lora-dir", "."], "the weight of <lora:a:b> must be one number, such as 0.8"),
        (["a <lora:a>", "--lora-dir", "none"], "--lora-dir none is not a folder"),
        (["a", "--negative", "<lora:a>"], "<lora:a> acts on the whole picture: write it into the prompt"),
        (["--prompts", "a <lora:a>", "b", "--lora-dir", "."], "the pictures of one run share their LoRAs: write the"),
        (["a", "--lora", "none.safetensors"], "none.safetensors does not exist"),
    ],
)
def test_wrong_words_are_one_sentence_and_no_picture(words, message, run):
    code, out, err = run(*words)
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith(f"ldm: error: {message}")
    assert not Path("out.png").exists()
