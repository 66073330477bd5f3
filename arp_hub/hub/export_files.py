"""The exports in a saved folder, and whether they are of its weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .._utils.parse import read_json
from .._utils.torch_utils import digest_of

EXPORT = "export.json"
EXPORT_FILES = frozenset({EXPORT, "model.onnx", "model.xml", "model.bin", "model.pt2"})
"""Files of an export: the first describes the others."""

_logger = logging.getLogger(__name__)


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """A digest of weights, by name and in float32: the same for a model and the file it is saved in."""
    return digest_of(state[name].float() for name in sorted(state))


def read_export(folder: Path) -> Any:
    """The content of a folder's ``export.json``, which ``arp-hub export`` writes; None without one that can be read.

    If the exports lie in folders of their own in this one, their contents by the names of these folders. An export of
    other weights than the folder's is left out, with a warning.
    """
    own = _read(folder)
    ours, others = _by_weights(folder, {folder: own} if own else _found(folder))
    for place in others:
        _logger.warning(
            "the export in '%s' is of other weights than '%s': the card leaves it out; export the saved model again",
            place,
            folder,
        )
    return ours.get(folder) or {place.name: record for place, record in ours.items() if record} or None


def export_folders(folder: Path) -> list[Path]:
    """The exports of a folder's weights: the folders in it that hold an ``export.json``, without links."""
    return list(_by_weights(folder, _found(folder))[0])


def _found(folder: Path) -> dict[Path, Any]:
    """The folders with an export in a folder, and what their ``export.json`` says."""
    places = sorted(place for place in folder.iterdir() if place.is_dir() and not place.is_symlink())
    return {place: _read(place) for place in places if (place / EXPORT).is_file()}


def _read(folder: Path) -> Any:
    try:
        return read_json(folder / EXPORT)
    except (OSError, ValueError):
        return None


def _by_weights(folder: Path, exports: Mapping[Path, Any]) -> tuple[dict[Path, Any], dict[Path, Any]]:
    """Exports of the folder's weights, and those of others. What names no weights counts among the first."""
    named = {place: record.get("weights") for place, record in exports.items() if isinstance(record, Mapping)}
    saved = _saved_digest(folder) if any(named.values()) else None
    others = {place: record for place, record in exports.items() if saved and named.get(place) not in (None, saved)}
    return {place: record for place, record in exports.items() if place not in others}, others


def _saved_digest(folder: Path) -> str | None:
    """The digest of a folder's weights, None without any that can be read."""
    try:
        return weights_digest(load_file(folder / "model.safetensors"))
    except (OSError, SafetensorError):
        return None
