"""What the UNet of a single file predicts: everything that says so, in order of trust, and never a silent guess."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ldm.checkpoint.known import KnownFile
from ldm.checkpoint.shapes import Family
from ldm.checkpoint.tensors import Tensors
from ldm.config import PRESETS, Prediction

# Tensors without data that tools add to say how a checkpoint samples. Those of EDM are refused.
V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
EDM_MARKERS = {
    "edm_mean": "Playground v2.5",
    "edm_std": "Playground v2.5",
    "edm_vpred.sigma_max": "CosXL",
    "edm_vpred.sigma_min": "CosXL",
}
MARKERS = (V_MARKER, ZERO_SNR_MARKER, *EDM_MARKERS)

# ComfyUI's rule: the standard deviation of this tensor is larger in SD 2 models that predict v, smaller in the others.
PROBED = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
PROBED_STD = 0.09
MAX_PROBED = 4096  # numbers; it has 320

MAX_SIDECAR = 65536  # bytes; the published ones have some 2,000

_SPELLINGS: dict[str, Prediction] = {
    **dict.fromkeys(("eps", "epsilon", "eps_prediction", "epsilon_prediction"), "eps"),
    **dict.fromkeys(("v", "v_pred", "vpred", "v_prediction"), "v"),
    **dict.fromkeys(("x0", "sample"), "x0"),
}
_METADATA: dict[str, dict[str, Prediction]] = {  # another value than these is an error
    "modelspec.prediction_type": _SPELLINGS,
    "modelspec.predict_key": _SPELLINGS,  # of ComfyUI
    "ss_v_parameterization": {"true": "v", "false": "eps"},  # of kohya's trainer
}
_SD2_METADATA: dict[str, dict[str, Prediction]] = {  # another value than these says nothing
    "modelspec.architecture": {
        "stable-diffusion-v2-512": "eps",
        "stable-diffusion-v2-768-v": "v",
    },
    "global_step": {"875000": "eps", "220000": "eps", "110000": "v"},  # 2.0 base, 2.1 base, 2.1
}
_SIDECAR: dict[str, Prediction] = {
    "eps": "eps",
    "v": "v",
    "x0": "x0",
    "EpsScaling": "eps",
    "VScaling": "v",
}
_SETTING = re.compile(r"\bparameterization\b[^\w\n]*(\w*)|\bdenoiser_scaling\.(\w+)")


class Decision(NamedTuple):
    """What the network predicts, whether its schedule ends in pure noise, and what says so, as one clause."""

    prediction: Prediction
    zero_terminal_snr: bool
    why: str


class _Statement(NamedTuple):
    """What one source says; None: that it predicts something which is not understood."""

    prediction: Prediction | None
    clause: str


def decide(
    tensors: Tensors,
    *,
    family: Family,
    unet_prefix: str,
    in_channels: int,
    asked: Prediction | None = None,
    known: KnownFile | None = None,
) -> Decision:
    """Decide what the UNet behind `unet_prefix` in `tensors` predicts.

    The first that speaks decides: the user (`asked`), the file's digest (`known`, looked up by the caller), its
    metadata, marker tensors, a LDM configuration <stem>.yaml beside it, the statistics of one small tensor of SD 2.
    If none does, it is eps. `why` also names those that disagree.
    Raises ValueError for an EDM model, and where what decides says something that is not understood.
    """
    for name, model in EDM_MARKERS.items():
        if name in tensors.shapes:
            raise ValueError(
                f"{tensors} is an EDM model as {model} is (it holds {name}); its noise levels are not supported"
            )
    plain_sd2 = family == "sd2" and in_channels == 4  # its other variants all predict eps
    statements = [
        *_of_caller(asked, known),
        *_of_metadata(tensors.metadata),
        *(_of_sd2_metadata(tensors.metadata) if plain_sd2 else ()),
        *_of_markers(tensors),
        *_of_sidecar(tensors.paths[0].with_suffix(".yaml")),
        *(_of_weights(tensors, unet_prefix + PROBED) if plain_sd2 else ()),
    ]
    if not statements:
        statements = [_Statement("eps", "its family does and nothing in it says otherwise")]

    first = statements[0]
    if first.prediction is None:
        raise ValueError(
            f"{tensors}: {first.clause}, which is not understood: say what it predicts by prediction='eps', 'v' or 'x0'"
        )
    others = [s.clause for s in statements if s.prediction != first.prediction]
    why = first.clause + (f", although {' and '.join(others)}" if others else "")
    zero_terminal_snr = _zero_terminal_snr(tensors)
    if zero_terminal_snr:
        why += f"; zero terminal SNR, because {zero_terminal_snr}"
    return Decision(first.prediction, zero_terminal_snr is not None, why)


def _zero_terminal_snr(tensors: Tensors) -> str | None:
    """What in the file asks for a schedule that ends without signal, if anything does."""
    if ZERO_SNR_MARKER in tensors.shapes:
        return f"it holds the marker tensor {ZERO_SNR_MARKER}"
    if tensors.metadata.get("ss_zero_terminal_snr", "").lower() == "true":
        return "its metadata ss_zero_terminal_snr says so"
    return None


def _of_caller(asked: Prediction | None, known: KnownFile | None) -> Iterator[_Statement]:
    if asked:
        yield _Statement(asked, f"you asked for {asked}")
    if known and known.preset:
        preset = PRESETS[known.preset.removesuffix("-inpainting")]  # those predict as their base
        prediction = preset.diffusion.prediction
        yield _Statement(
            prediction, f"by its {known.told_by} it is {known.name}, which predicts {prediction}"
        )


def _of_metadata(metadata: Mapping[str, str]) -> Iterator[_Statement]:
    for key, meanings in _METADATA.items():
        value = metadata.get(key, "").strip()
        if value.lower() not in ("", "none"):
            word = value.lower().replace("-", "_").replace(" ", "_")
            yield _Statement(meanings.get(word), f"its metadata {key} says {value[:40]!r}")


def _of_sd2_metadata(metadata: Mapping[str, str]) -> Iterator[_Statement]:
    for key, meanings in _SD2_METADATA.items():
        if (value := metadata.get(key, "")) in meanings:
            yield _Statement(meanings[value], f"its metadata {key} says {value!r}")


def _of_markers(tensors: Tensors) -> Iterator[_Statement]:
    if V_MARKER in tensors.shapes:
        yield _Statement("v", f"it holds the marker tensor {V_MARKER}")


def _of_sidecar(path: Path) -> Iterator[_Statement]:
    """Read the settings that matter from the LDM or sgm configuration at `path`, as far as it is one.

    No YAML is parsed: whatever its syntax, the word after the name of a setting is the value, or is not understood.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        raw = file.read(MAX_SIDECAR + 1)
    if len(raw) > MAX_SIDECAR:
        yield _Statement(None, f"{path.name} beside it is too large to be a configuration")
        return
    text = raw.decode("utf-8", errors="replace")
    code = "\n".join(line.partition("#")[0] for line in text.splitlines())
    words = [match[1] or match[2] or "" for match in _SETTING.finditer(code)]
    for word in dict.fromkeys(words):
        yield _Statement(_SIDECAR.get(word), f"{path.name} beside it says {word[:40]!r}")
    if not words and "ldm.models.diffusion.ddpm." in code:
        yield _Statement("eps", f"{path.name} beside it leaves it at LDM's default, eps")


def _of_weights(tensors: Tensors, probed: str) -> Iterator[_Statement]:
    """What tells the SD 2 models apart, which agree in every name and shape."""
    if any(name.startswith("conditioner.") for name in tensors.shapes):
        yield _Statement("eps", "it names its text encoder as SD-Turbo does, which predicts eps")
    elif len(shape := tensors.shapes.get(probed, ())) == 1 and 0 < shape[0] <= MAX_PROBED:
        ((_, value),) = tensors.read([probed])
        std = value.float().std(unbiased=False).item()
        prediction: Prediction = "v" if std > PROBED_STD else "eps"
        side = "above" if prediction == "v" else "not above"
        yield _Statement(
            prediction,
            f"the standard deviation of {probed}, {std:.3f}, is {side} {PROBED_STD} as in SD 2 models that "
            f"predict {prediction}",
        )
