"""The text towers equal transformers' bit for bit; padding, the choice of a layer and the pooled output."""

import copy
import dataclasses
import warnings

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import ldm
from ldm.checkpoint import tables
from ldm.checkpoint.keymap import key_map
from ldm.conditioning import Condition
from ldm.config import TextConfig
from ldm.models.text import TextEncoder, TextTower
from ldm.models.tokens import Tokenizer
from tests.sparse import sparse

SMALL = TextConfig(width=16, layers=3, heads=2, mlp=32, vocab_size=49408)
TEXTS = ["a photo of an astronaut riding a horse on mars", ""]
KINDS = {  # every tower that an official model has
    "sd15": ldm.SD15.text[0],
    "sd21": ldm.SD21.text[0],
    "sdxl, first": ldm.SDXL_BASE.text[0],
    "sdxl, second": ldm.SDXL_BASE.text[1],
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.official()


def tower(config, tokenizer):
    torch.manual_seed(0)
    return TextTower(config, tokenizer).eval()


def small(config):
    """`config` at an eighth of its width and four layers, with heads of 32."""
    width = config.width // 8 // 32 * 32
    projection = config.projection and width
    sizes = {"width": width, "mlp": 4 * width, "heads": width // 32, "layers": 4}
    return dataclasses.replace(config, projection=projection, **sizes)


def transformers_model(config):
    """transformers' model of that config, with weights and biases nowhere at a special value."""
    torch.manual_seed(0)
    kind = CLIPTextModelWithProjection if config.projection else CLIPTextModel
    model = kind(
        CLIPTextConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            hidden_act=config.activation,
            projection_dim=config.projection or 512,
            vocab_size=config.vocab_size,
            **{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},  # wrong, as published
        )
    ).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        parameter.data += noise * (0.2 if "norm" in name else 0.02)
    return model.requires_grad_(False)


def of_transformers(model, config, ids, back=None):
    """The hidden state that a pipeline of diffusers takes from transformers' model, and the pooled text or None."""
    out = model(input_ids=ids, output_hidden_states=True)
    norm = getattr(model, "text_model", model).final_layer_norm
    hidden = out.hidden_states[back or config.output_layer]
    context = norm(hidden) if config.final_norm else hidden
    return Condition(context, out.text_embeds if config.projection else None)


def largest_difference(got, expected):
    assert (got.vector is None) == (expected.vector is None)
    pairs = [(got.context, expected.context)]
    if got.vector is not None:
        pairs.append((got.vector, expected.vector))
    assert all(a.shape == b.shape and b.std() > 0.05 for a, b in pairs)
    return max((a - b).abs().max().item() for a, b in pairs)


def filled(model, config, tokenizer):
    """A tower built on "meta" and given the weights of `model` by the key tables."""
    with torch.device("meta"):
        ours = TextTower(config, tokenizer).eval()
    state = model.state_dict()
    level = "text_model" if any(name.startswith("text_model.") for name in state) else ""
    names = key_map(ours.state_dict(), tables.hf_text(level))
    assert {at.name for at in names.values()} == state.keys()
    ours.load_state_dict({key: state[at.name] for key, at in names.items()}, assign=True)
    return ours


def check_equal(config, tokenizer, what):
    model = transformers_model(config)
    ours = filled(model, config, tokenizer)
    ids = ours.tokenize(TEXTS)
    with torch.no_grad():
        for rows in (ids, ids[:1]):
            difference = largest_difference(ours(rows), of_transformers(model, config, rows))
            print(f"{what}, {len(rows)} texts: largest difference {difference}")
            assert difference == 0
    return ours, model


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_tower_equals_transformers_bit_for_bit(kind, tokenizer):
    check_equal(small(KINDS[kind]), tokenizer, kind)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_each_tower_equals_transformers_bit_for_bit_at_its_full_size(kind, tokenizer):
    check_equal(KINDS[kind], tokenizer, kind)


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_a_tower_has_the_gradients_of_transformers(kind, tokenizer):
    config = small(KINDS[kind])
    model = transformers_model(config).requires_grad_(True)
    ours = filled(copy.deepcopy(model), config, tokenizer)
    ids = ours.tokenize(TEXTS)
    ours(ids).context.square().sum().backward()
    of_transformers(model, config, ids).context.square().sum().backward()
    got = ours.blocks[0].attn.to_k.weight.grad
    expected = getattr(model, "text_model", model).encoder.layers[0].self_attn.k_proj.weight.grad
    assert expected.abs().max() > 0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_tower_starts_from_the_deviations_of_transformers(tokenizer):
    config = dataclasses.replace(small(KINDS["sdxl, second"]), width=128, heads=4, mlp=512)
    torch.manual_seed(0)
    drawn = {name: value.std().item() for name, value in tower(config, tokenizer).state_dict().items()}
    kind = CLIPTextConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    theirs = CLIPTextModelWithProjection(kind).state_dict()
    names = key_map(drawn, tables.hf_text("text_model"))
    for key, at in names.items():
        if key != "projection.weight":  # of another size there
            assert drawn[key] == pytest.approx(theirs[at.name].std().item(), rel=0.05), key
    assert drawn["projection.weight"] == pytest.approx(128**-0.5, rel=0.05)


# ------------------------------------------------------------------ ids


@pytest.mark.parametrize("pad", [49407, 0])
def test_texts_are_begun_ended_and_padded_with_the_towers_own_id(pad, tokenizer):
    ids = tower(dataclasses.replace(SMALL, pad_id=pad), tokenizer).tokenize(["on mars!", ""])
    assert ids.shape == (2, 77)
    assert ids[0].tolist() == [49406, 525, 7496, 256, 49407] + [pad] * 72
    assert ids[1].tolist() == [49406, 49407] + [pad] * 75


def test_a_text_that_fills_the_window_is_whole_and_a_longer_one_says_what_is_cut(tokenizer):
    t = tower(SMALL, tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert t.tokenize(["cat " * 75])[0].tolist() == [49406] + [2368] * 75 + [49407]
    with pytest.warns(UserWarning, match=r"77 tokens and the text encoder reads 75.*'dog bird'"):
        cut = t.tokenize(["cat " * 75 + "dog bird"])
    assert torch.equal(cut, t.tokenize(["cat " * 75]))


# ------------------------------------------------------------------ layers


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("layer", [-1, -2, -4, 0, 2])
def test_the_layer_and_the_final_norm_are_chosen_by_the_config(layer, final, tokenizer):
    config = dataclasses.replace(SMALL, output_layer=layer, final_norm=final)
    model = transformers_model(config)
    ours = filled(model, config, tokenizer)
    ids = ours.tokenize(TEXTS)
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[layer]
    expected = getattr(model, "text_model", model).final_layer_norm(hidden) if final else hidden
    assert torch.equal(ours(ids).context, expected)


@pytest.mark.parametrize("skip", sparse([1, 2, 3, 4], 2))
@pytest.mark.parametrize("kind", KINDS)
def test_clip_skip_counts_from_the_last_layer_and_leaves_the_norm_and_the_pooled_text(kind, skip, tokenizer):
    ours, model = check_equal(small(KINDS[kind]), tokenizer, kind)
    ids = ours.tokenize(TEXTS)
    got = ours(ids, clip_skip=skip)
    # diffusers' clip_skip is one less in SD 1 and 2, and two less in SDXL
    assert largest_difference(got, of_transformers(model, ours.config, ids, back=-skip)) == 0
    own = 2 if "sdxl" in kind else 1
    assert torch.equal(got.context, ours(ids).context) == (skip == own)


@pytest.mark.parametrize("skip", [0, -1, 4])
def test_a_clip_skip_that_is_no_layer_is_refused(skip, tokenizer):
    encoder = TextEncoder((SMALL,), (tokenizer,))
    message = rf"clip_skip must be from 1 \(the last layer\) to 3, .* got {skip}"
    with pytest.raises(ValueError, match=message):
        encoder.encode(["a cat"], clip_skip=skip)


def test_the_pooled_output_is_projected_from_the_first_end_token_whatever_the_padding(tokenizer):
    pooled = []
    for pad in (49407, 0):  # after the end, so a causal tower cannot see it
        t = tower(dataclasses.replace(SMALL, pad_id=pad, projection=6), tokenizer)
        ids = t.tokenize(["a cat"])
        pooled.append(t(ids).vector)
        last = t.norm(t(ids, clip_skip=1).context)[:, 3]
        torch.testing.assert_close(pooled[-1], t.projection(last))
    torch.testing.assert_close(*pooled)


def test_the_pooled_output_is_that_of_the_end_token_though_added_tokens_have_higher_ids(tokenizer):
    from tokenizers import AddedToken

    added = Tokenizer(tokenizer.vocab, tokenizer.merges, {49408: AddedToken("<new>")})
    config = dataclasses.replace(SMALL, vocab_size=49409, projection=6, final_norm=False)
    t = tower(config, added)
    ids = t.tokenize(["a <new> cat"])
    assert ids[0, :6].tolist() == [49406, 320, 49408, 2368, 49407, 49407]
    last = t.norm(t(ids, clip_skip=1).context)
    torch.testing.assert_close(t(ids).vector, t.projection(last[:, 4]))


def test_an_encoder_joins_its_towers_and_takes_the_last_pooled_projection(tokenizer):
    torch.manual_seed(0)
    configs = (SMALL, dataclasses.replace(SMALL, width=24, projection=6, pad_id=0))
    encoder = TextEncoder(configs, (tokenizer, tokenizer)).eval()
    encoded = encoder.encode(["a cat", "a dog on mars!"])
    context, vector = encoded.context, encoded.vector
    assert context.shape == (2, 77, 40)
    assert vector.shape == (2, 6)
    alone = encoder.encode(["a dog on mars!"])
    torch.testing.assert_close(context[1:], alone.context, rtol=1e-4, atol=1e-5)
    assert TextEncoder((SMALL,), (tokenizer,)).encode(["x"]).vector is None


# ------------------------------------------------------------------ wrapped models of transformers


def transformers_tokenizer(tokenizer, pad="<|endoftext|>"):
    return CLIPTokenizer(vocab=tokenizer.vocab, merges=tokenizer.merges, pad_token=pad)


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_a_model_that_a_user_holds_is_wrapped_and_computes_the_same(kind, tokenizer):
    config = small(KINDS[kind])
    model = transformers_model(config)
    theirs = transformers_tokenizer(tokenizer, pad="!" if config.pad_id == 0 else "<|endoftext|>")
    encoder = TextEncoder.from_transformers(model, theirs)
    assert encoder.towers[0].config == config
    assert not encoder.training
    ids = encoder.towers[0].tokenize(TEXTS)
    got = encoder.encode(TEXTS)
    assert torch.equal(ids, filled(model, config, tokenizer).tokenize(TEXTS))
    assert largest_difference(got, of_transformers(model, config, ids)) == 0
    assert encoder.towers[0].norm.weight is getattr(model, "text_model", model).final_layer_norm.weight  # shared


@pytest.mark.slow
def test_sdxls_two_models_are_wrapped_together_and_its_refiners_alone(tokenizer):
    configs = [small(KINDS["sdxl, first"]), small(KINDS["sdxl, second"])]
    models = [transformers_model(config) for config in configs]
    theirs = [transformers_tokenizer(tokenizer), transformers_tokenizer(tokenizer, pad="!")]
    encoder = TextEncoder.from_transformers(models, theirs)
    assert [t.config for t in encoder.towers] == configs
    ids = [t.tokenize(TEXTS) for t in encoder.towers]
    expected = [of_transformers(*each) for each in zip(models, configs, ids, strict=True)]
    joined = Condition(torch.cat([each.context for each in expected], dim=-1), expected[1].vector)
    assert largest_difference(encoder.encode(TEXTS), joined) == 0

    refiner = TextEncoder.from_transformers(models[1], theirs[1])
    assert largest_difference(refiner.encode(TEXTS), expected[1]) == 0
    plain = TextEncoder.from_transformers(models[1], theirs[1], sdxl=False)
    assert plain.towers[0].config == dataclasses.replace(configs[1], projection=None, output_layer=-1, final_norm=True)


def test_a_wrapped_models_added_tokens_come_with_it(tokenizer):
    model, theirs = transformers_model(small(KINDS["sd15"])), transformers_tokenizer(tokenizer)
    theirs.add_tokens("<cat-toy>")
    model.resize_token_embeddings(len(theirs))
    tower = TextEncoder.from_transformers(model, theirs).towers[0]
    assert tower.config.vocab_size == 49409
    assert tower.tokenize(["a <cat-toy>"])[0, :4].tolist() == [49406, 320, 49408, 49407]


def test_a_text_model_of_another_kind_is_refused(tokenizer):
    said = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, hidden_act="relu")
    model = CLIPTextModel(said)
    with pytest.raises(ValueError, match=r"an activation of quick_gelu, gelu, .* got relu, 1e-05"):
        TextEncoder.from_transformers(model, transformers_tokenizer(tokenizer))
