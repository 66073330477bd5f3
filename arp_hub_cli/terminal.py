"""Output of ``arp-hub``: tables and JSON on stdout; progress, notes and errors on stderr."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import typer
from rich.console import Console, RenderableType
from typer.core import TyperGroup

_UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])
"""The exception that typer raises for a wrong option. It has no public name."""
MANY_WORDS = "--model-kwargs"
"""The option that takes all words ``NAME=VALUE`` after it."""
_PIPE_WIDTH = 140
"""Characters in a line of a table that is written to a file or a pipe."""


class Group(TyperGroup):
    """Commands whose user errors are one line on stderr and exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command line, then exit."""
        if (words := kwargs.get("args", args[0] if args else None)) is None:
            words = sys.argv[1:]
        kwargs["args"] = repeated(MANY_WORDS, words)
        plain = warnings.formatwarning
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
        try:
            code = super().main(**{**kwargs, "standalone_mode": False})
        except (typer.Abort, KeyboardInterrupt):
            note("interrupted")
            code = 130
        except Exception as error:
            message = _for_people(error)
            if message is None:
                raise
            note(f"error: {message}")
            code = 2
        finally:
            warnings.formatwarning = plain
        sys.exit(code)


def repeated(option: str, words: Sequence[str]) -> list[str]:
    """Repeat an option before each of its values, because typer takes one value at a time.

    Example:
        >>> repeated("--x", ["--x", "a=1", "b=2", "--y", "c=3"])
        ['--x', 'a=1', '--x', 'b=2', '--y', 'c=3']
    """
    found: list[str] = []
    more = False  # whether the next word can be one more value of the option
    for place, word in enumerate(words):
        is_value = place > 0 and words[place - 1] == option
        if more and not is_value and "=" in word and not word.startswith("-"):
            found.append(option)
            is_value = True
        more = is_value or word == option
        found.append(word)
    return found


def _for_people(error: Exception) -> str | None:
    """One line for an error that the user can correct; None for any other error."""
    if isinstance(error, _UsageError):
        return " ".join(error.format_message().split())  # type: ignore[attr-defined] # typer's base class has it
    from arp_hub.errors import ArpHubError  # here, because `arp_hub` imports torch, which help does not need

    return " ".join(str(error).split()) if isinstance(error, ArpHubError) else None


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
