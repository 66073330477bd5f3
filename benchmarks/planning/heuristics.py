"""What each heuristic of planning and fitting is worth, on four trained networks: one at a time is switched off.

    python -m benchmarks.planning.heuristics list
    OMP_NUM_THREADS=1 python -m benchmarks.planning.heuristics run 'resnet20/*' --shared ../shared
    python -m benchmarks.planning.heuristics table

A row is NETWORK/WHAT-IS-OFF, with the preset "fast" on one thread and no training. It records top-1 and the divergence
of the predictions from the dense network's on training images that the fit has not seen, and CPU seconds. The networks
learned from these images, so top-1 is high; divergences tell apart more. Heuristics may be chosen by this table, since
it looks at no test image. `run` writes results/heuristics.json; `table` prints it.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import arp_hub
from arp_hub._utils.environment import environment
from arp_hub.calibration import layer_problem
from arp_hub.calibration.moments import Moments
from arp_hub.calibration.regression import Regression
from arp_hub.schemes import SCHEMES
from benchmarks.networks import SEED, calibration_of, held_out_of, load_network
from benchmarks.rows import one_thread_command, results_file

RESULTS = results_file("heuristics")
SETTINGS = {"resnet20": (0.35, 1024), "resnet56": (0.35, 512), "lite0": (0.7, 128), "vit": (0.5, 128)}
"""Share of the parameters to keep, and number of calibration images."""
HELD_OUT = {"resnet20": 5000, "resnet56": 5000, "lite0": 872, "vit": 1000}
"""Number of training images to judge by; none of them calibrates."""
SEEDS = {"resnet20": (0, 1, 2)}
"""Seeds of the choice of calibration images, over which a row takes the mean, where it is more than one."""


def _no_anchor(regression: Callable[[Moments, Tensor], Regression]) -> Callable[[Moments, Tensor], Regression]:
    """The best weight for the dense outputs alone, in place of the point halfway to the dense weight."""

    def alone(self: Moments, weight: Tensor) -> Regression:
        found = regression(self, weight)
        return Regression(2 * found.target - weight, found.moment, found.x_mean, found.y_mean)

    return alone


def _no_gradients(problem: Any) -> Any:
    """Errors of the output weighted by BatchNorm scales, in place of the second moment of gradients."""
    return lambda moments, gradients, norm, weight: problem(moments, None, norm, weight)


def _least_shrinkage(moment: Tensor, scale: Tensor, variance: Tensor) -> Tensor:
    return torch.full_like(scale, 1e-4)


def _set(value: Any, *names: str) -> Callable[[], contextlib.ExitStack]:
    """A context in which names of the package have another value."""

    def enter() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        for name in names:
            stack.enter_context(patch(f"arp_hub.{name}", value))
        return stack

    return enter


OFF: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "nothing": contextlib.nullcontext,
    "halfway-target": _set(_no_anchor(Moments.regression), "calibration.moments.Moments.regression"),
    "gradient-metric": _set(_no_gradients(layer_problem._metric), "calibration.layer_problem._metric"),
    "shrinkage": _set(staticmethod(_least_shrinkage), "calibration.moments.Moments._shrinkage"),
    "temperature": _set(1.0, "calibration.gradients._TEMPERATURE"),
    "loss-of-large-errors": _set(lambda errors, sensitivity: errors * sensitivity, "planning.losses.output_loss"),
    "norms-behind": _set(lambda *args, **kwargs: None, "decomposition.renormalise"),
    "dense-layers-refitted": _set(lambda *args, **kwargs: [], "decomposition.layers_to_refit"),
    "fewer-patches": _set(10**9, "calibration.moments.SAMPLES"),
    "groups-for-kxk-only": contextlib.nullcontext,
    "balanced:nothing": contextlib.nullcontext,
    "balanced:copies": contextlib.nullcontext,
}
"""What is off in a row, and how. The last ones are arguments of public functions, which `measure` passes: with
``groups-for-kxk-only`` off, 1x1 and linear layers may have grouped schemes too; with ``copies`` off, the calibration
images of CIFAR-10 have no augmented copies, which only the effort "balanced" uses in number."""
ROWS = [
    f"{network}/{off}" for network in SETTINGS for off in OFF if network == "resnet20" or not off.startswith("balanced")
]


def main() -> None:
    """Parse the command line and do what it asks for."""
    one_thread_command(__doc__, ROWS, RESULTS, measure, _short, table)


def measure(row: str, shared: Path) -> dict[str, Any]:
    """Plan and decompose one network with one heuristic off, and take the mean over the network's seeds."""
    name, off = row.split("/")
    seeds = SEEDS.get(name, (SEED,))
    runs = [_measure(name, off, shared, seed) for seed in seeds]
    keep, count = SETTINGS[name]
    return {
        **environment(),
        "seeds": seeds,
        "keep_params": keep,
        "calibration_images": count,
        "held_out_images": HELD_OUT[name],
        **{key: round(statistics.mean(run[key] for run in runs), 5) for key in runs[0]},
        "divergences": [run["divergence"] for run in runs],
    }


def _measure(name: str, off: str, shared: Path, seed: int) -> dict[str, float]:
    """Top-1 and divergence on held-out images, and CPU seconds, of one run."""
    keep, count = SETTINGS[name]
    model, images, labels, expected = _dense(name, shared, seed)
    calibration = calibration_of(name, model, shared, count, copies=0 if off.endswith("copies") else None, seed=seed)
    schemes = tuple(SCHEMES) if off == "groups-for-kxk-only" else None
    effort = "balanced" if off.startswith("balanced") else "fast"
    torch.manual_seed(seed)
    began = time.process_time()
    with OFF[off]():
        plan = arp_hub.make_plan(model, keep_params=keep, schemes=schemes, calibration=calibration, effort=effort)
        small = arp_hub.decompose(copy.deepcopy(model), plan, calibration, effort=effort)
    seconds = time.process_time() - began
    found = _predictions(small, images)
    return {
        "cpu_seconds": round(seconds, 1),
        "dense_top1": _top1(expected, labels),
        "top1": _top1(found, labels),
        "agreement": 100 * float((found.argmax(1) == expected.argmax(1)).float().mean()),
        "divergence": round(float(F.kl_div(found, expected, reduction="batchmean", log_target=True)), 5),
    }


def _dense(name: str, shared: Path, seed: int) -> tuple[nn.Module, list[Tensor], Tensor, Tensor]:
    """A dense network, held-out training images in batches, their labels, and its log-probabilities."""
    model = load_network(name, shared)
    held_out = held_out_of(name, model, shared, HELD_OUT[name], seed)
    batches = [(images.half(), target) for images, target in held_out.labelled(256, torch.device("cpu"), 0)]
    images, labels = [part for part, _ in batches], torch.cat([target for _, target in batches])
    return model, images, labels, _predictions(model, images)


@torch.inference_mode()
def _predictions(model: nn.Module, images: list[Tensor]) -> Tensor:
    return torch.cat([model(part.float()).log_softmax(1) for part in images])


def _top1(found: Tensor, labels: Tensor) -> float:
    return 100 * float((found.argmax(1) == labels).float().mean())


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a heuristic: top-1, divergence and CPU seconds of each network without it."""
    lines = ["| off | " + " | ".join(f"{network} at {keep:g}" for network, (keep, _) in SETTINGS.items()) + " |"]
    lines.append("|---|" + "---|" * len(SETTINGS))
    for off in OFF:
        cells = [_cell(results.get(f"{network}/{off}")) for network in SETTINGS]
        if any(cells):
            lines.append(f"| {off} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['top1']:.2f}, {row['divergence']:.4f}, {row['cpu_seconds']:.0f} s"


def _short(row: dict[str, Any]) -> str:
    return f"top-1 {row['top1']:.2f}, divergence {row['divergence']:.4f}, {row['cpu_seconds']:.0f} s"


if __name__ == "__main__":
    main()
