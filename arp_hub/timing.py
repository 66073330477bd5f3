"""Timing: alternatives are timed in turns, after a warm-up, and reported as medians with quartiles.

On a CPU with one thread, times are CPU times of the process, so that other processes do not count.
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
"""Floating-point types of a workload."""
RUNTIMES = ("torch", "onnxruntime", "openvino")
"""Runtimes of a workload."""
PRECISIONS = ("float32", "int8")
"""Precisions of a workload in a runtime other than PyTorch."""
LEAST_ROUNDS = 5
"""Rounds that are measured in any case: quartiles need about five samples."""


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        batch_size: Images of a forward pass.
        dtype: Floating-point type of weights and images in PyTorch, one of `DTYPES`.
        channels_last: Whether weights and images are in the channels-last memory format of PyTorch.
        runtime: Where the forward pass runs: ``"torch"``, or ``"onnxruntime"`` or ``"openvino"`` on the CPU.
        precision: ``"float32"``, or ``"int8"`` by the quantiser of the runtime. Ranges come from random images: they
            change the accuracy, which is not measured here, and hardly the latency.

    Raises:
        ArpHubError: If a value is out of range, or values contradict each other.

    Example:
        >>> Workload(runtime="onnxruntime", precision="int8").where
        'onnxruntime, int8'
    """

    batch_size: int = 1
    dtype: str = "float32"
    channels_last: bool = False
    runtime: str = "torch"
    precision: str = "float32"

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ArpHubError(f"batch_size must be a whole number of at least 1, got {self.batch_size!r}")
        if self.dtype not in DTYPES:
            raise ArpHubError(f"unknown dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if self.runtime not in RUNTIMES:
            raise ArpHubError(f"unknown runtime {self.runtime!r:.50}: choose one of {', '.join(RUNTIMES)}")
        if self.precision not in PRECISIONS:
            raise ArpHubError(f"unknown precision {self.precision!r:.50}: choose one of {', '.join(PRECISIONS)}")
        if self.in_torch and self.precision == "int8":
            raise ArpHubError(
                "precision='int8' is timed in other runtimes than PyTorch only: choose runtime='onnxruntime' or "
                "runtime='openvino'"
            )
        if not self.in_torch and self.dtype != "float32":
            raise ArpHubError(
                f"dtype={self.dtype} is a type of PyTorch, runtime={self.runtime} takes float32 images: leave it out, "
                "or choose a precision"
            )
        if not self.in_torch and self.channels_last:
            raise ArpHubError(f"runtime={self.runtime} chooses its own memory format: leave `channels_last` out")

    @property
    def in_torch(self) -> bool:
        """Whether the forward pass runs in PyTorch."""
        return self.runtime == "torch"

    @property
    def where(self) -> str:
        """Type of the numbers, after the runtime if it is not PyTorch."""
        return self.dtype if self.in_torch else f"{self.runtime}, {self.precision}"

    def device(self, own: torch.device) -> torch.device:
        """Where a model on the device ``own`` is timed: there in PyTorch, on the CPU in other runtimes."""
        return own if self.in_torch else torch.device("cpu")

    @property
    def layout(self) -> torch.memory_format:
        """The memory format of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of samples.

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
        """All three multiplied by a positive ``factor``."""
        return Spread(self.median * factor, self.low * factor, self.high * factor)

    def to_dict(self, digits: int = 4) -> dict[str, float]:
        """The JSON form, rounded to significant ``digits``."""
        return {name: float(f"{value:.{digits}g}") for name, value in vars(self).items()}


def prepared(model: nn.Module, workload: Workload) -> nn.Module:
    """A copy of the model in evaluation mode, in the dtype and memory format of the workload."""
    return copy.deepcopy(model).eval().to(DTYPES[workload.dtype]).to(memory_format=workload.layout)


def forward_call(model: nn.Module, images: Tensor, workload: Workload, compiled: bool = False) -> Callable[[], Any]:
    """A function that runs one forward pass of a prepared copy of the model."""
    network = prepared(model, workload)
    layout = workload.layout if images.dim() == 4 else torch.contiguous_format
    x = images.to(dtype=DTYPES[workload.dtype], memory_format=layout)
    run = torch.compile(network, dynamic=False) if compiled else network  # as for one batch size alone
    return lambda: run(x)


@torch.inference_mode()
def layer_shares(
    model: nn.Module, names: Collection[str], images: Tensor, workload: Workload, seconds: float = 2.0
) -> dict[str, float]:
    """Each layer's share of the time of a forward pass, over all its calls.

    A pass is cut into pieces where a layer begins or ends. The fastest of many passes counts for each piece, because
    other work on the machine only adds time.
    """
    network, device = prepared(model, workload), images.device
    x = images.to(dtype=DTYPES[workload.dtype], memory_format=workload.layout)
    cuts: list[tuple[str | None, Any]] = []

    def cut(name: str | None, *_: Any) -> None:
        cuts.append((name, _now(device)))

    for name in names:
        layer = network.get_submodule(name)
        layer.register_forward_pre_hook(partial(cut, None))  # the piece before a layer belongs to no layer
        layer.register_forward_hook(partial(cut, name))
    passes, owners = [], list[str | None]()
    began = time.perf_counter()
    for done in range(2 + 500):  # two passes warm up; more than 500 do not make a minimum lower
        if done >= 2 + LEAST_ROUNDS and time.perf_counter() - began > seconds:
            break
        cuts.clear()
        cut(None)
        network(x)
        cut(None)
        _wait(device)
        if done >= 2:
            owners = [name for name, _ in cuts[1:]]
            passes.append([_between(one, other) for (_, one), (_, other) in pairwise(cuts)])
    pieces = [min(times) for times in zip(*passes, strict=True)]
    shares = dict.fromkeys(names, 0.0)
    for owner, taken in zip(owners, pieces, strict=True):
        if owner is not None:
            shares[owner] += taken / sum(pieces)
    return shares


def clock(device: torch.device) -> str:
    """The clock in use: ``cpu`` for the CPU time of the process, on one CPU thread, else ``wall``."""
    return "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def _now(device: torch.device) -> Any:
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event
    _wait(device)  # accelerators without such events
    return time.process_time() if clock(device) == "cpu" else time.perf_counter()


def _between(first: Any, second: Any) -> float:
    return second - first if isinstance(first, float) else first.elapsed_time(second) / 1e3


def take_turns(
    rivals: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float = 2.0, least: int = LEAST_ROUNDS
) -> dict[str, list[float]]:
    """Time alternatives in turns, so that other work on the machine affects all of them alike.

    Args:
        rivals: What to time, by name. Each is warmed up first.
        device: Where the work is done; each sample waits for it.
        seconds: How long to measure, all alternatives together.
        least: Rounds that are measured in any case.

    Returns:
        Seconds of one call for each sample. Samples of one round have the same index in every list.
    """
    repeats = {name: _repeats(call, device) for name, call in rivals.items()}
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    began, order = time.perf_counter(), list(rivals)
    for done in range(500):  # more samples do not make a median more exact
        if done >= least and time.perf_counter() - began > seconds:
            break
        for name in order:
            samples[name].append(_sample(rivals[name], repeats[name], device))
        order.reverse()  # so that none always follows the same one
    return samples


def paired_ratio(samples: list[float], reference: list[float]) -> Spread:
    """Ratios of samples to the reference's samples of the same rounds."""
    return Spread.of([one / other for one, other in zip(samples, reference, strict=True)])


def _repeats(call: Callable[[], Any], device: torch.device) -> int:
    """Calls of one sample, so that a sample takes at least 2 ms; found while warming up."""
    for _ in range(2):  # the first call may take long for other reasons: compiling, or the start of a GPU
        taken = _sample(call, 1, device)
    return max(1, round(2e-3 / max(taken, 1e-9)))


def _sample(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    read = time.process_time if clock(device) == "cpu" else time.perf_counter
    _wait(device)
    began = read()
    for _ in range(repeats):
        call()
    _wait(device)
    return (read() - began) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "mps":  # there is one, which takes no argument
        torch.mps.synchronize()
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize(device)  # not the current device, which may be another
