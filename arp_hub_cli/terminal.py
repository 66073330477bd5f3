"""Output of ``arp-hub``: tables and JSON on stdout; progress, notes and errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console, RenderableType

_PIPE_WIDTH = 140
"""Characters in a line of a table that is written to a file or a pipe."""


def interactive() -> bool:
    """Whether stderr is a terminal, so that a progress bar can be shown."""
    return sys.stderr.isatty()


def print_tables(*tables: RenderableType) -> None:
    """Tables to stdout."""
    console = Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)
    for table in tables:
        console.print(table)


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object to stdout."""
    print(json.dumps(value, indent=2))


def note(text: str) -> None:
    """One line to stderr, with control characters escaped."""
    if not text.isprintable():
        from arp_hub.reports.tables import printable  # here, because `arp_hub` imports torch

        text = printable(text)
    print(text, file=sys.stderr)
