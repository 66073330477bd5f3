"""How long something takes: rivals in turns, warmed up, medians with their spread.

Where one thread does all the work, times are those of the process, in which other processes have no part.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArpHubError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
"""Numbers that a workload may be in."""
_WARM_UP, _MOST_ROUNDS = 2, 500
LEAST_ROUNDS = 5
"""Rounds of rivals in turns that are made in any case, unless told."""
_LEAST_SAMPLE, _LONG = 2e-3, 0.1
"""Seconds that one sample takes at least, shorter work is repeated within it, and seconds of work that one call warms
up."""


@dataclass(frozen=True)
class Workload:
    """What a latency is the latency of.

    Attributes:
        batch_size: Images of a forward pass.
        dtype: Numbers of weights and images, one of `DTYPES`.
        channels_last: Whether weights and images lie in memory channel by channel for every pixel.

    Raises:
        ArpHubError: If a value is out of range.
    """

    batch_size: int = 1
    dtype: str = "float32"
    channels_last: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ArpHubError(f"batch_size must be a whole number of at least 1, got {self.batch_size!r}")
        if self.dtype not in DTYPES:
            raise ArpHubError(f"unknown dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}")

    @property
    def layout(self) -> torch.memory_format:
        """The memory format of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


@dataclass(frozen=True)
class Spread:
    """The middle of many samples and how far they lie apart.

    Attributes:
        median: Median.
        low: First quartile.
        high: Third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        """The spread of at least two samples."""
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)

    def scaled(self, factor: float) -> Spread:
        """All three times ``factor``, which is positive."""
        return Spread(self.median * factor, self.low * factor, self.high * factor)

    def to_dict(self, digits: int = 4) -> dict[str, float]:
        """The JSON form, rounded to significant ``digits``."""
        return {name: float(f"{value:.{digits}g}") for name, value in vars(self).items()}


def prepared(model: nn.Module, workload: Workload) -> nn.Module:
    """A copy of the model in evaluation mode, in the numbers and layout of the workload."""
    return copy.deepcopy(model).eval().to(DTYPES[workload.dtype]).to(memory_format=workload.layout)


def forward_call(model: nn.Module, images: Tensor, workload: Workload, compiled: bool = False) -> Callable[[], Any]:
    """One forward pass, to be timed, of a copy of the model that is ready for the workload."""
    network = prepared(model, workload)
    layout = workload.layout if images.dim() == 4 else torch.contiguous_format
    x = images.to(dtype=DTYPES[workload.dtype], memory_format=layout)
    run = torch.compile(network) if compiled else network
    return lambda: run(x)


@torch.inference_mode()
def layer_shares(
    model: nn.Module, names: Collection[str], images: Tensor, workload: Workload, seconds: float = 2.0
) -> dict[str, float]:
    """Each layer's share of the time of a forward pass, all its calls together.

    A pass is cut where a layer begins or ends. Of every piece the fastest of many passes counts: what else the machine
    does only adds to times.
    """
    network, device = prepared(model, workload), images.device
    x = images.to(dtype=DTYPES[workload.dtype], memory_format=workload.layout)
    cuts: list[tuple[str | None, Any]] = []

    def cut(name: str | None, *_: Any) -> None:
        cuts.append((name, _now(device)))

    for name in names:
        layer = network.get_submodule(name)
        layer.register_forward_pre_hook(partial(cut, None))  # what comes before a layer is nobody's
        layer.register_forward_hook(partial(cut, name))
    passes, owners = [], list[str | None]()
    began = time.perf_counter()
    for done in range(_WARM_UP + _MOST_ROUNDS):
        if done >= _WARM_UP + LEAST_ROUNDS and time.perf_counter() - began > seconds:
            break
        cuts.clear()
        cut(None)
        network(x)
        cut(None)
        _wait(device)
        if done >= _WARM_UP:
            owners = [name for name, _ in cuts[1:]]
            passes.append([_between(one, other) for (_, one), (_, other) in pairwise(cuts)])
    pieces = [min(times) for times in zip(*passes, strict=True)]
    shares = dict.fromkeys(names, 0.0)
    for owner, taken in zip(owners, pieces, strict=True):
        if owner is not None:
            shares[owner] += taken / sum(pieces)
    return shares


def clock(device: torch.device) -> str:
    """What times are of: ``cpu`` for the process's own time, where one thread does the work, else ``wall``."""
    return "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def _now(device: torch.device) -> Any:
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.process_time() if clock(device) == "cpu" else time.perf_counter()


def _between(first: Any, second: Any) -> float:
    return second - first if isinstance(first, float) else first.elapsed_time(second) / 1e3


def take_turns(
    rivals: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float = 2.0, least: int = LEAST_ROUNDS
) -> dict[str, list[float]]:
    """Time rivals in turns, so that whatever else the machine does falls on all of them.

    Args:
        rivals: What to time, by name. Each is warmed up first.
        device: Where the work is done; it is waited for.
        seconds: How long to go on, all rivals together.
        least: Rounds that are made in any case.

    Returns:
        Seconds of one call, sample by sample; the samples of one round stand at the same place in every list.
    """
    repeats = {name: _repeats(call, device) for name, call in rivals.items()}
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    began, order = time.perf_counter(), list(rivals)
    for done in range(_MOST_ROUNDS):
        if done >= least and time.perf_counter() - began > seconds:
            break
        for name in order:
            samples[name].append(_sample(rivals[name], repeats[name], device))
        order.reverse()  # so that nobody always comes after the same one
    return samples


def paired_ratio(samples: list[float], reference: list[float]) -> Spread:
    """Ratios of the samples of one round to the reference's sample of that round."""
    return Spread.of([one / other for one, other in zip(samples, reference, strict=True)])


def _repeats(call: Callable[[], Any], device: torch.device) -> int:
    """Calls that one sample takes, found while warming up."""
    for _ in range(_WARM_UP):
        taken = _sample(call, 1, device)
        if taken > _LONG:
            break
    return max(1, round(_LEAST_SAMPLE / max(taken, 1e-9)))


def _sample(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    read = time.process_time if clock(device) == "cpu" else time.perf_counter
    _wait(device)
    began = read()
    for _ in range(repeats):
        call()
    _wait(device)
    return (read() - began) / repeats


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
