"""Shared by the benchmarks: the commands ``list``, ``run`` and ``table``, and results files with one entry a row."""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

Results = dict[str, dict[str, Any]]
HERE = Path(__file__).parent
"""Folder of the benchmarks, which holds ``results/``, and ``models/``."""


def results_file(name: str) -> Path:
    """The file that holds the results of one benchmark."""
    return HERE / "results" / f"{name}.json"


def row_parser(doc: str | None, table: str) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser of a command line with ``list``, ``run`` and ``table``, and the parser of ``run``.

    Args:
        doc: Docstring of the script, as the description.
        table: Help text of ``table``.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="print the name of every row, and its result if there is one")
    runner = commands.add_parser("run", help="measure rows")
    runner.add_argument("rows", nargs="+", help="names or patterns")
    runner.add_argument("--again", action="store_true", help="also measure rows that already have a result")
    commands.add_parser("table", help=table)
    return parser, runner


def chosen(rows: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match a pattern, in the order of ``rows``. The program ends if none does."""
    names = [name for name in rows if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not names:
        raise SystemExit(f"no row matches {' '.join(patterns)}: see 'list'")
    return names


def load_results(path: Path) -> Results:
    """Results by row name; empty without a file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def load_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file that is a list; empty without a file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def without_folder(text: str, shared: Path) -> str:
    """A stored text without the folder of data and weights, which readers do not have: ``data/cifar10``.

    Example:
        >>> without_folder("train.py --data ../shared/data/cifar10 --shared ../shared", Path("../shared"))
        'train.py --data data/cifar10 --shared FOLDER'
    """
    return text.replace(f"{shared}/", "").replace(f"--shared {shared}", "--shared FOLDER")


def replace_row(path: Path, row: Mapping[str, Any], *, same: Sequence[str]) -> None:
    """Write a row over the one with equal values in the columns ``same``, and keep all other rows."""
    kept = [old for old in load_rows(path) if any(old.get(key) != row[key] for key in same)]
    _write(path, [*kept, dict(row)])


def write_result(path: Path, name: str, result: Mapping[str, Any]) -> None:
    """Write one result and keep all others."""
    _write(path, load_results(path) | {name: dict(result)}, sort_keys=True)


def _write(path: Path, content: Any, sort_keys: bool = False) -> None:
    """Replace a results file in one step, so that a stopped benchmark leaves it intact."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=sort_keys) + "\n", encoding="utf-8")
    temporary.replace(path)


def run_rows(
    names: Iterable[str],
    path: Path,
    again: bool,
    measure: Callable[[str], Mapping[str, Any]],
    number: Callable[[dict[str, Any]], str],
) -> None:
    """Measure rows and write each result immediately. Rows with a result are skipped unless ``again``."""
    for name in names:
        if again or name not in load_results(path):
            result = dict(measure(name))
            write_result(path, name, result)
            print(f"{name}: {number(result)}", flush=True)


def row_command(
    parser: argparse.ArgumentParser,
    rows: Iterable[str],
    path: Path,
    measure: Callable[[str, argparse.Namespace], Mapping[str, Any]],
    number: Callable[[dict[str, Any]], str],
    table: Callable[[], None],
) -> None:
    """Parse the command line of `row_parser` and run its command.

    Args:
        parser: The parser.
        rows: Names of all rows.
        path: Results file.
        measure: Measures one row, from its name and the parsed command line.
        number: A result in a few words.
        table: Runs the command ``table``.
    """
    args = parser.parse_args()
    if args.command == "list":
        print_rows(rows, load_results(path), number)
    elif args.command == "run":
        run_rows(chosen(rows, args.rows), path, args.again, lambda name: measure(name, args), number)
    else:
        table()


def one_thread_command(
    doc: str | None,
    rows: Iterable[str],
    path: Path,
    measure: Callable[[str, Path], Mapping[str, Any]],
    number: Callable[[dict[str, Any]], str],
    table: Callable[[Results], str],
) -> None:
    """`row_command` for rows that are measured on one thread, from the networks of ``--shared``; it prints the table.

    Each row is measured in a process of its own, whose peak memory is that of the row.

    Args:
        doc: Docstring of the script, as the description.
        rows: Names of all rows.
        path: Results file.
        measure: Measures one row, from its name and the shared folder: a top-level function, which the process imports.
        number: A result in a few words.
        table: The results as a Markdown table.
    """
    parser, runner = row_parser(doc, table="print the results as a table")
    runner.add_argument("--shared", type=Path, required=True, help="folder with weights/ and data/")
    row_command(
        parser,
        rows,
        path,
        lambda row, args: _measured_alone(measure, row, args.shared),
        number,
        lambda: print(table(load_results(path)), end=""),
    )


def _measured_alone(measure: Callable[[str, Path], Mapping[str, Any]], row: str, shared: Path) -> Mapping[str, Any]:
    """Measure a row on one thread of a new process."""
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return pool.submit(measure, row, shared).result()


def print_rows(rows: Iterable[str], found: Results, number: Callable[[dict[str, Any]], str]) -> None:
    """Print one line for each row: its name, and its number if it has a result."""
    for name in rows:
        print(f"{name:45} {number(found[name])}" if name in found else name)
