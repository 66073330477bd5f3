"""Write the reference of `docs/command-line.md` from the code: ``python docs/_command_line.py``.

All text below the line `MARK` of the page is made here. A test compares it with the page.
"""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from arp_hub.training.command import setting_help
from arp_hub.training.config import TrainConfig
from arp_hub.training.config_fields import GROUPS
from arp_hub_cli.app import app
from arp_hub_cli.command import option_groups, split_example

PAGE = Path(__file__).with_name("command-line.md")
MARK = "<!-- The text below is generated: python docs/_command_line.py -->"


OF_RECIPES = (
    "All recipes but `custom_loop.py` take these options, and `--config FILE` and `--print-config`: "
    "`python recipes/any_backbone.py --help`."
)


def reference() -> str:
    """All commands and options, and all options of recipes."""
    group = typer.main.get_command(app)
    parts = ["## Commands"]
    for name, command in group.commands.items():  # type: ignore[attr-defined]  # an app of several commands is a group
        parts += _command(name, command)
    parts += ["## Options of recipes", OF_RECIPES]
    for heading in GROUPS:
        rows = [
            (f"`--{setting.name.replace('_', '-')}`", setting_help(setting, setting.default))
            for setting in dataclasses.fields(TrainConfig)
            if setting.metadata["group"] == heading
        ]
        parts += _table(heading.capitalize(), rows)
    return "\n\n".join(parts) + "\n"


def _command(name: str, command: Any) -> Iterator[str]:
    text, example = split_example(command.help)
    yield f"### `arp-hub {name}`"
    yield "\n\n".join(_escaped(" ".join(part.split())) for part in text.split("\n\n"))
    yield f"```bash\n{example}\n```"
    context = typer.Context(command, info_name=name)
    for heading, rows in option_groups(command, context).items():
        rows = [(f"`{option}`", help) for option, help in rows if option != "--help"]
        if rows:
            yield from _table(heading, rows)


def _table(heading: str, rows: list[tuple[str, str]]) -> Iterator[str]:
    lines = [f"| {heading} | |", "|---|---|", *(f"| {name} | {_escaped(help)} |" for name, help in rows)]
    yield "\n".join(lines)


def _escaped(text: str) -> str:
    """Text whose marks Markdown does not read as its own."""
    return re.sub(r"([|*])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def whole_page(text: str) -> str:
    """The page with its reference from the present code."""
    return text.partition(MARK)[0] + MARK + "\n\n" + reference()


if __name__ == "__main__":
    PAGE.write_text(whole_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
