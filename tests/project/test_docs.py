"""The documentation is true: its Python runs, its commands and options exist, its tables are those of the results."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import arp_hub
from arp_hub.schemes import SCHEMES
from arp_hub.training import TrainConfig
from arp_hub.training.preemption import EXIT_CODE
from arp_hub_cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").rglob("*.md"))
}
BLOCK = re.compile(r"^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S)
NAV = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
OF_TOOLS = {f"docs/how-to/{name}.md" for name in ("peft", "transformers", "segmentation", "lightning", "torchvision")}
"""Pages about other packages, which tests/models/test_tools.py runs where those are installed."""
GUIDES = [name for name in PAGES if name.startswith("docs/how-to/") and name not in OF_TOOLS]
RUN = ["docs/index.md", "docs/tutorial.md", "docs/troubleshooting.md", *GUIDES]


WIDEST = 98


def blocks(page: str, language: str) -> list[str]:
    return [match["code"] for match in BLOCK.finditer(PAGES[page]) if match["language"] == language]


def commands() -> list[list[str]]:
    """Every command of every shell block, as words."""
    shell = [code.replace("\\\n", " ") for page in PAGES for code in blocks(page, "bash")]
    lines = [line for code in shell for line in code.splitlines() if line.strip()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", [name for name in PAGES if not name.startswith(("docs/research/", "docs/examples/"))])
def test_no_code_is_cut_off_at_1280_px(page):
    """The site shows `WIDEST` characters at 1280 px, and GitHub about as many."""
    lines = [line for match in BLOCK.finditer(PAGES[page]) for line in match["code"].splitlines()]
    assert [line for line in lines if len(line) > WIDEST] == []


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[-:] ([\w/-]+\.md)$", NAV, re.M))
    assert listed == {name.removeprefix("docs/") for name in PAGES if not name.startswith("docs/examples/")}


def test_python_of_all_pages_runs(client, tmp_path):
    """One process for all pages, each with names of its own, as a reader would type them in."""
    pages = {page: "\n".join(blocks(page, "python")) for page in RUN}
    assert all(
        pages[page]
        for page in ("docs/index.md", "docs/tutorial.md", "docs/troubleshooting.md", "docs/how-to/your-loop.md")
    )
    parts = [f"exec({code!r}, {{'__name__': {page!r}}})" for page, code in pages.items()]
    done = client.run("\n".join(["import os", f"os.chdir({str(tmp_path)!r})", *parts]), token=None)
    assert done.code == 0, done.err
    first, last = (float(number) for number in re.search(r"top-1 ([\d.]+) -> ([\d.]+) %", done.out).groups())
    assert first > 90
    assert last > first - 10


def test_the_total_of_faults_is_the_sum_of_its_rows():
    rows = [line.split(" | ") for line in PAGES["docs/faults.md"].splitlines() if line.startswith("| ")]
    tried = " ".join(re.sub(r"`[^`]*`|\[[^]]*\]\([^)]*\)", "", cells[1]) for cells in rows if len(cells) == 3)
    total = sum(int(one) * int(other or 1) for one, other in re.findall(r"(\d+)(?: \w+)?(?: × (\d+))?", tried))
    assert f"the rows below add up to {total:,} trials" in PAGES["docs/faults.md"]


def test_commands_and_their_options_exist():
    checked: dict[str, str] = {}
    used = [words[:3] if words[1] == "run" else words for words in commands() if words[0] == "arp-hub"]
    assert len(used) > 4
    for words in used:
        if words[1] not in checked:
            checked[words[1]] = CliRunner().invoke(app, [words[1], "--help"], terminal_width=200).output
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"{option}\b", checked[words[1]]), f"{words[1]} has no {option}"
    settings = {f"--{name.replace('_', '-')}" for name in TrainConfig.__dataclass_fields__}
    settings |= {"--config", "--print-config"}
    for words in commands():
        for start, word in enumerate(words):
            if word.startswith("recipes/"):
                assert (ROOT / word).is_file()
            if word.startswith("recipes/") and word.endswith(".py"):  # options before it are those of the launcher
                assert {option for option in words[start:] if option.startswith("--")} <= settings


def test_every_command_is_on_the_page_of_the_command_line():
    names = re.findall(r"^[│ ]+(\w+)  ", CliRunner().invoke(app, ["--help"]).output, re.M)
    assert {"plan", "doctor", "report"} <= set(names)
    page = PAGES["docs/command-line.md"]
    assert [name for name in names if f"`arp-hub {name}`" not in page] == []
    assert f"| {EXIT_CODE} | recipes |" in page


def test_every_public_name_is_in_the_reference():
    documented = set(re.findall(r"^::: ([\w.]+)$", PAGES["docs/api.md"], re.M))
    assert {f"arp_hub.{name}" for name in arp_hub.__all__} - {"arp_hub.models"} <= documented
    for path in documented:
        module, _, name = path.rpartition(".")
        __import__(module)
        assert hasattr(sys.modules[module], name), path


def test_every_scheme_is_explained():
    assert [name for name in SCHEMES if f"`{name}`" not in PAGES["docs/concepts.md"]] == []


def test_tables_are_those_of_the_results(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["planning.latency", "table"])
    runpy.run_module("benchmarks.planning.latency", run_name="__main__", alter_sys=True)
    printed = capsys.readouterr().out
    rows = [line for line in printed.partition("| row |")[0].splitlines() if line]  # the page regroups the rest
    assert len(rows) > 15
    assert [row for row in rows if row not in PAGES["docs/research/speed.md"].splitlines()] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    local = [link.partition("#")[0] for link in links if not link.startswith(("http", "#", "mailto:"))]
    assert [link for link in local if link and not (ROOT / page).parent.joinpath(link).exists()] == []
