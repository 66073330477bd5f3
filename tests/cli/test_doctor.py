"""`arp-hub doctor`: what it sees, against a Hub on this machine that answers as the real one does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import search_path

from arp_hub_cli.app import app
from arp_hub_cli.doctor import _requirements, examine

TOKEN = "hf_aVerySecretToken"


class Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        wanted = "/whoami" in self.path
        answer = {"error": "Invalid credentials"} if wanted and not known else {"type": "user", "name": "alice"}
        body = json.dumps(answer).encode()
        self.send_response(401 if wanted and not known else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            app(["doctor", *words])
        return (stop.value.code or 0, *capsys.readouterr())

    return call


def free_space(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    """Every disk has this much free space."""
    usage = shutil.disk_usage("/")._replace(free=int(gib * 2**30))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, requirements: list[str], extras: Sequence[str] = ("toys",)
) -> None:
    """Install metadata of arp-hub with these requirements, before the real ones."""
    metadata = folder / "arp_hub-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: arp-hub", "Version: 0.1.0", *(f"Provides-Extra: {n}" for n in extras)]
    metadata.write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requirements)]))
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize(
    ("token", "user", "refused"),
    [(None, None, False), (TOKEN, "alice", False), ("hf_anOldToken", None, True)],
)
def test_login_state(hub, monkeypatch, token, user, refused):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    found = examine(hub)
    assert found["hub"] == {"endpoint": hub, "reachable": True, "user": user, "token": token is not None}
    about_the_hub = [problem for problem in found["problems"] if "Hub" in problem]
    assert found["notes"] == []
    assert len(about_the_hub) == refused
    if refused:
        assert "refuses the stored token (401): log in again with `hf auth login`" in about_the_hub[0]
    assert token is None or token not in json.dumps(found)


def test_a_healthy_machine(hub, run, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    free_space(monkeypatch, gib=100)
    code, out, err = run()
    assert (code, err) == (0, "no problem found\n")
    assert torch.__version__.partition("+")[0] in out
    assert "logged in as alice" in " ".join(out.split())
    assert TOKEN not in out
    code, out, err = run("--json")
    assert code == 0
    assert json.loads(out)["problems"] == []


MARKERS = {
    "another Python": ('x; python_version < "3.1"', {"toys": True}, False),
    "this Python": ('x; python_version >= "3.1"', {"toys": True}, True),
    "another system": ('x; sys_platform == "amiga"', {"toys": True}, False),
    "an extra": ('x; extra == "toys"', {"toys": False}, False),
    "an extra, the other way round": ('x; "toys" == extra', {"toys": False}, False),
    "an extra here": ('x; python_version >= "3.1" and extra == "toys"', {"toys": False}, False),
    "an extra here, the other way round": ('x; extra == "toys" and python_version >= "3.1"', {"toys": False}, False),
    "an extra elsewhere": ('x; extra == "toys" and sys_platform == "amiga"', {"toys": True}, False),
    "either of two extras": ('x; extra == "toys" or extra == "games"', {"toys": False, "games": False}, False),
}


@pytest.mark.parametrize("case", MARKERS)
def test_only_extras_are_listed_as_extras(monkeypatch, tmp_path, case):
    line, extras, problem = MARKERS[case]
    install(tmp_path, monkeypatch, ["torch", *(f'torch; extra == "{name}"' for name in extras), line], [*extras])
    problems, found = _requirements()
    assert found == extras
    assert bool(problems) is problem


def test_what_is_wrong_is_named_with_the_way_out(run, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    install(tmp_path, monkeypatch, ["torch>=99", "no-such-package", 'x; extra == "toys"'])
    free_space(monkeypatch, gib=1)
    code, out, err = run()
    assert code == 1
    for words in (
        'pip install --upgrade "torch>=99"',
        "no-such-package is missing",
        "has 1.0 GiB left: make room",
    ):
        assert words in err
    assert "toys no" in out


@pytest.mark.parametrize(
    ("offline", "words"),
    [(False, "http://127.0.0.1:9 cannot be reached"), (True, "switched off by HF_HUB_OFFLINE=1")],
    ids=["no network", "switched off"],
)
def test_a_machine_without_the_hub_is_healthy(run, monkeypatch, offline, words):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    free_space(monkeypatch, gib=100)
    code, _, err = run()
    assert code == 0
    first, last = err.splitlines()
    assert first.startswith("note: the Hub") and words in first and last == "no problem found"


@pytest.mark.parametrize(
    ("package", "error", "way_out"),
    [
        ("torchvision", "RuntimeError('operator torchvision::nms does not exist')", "reinstall torch torchvision"),
        ("torch", "OSError('libcudart.so.12: cannot open')", "pip install --upgrade --force-reinstall torch"),
        ("timm", "ImportError('no name x')", "pip install --upgrade --force-reinstall timm"),
    ],
)
def test_a_package_that_does_not_import_is_one_line(tmp_path, package, error, way_out):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(f"raise {error}\n")
    places = os.pathsep.join([str(tmp_path), search_path(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": places}

    def arp_hub(*words: str) -> tuple[int, list[str]]:
        code = f"import sys; sys.argv = ['arp-hub', *{words!r}]; from arp_hub_cli.app import app; app()"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr.splitlines()

    code, lines = arp_hub("doctor")
    assert code == 1 and len(lines) == 1
    assert lines[0].startswith(f"problem: {package} does not import (") and lines[0].endswith(way_out)
    code, lines = arp_hub("evaluate", "--model", "resnet18", "--data", "digits")
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith("error: a package does not import (") and "`arp-hub doctor`" in lines[0]
