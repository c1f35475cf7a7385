"""Content credentials: signed with a certificate made here by openssl, read back, and every change is found."""

import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from ldm.pictures import save_png
from ldm.safety import credentials
from ldm.safety.credentials import Credentials, read, sign

_SECTIONS = """
[req]
distinguished_name = name
[name]
[anchor]
basicConstraints = critical, CA:true
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[signer]
basicConstraints = critical, CA:false
keyUsage = critical, digitalSignature
extendedKeyUsage = critical, emailProtection
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A folder with anchor.pem and, signed by it, signer.pem with signer.key."""
    pytest.importorskip("c2pa")
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates")
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "sections").write_text(_SECTIONS)

    def openssl(words):
        subprocess.run(["openssl", *words.split()], cwd=folder, check=True, capture_output=True)

    for name in ("anchor", "signer"):
        openssl(f"genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out {name}.key")
    made = "-config sections -subj /O=Tests/CN"
    openssl(f"req -x509 -new -key anchor.key -days 2 -out anchor.pem -extensions anchor {made}=anchor")
    openssl(f"req -new -key signer.key -out signer.csr {made}=painter")
    openssl(
        "x509 -req -in signer.csr -CA anchor.pem -CAkey anchor.key -CAcreateserial -days 2 -out signer.pem "
        "-extfile sections -extensions signer"
    )
    return folder


@pytest.fixture
def signed(certificates, tmp_path):
    """A signed PNG with a text chunk, and its pixels."""
    levels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    save_png(Image.fromarray(levels), tmp_path / "a.png", {"ldm": "how it was made"})
    sign(tmp_path / "a.png", certificates / "signer.pem", certificates / "signer.key")
    return tmp_path / "a.png", levels


def test_a_signed_picture_says_who_made_it_and_keeps_pixels_and_texts(signed, certificates):
    path, levels = signed
    assert read(path) == Credentials("Valid", ("signingCredential.untrusted",), "painter", True)
    assert read(path, certificates / "anchor.pem") == Credentials("Trusted", (), "painter", True)
    with Image.open(path) as picture:
        np.testing.assert_array_equal(np.asarray(picture), levels)
        assert picture.text == {"ldm": "how it was made"}
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]  # no temporary file is left


def test_a_changed_byte_is_found(signed, certificates):
    path, _ = signed
    data = bytearray(path.read_bytes())
    for place in (data.index(b"how it was made"), data.index(b"IDAT") + 900):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        found = read(path, certificates / "anchor.pem")
        assert found.state == "Invalid"
        assert "assertion.dataHash.mismatch" in found.problems


def test_saving_again_removes_the_credentials(signed, tmp_path):
    path, levels = signed
    save_png(Image.fromarray(levels), tmp_path / "b.png")
    assert read(tmp_path / "b.png") is None
    with Image.open(path) as picture:
        picture.save(tmp_path / "c.png")
    assert read(tmp_path / "c.png") is None


def test_a_key_that_does_not_fit_leaves_the_picture_as_it_was(signed, certificates, tmp_path):
    _, levels = signed
    save_png(Image.fromarray(levels), tmp_path / "b.png")
    before = (tmp_path / "b.png").read_bytes()
    with pytest.raises(ValueError, match=r"cannot sign .*b\.png with .*signer\.pem: "):
        sign(tmp_path / "b.png", certificates / "signer.pem", certificates / "anchor.key")
    assert (tmp_path / "b.png").read_bytes() == before
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot read the content credentials of"):
        read(tmp_path / "text.png")


def test_without_the_extra_the_error_names_it(monkeypatch, tmp_path):
    monkeypatch.setattr(credentials, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'ldm\[c2pa\]'"):
        read(tmp_path / "a.png")
