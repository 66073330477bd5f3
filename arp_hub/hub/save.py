"""Save a model in a folder that timm loads, with its metrics, card and pictures."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .._utils.environment import environment, without_machine
from .._utils.files import read_text, replacing
from .._utils.parse import parse_json, read_json
from .._utils.secrets import redact
from ..errors import ArpHubError, cause, check_writable, checked_path
from ..layers.model import check_model
from ..layers.trace import input_size_of
from ..reports.run_page import REPORT
from ..reports.summary import model_sizes
from .card import PICTURES, UNFIT, draw_pictures, keep_by_hand, model_card
from .config import check_rebuilds, write_config

CONFIG, WEIGHTS, CARD, METRICS = "config.json", "model.safetensors", "README.md", "metrics.json"
_FILES = frozenset({CONFIG, WEIGHTS, CARD, METRICS, REPORT})
"""Files that arp_hub writes into a saved folder; `write_report` adds its page."""
_PICTURES = frozenset({".png", ".svg"})
FAILED_WRITES = (OSError, SafetensorError)
"""What a full disk or a read-only folder raises."""


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    metrics: Mapping[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
    backbone: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Save a model so that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads it.

    The folder is replaced in one step, so it never holds a half-written model. It contains ``config.json``,
    ``model.safetensors``, ``metrics.json``, and the model card ``README.md`` with its pictures (if matplotlib is
    installed).

    Args:
        model: A timm model, decomposed or dense, bare (``accelerator.unwrap_model(model)``).
        folder: Where to save. An earlier saved model is replaced; the owner's text in its card and other pictures stay.
        metrics: Numbers for ``metrics.json`` and the card. This model's are at the top level (``top1`` and ``top5`` in
            per cent, ``loss`` in nats), the dense model's under ``dense``. Say how they were measured with ``data``,
            ``split``, ``images``, ``seed`` and ``command``. The card also shows ``base_model`` and ``dataset`` (ids on
            the Hub), ``license``, ``latency``, ``spectra`` and ``history`` (docs/publishing.md). Sizes and MACs are
            counted automatically.
        label_names: Names of the classes, in order.
        backbone: timm name of the dense model, if ``timm.create_model`` did not create the model.
        model_args: Arguments of the model that add to or replace those that timm stored on it.
        overwrite: Replace all of the folder, even if it holds other files. They are deleted.

    Returns:
        The folder.

    Raises:
        ArpHubError: If the folder holds other files, or the saved model would not load.

    Example:
        >>> model = timm.create_model("resnet18", pretrained=True)  # doctest: +SKIP
        >>> arp_hub.decompose(model, arp_hub.make_plan(model, keep_params=0.5))  # doctest: +SKIP
        >>> arp_hub.save_pretrained(model, "out", metrics={"top1": 70.1})  # doctest: +SKIP
    """
    check_folder(folder, overwrite=overwrite)
    return write_folder(
        model,
        Path(folder),
        metrics=metrics,
        label_names=label_names,
        backbone=backbone,
        model_args=model_args,
        keep=not overwrite,
    )


def write_folder(
    model: nn.Module,
    folder: Path,
    *,
    metrics: Mapping[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
    backbone: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    keep: bool = True,
) -> Path:
    """Save a model in a folder that `check_folder` has accepted, maybe long ago.

    Args:
        model: As for `save_pretrained`, like the other arguments.
        folder: The folder.
        metrics: Numbers.
        label_names: Names of the classes.
        backbone: timm name of the dense model.
        model_args: Arguments of the model.
        keep: Keep what others have put into the folder, and the owner's edits of the card.
    """
    check_model(model, mergeable=True)
    given = plain_metrics(metrics or {})
    tensors = _tensors(model)
    try:
        with replacing(folder) as new:
            config = write_config(
                model, new / CONFIG, backbone=backbone, model_args=model_args, label_names=label_names
            )
            check_rebuilds(config, model)
            numbers = _numbers(model, config, given)
            write_json(new / METRICS, numbers)
            try:
                pictures = draw_pictures(new, numbers)
                card = model_card(config, numbers, f"local-dir:{folder.name}", pictures=pictures)
            except UNFIT as error:
                reason = f"{type(error).__name__}: {error}"
                raise ArpHubError(f"metrics hold entries that the card cannot show ({reason}): mend them") from error
            write_card(new / CARD, card)
            if keep:
                _keep_of_the_owner(folder, new)
            save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
            (new / WEIGHTS).chmod((new / CONFIG).stat().st_mode)  # safetensors gives only the owner read access
    except FAILED_WRITES as error:
        raise ArpHubError(f"cannot save in '{folder}': {cause(error)} (the earlier content is unchanged)") from error
    return folder


def _keep_of_the_owner(folder: Path, new: Path) -> None:
    """Copy into a new saved folder what the owner has added to the earlier one: files, and edits of the card."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir():
            shutil.copytree(path, new / path.name, symlinks=True)
        elif path.is_file() and path.name not in _FILES and path.name not in PICTURES:
            shutil.copyfile(path, new / path.name)
    if (folder / CARD).is_file():
        earlier = read_text(folder / CARD, errors="replace")
        write_card(new / CARD, keep_by_hand((new / CARD).read_text(encoding="utf-8"), earlier))


def check_folder(folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Check that `save_pretrained` may save in a folder, for use before long work.

    Raises:
        ArpHubError: If it is a file, lies below a file or in a read-only folder, or contains the current directory.
            Unless ``overwrite``, also if it holds files that `save_pretrained` did not write.
    """
    folder = checked_path(folder, "folder")
    check_writable(folder.resolve().parent, folder)  # the folder is put together beside its place
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ArpHubError(f"'{folder}' is not UTF-8, and safetensors reads no such path: choose another") from error
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ArpHubError(f"'{folder}' is a file: choose a folder to save the model in")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ArpHubError(f"'{folder}' contains the current directory and cannot be replaced: choose another folder")
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError as error:
        raise ArpHubError(f"cannot look into '{folder}': {error}: choose another folder") from error
    strange = sorted(name for name in names if name not in _FILES and not _is_picture(folder / name))
    if names and not overwrite and (strange or not is_saved_folder(folder)):
        if not strange and CONFIG not in names:  # pictures alone
            strange = names
        shown = f"'{strange[0]}', no file of a saved model" if strange else "another model, not saved by arp_hub"
        raise ArpHubError(f"'{folder}' holds {shown}: choose another folder, or replace all of it with overwrite=True")


def _is_picture(path: Path) -> bool:
    return path.suffix in _PICTURES and path.is_file()


def is_saved_folder(folder: Path) -> bool:
    """Whether a folder was written by `save_pretrained`."""
    try:
        config = read_json(folder / CONFIG)
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and isinstance(config.get("arp_hub"), dict)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights as safetensors needs them: contiguous, on the CPU, and without shared memory."""
    tensors: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or tensor.is_quantized:
            raise ArpHubError(
                f"'{name}' belongs to a quantised layer, which is not saved: save the model, then quantise"
            )
        if tensor.is_meta:
            raise ArpHubError(f"the weight '{name}' is on the meta device: load the model's weights before saving it")
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        alone = storage.data_ptr() not in places and storage.nbytes() == tensor.nbytes
        tensors[name] = tensor if alone else tensor.clone()
        places.add(storage.data_ptr())
    return tensors


def _numbers(model: nn.Module, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``metrics.json``. Given metrics override facts of this process; counts override both."""
    own = getattr(model, "pretrained_cfg", None) or {}
    size = input_size_of(model, None if own.get("input_size") else tuple(config["pretrained_cfg"]["input_size"]))
    figures = model_sizes(model, size, (given.get("plan") or {}).get("dense", {}))
    dense = {**given.get("dense", {}), **figures.pop("dense", {})}
    numbers = {**environment(), **given, **figures}
    return {**numbers, "dense": dense} if dense else numbers


def plain_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics after a round trip through JSON, without tokens and without the folders of this machine.

    Raises:
        ArpHubError: If JSON cannot hold them.
    """
    try:
        plain = parse_json(redact(json.dumps(_without_machine(dict(metrics)), allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArpHubError(
            f"metrics must be what JSON holds (finite numbers, strings, lists, objects): {error}"
        ) from error
    if not isinstance(plain.get("dense", {}), dict):
        raise ArpHubError(f"metrics['dense'] must hold the dense model's metrics by name, got {plain['dense']!r:.100}")
    for name in ("top1", "top5"):
        for where, scores in (("metrics", plain), ("metrics['dense']", plain.get("dense", {}))):
            if isinstance(value := scores.get(name), (int, float)) and not 0 <= value <= 100:
                raise ArpHubError(f"{where}['{name}'] must lie between 0 and 100 (per cent), got {value!r}")
    plan = plain.get("plan") or {}
    if not isinstance(plan, dict) or not isinstance(plan.get("dense", {}), dict):
        raise ArpHubError(f"metrics['plan'] must be a plan as RankPlan.to_dict gives it, got {plan!r:.100}")
    return plain


_PLACES = frozenset("model data data_dir checkpoint teacher teacher_checkpoint output resume".split())
"""Metrics and settings that may hold a path."""


def _without_machine(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics and the settings of a run whose paths name no folder of this machine."""
    found = {
        name: without_machine(value) if name in _PLACES and isinstance(value, str) else value
        for name, value in metrics.items()
    }
    if isinstance(config := metrics.get("config"), Mapping):
        found["config"] = _without_machine(config)
    return found


def write_card(path: Path, card: str) -> None:
    """Write a card. Half of a surrogate pair, as names of files and texts in JSON may hold, is spelled out."""
    path.write_text(card, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
