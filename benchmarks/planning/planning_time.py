"""Time and memory of planning and decomposing a model with random weights.

    OMP_NUM_THREADS=1 python -m benchmarks.planning.planning_time resnet50
    OMP_NUM_THREADS=1 python -m benchmarks.planning.planning_time resnet50 --images 256
    python -m benchmarks.planning.planning_time resnet50 --images 256 --device cuda

The row in results/planning_time.json holds wall time, CPU time, and peak memory. Peak memory is that of the process, or
of the GPU, minus the memory in use before planning, in multiples of the size of the weights. The images are smooth
noise, because their content does not change the time.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import timm
import torch

import arp_hub
from arp_hub._utils.environment import environment
from arp_hub.layers.trace import input_size_of
from benchmarks.rows import replace_row, results_file

RESULTS = results_file("planning_time")


def memory(device: torch.device) -> int:
    """Peak memory so far, in bytes: of the process, or of its tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, dict[str, float]]:
    """The result of ``work``, and its wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, {"wall": round(time.perf_counter() - wall, 2), "cpu": round(time.process_time() - cpu, 2)}


def main() -> None:
    """Measure one model and write its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="timm name")
    parser.add_argument("--images", type=int, default=0, help="calibration images")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the parameters to keep")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(args.model).eval().to(args.device)
    weights = sum(p.numel() for p in model.parameters())
    size = input_size_of(model)
    images = None
    if args.images:
        coarse = torch.randn(args.images, size[0], size[1] // 4, size[2] // 4)
        images = torch.nn.functional.interpolate(coarse, size=size[1:], mode="bilinear")
    before = memory(args.device)
    plan, planning = timed(lambda: arp_hub.make_plan(model, keep_params=args.keep, calibration=images), args.device)
    _, decomposing = timed(lambda: arp_hub.decompose(model, plan, images), args.device)
    peak = memory(args.device) - before
    row = {
        **environment(),
        "model": args.model,
        "seed": 0,
        "keep_params": args.keep,
        "images": args.images,
        "device": args.device.type,
        "params": weights,
        "layers": len(plan.layers),
        "plan_seconds": planning,
        "decompose_seconds": decomposing,
        "peak_over_weights": round(peak / (4 * weights), 2),
    }
    print(json.dumps({key: row[key] for key in list(row)[3:]}))
    replace_row(RESULTS, row, same=("model", "images", "device"))


if __name__ == "__main__":
    main()
