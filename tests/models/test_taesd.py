"""TAESD equals diffusers' AutoencoderTiny, from each layout of its files; other files are refused by name."""

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file

from ldm.checkpoint.taesd import load_taesd


@pytest.fixture(scope="module")
def theirs() -> AutoencoderTiny:
    """A TAESD of diffusers with random weights, at its full size."""
    torch.manual_seed(0)
    return AutoencoderTiny().eval().requires_grad_(False)


def state(theirs, first, prefix):
    """The decoder's tensors as other programs name them. first: the number of the first convolution."""
    found = {}
    for name, value in theirs.decoder.layers.state_dict().items():
        number, rest = name.split(".", 1)
        found[f"{prefix}{int(number) + first}.{rest}"] = value
    return found


def test_each_layout_gives_the_pictures_of_diffusers(theirs, tmp_path):
    latents = 2 * torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    expected = theirs.decode(latents).sample
    theirs.save_pretrained(tmp_path / "folder")
    paths = [tmp_path / "folder", tmp_path / "folder" / "diffusion_pytorch_model.safetensors"]
    for i, prefix in enumerate(["", "decoder.", "taesd_decoder."]):
        paths.append(tmp_path / f"{i}.safetensors")
        save_file(state(theirs, 1, prefix), paths[-1])
    for path in paths:
        difference = (load_taesd(path)(latents) - expected).abs().max()
        print(f"{path.name}: {difference:.1e}")
        assert difference < 1e-5
    assert expected.std() > 0.01  # a constant picture would show nothing


def test_a_decoder_for_more_channels_is_loaded_too(tmp_path):
    theirs = AutoencoderTiny(latent_channels=16)
    save_file(state(theirs, 1, ""), tmp_path / "a.safetensors")
    assert load_taesd(tmp_path / "a.safetensors").latent_channels == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"7.weight": None}, r"the TAESD decoder in .* does not match its configuration \(1 missing: 7\.weight"),
        ({"4.conv.1.weight": (1,)}, r"4\.conv\.1\.weight"),
        ({"1.weight": None}, r"is a TAESD, a tiny autoencoder, without a decoder of TAESD: give its taesd_decoder\.s"),
        ({"1.weight": (32, 4, 3, 3)}, r"without a decoder of TAESD: give its"),
        ({"1.weight": None, "lora_down.weight": (1,)}, r"is a LoRA, without a decoder of TAESD"),
    ],
)
def test_other_files_are_refused(theirs, tmp_path, change, message):
    tensors = state(theirs, 1, "")
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.zeros(shape)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        load_taesd(tmp_path / "a.safetensors")


def test_the_encoder_alone_is_refused(theirs, tmp_path):
    save_file(theirs.encoder.layers.state_dict(), tmp_path / "taesd_encoder.safetensors")
    with pytest.raises(ValueError, match=r"without a decoder of TAESD: give its taesd_decoder\.safetensors"):
        load_taesd(tmp_path / "taesd_encoder.safetensors")
