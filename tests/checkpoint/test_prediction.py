"""What decides the prediction type of a single file, in which order, and what is said about it."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.checkpoint.identify import Decision, Place, check_stored_plainly, decide
from ldm.checkpoint.known import KnownFile
from ldm.checkpoint.tensors import DTYPES
from ldm.presets import SD15, SD21_BASE, SDXL_BASE, SDXL_REFINER

UNET = Place("model.diffusion_model.", "ldm")
PROBED = {
    "ldm": "output_blocks.11.1.transformer_blocks.0.norm1.bias",
    "diffusers": "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
}
BY_DEFAULT = "its family does and nothing in it says otherwise"


@dataclasses.dataclass
class File:
    """Stands in for TensorFiles: a file with these tensors and this metadata."""

    values: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    paths: tuple[Path, ...] = (Path("nowhere/model.safetensors"),)

    def __str__(self) -> str:
        return str(self.paths[0])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.values.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        return dict.fromkeys(self.values, "F32")

    def read(self, names: Iterable[str], *, mapped: bool = True) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.values[name]) for name in names)


def marked(*names: str) -> File:
    return File(dict.fromkeys(names, torch.tensor([])))


def of_spread(std: float, dtype: torch.dtype = torch.float16, in_channels: int = 4, place: Place = UNET) -> File:
    """A file whose probed tensor has that standard deviation, over all its 320 elements."""
    first = "input_blocks.0.0.weight" if place.style == "ldm" else "conv_in.weight"
    return File(
        {
            place.prefix + PROBED[place.style]: torch.tensor([std, -std] * 160, dtype=dtype),
            place.prefix + first: torch.empty(320, in_channels, 3, 3, device="meta"),
        }
    )


def decided(file: File, family=SDXL_BASE, asked=None, known=None, place=UNET) -> Decision:
    return decide(file, place, family, asked, known)


def plainly(prediction: str, why: str) -> Decision:
    return Decision(prediction, False, why, ())


@pytest.mark.parametrize("family", [SD15, SD21_BASE, SDXL_BASE, SDXL_REFINER], ids=lambda p: p.name)
def test_what_nothing_speaks_of_predicts_eps(family):
    assert decided(File(), family) == plainly("eps", BY_DEFAULT)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_user_is_obeyed(prediction):
    assert decided(File(), asked=prediction) == plainly(prediction, f"you asked for {prediction}")


@pytest.mark.parametrize(("preset", "prediction"), [("sd21", "v"), ("sd21-base-inpainting", "eps"), (None, "eps")])
def test_known_files_speak_for_their_preset(preset, prediction):
    decision = decided(File(), SD21_BASE, known=KnownFile("a.safetensors", preset))
    assert decision.prediction == prediction
    assert decision.why == (f"by its sha256 it is a.safetensors, which predicts {prediction}" if preset else BY_DEFAULT)


@pytest.mark.parametrize(
    ("key", "value", "prediction"),
    [
        ("modelspec.prediction_type", "v", "v"),
        ("modelspec.prediction_type", "epsilon", "eps"),
        ("modelspec.prediction_type", "V-Prediction", "v"),
        ("modelspec.prediction_type", "v prediction", "v"),
        ("modelspec.prediction_type", "sample", "x0"),
        ("modelspec.predict_key", "v", "v"),
        ("modelspec.predict_key", "epsilon", "eps"),
        ("ss_v_parameterization", "True", "v"),
        ("ss_v_parameterization", "False", "eps"),
    ],
)
def test_metadata_decides(key, value, prediction):
    assert decided(File(metadata={key: value})) == plainly(prediction, f"its metadata {key} says {value!r}")


@pytest.mark.parametrize("value", ["v-zsnr", "v_prediction ztsnr", "vpred-zsnr", "ZSNR v", "v_zsnr"])
def test_metadata_may_add_the_schedule_to_the_prediction(value):
    clause = f"its metadata modelspec.prediction_type says {value!r}"
    decision = decided(File(metadata={"modelspec.prediction_type": value}))
    assert decision == Decision("v", True, f"{clause}; its schedule ends in zero SNR: {clause}", ())


@pytest.mark.parametrize("value", ["", " ", "None"])
def test_empty_metadata_say_nothing(value):
    assert decided(File(metadata={"modelspec.prediction_type": value})) == plainly("eps", BY_DEFAULT)


@pytest.mark.parametrize("key", ["modelspec.prediction_type", "modelspec.predict_key"])
@pytest.mark.parametrize("value", ["flow\n" + 100 * "!", "rectified", "epsilon+v", "v2"])
def test_words_that_are_not_known_are_noted_and_do_not_decide(key, value):
    decision = decided(File(metadata={key: value}))
    assert (decision.prediction, decision.why) == ("eps", BY_DEFAULT)
    assert decision.notes == (f"its metadata {key} says {value[:40]!r}, which is not a known prediction type",)


@pytest.mark.parametrize(
    ("key", "value", "prediction"),
    [
        ("modelspec.architecture", "stable-diffusion-v2-768-v", "v"),
        ("modelspec.architecture", "stable-diffusion-v2-512", "eps"),
        ("global_step", "875000", "eps"),
        ("global_step", "220000", "eps"),
        ("global_step", "110000", "v"),
    ],
)
def test_metadata_tell_apart_the_plain_models_of_sd2_and_no_others(key, value, prediction):
    file = File(metadata={key: value})
    assert decided(file, SD21_BASE) == plainly(prediction, f"its metadata {key} says {value!r}")
    for family in (SD15, SDXL_BASE):
        assert decided(file, family) == plainly("eps", BY_DEFAULT)


def test_another_architecture_or_step_says_nothing():
    metadata = {"modelspec.architecture": "stable-diffusion-xl-v1-base", "global_step": "470000"}
    assert decided(File(metadata=metadata), SD21_BASE) == plainly("eps", BY_DEFAULT)


def test_marker_tensors_decide():
    assert decided(marked("v_pred")) == plainly("v", "it holds the marker tensor v_pred")
    why = "it holds the marker tensor v_pred; its schedule ends in zero SNR: it holds the marker tensor ztsnr"
    assert decided(marked("v_pred", "ztsnr")) == Decision("v", True, why, ())


@pytest.mark.parametrize(
    ("marker", "model"), [("edm_mean", "Playground"), ("edm_std", "Playground"), ("edm_vpred.sigma_max", "CosXL")]
)
def test_edm_models_are_refused_by_name(marker, model):
    with pytest.raises(ValueError, match=rf"is an EDM model as {model}.* is \(it holds {marker}\).* not supported"):
        check_stored_plainly(marked("v_pred", marker))


def test_zero_terminal_snr_holds_whatever_decides_the_prediction():
    why = "you asked for eps; its schedule ends in zero SNR: it holds the marker tensor ztsnr"
    assert decided(marked("ztsnr"), asked="eps") == Decision("eps", True, why, ())
    said = {"ss_zero_terminal_snr": "True", "ss_v_parameterization": "True"}
    assert decided(File(metadata=said)).why.endswith("zero SNR: its metadata ss_zero_terminal_snr says so")
    assert not decided(File(metadata=said | {"ss_zero_terminal_snr": "False"})).zero_terminal_snr


@pytest.mark.parametrize("place", [UNET, Place("", "ldm"), Place("", "diffusers"), Place("unet.", "diffusers")])
@pytest.mark.parametrize(("std", "prediction", "side"), [(0.11, "v", "above"), (0.05, "eps", "not above")])
def test_the_spread_of_one_tensor_tells_the_plain_models_of_sd2_apart(std, prediction, side, place):
    name = place.prefix + PROBED[place.style]
    why = f"the standard deviation of {name}, {std:.3f}, is {side} 0.09, as in SD 2 models that predict {prediction}"
    assert decided(of_spread(std, place=place), SD21_BASE, place=place) == plainly(prediction, why)


def test_the_spread_is_that_of_a_whole_population():
    # two values 0.09 +- 0.0001 apart from their mean: dividing by n - 1 instead of n would give 0.127 for both
    for std, prediction in ((0.0901, "v"), (0.0899, "eps")):
        file = of_spread(0.2)
        file.values[UNET.prefix + PROBED["ldm"]] = torch.tensor([std, -std])
        assert decided(file, SD21_BASE).prediction == prediction


def test_the_spread_is_taken_in_any_dtype():
    for dtype in DTYPES.values():
        if dtype.is_floating_point:
            assert decided(of_spread(0.2, dtype), SD21_BASE).prediction == "v"
            assert decided(of_spread(0.02, dtype), SD21_BASE).prediction == "eps"


def test_the_spread_says_nothing_of_other_families_and_of_other_inputs():
    for family, inputs in ((SD15, 4), (SDXL_BASE, 4), (SD21_BASE, 9), (SD21_BASE, 8)):
        assert decided(of_spread(0.2, in_channels=inputs), family) == plainly("eps", BY_DEFAULT)


def test_the_order_is_user_known_file_markers_metadata_and_weights_and_the_others_are_noted():
    file = of_spread(0.2)
    spread = f"the standard deviation of {UNET.prefix}{PROBED['ldm']}, 0.200, is above 0.09, as in SD 2 models that "
    notes = [f"{spread}predict v, which is not followed"]
    file.metadata["global_step"] = "875000"
    file.metadata["modelspec.prediction_type"] = "epsilon"
    assert decided(file, SD21_BASE) == Decision(
        "eps", False, "its metadata modelspec.prediction_type says 'epsilon'", tuple(notes)
    )
    file.values["v_pred"] = torch.tensor([])
    decision = decided(file, SD21_BASE)
    assert (decision.prediction, decision.why) == ("v", "it holds the marker tensor v_pred")
    assert decision.notes == (
        "its metadata modelspec.prediction_type says 'epsilon', which is not followed",
        "its metadata global_step says '875000', which is not followed",
    )
    known = KnownFile("known.safetensors", "sd21-base")
    decision = decided(file, SD21_BASE, known=known)
    assert (decision.prediction, decision.why) == ("eps", "by its sha256 it is known.safetensors, which predicts eps")
    decision = decided(file, SD21_BASE, known=known, asked="v")
    assert (decision.prediction, decision.why) == ("v", "you asked for v")
    assert decision.notes[0] == "by its sha256 it is known.safetensors, which predicts eps, which is not followed"
