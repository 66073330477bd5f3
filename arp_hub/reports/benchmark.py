"""Latency and throughput of a model against its dense form, in one run."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..decomposition import to_dense
from ..errors import ArpHubError
from ..layers.model import check_model, low_rank_layers
from ..layers.trace import InputSize, input_size_of
from ..runtimes.timed import check_installed, model_call
from ..timing import Spread, Workload, clock, paired_ratio, take_turns


@dataclass(frozen=True)
class Benchmark:
    """What `benchmark` measured.

    Attributes:
        workload: What was timed.
        compiled: Whether both went through ``torch.compile``.
        device: Type of the device.
        threads: Threads that torch uses on a CPU.
        clock: ``wall``, or ``cpu`` where times are the process's own, which they are on one thread.
        input_size: ``(channels, height, width)``.
        latency: Seconds of one forward pass of the model.
        dense: Those of its dense form, None for a model that is dense itself.
        ratio: Latency over that of the dense form, pair by pair: below 1 is faster.
        rounds: Number of pairs.
    """

    workload: Workload
    compiled: bool
    device: str
    threads: int
    clock: str
    input_size: InputSize
    latency: Spread
    dense: Spread | None
    ratio: Spread | None
    rounds: int

    @property
    def throughput(self) -> float:
        """Images a second."""
        return self.workload.batch_size / self.latency.median

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: latencies in milliseconds, throughput in images a second."""
        found: dict[str, Any] = {
            **asdict(self.workload),
            "compiled": self.compiled,
            "device": self.device,
            "threads": self.threads,
            "clock": self.clock,
            "input_size": list(self.input_size),
            "rounds": self.rounds,
            "latency_ms": self.latency.scaled(1e3).to_dict(),
            "images_per_second": round(self.throughput, 2),
        }
        if self.dense is not None and self.ratio is not None:
            found["dense_latency_ms"] = self.dense.scaled(1e3).to_dict()
            found["dense_images_per_second"] = round(self.workload.batch_size / self.dense.median, 2)
            found["ratio"] = self.ratio.to_dict()
        return found


def benchmark(
    model: nn.Module,
    workload: Workload | None = None,
    *,
    dense: nn.Module | None = None,
    input_size: InputSize | None = None,
    compiled: bool = False,
    seconds: float = 5.0,
) -> Benchmark:
    """Time a model against its dense form: warmed up, in turns, medians with quartiles.

    Args:
        model: Any timm model, on the device to time it on; it is copied, not changed.
        workload: Batch size, numbers, memory layout and runtime; by default one image, in float32, in PyTorch. Other
            runtimes run on the CPU: both models are exported to temporary files first.
        dense: What to compare with; by default the model with its factors merged.
        input_size: ``(channels, height, width)``; by default the model's own.
        compiled: Time both through ``torch.compile``; it compiles while warming up.
        seconds: How long to measure, after the warm-up; 5 rounds are made in any case.

    Returns:
        Latencies of both, and their paired ratios.

    Raises:
        ArpHubError: If an argument is out of range, the packages of the runtime are missing, or the model cannot run
            the workload on its device.

    Example:
        >>> benchmark(model, Workload(batch_size=32), seconds=20).ratio.median
        0.61
    """
    check_model(model)
    workload = workload or Workload()
    if not (isinstance(seconds, (int, float)) and math.isfinite(seconds) and seconds > 0):
        raise ArpHubError(f"seconds must be a number above 0, got {seconds!r}")
    if compiled and not workload.in_torch:
        raise ArpHubError(f"torch.compile has no effect in runtime={workload.runtime}: leave `compiled` out")
    check_installed(workload)
    size = input_size_of(model, input_size)
    if dense is None and low_rank_layers(model):
        dense = to_dense(copy.deepcopy(model))
    models = {"model": model} if dense is None else {"model": model, "dense": dense}
    device = workload.device(next(model.parameters()).device)
    images = torch.randn(workload.batch_size, *size, device=device)
    if compiled:  # torch counts graphs of a forward method over all models, and runs the ninth uncompiled
        torch.compiler.reset()
    try:
        calls = {name: model_call(network, images, workload, compiled) for name, network in models.items()}
        with torch.inference_mode():
            samples = take_turns(calls, device, seconds)
    except ArpHubError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:  # models refuse sizes in many ways
        raise ArpHubError(f"the model cannot run {workload} on {device}: {str(error).splitlines()[0]}") from error
    return Benchmark(
        workload,
        compiled,
        device.type,
        torch.get_num_threads(),
        clock(device),
        size,
        Spread.of(samples["model"]),
        Spread.of(samples["dense"]) if "dense" in samples else None,
        paired_ratio(samples["model"], samples["dense"]) if "dense" in samples else None,
        len(samples["model"]),
    )
