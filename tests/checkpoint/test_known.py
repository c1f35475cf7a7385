"""Digests of files and folders, and the table of published ones."""

import hashlib
import json
import re
from importlib import resources

from ldm.checkpoint.known import known_files
from ldm.presets import PRESETS
from ldm.record import digest

FILES = json.loads(resources.files("ldm.checkpoint").joinpath("known.json").read_text(encoding="utf-8"))


def test_every_known_digest_is_one_sha256_of_one_preset():
    digests = [sha256 for files in FILES.values() for sha256 in files]
    assert len(set(digests)) == len(digests) > 30  # none is listed under two presets
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in digests)
    presets = {name.removesuffix("-inpainting") for name in FILES if name != "part"}
    assert presets == PRESETS.keys() - {"tiny"}


def test_a_file_is_looked_up_by_its_digest():
    for preset, files in FILES.items():
        for sha256, name in files.items():
            assert known_files()[sha256] == (name, None if preset == "part" else preset, "sha256")


def test_known_files_that_state_a_resolution_or_v_in_their_name_have_that_preset():
    for preset, names in FILES.items():
        for name in names.values():
            if name.startswith(("768-v", "v2-1_768")):
                assert preset == "sd21"
            if name.startswith(("512-base", "v2-1_512")):
                assert preset == "sd21-base"
            assert ("inpainting" in name) == ("inpainting" in preset)


def test_the_digest_of_a_file_is_its_sha256(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest(tmp_path / "model.ckpt") == digest(str(tmp_path / "model.ckpt")) == expected


def test_the_digest_of_a_folder_is_of_the_names_and_digests_of_its_files(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/model.safetensors").write_bytes(b"abc")
    (tmp_path / "config.json").write_bytes(b"{}")
    lines = [
        f"{name} {hashlib.sha256(content).hexdigest()}\n"
        for name, content in (("config.json", b"{}"), ("unet/model.safetensors", b"abc"))
    ]
    assert digest(tmp_path) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_digest_of_a_folder_changes_with_what_can_change_a_picture_only(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"abc")
    first = digest(tmp_path)
    (tmp_path / "README.md").write_bytes(b"words")
    (tmp_path / "sample.png").write_bytes(b"picture")
    assert digest(tmp_path) == first
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    renamed = digest(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"abd")
    assert len({first, renamed, digest(tmp_path)}) == 3
