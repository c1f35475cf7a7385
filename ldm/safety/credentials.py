"""Content credentials (C2PA): a signed note inside a picture file that a model made the picture.

The signature covers the bytes of the file. Any later change of pixels or metadata is found, and saving the picture
again removes the note. So sign last, after the watermark. This needs the extra `c2pa`. Nothing is fetched: timestamps,
certificate status and manifests elsewhere would need the network.
"""

import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ldm
from ldm.atomic import beside

MADE_BY_A_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_SETTINGS = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "builder": {"thumbnail": {"enabled": False}},
}


@dataclass(frozen=True)
class Credentials:
    """What the content credentials of a picture say.

    state: "Trusted" for a signer whose certificate leads to a given anchor, and "Valid" for another signer. "Invalid":
    the file was changed, or the signature is wrong. problems: codes of the C2PA specification.
    signer: the name in the certificate. made_by_a_model: whether the note says so.
    """

    state: str
    problems: tuple[str, ...]
    signer: str
    made_by_a_model: bool


def sign(path: str | Path, certificates: str | Path, key: str | Path, *, algorithm: str = "es256") -> None:
    """Add content credentials to the picture file at `path` (PNG, JPEG or WebP), completely or not at all.

    certificates: a PEM file with the signer's certificate and those up to, but without, the anchor. The first must
    allow signatures (C2PA 2.1, section 14.5). key: a PEM file. algorithm: es256, es384, es512, ps256, ps384, ps512 or
    ed25519; it must fit the key.
    Raises ValueError without the extra, and for a picture, certificate or key that c2pa refuses.
    """
    c2pa, path = _library(), Path(path)
    manifest = {
        "claim_generator_info": [{"name": "ldm", "version": ldm.__version__}],
        "title": path.name,
        "assertions": [
            {
                "label": "c2pa.actions",
                "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": MADE_BY_A_MODEL}]},
            }
        ],
    }
    signer = (Path(certificates).read_bytes(), Path(key).read_bytes())
    with beside(path) as new:
        try:
            info = c2pa.C2paSignerInfo(algorithm, *signer, None)
            context = c2pa.Context(c2pa.Settings.from_dict(_SETTINGS))
            with (
                c2pa.Signer.from_info(info) as by,
                c2pa.Builder(manifest, context) as builder,
                path.open("rb") as source,
                new.open("w+b") as target,
            ):
                builder.sign(by, path.suffix[1:].lower(), source, target)
        except c2pa.C2paError as error:
            raise ValueError(f"cannot sign {path} with {certificates}: {error}") from error
        os.replace(new, path)


def read(path: str | Path, anchors: str | Path | None = None) -> Credentials | None:
    """Read and verify the content credentials of a picture file; None if it has none.

    anchors: a PEM file with the certificates that are trusted.
    Raises ValueError without the extra, and for a file that c2pa cannot read.
    """
    c2pa = _library()
    settings: dict[str, Any] = dict(_SETTINGS)
    if anchors is not None:
        settings["trust"] = {"trust_anchors": Path(anchors).read_text(encoding="ascii")}
    try:
        with Path(path).open("rb") as file:
            context = c2pa.Context(c2pa.Settings.from_dict(settings))
            with c2pa.Reader(Path(path).suffix[1:].lower(), file, context=context) as reader:
                state, found = reader.get_validation_state(), json.loads(reader.json())
    except c2pa.C2paError as error:
        if "ManifestNotFound" in str(error):
            return None
        raise ValueError(f"cannot read the content credentials of {path}: {error}") from error
    manifest = found["manifests"][found["active_manifest"]]
    sources = [
        action.get("digitalSourceType")
        for assertion in manifest.get("assertions", ())
        if assertion["label"].startswith("c2pa.actions")
        for action in assertion["data"]["actions"]
    ]
    return Credentials(
        state,
        tuple(problem["code"] for problem in found.get("validation_status", ())),
        manifest.get("signature_info", {}).get("common_name", ""),
        MADE_BY_A_MODEL in sources,
    )


def _library() -> Any:
    if find_spec("c2pa") is None:
        raise ValueError(
            "content credentials need c2pa-python, which is not installed: install the extra with pip install "
            "'ldm[c2pa]'"
        )
    import c2pa

    return c2pa
