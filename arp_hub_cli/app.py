"""The command ``arp-hub``. Each command is one module of `arp_hub_cli.commands`.

Commands import heavy packages when they run, so that help is printed quickly.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from .command import SCRIPT_WORDS, Command, Group, ScriptCommand
from .commands.bench import bench
from .commands.compress import compress
from .commands.doctor import doctor
from .commands.evaluate import evaluate
from .commands.export import export
from .commands.inspect import inspect
from .commands.plan import plan
from .commands.predict import predict
from .commands.push import push
from .commands.report import report
from .commands.run import run

app = typer.Typer(
    cls=Group,
    add_completion=True,
    rich_markup_mode=None,  # rich cuts long names off at 80 columns
    pretty_exceptions_enable=False,
    help="""Shrink vision models by low-rank decomposition.

    Exit codes: 0 success; 1 doctor found a problem; 2 bad input, with one line on stderr that says what to do; 130
    interrupted. `arp-hub COMMAND --help` shows the options of a command, with an example.
    """,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"arp-hub {version('arp-hub')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command itself."""


COMMANDS = {
    "Compress": (plan, compress),
    "Use and measure": (predict, evaluate, bench, inspect),
    "Publish and follow": (export, push, report),
    "Installation": (doctor,),
}
"""The commands, by their heading in ``arp-hub --help``."""

for heading, commands in COMMANDS.items():
    for command in commands:
        app.command(cls=Command, rich_help_panel=heading)(command)
app.command(cls=ScriptCommand, rich_help_panel="Use and measure", context_settings=SCRIPT_WORDS)(run)
