"""Prepare a push: write and check all files of all branches before any upload."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .._utils.files import write_atomically
from .._utils.parse import read_json
from .._utils.secrets import holds_secret
from ..decomposition import to_dense
from ..errors import ArpHubError
from ..layers.model import low_rank_layers
from ..models._untrusted import read_config
from .card import PICTURES, UNFIT, by_hand, draw_pictures, keep_by_hand, model_card
from .export_files import EXPORT_FILES, export_folders, read_export
from .load import load_model
from .save import CARD, CONFIG, FAILED_WRITES, METRICS, WEIGHTS, plain_metrics, save_pretrained, write_card, write_json

_logger = logging.getLogger(__name__)

_METRICS_BYTES = 2**24
"""Largest ``metrics.json`` in bytes."""

MAIN = "main"
_ABOUT = ("base_model", "dataset", "license", "license_link")
"""Metrics that also apply to the merged model."""


@dataclass
class Upload:
    """The content of one branch after the push.

    Attributes:
        branch: Its name.
        tag: The tag for its commit, if any.
        files: Names in the repository, with the local paths.
    """

    branch: str
    tag: str | None
    files: dict[str, Path]


def stage(
    folder: Path,
    scratch: Path,
    repo_id: str,
    branch: str,
    dense_revision: str | None,
    *,
    metrics: Mapping[str, Any] | None,
    tag: str | None,
    earlier_card: Callable[[str], str],
) -> list[Upload]:
    """Write all files that the push uploads.

    Args:
        folder: A saved model. It is not changed.
        scratch: An empty folder for the new files.
        repo_id: The repository to publish to.
        branch: The branch of the model.
        dense_revision: The branch of the merged model beside ``main``, or None.
        metrics: Numbers that override those of the folder.
        tag: Tag of this version, for the card.
        earlier_card: Returns the card on a branch of the Hub, or an empty text.

    Returns:
        One entry for each branch, the model's first.

    Raises:
        ArpHubError: If the folder does not hold a whole model, or a text holds what looks like a token.
    """
    model = load_model(f"local-dir:{folder}").eval()
    config = read_config(folder / CONFIG)
    numbers = _merge(_read_metrics(folder), plain_metrics(metrics or {}))
    merged = None
    if dense_revision and low_rank_layers(model):
        to = dense_name(branch, dense_revision)
        source = repo_id if branch == MAIN else f"{repo_id}@{branch}"
        files = _merged(model, scratch / "dense", f"hf-hub:{repo_id}@{to}", source, numbers, earlier_card(to))
        merged = files and Upload(to, tag and dense_name(tag, dense_revision), files)
    made = scratch / "main"
    made.mkdir()
    write_json(made / METRICS, numbers)
    try:
        pictures = draw_pictures(made, numbers) if metrics else []
    except UNFIT as error:
        raise _unfit(folder / METRICS, error) from error
    own = _pictures(folder)
    pictures += [path.name for path in own if path.name in PICTURES and path.name not in pictures]
    name = f"hf-hub:{repo_id}" + ("" if branch == MAIN else f"@{branch}")
    dense = merged.branch if merged else None
    try:
        export = read_export(folder)
        card = model_card(config, numbers, name, pictures=pictures, dense=dense, tag=tag, export=export)
    except UNFIT as error:
        raise _unfit(folder / METRICS, error) from error
    here = _card_text(folder / CARD)
    _write_card(made / CARD, card, here, earlier_card(branch))
    files = {path.name: path for path in (folder / CONFIG, folder / WEIGHTS, *own, *made.iterdir())}
    for place in export_folders(folder):
        files |= {f"{place.name}/{path.name}": path for path in place.iterdir() if _is_export(path)}
    uploads = [Upload(branch, tag, files), *([merged] if merged else [])]
    _check_texts(uploads)
    return uploads


def refresh_card(folder: Path) -> None:
    """Write the card of a saved folder once more, with the exports in the folder. The owner's edits are kept.

    Raises:
        ArpHubError: If the folder's metrics cannot be read or shown.
    """
    path, pictures = folder / CARD, [path.name for path in _pictures(folder) if path.name in PICTURES]
    numbers, name = _read_metrics(folder), f"local-dir:{folder.name}"
    try:
        card = model_card(read_config(folder / CONFIG), numbers, name, pictures=pictures, export=read_export(folder))
    except UNFIT as error:
        raise _unfit(folder / METRICS, error) from error
    earlier = _card_text(path)
    write_atomically(path, keep_by_hand(card, earlier).encode("utf-8", "backslashreplace"))


def _is_export(path: Path) -> bool:
    """Whether a path is a file that export writes. Others in its folder are the owner's, and stay private."""
    return path.name in EXPORT_FILES and _is_plain(path)


def _card_text(path: Path) -> str:
    """The card of a folder, or an empty text without one."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise ArpHubError(f"'{path}' is not UTF-8 ({error}): save it as UTF-8, or delete it") from error


def _is_plain(path: Path) -> bool:
    """Whether a path is a file of this folder: a link could publish a file from another place."""
    return path.is_file() and not path.is_symlink()


def _pictures(folder: Path) -> list[Path]:
    """The pictures of a folder, without links: those could publish a file from another place."""
    found = [path for path in folder.iterdir() if path.suffix in (".png", ".svg")]
    for path in found:
        if path.is_symlink():
            _logger.warning("'%s' is a link and is not published: copy the picture into the folder", path.name)
    return [path for path in found if _is_plain(path)]


def dense_name(name: str, dense: str) -> str:
    """The branch or tag of the merged model, for that of the decomposed one."""
    return dense if name == MAIN else f"{name}-{dense}"


def _merged(
    model: nn.Module,
    folder: Path,
    name: str,
    source: str,
    numbers: Mapping[str, Any],
    earlier_card: str,
) -> dict[str, Path] | None:
    """The merged model in the plain architecture, or None if that architecture cannot hold it.

    Args:
        model: The decomposed model, which is merged in place.
        folder: Where to write.
        name: The name to load the merged model by.
        source: The repository of the decomposed model, with its branch unless that is ``main``.
        numbers: Metrics of the decomposed model.
        earlier_card: The card of the merged model on the Hub.
    """
    about = {key: numbers[key] for key in _ABOUT if numbers.get(key)}
    try:
        save_pretrained(to_dense(model), folder, metrics={**about, "merged_from": source, "command": None})
    except ArpHubError as error:
        if isinstance(error.__cause__, FAILED_WRITES):
            raise error.__cause__ from None
        _logger.warning("the merged model is left out: %s", error)
        return None
    config = read_config(folder / CONFIG)
    card = model_card(config, _read_metrics(folder), name)
    _write_card(folder / CARD, card, "", earlier_card)
    return {path.name: path for path in folder.iterdir()}


def _write_card(path: Path, card: str, here: str, there: str) -> None:
    """Write a card with the owner's edits, those on the Hub before those in the local card."""
    if by_hand(here) and by_hand(there) and by_hand(here) != by_hand(there):
        _logger.warning("the owner's notes in the folder and on the Hub differ: the Hub's are kept, edit them there")
    write_card(path, keep_by_hand(card, there, here))


def _read_metrics(folder: Path) -> dict[str, Any]:
    """Read and check the folder's ``metrics.json``, which may come from anybody.

    Raises:
        ArpHubError: If it is not a JSON object, or larger, longer or deeper than allowed.
    """
    path = folder / METRICS
    try:
        found = read_json(path, _METRICS_BYTES)
        if not isinstance(found, dict) or not isinstance(found.get("dense", {}), dict):
            raise TypeError("it and its 'dense' must be JSON objects")
        for key in ("layers", "history"):
            if len(found.get(key) or ()) > 10_000:
                raise ValueError(f"'{key}' has {len(found[key]):,} rows, {10_000:,} are allowed")
        json.dumps(found, allow_nan=False)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ArpHubError(f"cannot read '{path}': {error}: save the model again") from error
    return found


def _unfit(path: Path, error: Exception) -> ArpHubError:
    reason = f"{type(error).__name__}: {error}"
    return ArpHubError(f"'{path}' holds entries that the card cannot show ({reason}): save the model again")


def _merge(numbers: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    dense = {**numbers.get("dense", {}), **given.get("dense", {})}
    return {**numbers, **given, **({"dense": dense} if dense else {})}


def _check_texts(uploads: Sequence[Upload]) -> None:
    for upload in uploads:
        for file in (CONFIG, CARD, METRICS):
            if holds_secret(upload.files[file].read_text(encoding="utf-8")):
                raise ArpHubError(f"{file} contains what looks like a token: remove it before publishing the model")
