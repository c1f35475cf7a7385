"""What decides the prediction type of a single file, in which order, and what is said about it."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from ldm.checkpoint.prediction import EDM_MARKERS, MARKERS, MAX_SIDECAR, PROBED, Decision, decide
from torch import Tensor

from ldm.checkpoint.known import KNOWN, KnownFile
from ldm.checkpoint.tensors import DTYPES

UNET = "model.diffusion_model."
BY_DEFAULT = "its family does and nothing in it says otherwise"


@dataclasses.dataclass
class File:
    """Stands in for TensorFiles: a file with these tensors and this metadata."""

    path: Path = Path("nowhere/model.safetensors")
    values: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.path,)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.values.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        return dict.fromkeys(self.values, "F32")

    def read(self, names: Iterable[str], *, mapped: bool = True) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.values[name]) for name in names)


def marked(*names: str) -> File:
    return File(values=dict.fromkeys(names, torch.tensor([])))


def saying(**metadata: str) -> File:
    return File(metadata={key.replace("__", "."): value for key, value in metadata.items()})


def of_spread(std: float, dtype: torch.dtype = torch.float16) -> File:
    """A file whose probed tensor has that standard deviation, over all its 320 elements."""
    return File(values={UNET + PROBED: torch.tensor([std, -std] * 160, dtype=dtype)})


def decided(file: File, family="sdxl", in_channels=4, **options) -> Decision:
    return decide(file, family=family, unet_prefix=UNET, in_channels=in_channels, **options)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_what_nothing_speaks_of_predicts_eps(family):
    assert decided(File(), family) == Decision("eps", False, BY_DEFAULT)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_user_is_obeyed(prediction):
    decision = decided(File(), asked=prediction)
    assert decision == Decision(prediction, False, f"you asked for {prediction}")


def test_known_digests_speak_for_their_preset():
    for known in KNOWN.values():
        if known.preset is None:
            assert decided(File(), "sd2", known=known).why == BY_DEFAULT
        else:
            decision = decided(File(), "sd2", known=known)
            assert decision.prediction == ("v" if known.preset == "sd21" else "eps")
            assert decision.why.startswith(f"by its sha256 it is {known.name}, which predicts")


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
    decision = decided(File(metadata={key: value}))
    assert decision == Decision(prediction, False, f"its metadata {key} says {value!r}")


@pytest.mark.parametrize("value", ["", " ", "None"])
def test_empty_metadata_say_nothing(value):
    assert decided(saying(modelspec__prediction_type=value)).why == BY_DEFAULT


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
    assert decided(file, "sd2") == Decision(prediction, False, f"its metadata {key} says {value!r}")
    for family, in_channels in (("sd2", 9), ("sd1", 4), ("sdxl", 4)):
        assert decided(file, family, in_channels).why == BY_DEFAULT


def test_another_architecture_or_step_says_nothing():
    file = saying(modelspec__architecture="stable-diffusion-xl-v1-base", global_step="470000")
    assert decided(file, "sd2").why == BY_DEFAULT


@pytest.mark.parametrize("key", ["modelspec.prediction_type", "ss_v_parameterization"])
def test_metadata_that_are_not_understood_are_an_error_unless_the_user_decides(key):
    file = File(metadata={key: "flow\n" + 100 * "!"})
    with pytest.raises(
        ValueError,
        match=rf"model.safetensors: its metadata {key} says 'flow\\n!{{35}}', which is not understood: say what it "
        "predicts by prediction='eps', 'v' or 'x0'",
    ):
        decided(file)
    decision = decided(file, asked="v")
    assert decision.prediction == "v"
    assert decision.why.startswith(f"you asked for v, although its metadata {key} says 'flow")


def test_marker_tensors_decide():
    assert decided(marked("v_pred")) == Decision("v", False, "it holds the marker tensor v_pred")
    noob = decided(marked("v_pred", "ztsnr"))
    assert noob == Decision(
        "v", True, "it holds the marker tensor v_pred; zero terminal SNR, because it holds the marker tensor ztsnr"
    )


@pytest.mark.parametrize("asked", [None, "v"])
@pytest.mark.parametrize(("marker", "model"), EDM_MARKERS.items())
def test_edm_models_are_refused_by_name_whatever_the_user_asks(marker, model, asked):
    with pytest.raises(ValueError, match=rf"is an EDM model as {model} is \(it holds {marker}\).* not supported"):
        decided(marked("v_pred", marker), asked=asked)


def test_all_markers_are_listed_for_the_loader():
    assert sorted(MARKERS) == sorted(["v_pred", "ztsnr", *EDM_MARKERS])


def test_zero_terminal_snr_holds_whatever_decides_the_prediction():
    assert decided(marked("ztsnr"), asked="eps") == Decision(
        "eps", True, "you asked for eps; zero terminal SNR, because it holds the marker tensor ztsnr"
    )
    file = saying(ss_zero_terminal_snr="True", ss_v_parameterization="True")
    assert decided(file).zero_terminal_snr
    assert decided(file).why.endswith("because its metadata ss_zero_terminal_snr says so")
    assert not decided(saying(ss_zero_terminal_snr="False")).zero_terminal_snr


@pytest.mark.parametrize(
    ("text", "prediction", "said"),
    [
        ('model:\n  params:\n    parameterization: "v"  # all of it\n', "v", "says 'v'"),
        ("parameterization: 'eps'", "eps", "says 'eps'"),
        ("\ufeffparameterization: x0\r\n", "x0", "says 'x0'"),
        ('{"model": {"params": {"parameterization": "v"}}}', "v", "says 'v'"),
        ("target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling", "v", "says 'VScaling'"),
        ("target: sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling", "eps", "says 'EpsScaling'"),
        (
            "target: ldm.models.diffusion.ddpm.LatentDiffusion\n# parameterization: v",
            "eps",
            "leaves it at LDM's default, eps",
        ),
    ],
)
def test_a_configuration_beside_the_file_decides(text, prediction, said, tmp_path):
    (tmp_path / "model.v1.yaml").write_text(text)
    decision = decided(File(tmp_path / "model.v1.safetensors"))
    assert decision == Decision(prediction, False, f"model.v1.yaml beside it {said}")


@pytest.mark.parametrize("text", ["", "prompt: a v8 engine", "# parameterization: v", "a: [1, 2]"])
def test_another_yaml_beside_the_file_says_nothing(text, tmp_path):
    (tmp_path / "model.yaml").write_text(text)
    assert decided(File(tmp_path / "model.safetensors")).why == BY_DEFAULT


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("parameterization: ${other}", "says 'other'"),
        ("parameterization:\n  v\n", "says ''"),
        ("target: sgm.denoiser_scaling.VScalingWithEDMcNoise", "says 'VScalingWithEDMcNoise'"),
        ("target: sgm.denoiser_scaling.EDMScaling", "says 'EDMScaling'"),
        ("parameterization: v\n" + " " * MAX_SIDECAR, "is too large to be a configuration"),
    ],
)
def test_a_configuration_that_is_not_understood_is_an_error(text, said, tmp_path):
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"model\.yaml beside it {said}, which is not understood"):
        decided(File(tmp_path / "model.safetensors"))


def test_a_configuration_runs_nothing_and_survives_any_bytes(tmp_path):
    sidecar = tmp_path / "model.yaml"
    sidecar.write_bytes(b"!!python/object/apply:os.mkdir [ran]\n\xff\xfe\x00")
    assert decided(File(tmp_path / "model.safetensors")).why == BY_DEFAULT
    assert [path.name for path in tmp_path.iterdir()] == ["model.yaml"]
    sidecar.unlink()
    sidecar.mkdir()
    assert decided(File(tmp_path / "model.safetensors")).why == BY_DEFAULT


@pytest.mark.parametrize(("std", "prediction", "side"), [(0.11, "v", "above"), (0.05, "eps", "not above")])
def test_the_spread_of_one_tensor_tells_the_plain_models_of_sd2_apart(std, prediction, side):
    decision = decided(of_spread(std), "sd2")
    assert decision == Decision(
        prediction,
        False,
        f"the standard deviation of {UNET}{PROBED}, {std:.3f}, is {side} 0.09 as in SD 2 models that predict "
        f"{prediction}",
    )


def test_the_spread_is_that_of_a_whole_population():
    # two values 0.09 +- 0.0001 apart from their mean: dividing by n - 1 instead of n would give 0.127 for both
    for std, prediction in ((0.0901, "v"), (0.0899, "eps")):
        file = File(values={UNET + PROBED: torch.tensor([std, -std])})
        assert decided(file, "sd2").prediction == prediction


def test_the_spread_is_taken_in_any_dtype():
    for dtype in DTYPES.values():
        if dtype.is_floating_point:
            assert decided(of_spread(0.2, dtype), "sd2").prediction == "v"
            assert decided(of_spread(0.02, dtype), "sd2").prediction == "eps"


def test_the_spread_says_nothing_of_other_families_and_of_inpainting():
    for family, in_channels in (("sd1", 4), ("sdxl", 4), ("sd2", 9), ("sd2", 8)):
        assert decided(of_spread(0.2), family, in_channels).why == BY_DEFAULT


def test_sd_turbo_is_told_from_its_prefixes_and_predicts_eps():
    file = of_spread(0.2)
    file.values["conditioner.embedders.0.model.ln_final.weight"] = torch.ones(1024)
    decision = decided(file, "sd2")
    assert decision.prediction == "eps"
    assert decision.why == "it names its text encoder as SD-Turbo does, which predicts eps"


def test_the_order_is_user_digest_metadata_markers_configuration_and_weights(tmp_path):
    file = of_spread(0.2)  # v
    known = KnownFile("known.safetensors", "sd21")  # v
    assert decided(file, "sd2").prediction == "v"
    file.path = tmp_path / "model.safetensors"
    (tmp_path / "model.yaml").write_text("parameterization: eps")
    assert decided(file, "sd2").prediction == "eps"
    file.values["v_pred"] = torch.tensor([])
    assert decided(file, "sd2").prediction == "v"
    file.metadata["modelspec.architecture"] = "stable-diffusion-v2-512"
    assert decided(file, "sd2").prediction == "eps"
    file.metadata["ss_v_parameterization"] = "true"
    assert decided(file, "sd2").prediction == "v"
    file.metadata["modelspec.predict_key"] = "epsilon"
    assert decided(file, "sd2").prediction == "eps"
    file.metadata["modelspec.prediction_type"] = "v"
    assert decided(file, "sd2").prediction == "v"
    file.metadata["modelspec.prediction_type"] = "epsilon"
    assert decided(file, "sd2", known=known).prediction == "v"
    decision = decided(file, "sd2", known=known, asked="eps")
    assert decision == Decision(
        "eps",
        False,
        "you asked for eps, although by its sha256 it is known.safetensors, which predicts v and its metadata "
        "ss_v_parameterization says 'true' and it holds the marker tensor v_pred and the standard deviation of "
        f"{UNET}{PROBED}, 0.200, is above 0.09 as in SD 2 models that predict v",
    )
