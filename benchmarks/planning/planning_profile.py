"""Where the CPU time of planning and fitting goes, term by term.

    python -m benchmarks.planning.planning_profile list
    OMP_NUM_THREADS=1 python -m benchmarks.planning.planning_profile run '*' --shared ../shared
    python -m benchmarks.planning.planning_profile table

A row is NETWORK/EFFORT: a network with half of its parameters kept (84 % of lite0, 67 % of the ViT), on one thread.
Each term holds the CPU seconds of its functions, without those of the terms that they call, for `make_plan` and
`decompose` apart. ResNet-50 and ResNet-110 have random weights and images of smooth noise: neither changes
the time.
A row NETWORK/calls counts calls of torch's operators in the place of seconds: on a GPU, what has to be launched. There,
planning fits like layers together, which is counted, too.
`run` writes results/planning_profile.json; `table` prints it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import arp_hub
from arp_hub._utils.environment import environment
from arp_hub.layers.model import count_params
from benchmarks.networks import SEED, calibration_of, load_network
from benchmarks.rows import one_thread_command, results_file

RESULTS = results_file("planning_profile")
SETTINGS = {"resnet20": (0.5, 2048), "lite0": (0.84, 128), "vit": (0.67, 128), "resnet50": (0.5, 256)}
"""Share of the parameters to keep, and number of calibration images."""
CALLS = {"resnet20": (0.5, 2048), "resnet110": (0.35, 64)}
"""The same for rows that count calls. Their number hardly depends on that of the images."""
ROWS = [f"{network}/{effort}" for network in SETTINGS for effort in ("fast", "balanced")]
ROWS += [f"{network}/calls" for network in CALLS]
RANDOM = {"resnet50": ("resnet50", 224), "resnet110": ("cifar_resnet110", 32)}
"""Architecture and side of the images of networks without a checkpoint: random weights and images of smooth noise."""
TERMS = {
    "forward passes": (
        "decomposition.paired_moments",
        "planning.output_errors.all_moments",
        "calibration.resumption.ResumedPasses.advance",
    ),
    "forward and backward passes": (
        "decomposition.gradient_moments",
        "planning.output_errors.gradient_moments",
        "planning.output_errors.predicted_divergences",
    ),
    "second moments": ("calibration.moments.Moments.update",),
    "regressions and metrics": ("calibration.layer_problem.LayerProblem.of",),
    "starting points and fits": (
        "decomposition.fitted_together",
        "planning.output_errors.fitted_together",
    ),
    "errors of fits": ("calibration.layer_problem.LayerProblem.error",),
    "schemes by weight errors": ("planning.output_errors.shortlist",),
    "BatchNorm statistics": ("decomposition.renormalise",),
    "allocation": ("planning.allocation.CountedBudget.plan",),
}
"""Functions of each term."""


class Clock:
    """What the innermost term that runs takes.

    Args:
        now: A number that grows: CPU seconds, or calls so far.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.seconds: dict[str, float] = {}
        self._running = ["the rest"]
        self._now, self._since = now, now()

    def _switch(self) -> None:
        now = self._now()
        term = self._running[-1]
        self.seconds[term] = self.seconds.get(term, 0.0) + now - self._since
        self._since = now

    def timed(self, term: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose time counts for a term."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._running.append(term)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._running.pop()

        return run

    def read(self) -> dict[str, float]:
        """The seconds since the last reading."""
        self._switch()
        found, self.seconds = {term: round(seconds, 2) for term, seconds in self.seconds.items()}, {}
        return found


class Calls(TorchDispatchMode):
    """Counts calls of torch's operators, and those that read a number back."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.read_back = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        self.read_back += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def watched(now: Callable[[], float] = time.process_time) -> Iterator[Clock]:
    """A clock that times the functions of `TERMS` during the block."""
    clock = Clock(now)
    with contextlib.ExitStack() as stack:
        for term, names in TERMS.items():
            for name in names:
                target, attribute, static = _place(name)
                timed = clock.timed(term, getattr(target, attribute))
                stack.enter_context(patch.object(target, attribute, staticmethod(timed) if static else timed))
        yield clock


def _place(name: str) -> tuple[Any, str, bool]:
    """What holds a function of the package, its name there, and whether it is bound already."""
    parts = name.split(".")
    depth = next(i for i, part in enumerate(parts) if part[0].isupper() or i == len(parts) - 1)
    target = importlib.import_module("arp_hub." + ".".join(parts[:depth]))
    for part in parts[depth:-1]:
        target = getattr(target, part)
    return target, parts[-1], isinstance(vars(target)[parts[-1]], classmethod)


def main() -> None:
    """Parse the command line and do what it asks for."""
    one_thread_command(__doc__, ROWS, RESULTS, measure, _short, table)


def measure(row: str, shared: Path) -> dict[str, Any]:
    """Profile one network with one preset."""
    name, effort = row.split("/")
    keep, count = (CALLS if effort == "calls" else SETTINGS)[name]
    model, images = _network(name, shared, count)
    facts = {**environment(), "seed": SEED, "keep_params": keep, "calibration_images": count}
    if effort == "calls":
        with Calls() as calls, watched(lambda: calls.count) as clock:
            found = _profile(model, images, keep, "balanced", clock) | {"read_back": calls.read_back}
            with patch("arp_hub.planning.output_errors.stack_size", lambda weight: max(1, 2**20 // weight.numel())):
                arp_hub.make_plan(model, keep_params=keep, calibration=images)
            return facts | found | {"plan_together": clock.read()}
    before = resource.getrusage(resource.RUSAGE_SELF)
    with watched() as clock:
        found = _profile(model, images, keep, effort, clock)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        **facts,
        **found,
        "user_seconds": round(after.ru_utime - before.ru_utime, 1),
        "system_seconds": round(after.ru_stime - before.ru_stime, 1),
        "peak_mb": after.ru_maxrss // 1024,
        "peak_over_weights": round(1024 * (after.ru_maxrss - before.ru_maxrss) / (4 * count_params(model)), 1),
    }


def _profile(model: nn.Module, images: Tensor, keep: float, effort: str, clock: Clock) -> dict[str, Any]:
    plan = arp_hub.make_plan(model, keep_params=keep, calibration=images, effort=effort)
    planning = clock.read()
    arp_hub.decompose(copy.deepcopy(model), plan, images, effort=effort)
    return {"plan": planning, "decompose": clock.read(), "layers": len(plan.layers)}


def _network(name: str, shared: Path, count: int) -> tuple[nn.Module, Tensor]:
    if name not in RANDOM:
        model = load_network(name, shared)
        return model, calibration_of(name, model, shared, count, copies=0)
    architecture, size = RANDOM[name]
    torch.manual_seed(SEED)
    coarse = torch.randn(count, 3, size // 4, size // 4)
    images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return timm.create_model(architecture).eval(), images


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a term: CPU seconds of planning and of decomposing, network by network; and totals of both presets."""
    networks = [name for name in SETTINGS if f"{name}/balanced" in results]
    balanced = {name: results[f"{name}/balanced"] for name in networks}
    heads = (f"{name}, {row['calibration_images']:,d} images" for name, row in balanced.items())
    lines = ["| CPU seconds, plan + fit | " + " | ".join(heads) + " |", "|---|" + "---|" * len(networks)]
    for term in (*TERMS, "the rest"):
        cells = [
            " + ".join(f"{row[part].get(term, 0.0):.1f}" for part in ("plan", "decompose")) for row in balanced.values()
        ]
        lines.append(f"| {term} | " + " | ".join(cells) + " |")
    for effort in ("balanced", "fast"):
        rows = [results.get(f"{name}/{effort}") for name in networks]
        cells = [f"{row['user_seconds']:.0f} + {row['system_seconds']:.1f}" if row else "" for row in rows]
        lines.append(f"| {effort}: user + system | " + " | ".join(cells) + " |")
        lines.append(
            f"| {effort}: peak MB | " + " | ".join(f"{row['peak_mb']:,d}" if row else "" for row in rows) + " |"
        )
    for name in (name for name in CALLS if f"{name}/calls" in results):
        lines += ["", *_calls(name, results[f"{name}/calls"])]
    return "\n".join(lines) + "\n"


def _calls(name: str, row: Mapping[str, Any]) -> Iterator[str]:
    """Calls of operators, in thousands."""
    parts = {"plan": "plan", "plan, like layers together": "plan_together", "fit": "decompose"}
    yield f"| thousand calls of operators, {name}, {row['layers']} low-rank layers | " + " | ".join(parts) + " |"
    yield "|---|" + "---|" * len(parts)
    for term in (*TERMS, "the rest"):
        counts = [row[part].get(term, 0) for part in parts.values()]
        if max(counts) >= 1000:
            yield f"| {term} | " + " | ".join(f"{count / 1000:,.0f}" for count in counts) + " |"
    yield f"| those that read a number back, plan and fit | {row['read_back'] / 1000:,.0f} | | |"


def _short(row: dict[str, Any]) -> str:
    if "read_back" in row:
        return f"{sum(row['plan'].values()) + sum(row['decompose'].values()):,.0f} calls"
    return f"{row['user_seconds']:.0f} s user, {row['system_seconds']:.0f} s system, {row['peak_mb']:,d} MB"


if __name__ == "__main__":
    main()
