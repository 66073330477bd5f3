"""How much of the work of a refinement is done, in steps or in minutes."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist


class Clock:
    """Counts steps and seconds against a budget of one of them, the same in all processes.

    Args:
        minutes: Minutes to work for.
        steps: Steps to make, where there is no limit in minutes.
        seconds: Seconds that earlier runs have worked for.
        done: Steps that earlier runs have made.
    """

    def __init__(self, minutes: float | None, steps: int | None, seconds: float = 0.0, done: int = 0) -> None:
        self._minutes, self._most, self.steps = minutes, steps, done
        self._start = time.monotonic() - seconds
        self._share = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of work so far."""
        return time.monotonic() - self._start

    def share(self) -> float:
        """The share of the work that is done, at most 1. It costs a message where there are several processes."""
        if self._minutes is None:
            return min(1.0, self.steps / max(1, self._most or 0))
        share = torch.tensor(self.seconds / (60 * self._minutes))
        if dist.is_available() and dist.is_initialized():
            share = share.to(torch.device("cuda") if dist.get_backend() == "nccl" else "cpu")
            dist.broadcast(share, 0)
        return min(1.0, float(share))
