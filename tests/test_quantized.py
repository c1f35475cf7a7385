"""The two lines of docs/shortcuts.md that hold a UNet's linear layers in eight bits."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import ldm

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
PAGE = Path(__file__).parents[1] / "docs" / "shortcuts.md"
REQUEST = ldm.Request("a frog", steps=3)


@pytest.fixture
def quantized(model_folder) -> ldm.Pipeline:
    """The tiny random model after the lines of the page."""
    (lines,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(lines.split("\n\n")) == len(lines.splitlines()) - 1 == 2
    pipe = ldm.load(model_folder, ldm.Placement("cpu"))
    exec(compile(lines, PAGE.name, "exec"), {"pipe": pipe})
    return pipe


def test_each_linear_layer_of_the_unet_takes_a_byte_a_weight_and_a_picture_changes_little(pipe, quantized):
    layers = [layer for layer in quantized.unet.modules() if isinstance(layer, nn.Linear)]
    assert {layer.weight.qdata.dtype for layer in layers} == {torch.int8}
    plain = [layer for layer in pipe.unet.modules() if isinstance(layer, nn.Linear)]
    for layer, other in zip(layers, plain, strict=True):
        step = other.weight.abs().amax(dim=1, keepdim=True) / 127
        assert ((layer.weight.dequantize() - other.weight).abs() <= 0.51 * step).all()
    *_, expected = pipe.stream(REQUEST)
    *_, found = quantized.stream(REQUEST)
    error = ((found.latents - expected.latents).norm() / expected.latents.norm()).item()
    print(f"{error:.1e}")
    assert 0 < error < 0.02  # weights are rounded to 1 of 256 levels


def test_numbers_that_are_not_finite_are_explained_as_ever(quantized):
    quantized.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"conv_out\.bias of the UNet holds NaN"):
        quantized.generate(REQUEST)


def test_a_quantized_model_cannot_be_saved_and_the_error_says_what_to_do(quantized, tmp_path):
    with pytest.raises(ValueError, match=r"Int8Tensor.*save the model before quantizing it"):
        quantized.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())
