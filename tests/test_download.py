"""`ldm.download` against a server on this machine, in a process of its own: the tests' process refuses sockets."""

import hashlib
import subprocess
import sys
import textwrap

import pytest

from ldm.cli import main
from ldm.download import PUBLISHED

BYTES = bytes(range(256)) * 20_000  # 5 MB

SERVER = """
import hashlib, http.server, sys, threading
from pathlib import Path
from ldm.download import Published, download
BYTES = bytes(range(256)) * 20_000
asked, cut, wrong, status, moved, whole = [], [None], [False], [None], [], [False]

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        asked.append((self.path, start, self.headers.get("Authorization")))
        if status[0]:
            self.send_error(status[0]); return
        if moved and self.path != "/moved":
            self.send_response(302)
            self.send_header("Location", moved[0])
            self.end_headers(); return
        start = 0 if whole[0] else start
        body = (b"x" * len(BYTES) if wrong[0] else BYTES)[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: cut[0]])
    def log_message(self, *words): pass

server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
host = f"http://127.0.0.1:{server.server_port}/"
model = Published("owner/model", "sub/model.bin", len(BYTES), hashlib.sha256(BYTES).hexdigest(), "MIT")
folder = Path(sys.argv[1])

def get(**more):
    try:
        return download(model, folder, host=host, **more)
    except (OSError, ValueError) as error:
        return error
"""


def served(tmp_path, code):
    script = SERVER + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_file_is_fetched_once_and_checked(tmp_path):
    served(
        tmp_path,
        """
        seen = []
        assert get(watch=seen.append, token="secret") == folder / "model.bin"
        assert sum(seen) == len(BYTES)
        assert get() == folder / "model.bin"
        assert asked == [("/owner/model/resolve/main/sub/model.bin", 0, "Bearer secret")]
        """,
    )
    assert hashlib.sha256((tmp_path / "model.bin").read_bytes()).digest() == hashlib.sha256(BYTES).digest()
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]


def test_a_download_that_was_cut_goes_on(tmp_path):
    served(
        tmp_path,
        """
        cut[0] = 2_000_000
        assert "stopped after 2,000,000 of 5,120,000 bytes" in str(get())
        cut[0] = None
        assert get() == folder / "model.bin"
        assert [start for _, start, _ in asked] == [0, 2_000_000]
        """,
    )


def test_a_server_that_sends_the_whole_file_again_is_no_problem(tmp_path):
    served(
        tmp_path,
        """
        cut[0], whole[0] = 2_000_000, True
        get()
        cut[0] = None
        assert get() == folder / "model.bin"
        assert [start for _, start, _ in asked] == [0, 2_000_000]
        """,
    )


def test_the_token_stays_with_the_hub_if_the_file_lies_elsewhere(tmp_path):
    served(
        tmp_path,
        """
        cut[0] = 2_000_000
        get()
        cut[0] = None
        moved.append(f"http://localhost:{server.server_port}/moved")  # another host
        assert get(token="secret") == folder / "model.bin"
        assert asked[1:] == [
            ("/owner/model/resolve/main/sub/model.bin", 2_000_000, "Bearer secret"), ("/moved", 2_000_000, None)
        ]
        """,
    )


def test_a_wrong_file_is_removed_and_named(tmp_path):
    served(
        tmp_path,
        """
        wrong[0] = True
        assert "model.bin arrived with the sha256" in str(get())
        assert not list(folder.iterdir())
        (folder / "model.bin").write_bytes(b"mine")
        assert "is another file than the published one" in str(get())
        assert (folder / "model.bin").read_bytes() == b"mine"
        """,
    )


@pytest.mark.parametrize(("status", "words"), [(404, "answers 404"), (403, "accept its license on the Hub")])
def test_an_answer_of_the_server_is_named(status, words, tmp_path):
    served(tmp_path, f"status[0] = {status}\nassert {words!r} in str(get())")


def test_the_command_lists_the_models_and_a_mirror_that_is_absent_is_an_error(tmp_path, capsys):
    assert main(["download"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(PUBLISHED)
    assert main(["download", "sd15", str(tmp_path), "--host", "http://127.0.0.1:9"]) == 2
    err = capsys.readouterr().err
    assert "v1-5-pruned-emaonly.safetensors of stable-diffusion-v1-5/stable-diffusion-v1-5: 4,265,146,304 bytes" in err
    assert "cannot be fetched" in err
