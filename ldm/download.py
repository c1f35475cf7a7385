"""Official model files from the Hugging Face Hub: the only part of the library that uses the network.

A download is resumed where it stopped, and the file gets its name when its sha256 is the published one.
"""

import hashlib
import http
import http.client
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HOST = "https://huggingface.co"
CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Published:
    """A file as its publisher offers it. repository: OWNER/NAME. path: in the repository. size: bytes."""

    repository: str
    path: str
    size: int
    sha256: str
    license: str

    @property
    def file(self) -> str:
        """The name of the file."""
        return self.path.rpartition("/")[2]


_RAIL, _RAIL_PP, _STABILITY = "CreativeML Open RAIL-M", "CreativeML Open RAIL++-M", "Stability AI's own"
PUBLISHED = {
    "sd15": Published(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "v1-5-pruned-emaonly.safetensors",
        4_265_146_304,
        "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
        _RAIL,
    ),
    "sd-turbo": Published(
        "stabilityai/sd-turbo",
        "sd_turbo.safetensors",
        5_214_561_328,
        "3f067a1b943cf162f2b8f8588f6cf5824bd5b4c7d1d88d87164b9ca123616549",
        _STABILITY,
    ),
    "sdxl": Published(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "sd_xl_base_1.0.safetensors",
        6_938_078_334,
        "31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b",
        _RAIL_PP,
    ),
    "sdxl-refiner": Published(
        "stabilityai/stable-diffusion-xl-refiner-1.0",
        "sd_xl_refiner_1.0.safetensors",
        6_075_981_930,
        "7440042bbdc8a24813002c09b6b69b64dc90fded4472613437b7f55f9b7d9c5f",
        _RAIL_PP,
    ),
    "sdxl-turbo": Published(
        "stabilityai/sdxl-turbo",
        "sd_xl_turbo_1.0_fp16.safetensors",
        6_938_081_905,
        "e869ac7d6942cb327d68d5ed83a40447aadf20e0c3358d98b2cc9e270db0da26",
        _STABILITY,
    ),
    "sd-vae-mse": Published(
        "stabilityai/sd-vae-ft-mse-original",
        "vae-ft-mse-840000-ema-pruned.safetensors",
        334_641_190,
        "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75",
        "MIT",
    ),
    "sdxl-vae-fp16": Published(
        "madebyollin/sdxl-vae-fp16-fix",
        "sdxl_vae.safetensors",
        334_641_162,
        "235745af8d86bf4a4c1b5b4f529868b37019a10f7c0b2e79ad0abca3a22bc6e1",
        "MIT",
    ),
}


def download(
    published: Published,
    folder: Path,
    *,
    host: str = HOST,
    token: str | None = None,
    watch: Callable[[int], None] = lambda count: None,
) -> Path:
    """Fetch a file into `folder`, and return its path. A file that is there is checked, and not fetched again.

    host: the address of the Hub or of a mirror. token: for repositories that ask for an account. watch: is called with
    the number of bytes of each piece, those of an earlier call included.
    Raises ValueError for a file with another sha256, and for too little space. Raises OSError for a server that cannot
    be reached or does not have the file; the next call goes on.
    """
    path, part = folder / published.file, folder / f"{published.file}.part"
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        if _sha256(path, watch) != published.sha256:
            raise ValueError(f"{path} is another file than the published one: move it away, or name another folder")
        return path
    have = part.stat().st_size if part.exists() else 0
    free = shutil.disk_usage(folder).free
    if free < published.size - have:
        raise ValueError(f"{folder} has {free:,} bytes of free space, and {published.size - have:,} are needed")
    if have < published.size:
        url = f"{host.rstrip('/')}/{published.repository}/resolve/main/{published.path}"
        _fetch(url, part, have, token, watch)
        if (have := part.stat().st_size) < published.size:
            raise OSError(f"{url} stopped after {have:,} of {published.size:,} bytes; the same command goes on there")
    if (found := _sha256(part)) != published.sha256:
        part.unlink()
        raise ValueError(f"{published.file} arrived with the sha256 {found} in place of {published.sha256}: try again")
    part.rename(path)
    return path


def _fetch(url: str, part: Path, have: int, token: str | None, watch: Callable[[int], None]) -> None:
    """Append the bytes from number `have` on to `part`. Raises OSError if the connection fails."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # for the Hub, not for where the file lies
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            resumed = have > 0 and answer.status == http.HTTPStatus.PARTIAL_CONTENT
            if resumed:
                watch(have)
            with part.open("ab" if resumed else "wb") as file:
                while piece := answer.read(CHUNK):
                    file.write(piece)
                    watch(len(piece))
    except urllib.error.HTTPError as error:
        hint = ": accept its license on the Hub, and set HF_TOKEN" if error.code in (401, 403) else ""
        raise OSError(f"{url} answers {error.code} {error.reason}{hint}") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise OSError(f"{url} cannot be fetched ({reason}); the same command goes on where it stopped") from error


def _sha256(path: Path, watch: Callable[[int], None] = lambda count: None) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            found.update(piece)
            watch(len(piece))
    return found.hexdigest()
