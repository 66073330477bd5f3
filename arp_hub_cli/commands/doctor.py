"""``arp-hub doctor``: check the installation."""

from __future__ import annotations

import typer

from ..options import AsJson
from ..terminal import note, print_json, print_tables


def doctor(as_json: AsJson = False) -> None:
    """Check the installation: versions, devices, access to the Hub and login, disk space.

    Every problem is printed with its solution. The exit code is 1 if there is one. A Hub that cannot be reached is a
    note, because local folders and cached models still load.

    Example:
        arp-hub doctor
    """
    from ..doctor import examine, table

    found = examine()
    if as_json:
        print_json(found)
    else:
        print_tables(table(found))
    for text in found["notes"]:
        note(f"note: {text}")
    for problem in found["problems"]:
        note(f"problem: {problem}")
    if found["problems"]:
        raise typer.Exit(1)
    note("no problem found")
