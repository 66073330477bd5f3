"""Latency of files in their runtime: the compressed model and its dense form, in turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..runtimes.runtime import Run
from ..timing import Spread, clock, paired_ratio, take_turns

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class FileLatency:
    """Seconds of one forward pass.

    Attributes:
        batch_size: Images of the pass.
        threads: Threads of the runtime.
        clock: ``wall``, or ``cpu`` for the process's own time, on one thread.
        latency: The exported model.
        dense: Its dense form in the same runtime and precision, None for a model that is dense itself.
        ratio: Latency over that of the dense form, pair by pair: below 1 is faster.
        rounds: Number of pairs.
    """

    batch_size: int
    threads: int
    clock: str
    latency: Spread
    dense: Spread | None
    ratio: Spread | None
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, latencies in milliseconds."""
        found: dict[str, Any] = {
            "batch_size": self.batch_size,
            "threads": self.threads,
            "clock": self.clock,
            "rounds": self.rounds,
            "latency_ms": self.latency.scaled(1e3).to_dict(),
        }
        if self.dense is not None and self.ratio is not None:
            found |= {"dense_latency_ms": self.dense.scaled(1e3).to_dict(), "ratio": self.ratio.to_dict()}
        return found

    def verdict(self, where: str) -> str | None:
        """One sentence that says which model is faster; None without a dense form.

        Args:
            where: Runtime and precision.
        """
        if self.dense is None or self.ratio is None:
            return None
        times = f"{self.latency.median * 1e3:.3g} ms, dense {self.dense.median * 1e3:.3g} ms"
        ratio = f"ratio {self.ratio.median:.2f}"
        if self.ratio.high < 1:
            return f"{where}: the compressed model is faster than the dense one ({times}, {ratio})"
        if self.ratio.low > 1:
            return (
                f"{where}: the compressed model is SLOWER than the dense one: export the dense one ({times}, {ratio})"
            )
        return f"{where}: both models are equally fast ({times}, {ratio})"


def time_files(runs: Mapping[str, Run], images: Tensor, seconds: float) -> FileLatency:
    """Time loaded files in turns.

    Args:
        runs: The files by name: ``model``, and ``dense`` if there is one.
        images: The images of a forward pass.
        seconds: How long to measure, all files together.
    """
    samples = take_turns({name: partial(run, images) for name, run in runs.items()}, _CPU, seconds)
    model, dense = samples["model"], samples.get("dense")
    return FileLatency(
        len(images),
        torch.get_num_threads(),
        clock(_CPU),
        Spread.of(model),
        None if dense is None else Spread.of(dense),
        None if dense is None else paired_ratio(model, dense),
        len(model),
    )
