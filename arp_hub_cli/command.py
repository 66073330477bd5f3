"""How ``arp-hub`` reads a command line, prints help and reports errors."""

from __future__ import annotations

import inspect
import logging
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

from .processes import joined, prints_its_end
from .terminal import note
from .wording import MANY_WORDS, in_options

_UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])
"""The exception that typer raises for a wrong option. It has no public name."""


class _Interrupted(Exception):  # not an error
    """Ctrl-C ended a command. The message says how to go on, if there is more to say than to start again."""


class _WarningHandler(logging.Handler):
    """Writes warnings to stderr, as it is at that moment: of several processes only the first one has one.

    Args:
        line: Makes a line of a message.
    """

    def __init__(self, line: Callable[[str], str]) -> None:
        super().__init__(logging.WARNING)
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        """Write one warning."""
        print(self._line(record.getMessage()), file=sys.stderr)


class HelpfulCommand(TyperCommand):
    """A command whose help fits any width: grouped options, no text cut off, an example on lines of its own."""

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write what the command does, then its example."""
        text, example = split_example(self.help or "")
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(text)
        if example:
            with formatter.section("Example"):
                for line in example.splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options in their groups, in the order in which the groups first appear."""
        _write_groups(formatter, option_groups(self, ctx))


class Command(HelpfulCommand):
    """A command of arp_hub. Warnings are one line; errors name options where Python names arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words after the command's name."""
        return super().parse_args(ctx, repeated(MANY_WORDS, [_with_home(word) for word in args]))

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        plain = warnings.formatwarning
        warnings.formatwarning = lambda message, *_, **__: self._warning(ctx, str(message)) + "\n"
        handler = _WarningHandler(lambda message: self._warning(ctx, message))
        logging.getLogger("arp_hub").addHandler(handler)
        try:
            with joined(self.name or "", ctx.params.get("device")):
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _Interrupted(str(stop)) from stop  # typer would drop the message
        except Exception as error:
            if _is_ours(error):
                raise type(error)(in_options(str(error), self.get_params(ctx))) from error
            raise
        finally:
            warnings.formatwarning = plain
            logging.getLogger("arp_hub").removeHandler(handler)

    def _warning(self, ctx: Any, message: str) -> str:
        """One line for a warning of the library, in the options of this command."""
        from arp_hub.reports.tables import printable  # here, because `arp_hub` imports torch

        return printable(f"warning: {in_options(message, self.get_params(ctx))}")


def _with_home(word: str) -> str:
    """A word with the home folder for ``~``, which shells leave as it is behind ``--output=``."""
    option, equals, value = word.partition("=")
    if not (equals and option.startswith("--")):
        option, equals, value = "", "", word
    return option + equals + str(Path(value).expanduser()) if value.startswith(("~/", "~\\")) else word


class ScriptCommand(HelpfulCommand):
    """A command whose first argument is a script. All words after it belong to the script, ``--help`` too."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Words of the usage line."""
        return [*super().collect_usage_pieces(ctx), "[WORD...]"]


SCRIPT_WORDS = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
"""Settings of a `ScriptCommand`."""


class Group(TyperGroup):
    """Commands whose user errors are one line on stderr and exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command line, then exit."""
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
            if code != 130:  # recent versions of typer return it after Ctrl-C
                sys.exit(code)
            why = "interrupted"
        except (typer.Abort, KeyboardInterrupt):
            why, code = "interrupted", 130
        except _Interrupted as stop:
            why, code = f"interrupted. {stop}" if str(stop) else "interrupted", 130
        except Exception as error:
            message = _for_people(error)
            if message is None:
                raise
            why, code = f"error: {message}", 2
        if prints_its_end():
            note(why)
        sys.exit(code)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the first sentence about each command, in groups."""
        groups: Groups = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                first = " ".join((command.help or "").split("\n\n")[0].split())
                groups.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append((name, first))
        _write_groups(formatter, groups)


def split_example(help: str) -> tuple[str, str]:
    """The text of a docstring, and the lines below its heading ``Example:``."""
    text, _, example = inspect.cleandoc(help).partition("\nExample:\n")
    return text.strip(), inspect.cleandoc(example)


Groups = dict[str, list[tuple[str, str]]]
"""Lines of help, each a name and what it does, below their headings."""


def option_groups(command: TyperCommand, ctx: Any) -> Groups:
    """The arguments and options of a command in their groups, in the order in which the groups first appear."""
    groups: Groups = {}
    for param in command.get_params(ctx):
        if record := param.get_help_record(ctx):
            heading = getattr(param, "rich_help_panel", None)
            if param.param_type_name == "argument":
                heading, record = heading or "Arguments", (record[0].split()[0], record[1])  # without its type
            groups.setdefault(heading or "Other options", []).append((record[0], _range_in_words(record[1])))
    return groups


def _range_in_words(help: str) -> str:
    """Help in which the range of a number is words, such as "at least 1" in place of "x>=1"."""
    return re.sub(r"(?<=[\[ ])x>=(?=\S+\])", "at least ", re.sub(r"(\d+)<=x<=(?=\d)", r"\1 to ", help))


def _write_groups(formatter: Any, groups: Groups) -> None:
    for group, listed in groups.items():
        with formatter.section(group):
            column = max(len(name) for name, _ in listed) + 2
            for name, help in listed:
                room = formatter.width - formatter.current_indent - column
                lines = textwrap.wrap(help, room, break_on_hyphens=False, break_long_words=False) or [""]
                for first, line in zip([name, *[""] * len(lines)], lines, strict=False):
                    formatter.write(f"{'':{formatter.current_indent}}{first:{column}}{line}".rstrip() + "\n")


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


def _is_ours(error: Exception) -> bool:
    # not imported here: `arp_hub` imports torch, which help does not need and which may not import at all
    errors = sys.modules.get("arp_hub.errors")
    return errors is not None and isinstance(error, errors.ArpHubError)


def _is_broken_import(error: Exception) -> bool:
    """Whether a package does not import: `arp_hub`, which every command imports first, is then missing."""
    return "arp_hub" not in sys.modules and isinstance(error, (AttributeError, ImportError, OSError, RuntimeError))


def _about_value(usage: Any, message: str) -> str:
    """The message of a usage error, with the value that is wrong, or where to find what is missing."""
    if hasattr(usage.__cause__, "errors"):  # of pydantic, which typer converts values by
        given = usage.__cause__.errors()[0]
        wrong = {
            "float_parsing": "is no number, such as 0.5",
            "int_parsing": "is no whole number",
            "greater_than_equal": f"is below {given.get('ctx', {}).get('ge')}",
            "less_than_equal": f"is above {given.get('ctx', {}).get('le')}",
        }.get(given["type"])
        return f"{message.partition(': ')[0]}: '{given['input']}' {wrong}" if wrong else message
    return f"{message} --help names them." if message.endswith("arguments.") else message


def _for_people(error: Exception) -> str | None:
    """One line for an error that the user can correct; None for any other error."""
    if isinstance(error, _UsageError):
        usage = cast(Any, error)  # the cast above calls it an Exception
        message, context = _about_value(usage, " ".join(usage.format_message().split())), usage.ctx
        example = split_example(context.command.help or "")[1].splitlines() if context else []
        if message.startswith("No such command"):
            return f"{message} arp-hub --help lists the commands."
        return f"{message} Example: {example[0]}" if example and message.startswith("Missing") else message
    if _is_broken_import(error):
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return f"a package does not import ({reason:.200}): `arp-hub doctor` names it and the way out"
    return " ".join(str(error).split()) if _is_ours(error) else None
