"""Planning and fitting by several processes on the CPUs of one machine, one thread each, against one process.

    python -m benchmarks.planning.shared run '*' --shared ../shared
    python -m benchmarks.planning.shared table

A row alternates between one and two processes. It holds the seconds of both, and the bytes that each of two processes
sends into sums and exchanges. Three processes run once. The largest relative difference of a tensor is that of two and
of three processes from one. A BatchNorm's mean counts in standard deviations of its input. ``table`` prints the
speed-up, and an estimate for more processes::

    seconds(P) = serial + shared / min(P, batches) + 2 * bytes / bandwidth

``serial`` and ``shared`` follow from one and two processes; ``batches`` is the number of batches of calibration images,
which are shared out whole; the bandwidth is 1.25 GB/s, that of a 10 Gbit network.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import arp_hub
from arp_hub._utils.environment import environment
from arp_hub.calibration.images import Place, batches
from benchmarks.networks import NETWORKS, SEED, calibration_of, load_network
from benchmarks.rows import load_results, results_file, row_command, row_parser

RESULTS = results_file("shared_calibration")
ROWS = {"resnet20": (0.5, 2048), "lite0": (0.84, 256), "vit": (0.67, 256)}
"""Share of the parameters to keep, and calibration images, by network."""
BANDWIDTH = 1.25e9


def work(name: str, shared: Path, output: Path) -> None:
    """One process: plan and fit the network, write its weights and the seconds that it took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    sent = 0
    reduce, gather = dist.all_reduce, dist.all_gather_object

    def counted_reduce(tensor: torch.Tensor) -> None:
        nonlocal sent
        sent += tensor.nbytes
        reduce(tensor)

    def counted_gather(values: list[Any], value: Any) -> None:
        nonlocal sent
        gather(values, value)
        sent += len(json.dumps(value, default=lambda one: "x" * getattr(one, "nbytes", 100)))

    dist.all_reduce, dist.all_gather_object = counted_reduce, counted_gather
    keep, images = ROWS[name]
    model = load_network(name, shared)
    calibration = calibration_of(name, model, shared, images, copies=0)
    count = sum(1 for _ in batches(calibration, Place.of(model, calibration)))
    dist.barrier()
    start = time.perf_counter()
    plan = arp_hub.make_plan(model, keep_params=keep, calibration=calibration)
    planned = time.perf_counter()
    arp_hub.decompose(model, plan, calibration)
    ended = time.perf_counter()
    if dist.get_rank() == 0:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, output / "model.safetensors")
        figures = {"plan": planned - start, "fit": ended - planned, "bytes": sent, "batches": count}
        (output / "figures.json").write_text(json.dumps({**figures, "layers": plan.to_dict()["layers"]}))
    dist.destroy_process_group()


def launched(name: str, shared: Path, count: int, output: Path) -> dict[str, Any]:
    """The figures of a run by some processes."""
    output.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
    command = [*launcher, "--nproc_per_node", str(count), "-m", "benchmarks.planning.shared", "work", name]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(shared.resolve()), str(output)], check=True, env=environ, stdout=subprocess.DEVNULL)
    return json.loads((output / "figures.json").read_text())


def difference(one: Path, other: Path) -> float:
    """The largest relative difference of a tensor of two models; of means of BatchNorms in standard deviations."""
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")

    def scale(name: str) -> torch.Tensor:
        stem, _, kind = name.rpartition(".")  # means are often near zero: the spread of the input is their scale
        return first[f"{stem}.running_var"].sqrt() if kind == "running_mean" else first[name]

    return max(
        float((value - second[name]).norm() / scale(name).norm().clamp_min(1e-12))
        for name, value in first.items()
        if value.is_floating_point()
    )


def measured(name: str, shared: Path, repeats: int) -> dict[str, Any]:
    """The row of a network: medians over some rounds of one process, then two."""
    torch.set_num_threads(1)  # as in each process, for the entry's hardware
    runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repeats):
            for count in runs:
                runs[count].append(launched(name, shared, count, Path(folder, f"{number}-{count}")))
        runs[3] = [launched(name, shared, 3, Path(folder, "0-3"))]
        apart = {str(count): difference(Path(folder, "0-1"), Path(folder, f"0-{count}")) for count in (2, 3)}
    seconds = {
        str(count): {part: round(statistics.median(run[part] for run in found), 2) for part in ("plan", "fit")}
        for count, found in runs.items()
        if count < 3  # three processes on two cores tell no speed
    }
    return {
        **environment(),
        "command": f"python -m benchmarks.planning.shared run {name}",
        "seed": SEED,
        "keep": ROWS[name][0],
        "images": ROWS[name][1],
        "batches": runs[1][0]["batches"],
        "bytes": runs[2][0]["bytes"],
        "repeats": repeats,
        "seconds": seconds,
        "same_plan": all(run["layers"] == runs[1][0]["layers"] for found in runs.values() for run in found),
        "difference": apart,
    }


def estimate(row: dict[str, Any], processes: int) -> float:
    """Seconds of planning and fitting by more processes, see the top of this module."""
    one, two = (sum(row["seconds"][count].values()) for count in ("1", "2"))
    serial = max(0.0, 2 * two - one)
    parts = min(processes, row["batches"])
    return serial + (one - serial) / parts + 2 * row["bytes"] / BANDWIDTH


def table() -> str:
    """Speed-ups as a table in Markdown."""
    lines = [
        "| network | images | one process | two | speed-up | 8, estimate | 64 | same plan | difference, 2 | 3 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in load_results(RESULTS).items():
        one, two = (sum(row["seconds"][count].values()) for count in ("1", "2"))
        more = " | ".join(f"{estimate(row, count):.0f} s" for count in (8, 64))
        same = "yes" if row["same_plan"] else "no"
        lines.append(
            f"| {NETWORKS[name].title} | {row['images']:,} | {one:.0f} s | {two:.0f} s | {one / two:.2f} | {more} | "
            f"{same} | {row['difference']['2']:.1e} | {row['difference']['3']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run rows, or print the table."""
    if sys.argv[1:2] == ["work"]:
        work(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
        return
    parser, runner = row_parser(__doc__, "print speed-ups and estimates")
    runner.add_argument("--shared", type=Path, required=True, help="folder of checkpoints and data")
    runner.add_argument("--repeats", type=int, default=3, help="rounds of one process, then two")
    row_command(
        parser,
        ROWS,
        RESULTS,
        lambda name, args: measured(name, args.shared, args.repeats),
        lambda row: str(row["seconds"]),
        lambda: print(table()),
    )


if __name__ == "__main__":
    main()
