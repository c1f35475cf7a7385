"""TAESD on disk: its author's files, such as taesd_decoder.safetensors, and folders of diffusers' AutoencoderTiny."""

from pathlib import Path

import torch

from ldm.checkpoint.folder import NETWORK, tensors_of
from ldm.checkpoint.keymap import Rule
from ldm.checkpoint.known import kind_of
from ldm.checkpoint.parts import Part, check, fill
from ldm.checkpoint.tensors import TensorFiles, some
from ldm.models.taesd import WIDTH, Decoder

# (first convolution, prefix of all names, how much lower their numbers are): only the author counts the clamp.
_LAYOUTS = (
    ("decoder.layers.0.weight", "decoder.layers.", 1),  # diffusers
    ("taesd_decoder.1.weight", "taesd_decoder.", 0),  # ComfyUI
    ("decoder.1.weight", "decoder.", 0),
    ("1.weight", "", 0),  # the author
)


def load_taesd(path: str | Path) -> Decoder:
    """Load the decoder of the TAESD at `path` in fp32 on the CPU: a .safetensors file, or a folder of diffusers.

    Raises ValueError for anything else, and for tensors that are missing, unknown or of another shape.
    """
    path = Path(path)
    tensors = tensors_of(path, NETWORK, pickles=False) if path.is_dir() else TensorFiles([path])
    found = next((layout for layout in _LAYOUTS if layout[0] in tensors.shapes), None)
    if found is None or len(shape := tensors.shapes[found[0]]) != 4 or shape[0] != WIDTH:
        kind = kind_of(tensors) or f"a file with {some(sorted(tensors.shapes))}"
        raise ValueError(f"{tensors} is {kind}, without a decoder of TAESD: give its taesd_decoder.safetensors")
    _, prefix, lower = found
    with torch.device("meta"):
        decoder = Decoder(shape[1])
    part = Part(tensors, (Rule("layers.{i}", lambda i: str(i - lower)),), prefix)
    left = check({"TAESD decoder": decoder}, {"TAESD decoder": part})
    if strange := [name for name in left if name.startswith(prefix) and not name.startswith("encoder.")]:
        raise ValueError(f"{tensors} holds {len(strange)} tensors that TAESD does not have: {some(strange)}")
    fill(decoder, part, dtype=torch.float32, device=torch.device("cpu"))
    return decoder
