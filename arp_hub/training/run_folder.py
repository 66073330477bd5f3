"""The folders of a run: a lock on them, checks before any work, and their clearing when the run begins."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator

from .._utils.files import locked, remove_unfinished
from ..errors import ArpHubError, check_inputs_outside
from ..hub.push import check_push
from ..hub.save import check_folder
from .checkpoint import (
    STATE,
    Checkpoint,
    remove_later_checkpoints,
    remove_old_checkpoints,
    remove_unfinished_checkpoints,
    writing,
)
from .config import TrainConfig, read_config
from .resume import decisive_settings

LOCK = "run.lock"
"""Name of the file that the main process locks while the run lasts."""
REFINEMENT = "refinement.safetensors"
LOG = "log.jsonl"
CONFIG = "config.yaml"
"""Name of the file that holds the state of an unfinished refinement of the fit."""
DENSE = "dense.safetensors"
"""Name of the file that holds the dense model, once it is trained."""
_WRITTEN = {"checkpoints", CONFIG, DENSE, LOG, "metrics.json", "report.html", "tracker"}
"""What else a run writes in its folder. A new run keeps all other files, unless it may overwrite the folder."""


class RunFolder:
    """The folder of a run, beside the finished model. Only the main process writes in it.

    Args:
        config: The settings.
        accelerator: The run's accelerator.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.path = config.run_folder
        self.checkpoints = self.path / "checkpoints"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock while the block runs.

        Raises:
            ArpHubError: If another run holds it, or if the folder holds other files or cannot be written.
        """
        if not self.accelerator.is_main_process:
            yield
            return
        self._check_owner()
        with ExitStack() as stack:
            try:
                with writing(self.path):
                    stack.enter_context(locked(self.path / LOCK))
            except ArpHubError as error:
                if isinstance(error.__cause__, BlockingIOError):
                    raise ArpHubError(
                        f"another run writes in '{self.path}' ({error.__cause__}): wait for its end, stop it, or "
                        "choose another output"
                    ) from error
                raise
            yield

    def check(self, start: Checkpoint | None) -> None:
        """Refuse a run that would overwrite a model or another run, or that could not publish its model.

        Args:
            start: The checkpoint to resume from, if any.

        Raises:
            ArpHubError: Naming the folder or repository.
        """
        config, output, stranger = self.config, Path(self.config.output), self._is_of_another(start)
        inputs = {"--data": config.data, "--checkpoint": config.checkpoint}
        inputs["--teacher-checkpoint"] = config.teacher_checkpoint
        if stranger:
            inputs["--resume"] = config.resume
        for folder in (output, self.path) if config.overwrite or stranger else (output,):
            check_inputs_outside(folder, inputs)
        check_folder(output, overwrite=config.overwrite)
        if start is not None and start.phase != "dense":
            dense_of(start)
        if config.push_to_hub and self.accelerator.is_main_process:
            check_push(config.push_to_hub)
        if not config.overwrite and (start is None or stranger):
            if output.exists() and any(output.iterdir()):
                raise ArpHubError(
                    f"'{output}' already holds a model: choose another output, or replace it with --overwrite"
                )
            if stranger and self.checkpoints.is_dir():
                raise ArpHubError(
                    f"'{self.path}' holds an unfinished run, and resume='{config.resume}' is a checkpoint of another "
                    "one: continue the run with --resume auto, choose another output, or replace it with --overwrite"
                )
            if self.checkpoints.is_dir() and not config.resume:
                raise ArpHubError(
                    f"'{self.path}' holds an unfinished run: continue it with --resume auto, or start a new run with "
                    "--overwrite"
                )

    def begin(self, config: TrainConfig, start: Checkpoint | None) -> None:
        """Remove what the run will write, and save its settings.

        A new run clears the folder. A resumed run removes checkpoints that are later or too many, and files
        that are only half-written.

        Args:
            config: The settings to save.
            start: The checkpoint to resume from, if any.
        """
        if self.accelerator.is_main_process:
            with writing(self.path):
                remove_unfinished(Path(config.output))
                if start is None or self._is_of_another(start):
                    self._clear(start)
                if start is not None and start.path is not None and self._is_of_another(start):
                    with suppress(FileNotFoundError):  # the history up to the checkpoint
                        shutil.copyfile(start.path.parent.parent / LOG, self.path / LOG)
                for folder in (self.path, self.checkpoints):
                    remove_unfinished_checkpoints(folder)
                if start is not None:
                    remove_later_checkpoints(self.checkpoints, start.phase, start.step)
                    remove_old_checkpoints(self.checkpoints, config.keep_checkpoints)
                config.save(self.path / CONFIG)
        self.accelerator.wait_for_everyone()

    def _goes_on(self) -> bool:
        """Whether the settings in the folder give the same numbers as those of this run."""
        try:
            saved = TrainConfig(**read_config(self.path / CONFIG))
        except ArpHubError:
            return False
        return decisive_settings(saved) == decisive_settings(self.config)

    def _is_of_another(self, start: Checkpoint | None) -> bool:
        """Whether a checkpoint lies outside the folder of this run."""
        path = None if start is None else start.path
        return path is not None and path.parent.resolve() != self.checkpoints.resolve()

    def _check_owner(self) -> None:
        """Refuse a folder that is a file, or that holds files which no run wrote."""
        if self.path.exists() and not self.path.is_dir():
            raise ArpHubError(f"'{self.path}' is a file, but the run needs a folder there: choose another output")
        if not self.config.overwrite and not _is_run_folder(self.path):
            raise ArpHubError(
                f"'{self.path}' is where the run keeps its checkpoints, but it holds "
                f"'{min(self.path.iterdir()).name}', which no run wrote: choose another output, or delete the whole "
                "folder with --overwrite"
            )

    def _clear(self, start: Checkpoint | None) -> None:
        """Delete what an earlier run wrote; with ``overwrite``, everything but the lock.

        Where resuming is asked for and there is no checkpoint yet, an unfinished refinement with the same settings
        stays.
        """
        kept = {LOCK, REFINEMENT} if self.config.resume and start is None and self._goes_on() else {LOCK}
        for path in self.path.iterdir():
            if path.name in kept or not (self.config.overwrite or path.name in _WRITTEN | {REFINEMENT}):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def dense_of(start: Checkpoint) -> Path:
    """The file of the dense model that a checkpoint belongs to, in the folder of its run.

    Raises:
        ArpHubError: If it is missing.
    """
    assert start.path is not None  # only a checkpoint that was not read has no path
    path = start.path.parent.parent / DENSE
    if not path.is_file():
        raise ArpHubError(
            f"checkpoint '{start.path}' needs the dense model of its run, and '{path}' is missing: resume from the "
            "whole folder of a run"
        )
    return path


def _is_run_folder(folder: Path) -> bool:
    """Whether a folder is empty, missing or written by a run."""
    if not folder.exists() or not any(folder.iterdir()) or (folder / LOCK).exists():
        return True
    return any(folder.glob(f"checkpoints/*/{STATE}"))
