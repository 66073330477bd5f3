"""What a push will upload: every file of every branch, made and checked before the Hub is told anything."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .._utils.secrets import holds_secret
from ..decomposition import to_dense
from ..errors import ArpHubError
from ..layers.model import low_rank_layers
from .card import PICTURES, by_hand, draw_pictures, keep_by_hand, model_card
from .load import load_model
from .save import CARD, CONFIG, FAILED_WRITES, METRICS, WEIGHTS, plain_metrics, save_pretrained, write_json

_logger = logging.getLogger(__name__)

UNFIT = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What rendering raises where an entry of the metrics has another type than `save_pretrained` gives it."""
_METRICS_BYTES = 2**24
"""Bytes of a ``metrics.json`` at most: a hundred times those of the largest kept model."""

MAIN = "main"
_ABOUT = ("base_model", "dataset", "license")
"""Metrics that hold for the merged model as well."""


@dataclass
class Upload:
    """What one branch will hold.

    Attributes:
        branch: Its name.
        tag: The tag that its commit gets, if any.
        files: Names in the repository, and where the files are here.
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
    """Make everything that will be uploaded.

    Args:
        folder: A saved model; it is read only.
        scratch: An empty folder for what is made.
        repo_id: Where the model goes.
        branch: The branch of the model.
        dense_revision: The branch of the merged model beside ``main``, None if there is to be none.
        metrics: Numbers over those of the folder.
        tag: Tag of this version, for the card.
        earlier_card: Gives the card that is on a branch now, or an empty text.

    Returns:
        One entry for each branch, the model's first.

    Raises:
        ArpHubError: If the folder does not hold a whole model, or a text holds what looks like a token.
    """
    model = load_model(f"local-dir:{folder}").eval()
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    numbers = _merge(_read_metrics(folder), plain_metrics(metrics or {}))
    merged = None
    if dense_revision and low_rank_layers(model):
        to = dense_name(branch, dense_revision)
        files = _merged(model, scratch / "dense", repo_id, to, numbers, earlier_card)
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
        card = model_card(config, numbers, name, pictures=pictures, dense=dense, tag=tag)
    except UNFIT as error:
        raise _unfit(folder / METRICS, error) from error
    here = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    _write_card(made / CARD, card, here, earlier_card(branch))
    files = {path.name: path for path in (folder / CONFIG, folder / WEIGHTS, *own, *made.iterdir())}
    uploads = [Upload(branch, tag, files), *([merged] if merged else [])]
    _check_texts(uploads)
    return uploads


def _pictures(folder: Path) -> list[Path]:
    """The pictures of a folder. A link is left out: it would publish a file from elsewhere."""
    found = [path for path in folder.iterdir() if path.suffix in (".png", ".svg")]
    for path in found:
        if path.is_symlink():
            _logger.warning("'%s' is a link and is not published: copy the picture into the folder", path.name)
    return [path for path in found if path.is_file() and not path.is_symlink()]


def dense_name(name: str, dense: str) -> str:
    """The branch or tag of the merged model that goes with another one."""
    return dense if name == MAIN else f"{name}-{dense}"


def _merged(
    model: nn.Module,
    folder: Path,
    repo_id: str,
    branch: str,
    numbers: Mapping[str, Any],
    earlier_card: Callable[[str], str],
) -> dict[str, Path] | None:
    """The model with its factors merged, in the plain architecture; None where that would be another model."""
    about = {key: numbers[key] for key in _ABOUT if numbers.get(key)}
    try:
        save_pretrained(to_dense(model), folder, metrics={**about, "merged_from": repo_id, "command": None})
    except ArpHubError as error:
        if isinstance(error.__cause__, FAILED_WRITES):
            raise error.__cause__ from None
        _logger.warning("the merged model is left out: %s", error)
        return None
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    card = model_card(config, _read_metrics(folder), f"hf-hub:{repo_id}@{branch}")
    _write_card(folder / CARD, card, "", earlier_card(branch))
    return {path.name: path for path in folder.iterdir()}


def _write_card(path: Path, card: str, here: str, there: str) -> None:
    """Write a card with what was written by hand into the one on the Hub or, if there is none, into the local one."""
    if by_hand(here) and by_hand(there) and by_hand(here) != by_hand(there):
        _logger.warning("the owner's notes here and on the Hub differ: those on the Hub are kept, edit them there")
    path.write_text(keep_by_hand(card, there if by_hand(there) or not by_hand(here) else here), encoding="utf-8")


def _read_metrics(folder: Path) -> dict[str, Any]:
    """The folder's ``metrics.json``, whoever wrote it.

    Raises:
        ArpHubError: If it is no JSON object, or larger, longer or deeper than what `save_pretrained` writes.
    """
    path = folder / METRICS
    try:
        if (size := path.stat().st_size) > _METRICS_BYTES:
            raise ArpHubError(f"'{path}' has {size:,} bytes, {_METRICS_BYTES:,} are allowed: save the model again")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("dense", {}), dict):
            raise TypeError("it and its 'dense' must be JSON objects")
        for key in ("layers", "history"):
            if len(found.get(key) or ()) > 10_000:
                raise ValueError(f"'{key}' has {len(found[key]):,} rows, {10_000:,} are allowed")
        json.dumps(found, allow_nan=False)
    except ArpHubError:
        raise
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
                raise ArpHubError(f"{file} holds what looks like a token: take it out before you publish the model")
