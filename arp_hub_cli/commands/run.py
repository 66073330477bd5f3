"""``arp-hub run``: a script that knows the architectures of arp_hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    context: typer.Context,
    script: Annotated[
        Path,
        typer.Argument(metavar="SCRIPT", help="A Python file. All words after it are its own.", show_default=False),
    ],
) -> None:
    """Run a script, such as train.py or validate.py of timm, with compressed models registered in timm.

    The script needs no change: `timm.create_model` in it builds what arp_hub saved, from local-dir:FOLDER or
    hf-hub:USER/NAME. Its output, its errors and its exit code are its own.

    Example:
        arp-hub run validate.py --model local-dir:out --data-dir photos
    """
    from ..script import run_script

    run_script(script, context.args)
