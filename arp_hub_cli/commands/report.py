"""``arp-hub report``: the page of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import AsJson
from ..terminal import note, print_json


def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Folder of a finished or unfinished run: OUTPUT-run.", show_default=False
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Write report.html into a run's folder: curves, violations, ranks, spectra, accuracy and size.

    A finished run already has one. Use this command to follow an unfinished run.

    Example:
        arp-hub report runs/quickstart-run
    """
    from arp_hub.reports.run_page import write_report

    path = write_report(folder)
    if as_json:
        print_json({"report": str(path)})
    else:
        note(f"report written to {path}")
