"""The output of a run: a progress bar, one line for each epoch (also as JSON), and curves for a tracker."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available
from tqdm import tqdm

from .._utils.files import read_text, write_atomically
from .._utils.parse import parse_json
from ..errors import ArpHubError
from .checkpoint import PHASES, writing
from .config import TrainConfig
from .run_folder import LOG

_logger = logging.getLogger(__name__)

_TRACKERS = ("tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab")


def tracker_name(config: TrainConfig) -> str | None:
    """The name of the tracker for Accelerate, or None for no tracker.

    Raises:
        ArpHubError: If Accelerate knows no such tracker.
    """
    if config.tracker in ("", "none"):
        return None
    if config.tracker not in _TRACKERS:
        raise ArpHubError(f"unknown tracker '{config.tracker}': choose from {', '.join(_TRACKERS)} or none")
    if config.tracker == "tensorboard" and not is_tensorboard_available():
        _logger.info("tensorboard is not installed, so there will be no curves: pip install 'arp-hub[tracking]'")
        return None
    return config.tracker


class RunLog:
    """The log of a run. Only the main process writes; on all others, every method does nothing.

    Args:
        accelerator: The run's accelerator.
        config: The settings.
        done: Phase and step that a resumed run continues from. Later lines of its log are dropped.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig, done: tuple[str, int] | None) -> None:
        self.accelerator = accelerator
        self.path = config.run_folder / LOG
        self.main = accelerator.is_main_process
        if self.main:
            with writing(self.path):
                self._cut(done)
                self.path.touch()  # a run without epochs has an empty log
        flat = {name: json.dumps(value) if isinstance(value, (dict, list, type(None))) else value
                for name, value in config.to_dict().items()}  # fmt: skip
        accelerator.init_trackers("tracker", config=flat)

    def bar(self, phase: str, total: int, done: int) -> tqdm:
        """A progress bar, silent when the output is not a terminal."""
        return tqdm(total=total, initial=done, desc=phase, unit="step", disable=None if self.main else True)

    def track(self, phase: str, step: int, values: dict[str, float]) -> None:
        """Curves for the tracker. Steps count from the start of the run: some trackers drop those that fall back."""
        self.accelerator.log({f"{phase}/{name}": value for name, value in values.items()}, step=step)

    def epoch(self, entry: dict[str, Any]) -> None:
        """Log an epoch as one line of text, and as JSON with the violations of every layer."""
        if not self.main:
            return
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        words = [f"{entry['phase']} epoch {entry['epoch']}/{entry['epochs']}", f"loss {entry['loss']:.4f}"]
        words.append(f"train top-1 {entry['top1']:.2f}")
        if "val" in entry:
            words.append(f"held-out top-1 {entry['val']['top1']:.2f}")
        if "violation" in entry:
            words.append(f"violation {entry['violation']:.2e} ({entry['stage']})")
        words += [f"lr {entry['lr']:.4g}", f"{entry['seconds']:.1f} s"]
        _logger.info(", ".join(words))

    def note(self, message: str, *values: Any) -> None:
        """A line of text."""
        if self.main:
            _logger.info(message, *values)

    def _cut(self, done: tuple[str, int] | None) -> None:
        """Drop the lines that the resumed run writes a second time."""
        if not self.path.exists():
            return
        kept = []
        if done is not None:
            last = PHASES.index(done[0]), done[1]
            for line in read_text(self.path, errors="replace").splitlines():
                try:
                    entry = parse_json(line)
                    if (PHASES.index(entry["phase"]), entry["step"]) <= last:
                        kept.append(line)
                except (ValueError, LookupError, TypeError):
                    continue  # the last line of a killed run may be half-written
        write_atomically(self.path, "".join(line + "\n" for line in kept))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a run's ``log.jsonl``.

    Raises:
        ArpHubError: If the file cannot be read, or a line is no entry.
    """
    entries: list[dict[str, Any]] = []
    try:
        for line in read_text(path).splitlines():
            entry = parse_json(line)
            if not isinstance(entry, dict):
                raise TypeError(f"expected an object, got {type(entry).__name__}")
            entries.append(entry)
    except (OSError, ValueError, TypeError) as error:
        raise ArpHubError(f"cannot read the log '{path}', line {len(entries) + 1}: {error}") from error
    return entries
