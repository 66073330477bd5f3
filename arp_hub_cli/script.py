"""Run a Python file as ``python FILE`` does, after ``import arp_hub``."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import arp_hub  # noqa: F401  (its import registers the architectures with timm, which scripts then build)
from arp_hub.errors import ArpHubError, checked_path


def run_script(script: Path, words: Sequence[str]) -> None:
    """Run a script under the name ``__main__``, with the folder of the script first among those of imports.

    Args:
        script: A Python file.
        words: The words after it on the command line.

    Raises:
        ArpHubError: If there is no such file.
    """
    if not checked_path(script, "script").is_file():
        raise ArpHubError(f"no script at '{script}': give the path of a Python file, such as train.py of timm")
    sys.argv = [str(script), *words]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except ArpHubError:
        raise
    except Exception as error:
        own = _within(error.__traceback__, str(script))
        sys.excepthook(type(error), error.with_traceback(own), own)
        sys.exit(1)


def _within(traceback: TracebackType | None, script: str) -> TracebackType | None:
    """The part of a traceback that begins in a script, as Python prints it; all of it if the script never started."""
    part = traceback
    while part is not None and part.tb_frame.f_code.co_filename != script:
        part = part.tb_next
    return part or traceback
