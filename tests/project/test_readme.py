"""The README is true: its Python runs, its options and files exist."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from arp_hub_cli.app import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^(?:<!-- (?P<mark>[^\n]+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
BLOCKS = [(m["language"], m["code"], m["mark"] or "") for m in BLOCK.finditer(README)]


def commands() -> list[list[str]]:
    """Every command of every shell block, split into words."""
    lines = [line for kind, code, _ in BLOCKS if kind == "bash" for line in code.splitlines() if line.strip()]
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]


def test_python_runs(client, tmp_path):
    """All blocks in turn, as a reader would type them in, with a small network and few images."""
    blocks = [code for kind, code, mark in BLOCKS if kind == "python" and not mark.startswith("no-test: ")]
    code = "\n".join(blocks)
    small = re.sub(r'create_model\("resnet\d+", pretrained=True\)', 'create_model("test_resnet")', code)
    assert small != code
    small = small.replace("torch.randn(32, 3, 64, 64)", "torch.randn(8, 3, 64, 64)")
    done = client.run(f"import os\nos.chdir({str(tmp_path)!r})\n{small}", token=None)
    assert done.code == 0, done.err


def test_commands_are_found():
    assert {"compress", "evaluate", "push"} <= {words[1] for words in commands() if words[0] == "arp-hub"}


@pytest.mark.parametrize("words", [words for words in commands() if words[0] == "arp-hub"], ids=" ".join)
def test_options_of_arp_hub_exist(words):
    result = CliRunner().invoke(app, [words[1], "--help"], terminal_width=200)
    assert result.exit_code == 0
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"{option}\b", result.output), f"{words[1]} has no {option}"


def test_recipes_and_their_options_exist(monkeypatch, capsys):
    used: dict[str, set[str]] = {}
    for words in commands():
        for start, word in enumerate(words):
            if word.startswith("recipes/"):
                used.setdefault(word, set()).update(w for w in words[start:] if w.startswith("--"))
    assert "recipes/quickstart.py" in used
    for recipe, options in used.items():
        monkeypatch.setattr(sys, "argv", [recipe, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / recipe), run_name="__main__")
        text = capsys.readouterr().out
        assert sorted(option for option in options if option not in text) == []


def test_named_modules_exist():
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("arp_hub/\n")[2].partition("\n```")[0]
    shown = re.findall(r"^  ([a-z_]+/)|([a-z_]+\.py)", tree, re.M)
    names = {folder or file for folder, file in shown}
    package = ROOT / "arp_hub"
    there = {f"{p.name}/" for p in package.iterdir() if (p / "__init__.py").exists()}
    there |= {
        p.name for p in package.glob("*.py") if p.name not in ("__init__.py", "__main__.py", "_version.py", "errors.py")
    }
    assert names == there


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_and_pictures_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [link.partition("#") for link in links if not link.startswith("http")]
    assert [path for path, _, _ in local if path and not (ROOT / path).exists()] == []
    aimed = [(path, anchor) for path, _, anchor in local if anchor]
    pages = {path: (ROOT / (path or page)).read_text(encoding="utf-8") for path, _ in aimed}
    assert [(path, anchor) for path, anchor in aimed if anchor not in headings(pages[path])] == []


def headings(page: str) -> set[str]:
    """The anchors of a page."""
    titles = re.findall(r"^#+ (.+)$", page, re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_it_is_short_and_needs_only_a_clone():
    assert len(README.splitlines()) <= 180
    assert "shared" not in README


def test_set_up_is_two_commands():
    assert "pip install -e . && accelerate launch recipes/quickstart.py" in README
    assert 'pip install -e ".[test]" && pytest' in README


def test_badges_tell_the_truth():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    licence, python = ((ROOT / f"docs/img/badge-{name}.svg").read_text() for name in ("licence", "python"))
    (named,), (oldest,) = (
        re.findall(rf'^{key} = "(?:>=)?(.+)"', project, re.M) for key in ("license", "requires-python")
    )
    assert f">{named}<" in licence
    assert f">{oldest} +<" in python
