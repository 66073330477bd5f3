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
    """All blocks one after the other, as a reader would type them in; a small network stands in for the large ones."""
    blocks = [code for kind, code, mark in BLOCKS if kind == "python" and not mark.startswith("no-test: ")]
    code = "\n".join(blocks)
    small = re.sub(r'create_model\("resnet\d+", pretrained=True\)', 'create_model("test_resnet")', code)
    assert small != code
    done = client.run(f"import os\nos.chdir({str(tmp_path)!r})\n{small}", token=None)
    assert done.code == 0, done.err


def test_commands_are_found():
    assert [words[1] for words in commands() if words[0] == "arp-hub"].count("compress") >= 2


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


def test_named_modules_and_links_exist():
    tree = README.partition("arp_hub/\n")[2].partition("\n```")[0]
    shown = re.findall(r"^  ([a-z_]+/)|([a-z_]+\.py)", tree, re.M)
    names = {folder or file for folder, file in shown}
    package = ROOT / "arp_hub"
    there = {f"{p.name}/" for p in package.iterdir() if (p / "__init__.py").exists()}
    there |= {
        p.name for p in package.glob("*.py") if p.name not in ("__init__.py", "__main__.py", "_version.py", "errors.py")
    }
    assert names == there
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_command_of_arp_hub_is_in_the_readme():
    result = CliRunner().invoke(app, ["--help"])
    names = re.findall(r"^[│ ]+(\w+)  ", result.output, re.M)
    assert {"plan", "compress", "evaluate", "inspect"} <= set(names)
    assert [name for name in names if f"`arp-hub {name}`" not in README] == []
