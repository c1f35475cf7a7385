"""The mechanism of key maps: renaming, numbering, nesting, and what it refuses."""

import pytest
import torch

from ldm.checkpoint.keymap import WHOLE, Form, Piece, Rule, inverse, key_map

RULES = (
    Rule("down.{i}.res", "blocks.{i}.0", (Rule("conv", "layers.2"), Rule("norm", "layers.0"))),
    Rule("up.{i}.blocks.{j}", lambda i, j: f"out.{2 - i}.{j}"),
    Rule("attn", "attention", form=Form.PIXELS),
    Rule("root", ""),
)


def test_a_rule_renames_the_prefix_and_rules_inside_rename_what_follows():
    names = key_map(["down.3.res.conv.weight", "up.2.blocks.1.bias", "root.scale"], RULES, "net.")
    assert names["down.3.res.conv.weight"] == ("net.blocks.3.0.layers.2.weight", Form.SAME, WHOLE)
    assert names["up.2.blocks.1.bias"].name == "net.out.0.1.bias"
    assert names["root.scale"].name == "net.scale"
    assert inverse(names)["net.out.0.1.bias"] == ("up.2.blocks.1.bias",)


def test_prefixes_end_at_dots():
    rules = (Rule("up.1", "one"), Rule("up.11", "eleven"))
    assert [s.name for s in key_map(["up.1.w", "up.11.w"], rules).values()] == ["one.w", "eleven.w"]


def test_a_key_without_a_rule_is_named():
    with pytest.raises(ValueError, match=r"no rule covers down\.x\.res\.conv; rules: down"):
        key_map(["down.x.res.conv"], RULES)
    with pytest.raises(ValueError, match="no rule covers gate; rules: conv, norm"):
        key_map(["down.1.res.gate"], RULES)


def test_two_keys_with_one_name_are_named():
    rules = (Rule("a", "x"), Rule("b", "x"))
    with pytest.raises(ValueError, match=r"map both a\.w and b\.w to x\.w"):
        key_map(["a.w", "b.w"], rules)


FUSED = (
    *(Rule(name, "fused", piece=Piece(i, 3)) for i, name in enumerate("qkv")),
    Rule("w", "alone", piece=Piece(1, 2)),
)


def test_several_keys_are_the_pieces_of_one_name_in_their_order():
    names = key_map(["v.bias", "q.bias", "k.bias"], FUSED)
    assert inverse(names) == {"fused.bias": ("q.bias", "k.bias", "v.bias")}


def test_a_name_of_which_a_piece_is_lacking_is_named():
    for keys in (["q.bias", "v.bias"], ["q.bias", "k.bias"], ["w.bias"]):
        with pytest.raises(ValueError, match=r"to pieces of \w+\.bias only"):
            key_map(keys, FUSED)


def test_a_transposed_matrix_comes_back():
    value = torch.randn(6, 4)
    assert Form.TRANSPOSED.store(value).shape == (4, 6)
    assert torch.equal(Form.TRANSPOSED.restore(Form.TRANSPOSED.store(value), value.shape), value)


@pytest.mark.parametrize("shape", [(6, 4), (6,), (6, 4, 3, 3)])
@pytest.mark.parametrize("form", [Form.SAME, Form.PIXELS])
def test_what_a_form_stores_it_restores_bit_for_bit(form, shape):
    value = torch.randn(shape)
    assert torch.equal(form.restore(form.store(value), value.shape), value)


def test_a_one_by_one_convolution_and_a_matrix_stand_for_each_other():
    matrix = torch.randn(6, 4)
    assert Form.PIXELS.store(matrix).shape == (6, 4, 1, 1)
    assert torch.equal(Form.SAME.restore(matrix, torch.Size([6, 4, 1, 1]))[..., 0, 0], matrix)
    assert torch.equal(Form.PIXELS.restore(matrix, matrix.shape), matrix)  # some files have it already
