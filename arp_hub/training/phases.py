"""The run and the phase that the training loop works on: settings, data, log, and the scores so far."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from torch import nn

from ..errors import ArpHubError
from ..penalty import AdaptiveRankPenalty
from .checkpoint import PHASES
from .config import TrainConfig
from .data.batches import steps_per_epoch
from .data.dataset import ImageData
from .preemption import Sigterm
from .runlog import RunLog


@dataclass
class Run:
    """The state that all phases of a run share.

    Attributes:
        config: The settings.
        accelerator: The run's accelerator.
        data: The data.
        log: The run's log.
        settings: The settings that a resumed run must share, as checkpoints hold them.
        sigterm: Whether SIGTERM has come.
        scores: Accuracies measured so far.
        plan: The plan as JSON, once there is one.
        began: When the run began, on the clock of `time.perf_counter`; earlier for a resumed run.
    """

    config: TrainConfig
    accelerator: Accelerator
    data: ImageData
    log: RunLog
    settings: Mapping[str, Any]
    sigterm: Sigterm = field(default_factory=Sigterm)
    scores: dict[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] | None = None
    began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Wall time so far, including the time before a resumed run was stopped."""
        return time.perf_counter() - self.began

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return steps_per_epoch(len(self.data.train), self.config.batch_size)

    def total_steps(self, epochs: int) -> int:
        """Optimiser steps of a phase, at most ``max_steps``."""
        return _phase_steps(self.config, self.data, epochs)

    def steps_before(self, phase: str) -> int:
        """Optimiser steps of all phases before one, for trackers whose steps must rise throughout a run."""
        epochs = (self.config.dense_epochs, self.config.epochs, self.config.finetune_epochs)
        return sum(self.total_steps(count) for count in epochs[: PHASES.index(phase)])


@dataclass
class Phase:
    """One phase of training and the model that it trains.

    Attributes:
        name: ``dense``, ``compress`` (ramp and hold) or ``finetune``.
        model: The model, trained in place.
        epochs: Number of epochs.
        lr: Peak learning rate.
        teacher: The model to distil from, if any.
        penalty: The low-rank penalty, if any.
        frozen_norms: Whether BatchNorm keeps its statistics, as in evaluation.
    """

    name: str
    model: nn.Module
    epochs: int
    lr: float
    teacher: nn.Module | None = None
    penalty: AdaptiveRankPenalty | None = None
    frozen_norms: bool = False


def check_schedule(config: TrainConfig, data: ImageData) -> None:
    """Refuse a ramp that leaves no step for the hold.

    Raises:
        ArpHubError: Naming the ramp and the number of steps.
    """
    steps = _phase_steps(config, data, config.epochs)
    if config.epochs and math.ceil(config.ramp * steps) >= steps:
        count = f"{steps} step{'' if steps == 1 else 's'}"
        more = "epochs or max_steps" if config.max_steps else "epochs"
        raise ArpHubError(f"ramp={config.ramp} leaves no step for the hold in {count}: lower ramp, or raise {more}")


def _phase_steps(config: TrainConfig, data: ImageData, epochs: int) -> int:
    total = epochs * steps_per_epoch(len(data.train), config.batch_size)
    return min(total, config.max_steps) if config.max_steps else total
