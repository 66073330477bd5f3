"""The notebooks run from top to bottom, each in a process of its own, and their stored cells are clean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_server import ALICE
from wording import findings

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "examples").glob("*.ipynb")}


def source(name: str, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == kind]


def program(name: str, folder: Path) -> str:
    """The code of all cells in one namespace, in a folder of its own."""
    return "\n".join([f"import os\nos.chdir({str(folder)!r})", *source(name, "code")])


def test_compress_and_inspect(client, tmp_path):
    code = program("compress_and_inspect", tmp_path)
    sizes = {"EPOCHS = 6": "EPOCHS = 1", "IMAGES = 256": "IMAGES = 32", "(0.7, 0.35)": "(0.7,)"}
    quick = {f"keep_params={share}": f"keep_params={share}, schemes=['channel']" for share in ("0.5", "share")}
    for full, small in (sizes | quick).items():
        assert full in code
        code = code.replace(full, small)
    done = client.run(code, token=None)
    assert done.code == 0, done.err
    assert "rank" in done.out and "factors" in done.out and "70% of the parameters: top-1" in done.out


@pytest.mark.parametrize("token", [None, ALICE], ids=["no token", "token"])
def test_publish_and_load(hub, client, tmp_path, token):
    code = program("publish_and_load", tmp_path).replace("me/test-resnet-arp", "alice/test-resnet-arp")
    done = client.run(code, token=token)
    assert done.code == 0, done.err
    assert "True" in done.out and "False" not in done.out
    assert ("no token" in done.out) == (token is None)
    assert ("alice/test-resnet-arp" in hub.repos) == (token is not None)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_cells_are_clean(name):
    cells = NOTEBOOKS[name]["cells"]
    assert all(
        cell["execution_count"] is None and cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code"
    )
    assert [line for text in source(name, "markdown") for line in findings(text)] == []
