"""Benchmarks start, lie in folders named after the package, and are named correctly in commands."""

from __future__ import annotations

import ast
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from arp_hub._utils.environment import environment
from arp_hub.hub.card import TEMPLATE
from benchmarks import accuracy, accuracy_report, deployment
from benchmarks.penalty import ablations
from benchmarks.planning import shared
from benchmarks.rows import load_results, load_rows, one_thread_command, results_file

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in BENCHMARKS.rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)
TEXTS = [
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.py", "arp_hub/**/*.py", "recipes/*.py", "pyproject.toml")
    for path in sorted(ROOT.glob(pattern))
    if path.name != "CHANGELOG.md"
]
COMMAND = re.compile(r"-m benchmarks((?:\.\w+)+)|\bbenchmarks/([\w/]+)\.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_benchmark_starts(script, monkeypatch, capsys):
    """Imports work, and the help names the benchmark's own command."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.delitem(sys.modules, script, raising=False)  # runpy warns of modules that are imported already
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    doc = ast.get_docstring(ast.parse(Path(ROOT, *script.split(".")).with_suffix(".py").read_text(encoding="utf-8")))
    assert doc.splitlines()[0] in capsys.readouterr().out
    assert script in doc or script.replace(".", "/") in doc


def whereabouts(row: str, shared: Path) -> dict[str, object]:
    """A row that tells where it is measured."""
    return {"row": row, "folder": str(shared), "process": os.getpid(), "threads": torch.get_num_threads()}


def test_rows_on_one_thread_each_have_a_process_of_their_own(monkeypatch, tmp_path):
    """The peak memory of a process is that of its largest row so far."""
    monkeypatch.setattr(sys, "argv", ["script", "run", "*", "--shared", str(tmp_path)])
    results = tmp_path / "results.json"
    one_thread_command("", ["a", "b"], results, whereabouts, str, str)
    found = load_results(results)
    assert {name: (row["row"], row["folder"], row["threads"]) for name, row in found.items()} == {
        name: (name, str(tmp_path), 1) for name in ("a", "b")
    }
    assert len({os.getpid(), *(row["process"] for row in found.values())}) == 3


def test_models_differ_relative_to_the_scale_of_each_tensor(tmp_path):
    """A BatchNorm's mean near zero is compared with the spread of its input."""
    tensors = {"norm.running_mean": torch.tensor([1e-3]), "norm.running_var": torch.tensor([4.0])}
    for name, mean in (("one", 1e-3), ("other", 3e-3)):
        (tmp_path / name).mkdir()
        save_file({**tensors, "norm.running_mean": torch.tensor([mean])}, tmp_path / name / "model.safetensors")
    assert shared.difference(tmp_path / "one", tmp_path / "other") == pytest.approx(1e-3)
    save_file({**tensors, "norm.running_var": torch.tensor([4.4])}, tmp_path / "other" / "model.safetensors")
    assert shared.difference(tmp_path / "one", tmp_path / "other") == pytest.approx(0.1)


def test_folders_are_those_of_the_package():
    folders = {path.parent.relative_to(BENCHMARKS).as_posix() for path in BENCHMARKS.rglob("*.py")} - {"."}
    parts = {path.relative_to(ROOT / "arp_hub").with_suffix("").parts[0] for path in (ROOT / "arp_hub").rglob("*.py")}
    assert folders <= parts


def test_commands_name_benchmarks_that_exist():
    named = {
        (path.name, match[1].strip(".").replace(".", "/") if match[1] else match[2])
        for path in TEXTS
        for match in COMMAND.finditer(path.read_text(encoding="utf-8"))
    }
    assert len(named) > 15
    assert [name for name in named if not (BENCHMARKS / f"{name[1]}.py").is_file()] == []


@pytest.mark.parametrize("folder", sorted(accuracy.MODELS.iterdir()), ids=lambda folder: folder.name)
def test_cards_of_kept_models_are_what_the_hub_package_writes(folder):
    assert (folder / "README.md").read_text(encoding="utf-8") == accuracy.card(folder)


@pytest.mark.parametrize("folder", sorted((ROOT / "docs" / "examples").iterdir()), ids=lambda folder: folder.name)
def test_cards_of_the_examples_have_the_headings_of_the_template(folder):
    headings = re.findall(r"^## .+$", TEMPLATE.read_text(encoding="utf-8"), re.M)
    found = re.findall(r"^## .+$", (folder / "README.md").read_text(encoding="utf-8"), re.M)
    assert len(found) > 5
    assert [heading for heading in headings if heading in found] == found


def test_pages_are_what_the_benchmarks_write():
    results = load_results(accuracy.RESULTS)
    readme = accuracy_report.README.read_text(encoding="utf-8")
    assert accuracy_report.PAGE.read_text(encoding="utf-8") == accuracy_report.page(results)
    assert readme == accuracy_report.with_tables(readme, results, load_rows(results_file("peers")))
    int8 = deployment.PAGE.read_text(encoding="utf-8")
    assert int8 == deployment.with_tables(int8, load_results(deployment.RESULTS))
    assert ablations.PAGE.read_text(encoding="utf-8") == ablations.page(load_results(ablations.RESULTS))


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda path: path.name)
def test_results_name_no_folder_of_a_machine(path):
    values = re.findall(r'"\w+": "(.*)"', path.read_text(encoding="utf-8"))
    assert [value for value in values if re.search(r"(^|[ =])/(?=[A-Za-z_])", value)] == []


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("/opt/bin/arp-hub", "arp-hub"),
        (str(ROOT / "arp_hub/__main__.py"), "__main__.py"),
        (str(ROOT / "recipes/vit.py"), "vit.py"),
        ("/opt/mytrainer/__main__.py", "./__main__.py"),
        ("/opt/work/vit.py", "./vit.py"),
        ("/opt/recipes/resnet50.py", "./resnet50.py"),
        ("/opt/train.py", "train.py"),
    ],
)
def test_a_script_of_a_user_is_not_taken_for_one_of_the_project(script, said, monkeypatch):
    monkeypatch.setattr("sys.argv", [script])
    assert environment()["command"] == said


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("/data/images", "images"),
        ("--data=/data/images", "--data=images"),
        ("../shared", "../shared"),
        ("{cwd}/runs/out", "runs/out"),
        ("0.5", "0.5"),
        ("--again", "--again"),
    ],
)
def test_a_recorded_command_names_no_folder_of_a_machine(word, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["/opt/bin/recipe.py", word.format(cwd=tmp_path)])
    assert environment()["command"] == f"recipe.py {said}"
