"""Checkpoints of a run: folders with safetensors and JSON, written whole or not at all. Nothing is pickled.

run/checkpoints/compress-00001200/
    state.json             phase, step, settings, scores, and the tree of which the tensors are the leaves
    state.safetensors      the tensors
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .._utils.files import atomic_path, flush
from ..errors import ArpHubError

FORMAT_VERSION = 1
"""The newest checkpoint format that this version reads, and the one that it writes."""
PHASES = ("dense", "compress", "finetune")
_TENSOR = "__tensor__"
_TURNED = torch.channels_last


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
    text = json.dumps({"format_version": FORMAT_VERSION, **meta, "state": tree})
    (temporary / "state.json").write_text(text, encoding="utf-8")
    if target.exists():
        target.replace(folder / f".{target.name}.old.tmp")
    for part in (*temporary.iterdir(), temporary):
        flush(part)
    temporary.replace(target)
    flush(folder)
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
    except (
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        SafetensorError,
    ) as error:
        raise ArpHubError(f"'{path}' is not a whole checkpoint: {error!r}: give another, or use --overwrite") from error


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, by phase and step. File times do not count: clocks step back, copies have new times."""
    found = [path for path in folder.glob("*-*") if _place(path) and (path / "state.json").is_file()]
    return sorted(found, key=_place)


def _place(path: Path) -> tuple[int, ...]:
    """Phase and step of a checkpoint by its name; empty for any other name."""
    phase, _, step = path.name.rpartition("-")
    return (PHASES.index(phase), int(step)) if phase in PHASES and step.isdecimal() else ()


def remove_later_checkpoints(folder: Path, phase: str, step: int) -> None:
    """Remove the checkpoints that a run resumed from an earlier one writes again."""
    for path in list_checkpoints(folder):
        if _place(path) > (PHASES.index(phase), step):
            path.replace(folder / f".{path.name}.old.tmp")
    remove_unfinished_checkpoints(folder)


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """The checkpoint to resume from.

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
    """Refuse to resume with other settings.

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
            "use the same ones, or start a new run with --overwrite"
        )


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all."""
    with atomic_path(path) as temporary:
        save_file({name: _own(tensor) for name, tensor in tensors.items()}, temporary)


def remove_unfinished_checkpoints(folder: Path) -> None:
    """Remove what a killed run left half-written, files and folders."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _own(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares memory with nothing, as safetensors wants it."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The tree with each tensor replaced by its name in ``tensors``."""
    if isinstance(value, Tensor):
        tensors[name] = _own(value)
        turned = value.dim() == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=_TURNED)
        return {_TENSOR: name, "channels_last": True} if turned else {_TENSOR: name}
    if isinstance(value, Mapping):
        return {"__dict__": [[key, _flatten(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_flatten(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
    return value


def _unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree with its tensors and dictionaries back; tuples come back as lists."""
    if isinstance(value, dict):
        if _TENSOR in value:
            tensor = tensors[value[_TENSOR]]
            # The order in memory decides how a norm is summed (lamb), and so the last bit.
            return tensor.contiguous(memory_format=_TURNED) if value.get("channels_last") else tensor
        return {key: _unflatten(item, tensors) for key, item in value["__dict__"]}
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    return value
