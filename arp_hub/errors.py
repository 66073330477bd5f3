"""The exception that arp_hub raises for every error that a user can correct, and checks of paths that raise it."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ._utils.secrets import printable

_OURS = ("config.json", "export.json", "config.yaml")
"""Files that a saved model, an export and a run have: such a folder may lie among images and be replaced."""


class ArpHubError(ValueError):
    """Bad input. The message names the faulty value and says how to correct it.

    Names in a message may come from a stranger's file, so control characters are escaped and long messages shortened.
    """

    def __init__(self, message: object = "") -> None:
        text = printable(str(message))
        if len(text) > 1_900:  # the start names the fault, the end the way out
            text = f"{text[:1_500]} … {text[-400:]}"
        super().__init__(text)


def cause(error: Exception) -> str:
    """Why a file could not be written, without the name of a temporary one."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def check_writable(folder: Path, given: object) -> None:
    """Make a file in a folder, or in the first folder above it that exists, and delete it.

    Modes do not tell: some file systems refuse what they allow.

    Args:
        folder: The folder.
        given: What is to be written there, for messages.

    Raises:
        ArpHubError: If no file can be made, such as below a file or in a read-only folder.
    """
    above = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise ArpHubError(
            f"cannot write '{given}': nothing can be written in '{above}' ({cause(error)}): choose another place"
        ) from error


def checked_path(given: object, what: str) -> Path:
    """A path that a user gave, whether anything is there or not.

    Args:
        given: The path.
        what: What it is, for messages.

    Raises:
        ArpHubError: If it is not a path, or no system could hold a file of that name.
    """
    try:
        path = Path(given)  # type: ignore[arg-type]  # what is no path raises TypeError, which is refused below
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, TypeError, ValueError) as error:
        raise ArpHubError(f"{what} must be the path of a file or folder, got {given!r:.200}: {error}") from error
    return path


def check_inputs_outside(folder: Path, inputs: Mapping[str, object]) -> None:
    """Refuse to replace a folder or file that holds what is read, or a part of it.

    Args:
        folder: The folder or file that will be replaced.
        inputs: Paths, patterns of ``--data`` and names of models, by the option that gives them. What is no path on
            this machine is passed over.

    Raises:
        ArpHubError: If an input is the folder itself or lies in it, or if the folder is a part of an input.
    """
    place = checked_path(folder, "output").resolve()
    for option, given in inputs.items():
        for source in _places(str(given or "")):
            if source.is_relative_to(place) or (place.is_relative_to(source) and _is_foreign(place)):
                raise ArpHubError(
                    f"'{folder}' would be replaced, but it holds what {option} '{given}' reads: choose another output"
                )


def _places(given: str) -> list[Path]:
    """The files and folders that a path, a pattern of ``--data`` or the name of a model may mean on this machine."""
    found = []
    for part in given.removeprefix("local-dir:").removeprefix("wds:").split("::"):
        for name in (part, part.rpartition(":")[0]):  # a configuration may follow a colon
            if re.search(r"[*?\[{]", name):  # the folder above all files of a pattern
                name = re.split(r"[*?\[{]", name)[0].rpartition("/")[0]
            try:
                if name and (path := Path(name).expanduser()).exists():
                    found.append(path.resolve())
            except (OSError, RuntimeError, ValueError):  # a name that no path has; no home folder
                continue
    return found


def _is_foreign(folder: Path) -> bool:
    """Whether a folder holds files, and is not a saved model, an export or a run."""
    try:
        return folder.is_dir() and any(folder.iterdir()) and not any((folder / name).is_file() for name in _OURS)
    except OSError:  # refused when the folder is checked
        return False
