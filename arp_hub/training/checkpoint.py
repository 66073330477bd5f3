"""Checkpoints of a run: a folder with safetensors and JSON, whole or not there at all. Nothing is pickled.

run/checkpoints/compress-00001200/
    state.json             phase, step, settings, scores, and the tree of which the tensors are the leaves
    state.safetensors      the tensors
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ArpHubError

FORMAT_VERSION = 1
_TENSOR = "__tensor__"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two steps.

    Attributes:
        phase: The phase under way.
        step: Steps of this phase that are done.
        settings: What must be the same to go on: the config, the number of processes, the steps of an epoch.
        scores: Accuracies measured so far.
        plan: The plan as JSON, once there is one.
        seconds: Wall time so far.
        state: Nested dictionaries and lists of tensors and plain values: model, optimizer, penalty and the like.
    """

    phase: str
    step: int
    settings: Mapping[str, Any]
    scores: Mapping[str, Any]
    plan: Mapping[str, Any] | None
    seconds: float
    state: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint atomically, then remove all but the newest ``keep``."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{checkpoint.phase}-{checkpoint.step:08d}"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    remove_unfinished_checkpoints(folder)
    temporary.mkdir()
    tensors: dict[str, Tensor] = {}
    tree = _flatten(checkpoint.state, "", tensors)
    save_file(tensors, temporary / "state.safetensors")
    meta = {name: getattr(checkpoint, name) for name in ("phase", "step", "settings", "scores", "plan", "seconds")}
    text = json.dumps({"format_version": FORMAT_VERSION, "saved": time.time(), **meta, "state": tree})
    (temporary / "state.json").write_text(text, encoding="utf-8")
    if target.exists():
        target.replace(folder / f".{target.name}.old.tmp")
    temporary.replace(target)
    for old in list_checkpoints(folder)[:-keep]:
        old.replace(folder / f".{old.name}.old.tmp")  # so that a kill leaves no half of it under its name
    remove_unfinished_checkpoints(folder)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        ArpHubError: If it is not there, not whole, or of a newer format.
    """
    try:
        meta = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "state.safetensors")
        if meta["format_version"] > FORMAT_VERSION:
            raise ArpHubError(
                f"checkpoint '{path}' has format_version {meta['format_version']}, this arp_hub reads up to "
                f"{FORMAT_VERSION}: upgrade with `pip install --upgrade arp-hub`"
            )
        return Checkpoint(
            phase=meta["phase"],
            step=meta["step"],
            settings=meta["settings"],
            scores=meta["scores"],
            plan=meta["plan"],
            seconds=meta.get("seconds", 0.0),
            state=_unflatten(meta["state"], tensors),
        )
    except ArpHubError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArpHubError(f"'{path}' is not a whole checkpoint: {error!r}: give another one, or start anew") from error


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted((path for path in folder.glob("[!.]*") if (path / "state.json").is_file()), key=_saved)


def _saved(path: Path) -> float:
    """When a checkpoint was written, in seconds; copies of a folder have other times than its files had."""
    file = path / "state.json"
    try:
        return float(json.loads(file.read_text(encoding="utf-8"))["saved"])
    except (OSError, ValueError, KeyError, TypeError):  # of an earlier version, or damaged: loading it will tell
        return file.stat().st_mtime


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """The checkpoint to go on from.

    Args:
        resume: Empty for none; ``auto`` for the newest in ``folder``; or the path of one, or of a run.
        folder: Where this run keeps its checkpoints.

    Raises:
        ArpHubError: If a named one is not there.
    """
    if not resume:
        return None
    if resume == "auto":
        return next(reversed(list_checkpoints(folder)), None)
    path = Path(resume)
    if (path / "state.json").is_file():
        return path
    inside = list_checkpoints(path / "checkpoints") if path.is_dir() else []
    if not inside:
        raise ArpHubError(f"no checkpoint at resume='{resume}': give a checkpoint folder, a run folder or 'auto'")
    return inside[-1]


def check_same(saved: Mapping[str, Any], current: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with other settings.

    Raises:
        ArpHubError: Naming each setting that differs, with both values.
    """
    names = [*saved, *(name for name in current if name not in saved)]
    different = [
        f"{name}: {saved.get(name)!r} in the checkpoint, {current.get(name)!r} now"
        for name in names
        if saved.get(name) != current.get(name)
    ]
    if different:
        raise ArpHubError(
            f"cannot resume from '{path}' with other settings ({'; '.join(different)}): "
            "use the same ones, or start anew with --overwrite"
        )


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({name: _own(tensor) for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)


def remove_unfinished_checkpoints(folder: Path) -> None:
    """Clear away what a killed run left half-written."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path)


def _own(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares memory with nothing, as safetensors wants it."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The tree with each tensor replaced by its name in ``tensors``."""
    if isinstance(value, Tensor):
        tensors[name] = _own(value)
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {"__dict__": [[key, _flatten(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_flatten(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
    return value


def _unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree with its tensors and dictionaries back; tuples come back as lists."""
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _unflatten(item, tensors) for key, item in value["__dict__"]}
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    return value
