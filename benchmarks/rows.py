"""Rows of a benchmark by name: its command line, which were chosen, and the results file, one entry a row."""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Results = dict[str, dict[str, Any]]


def row_parser(doc: str | None, table: str) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The command line with ``list``, ``run`` and ``table``, for which there is the help; and that of ``run`` alone."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names of all rows, with the results there are")
    runner = commands.add_parser("run", help="measure rows")
    runner.add_argument("rows", nargs="+", help="names or patterns")
    runner.add_argument("--again", action="store_true", help="measure rows that have a result already")
    commands.add_parser("table", help=table)
    return parser, runner


def chosen(rows: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that one of the patterns matches, in the order of ``rows``; the program ends if there is none."""
    names = [name for name in rows if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not names:
        raise SystemExit(f"no row matches {' '.join(patterns)}: see 'list'")
    return names


def load_results(path: Path) -> Results:
    """Results by row name; none if there is no file yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_result(path: Path, name: str, result: Mapping[str, Any]) -> None:
    """Put one result in, the others stay."""
    results = load_results(path) | {name: dict(result)}
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


def run_rows(
    names: Iterable[str],
    path: Path,
    again: bool,
    measure: Callable[[str], Mapping[str, Any]],
    number: Callable[[dict[str, Any]], str],
) -> None:
    """Measure rows one after the other, those with a result only ``again``; each is written as soon as it is known."""
    for name in names:
        if again or name not in load_results(path):
            result = dict(measure(name))
            write_result(path, name, result)
            print(f"{name}: {number(result)}", flush=True)


def print_rows(rows: Iterable[str], found: Results, number: Callable[[dict[str, Any]], str]) -> None:
    """All names, one a line, with the number of those that have a result."""
    for name in rows:
        print(f"{name:45} {number(found[name])}" if name in found else name)
