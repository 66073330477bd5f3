"""The folder that an export is written to."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ArpHubError, check_writable, checked_path
from ..hub.export_files import EXPORT, EXPORT_FILES


def check_output(output: str | os.PathLike[str], model: str | None, overwrite: bool) -> Path:
    """Check that an export may be written to a folder.

    Args:
        output: The folder.
        model: Name of the model that is exported, if it has one.
        overwrite: Whether other files in the folder may be deleted.

    Raises:
        ArpHubError: If it is a file, read-only, or holds other files, the current directory or the saved model.
    """
    folder = checked_path(output, "output").absolute()
    check_writable(folder.resolve().parent, output)
    if folder.exists() and not folder.is_dir():
        raise ArpHubError(f"'{output}' is a file: choose a folder for the export")
    source = Path(model.removeprefix("local-dir:")) if model and model.startswith("local-dir:") else None
    for what, place in (("the current directory", Path.cwd()), ("the saved model", source)):
        if place is not None and place.resolve().is_relative_to(folder.resolve()):
            raise ArpHubError(f"'{output}' contains {what} and cannot be replaced: choose another folder")
    held = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    ours = EXPORT_FILES if EXPORT in held else ()  # a model.onnx alone is somebody else's
    strange = [name for name in held if name not in ours]
    if strange and not overwrite:
        raise ArpHubError(
            f"'{output}' holds '{strange[0]}', which export did not write: choose another folder, or replace all of it "
            "with overwrite=True"
        )
    return folder
