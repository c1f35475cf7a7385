"""Linear layers with weights of eight bits, by torchao: a quarter of the memory of fp32, and not the same numbers."""

from importlib.util import find_spec

from torch import Tensor, nn


def can_quantize() -> bool:
    """Whether torchao is installed."""
    return find_spec("torchao") is not None


def quantize(module: nn.Module) -> None:
    """Hold the weight of each linear layer in `module` as integers of -128 to 127 and one scale for every output.

    For inference: they are widened again where they are multiplied, in the dtype of the input. There is no way back,
    and such a module cannot be saved. docs/shortcuts.md has the error that this makes.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # a second to import

    quantize_(module, Int8WeightOnlyConfig())


def is_plain(weight: object) -> bool:
    """Whether a parameter or an entry of a state dict holds its numbers as they are."""
    return type(weight) in (Tensor, nn.Parameter)
