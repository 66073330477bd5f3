"""What a resumed run must share with the run that it continues."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .._utils.torch_utils import digest_of
from ..errors import ArpHubError
from ..processes import Processes
from .checkpoint import Checkpoint, check_same
from .config import TrainConfig, idle_settings, without_retired
from .data.dataset import ImageData
from .data.splits import Split, StreamedSplit

_FREE = {"workers", "resume", "overwrite", "log_every", "keep_checkpoints", "checkpoint_every", "tracker", "output"}
_FREE |= {"max_bad_images", "push_to_hub", "hub_private", "cuda_graphs"}
"""Settings that a resumed run may change, because no number depends on them."""


def decisive_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the numbers of a run."""
    return {name: value for name, value in config.to_dict().items() if name not in _FREE}


def fixed_settings(config: TrainConfig, accelerator: Accelerator, data: ImageData) -> dict[str, Any]:
    """What decides the numbers of a run, as checkpoints hold it."""
    settings = decisive_settings(config)
    if isinstance(data.train, StreamedSplit):
        settings["workers of the stream"] = config.workers  # they decide its order
    if isinstance(data.train, Split) and data.train.labels is not None:
        names = hashlib.sha256("\n".join(data.class_names).encode()).hexdigest()
        settings["digest of classes and labels"] = f"{names[:8]}-{digest_of([data.train.labels])[:8]}"
    return settings | {"processes": accelerator.num_processes, "training images": len(data.train)}


def check_found(found: Path | None, resume: str, processes: Processes) -> None:
    """Refuse to resume where only some of the processes find the checkpoint, as on machines without a shared disk.

    Raises:
        ArpHubError: Naming a process that finds another one.
    """
    names = processes.gather(found.name if found else "no checkpoint")
    for number, name in enumerate(names):
        if name != names[0]:
            raise ArpHubError(
                f"resume='{resume}': process 0 finds {names[0]}, process {number} finds {name}: to resume, put the "
                "output on a disk that all machines share"
            )


def check_settings(start: Checkpoint, settings: Mapping[str, Any], path: Path) -> None:
    """Refuse to resume from a checkpoint of other settings. Settings that it lacks had their defaults.

    Settings that have no effect beside the others do not count.

    Raises:
        ArpHubError: Naming each setting that differs, with both values.
    """
    defaults = {item.name: item.default for item in dataclasses.fields(TrainConfig) if item.name not in _FREE}
    saved = {**defaults, **without_retired(start.settings)}
    for name in idle_settings({name: saved[name] for name in defaults}):
        saved[name] = defaults[name]
    check_same(saved, settings, path)
