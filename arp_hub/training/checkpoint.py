"""Checkpoints of a run: folders with safetensors and JSON, written whole or not at all. Nothing is pickled.

run/checkpoints/compress-00001200/
    state.json             phase, step, settings, scores, and the tree whose leaves are the tensors
    state.safetensors      the tensors
    SHA256SUMS             checksums of both, written last; verify them with `sha256sum --check SHA256SUMS`
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .._utils.files import atomic_path, read_text, replacing
from .._utils.parse import read_json
from ..errors import ArpHubError

_logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""The newest checkpoint format that this version reads, and the one that it writes."""
PHASES = ("dense", "compress", "finetune")
STATE, TENSORS, SUMS = "state.json", "state.safetensors", "SHA256SUMS"
_TENSOR = "__tensor__"
_TURNED = torch.channels_last


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two steps.

    Attributes:
        phase: The current phase.
        step: Number of completed steps of this phase.
        settings: Settings that a resumed run must share: the config, the numbers of processes and training images.
        scores: Accuracies measured so far.
        plan: The plan as JSON, once there is one.
        seconds: Wall time so far.
        state: Nested dictionaries and lists of tensors and plain values: model, optimizer, penalty and the like.
        path: The folder that it was read from.
    """

    phase: str
    step: int
    settings: Mapping[str, Any]
    scores: Mapping[str, Any]
    plan: Mapping[str, Any] | None
    seconds: float
    state: Mapping[str, Any]
    path: Path | None = None

    def load_into(self, target: Any, part: str) -> None:
        """Load a part of the state into a model or a penalty.

        Raises:
            DamagedCheckpoint: If the part is missing or does not fit.
        """
        try:
            target.load_state_dict(self.state[part])
        except ArpHubError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise damaged(
                self.path, f"'{part}' does not fit this run ({type(error).__name__}: {reason:.300})"
            ) from error


class DamagedCheckpoint(ArpHubError):
    """A checkpoint whose files are missing, cut short or changed."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint atomically, then remove all but the newest ``keep``."""
    target = folder / f"{checkpoint.phase}-{checkpoint.step:08d}"
    remove_unfinished_checkpoints(folder)
    tensors: dict[str, Tensor] = {}
    tree = _flatten(checkpoint.state, "", tensors)
    meta = {name: getattr(checkpoint, name) for name in ("phase", "step", "settings", "scores", "plan", "seconds")}
    with replacing(target) as new:
        save_file(tensors, new / TENSORS)
        text = json.dumps({"format_version": FORMAT_VERSION, **meta, "state": tree})
        (new / STATE).write_text(text, encoding="utf-8")
        (new / SUMS).write_text("".join(_sums(new).values()))
    remove_old_checkpoints(folder, keep)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, after its checksums are verified.

    Raises:
        DamagedCheckpoint: If a file is missing, cut short or changed.
        ArpHubError: If it is of a newer format.
    """
    verify_checksums(path)
    try:
        meta = read_json(path / STATE)
        tensors = load_file(path / TENSORS)
        if meta["format_version"] > FORMAT_VERSION:
            raise ArpHubError(
                f"checkpoint '{path}' has format_version {meta['format_version']}, this arp_hub reads up to "
                f"{FORMAT_VERSION}: upgrade with `pip install --upgrade arp-hub`"
            )
        return _checked(
            Checkpoint(
                phase=meta["phase"],
                step=meta["step"],
                settings=meta["settings"],
                scores=meta["scores"],
                plan=meta["plan"],
                seconds=meta.get("seconds", 0.0),
                state=_unflatten(meta["state"], tensors, path),
                path=path,
            )
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
        raise damaged(path, f"it cannot be read ({error!r})") from error


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, after the types of its parts are checked: a file without checksums may hold anything."""
    whole, real = (int,), (int, float)
    for name, value, types in (
        ("phase", checkpoint.phase, (str,)),
        ("step", checkpoint.step, whole),
        ("settings", checkpoint.settings, (dict,)),
        ("scores", checkpoint.scores, (dict,)),
        ("plan", checkpoint.plan, (dict, type(None))),
        ("seconds", checkpoint.seconds, real),
        ("state", checkpoint.state, (dict,)),
    ):
        if not isinstance(value, types) or isinstance(value, bool):
            raise TypeError(f"{name} is of type {type(value).__name__}")
    if checkpoint.phase not in PHASES or checkpoint.step < 0 or not math.isfinite(checkpoint.seconds):
        raise ValueError(
            f"there is no step {checkpoint.step} of phase '{checkpoint.phase}' after {checkpoint.seconds} seconds"
        )
    place = PHASES.index(checkpoint.phase), checkpoint.step
    if checkpoint.path and (_place(checkpoint.path) or place) != place:
        raise ValueError(f"it holds step {checkpoint.step} of phase '{checkpoint.phase}'")
    if checkpoint.phase != "dense" and not isinstance(checkpoint.scores.get("dense"), dict):
        raise TypeError("its scores lack those of the dense model")
    for name, holds, wanted in _PARTS:
        if not holds(checkpoint.state.get(name)):
            raise TypeError(f"'{name}' in its state is not {wanted}")
    return checkpoint


def _are_tensors(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(isinstance(part, Tensor) for part in value.values()))


def _are_states(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(isinstance(key, int) and isinstance(part, dict) for key, part in value.items())
    )


def _are_groups(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(group, dict) for group in value))


def _is_penalty(value: Any) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, dict)
        and all(type(value[key]) is int for key in ("step_count", "total_steps", "ramp_steps"))
        and isinstance(value["layers"], dict)
        and all(layer is not None and _are_tensors(layer) for layer in value["layers"].values())
    )


def _are_totals(value: Any) -> bool:
    return value is None or (isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == 3)


_PARTS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("model", _are_tensors, "tensors by name"),
    ("ema", _are_tensors, "tensors by name"),
    ("optimizer", _are_states, "a state for each parameter"),
    ("groups", _are_groups, "a list of groups"),
    ("penalty", _is_penalty, "the state of a penalty"),
    ("scaler", lambda value: value is None or isinstance(value, dict), "the state of a scaler"),
    ("totals", _are_totals, "three numbers for each process"),
)
"""The parts of a run's state, which it holds or lacks: name, check and what the check wants."""


class _Part(dict[Any, Any]):
    """A dictionary of a checkpoint: an entry that it lacks is damage, and no error of the program."""

    def __init__(self, items: Iterable[tuple[Any, Any]], path: Path) -> None:
        super().__init__(items)
        self.path = path

    def __missing__(self, key: Any) -> Any:
        raise damaged(self.path, f"its state lacks '{key}'")


def verify_checksums(path: Path) -> None:
    """Compare the files of a checkpoint with its checksums. A checkpoint without checksums passes.

    Raises:
        DamagedCheckpoint: Naming the file that is missing, cut short or changed.
    """
    sums = path / SUMS
    if not sums.exists():
        return
    for name in (STATE, TENSORS):
        if not (path / name).is_file():
            raise damaged(path, f"{name} is missing")
    try:
        found, current = read_text(sums), _sums(path)
    except (OSError, ValueError) as error:
        raise damaged(path, f"its {SUMS} cannot be verified ({error})") from error
    for name, line in current.items():
        if line not in found:
            raise damaged(path, f"{name} does not have the checksum in {SUMS}")
    if found != "".join(current.values()):
        raise damaged(path, f"{SUMS} has more than the checksums of {STATE} and {TENSORS}")


def _sums(path: Path) -> dict[str, str]:
    """The line of `SUMS` for each file of a checkpoint."""
    return {name: f"{_sha256(path / name)}  {name}\n" for name in (STATE, TENSORS)}


def damaged(path: Path | None, what: str) -> DamagedCheckpoint:
    """The error about a damaged checkpoint.

    Args:
        path: The folder of the checkpoint.
        what: What is wrong with it.
    """
    return DamagedCheckpoint(
        f"'{path}' is not a whole checkpoint: {what}. Give another with --resume, or start a new run with --overwrite"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run in order of phase and step, not of file times, which copying changes."""
    return sorted((path for path in folder.glob("*-*") if _place(path) and path.is_dir()), key=_place)


def newest_whole(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint of a run, if any, and the damaged ones that are newer."""
    damaged = []
    for path in reversed(list_checkpoints(folder)):
        try:
            if (path / SUMS).exists():
                verify_checksums(path)
            else:
                load_checkpoint(path)
        except DamagedCheckpoint:
            damaged.append(path)
        else:
            return path, damaged
    return None, damaged


def _place(path: Path) -> tuple[int, ...]:
    """Phase and step of a checkpoint by its name; empty for any other name."""
    phase, _, step = path.name.rpartition("-")
    return (PHASES.index(phase), int(step)) if phase in PHASES and step.isdecimal() else ()


def remove_later_checkpoints(folder: Path, phase: str, step: int) -> None:
    """Remove the checkpoints after a step, which a run resumed from that step writes a second time."""
    _remove(folder, [path for path in list_checkpoints(folder) if _place(path) > (PHASES.index(phase), step)])


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the newest ``keep``."""
    _remove(folder, list_checkpoints(folder)[:-keep])


def _remove(folder: Path, checkpoints: list[Path]) -> None:
    for path in checkpoints:  # renamed first: a killed run leaves no incomplete checkpoint under this name
        path.replace(folder / f".{path.name}.old.tmp")
    remove_unfinished_checkpoints(folder)


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """The checkpoint to resume from.

    Args:
        resume: Empty for none; ``auto`` for the newest whole one in ``folder``; or the path of one, or of a run.
        folder: Where this run keeps its checkpoints.

    Raises:
        ArpHubError: If the named checkpoint does not exist, or if all are damaged.
    """
    if not resume:
        return None
    path = Path(resume)
    if resume != "auto":
        if (path / STATE).is_file() or (_place(path) and path.is_dir()):
            return path
        folder = path / "checkpoints"
    found, damaged = newest_whole(folder)
    names = ", ".join(f"'{path}'" for path in damaged)
    if found and damaged:
        _logger.warning("damaged checkpoints: %s. The run continues from '%s', the newest whole one", names, found)
    elif damaged:
        raise ArpHubError(f"no checkpoint in '{folder}' is whole, damaged: {names}: start a new run with --overwrite")
    elif not found and resume != "auto":
        raise ArpHubError(f"no checkpoint at resume='{resume}': give a checkpoint folder, a run folder or 'auto'")
    return found


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


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Report a failed write inside the block in one sentence.

    Raises:
        ArpHubError: Naming ``place`` and the reason, such as a full or read-only disk.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ArpHubError(
            f"cannot write in '{place}': {error}. Free disk space or allow writing, then continue with --resume auto"
        ) from error


def remove_unfinished_checkpoints(folder: Path) -> None:
    """Remove files and folders that a killed run left half-written."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _own(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares memory with no other tensor, as safetensors requires."""
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


def _unflatten(value: Any, tensors: Mapping[str, Tensor], path: Path) -> Any:
    """The tree with its tensors and dictionaries back; tuples come back as lists."""
    if isinstance(value, dict):
        if _TENSOR in value:
            tensor = tensors[value[_TENSOR]]
            # The memory layout decides the order in which norms, such as LAMB's, are summed, and so their last bit.
            return tensor.contiguous(memory_format=_TURNED) if value.get("channels_last") else tensor
        return _Part([(key, _unflatten(item, tensors, path)) for key, item in value["__dict__"]], path)
    if isinstance(value, list):
        return [_unflatten(item, tensors, path) for item in value]
    return value
