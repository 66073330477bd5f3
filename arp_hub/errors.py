"""The exception that arp_hub raises for every error that a user can correct."""

import re
from collections.abc import Mapping
from pathlib import Path

from ._utils.secrets import printable


class ArpHubError(ValueError):
    """Bad input. The message names the faulty value and says how to correct it.

    Names in a message may come from a stranger's file, so control characters are escaped and long messages shortened.
    """

    def __init__(self, message: object = "") -> None:
        text = printable(str(message))
        if len(text) > 1_900:  # the start names the fault, the end the way out
            text = f"{text[:1_500]} … {text[-400:]}"
        super().__init__(text)


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
    """Refuse to replace a folder or file that holds what is read.

    Args:
        folder: The folder or file that will be replaced.
        inputs: Paths, patterns of ``--data`` and names of models, by the option that gives them. What is no path on
            this machine is passed over.

    Raises:
        ArpHubError: If an input is the folder itself, or lies in it.
    """
    for option, given in inputs.items():
        path = str(given or "").removeprefix("local-dir:")
        if re.search(r"[*?\[{]|::", path):  # the folder above all files of a pattern
            path = re.split(r"[*?\[{]|::", path)[0].rpartition("/")[0]
        try:
            place = Path(path).resolve() if path and Path(path).exists() else None
        except (OSError, ValueError):
            continue
        if place is not None and place.is_relative_to(folder.resolve()):
            raise ArpHubError(
                f"'{folder}' would be replaced, but {option} reads '{given}' in it: choose another output"
            )
