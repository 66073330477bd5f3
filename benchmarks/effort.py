"""Accuracy and time of the effort presets, on four trained networks.

    python -m benchmarks.effort list
    OMP_NUM_THREADS=1 python -m benchmarks.effort run 'resnet20/*' --shared ../shared
    python -m benchmarks.effort table

A row is NETWORK/EFFORT: planning and decomposition without training, calibrated on unlabelled training images, on one
thread. It records CPU seconds (user and system), peak memory, and top-1 on test images that nothing was tuned on.
`run` writes results/effort.json; `table` prints it.
"""

from __future__ import annotations

import copy
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import arp_hub
from arp_hub._utils.environment import environment
from arp_hub.effort import EFFORTS
from arp_hub.layers.model import count_params
from arp_hub.training import evaluate
from benchmarks.networks import SEED, calibration_of, load_network, test_images_of
from benchmarks.rows import one_thread_command, results_file

RESULTS = results_file("effort")
SETTINGS = {"resnet20": (0.5, 1024), "resnet56": (0.35, 512), "lite0": (0.84, 128), "vit": (0.67, 128)}
"""Share of the parameters to keep, and number of calibration images."""
TEST_IMAGES = {"vit": 1000}
"""Number of test images, where not all are used."""
ROWS = [f"{network}/{effort}" for network in SETTINGS for effort in EFFORTS]


def main() -> None:
    """Parse the command line and do what it asks for."""
    one_thread_command(__doc__, ROWS, RESULTS, measure, _short, table)


def measure(row: str, shared: Path) -> dict[str, Any]:
    """Plan and decompose one network with one preset."""
    name, effort = row.split("/")
    keep, count = SETTINGS[name]
    model = load_network(name, shared)
    images = calibration_of(name, model, shared, count, copies=0)
    test = test_images_of(name, model, shared, TEST_IMAGES.get(name))
    began = _cpu()
    plan = arp_hub.make_plan(model, keep_params=keep, calibration=images, effort=effort)
    planned = _cpu()
    small = arp_hub.decompose(copy.deepcopy(model), plan, images, effort=effort)
    fitted = _cpu()
    return {
        **environment(),
        "seed": SEED,
        "keep_params": keep,
        "kept": round(count_params(small) / count_params(model), 4),
        "calibration_images": len(images),
        "plan_seconds": {"user": round(planned[0] - began[0], 1), "system": round(planned[1] - began[1], 1)},
        "decompose_seconds": {"user": round(fitted[0] - planned[0], 1), "system": round(fitted[1] - planned[1], 1)},
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "dense": evaluate(model, test),
        **evaluate(small, test),
    }


def _cpu() -> tuple[float, float]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime, usage.ru_stime


def _seconds(row: Mapping[str, Any]) -> float:
    return sum(row["plan_seconds"].values()) + sum(row["decompose_seconds"].values())


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a row: accuracy and CPU seconds."""
    lines = [
        "| network | kept | images | effort | top-1 (dense) | CPU seconds, plan and fit |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in sorted(results.items(), key=lambda item: ROWS.index(item[0])):
        network, effort = name.split("/")
        accuracy = f"{row['top1']:.2f} ({row['dense']['top1']:.2f})"
        lines.append(
            f"| {network} | {row['kept']:.0%} | {row['calibration_images']:,d} | `{effort}` | {accuracy} "
            f"| {_seconds(row):.0f} |"
        )
    return "\n".join(lines) + "\n"


def _short(row: dict[str, Any]) -> str:
    return f"top-1 {row['top1']:.2f}, {_seconds(row):.0f} s"


if __name__ == "__main__":
    main()
