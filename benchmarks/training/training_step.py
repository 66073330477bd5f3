"""Time of a training step and its parts: data, forward and backward pass, penalty; in one process or several.

    OMP_NUM_THREADS=1 python -m benchmarks.training.training_step cifar_resnet20 --data ../shared/data/cifar10
    OMP_NUM_THREADS=1 python -m torch.distributed.run --nproc_per_node 2 \
        -m benchmarks.training.training_step cifar_resnet20 --data ../shared/data/cifar10
    python -m benchmarks.training.training_step cifar_resnet20 --data ../shared/data/cifar10 --gpu --recorded

Blocks of steps with and without the penalty take turns in one run. Times are medians of wall time: run nothing else on
the machine. The script writes a row to results/training_step.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import timm
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

import arp_hub
from arp_hub._utils.environment import environment
from arp_hub.training import load_data
from arp_hub.training.data.batches import epoch_batches
from arp_hub.training.data.images import TrainBatch
from arp_hub.training.graphs import recorded_training
from benchmarks.penalty.penalty_cost import plan_of
from benchmarks.rows import replace_row, results_file

RESULTS = results_file("training_step")


def main() -> None:
    """Measure one model and write its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="timm name")
    parser.add_argument("--data", default="digits", help="data set, as for the recipes")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step, over all processes")
    parser.add_argument("--every", type=int, default=32, help="steps from one pull to the next")
    parser.add_argument("--blocks", type=int, default=8, help="pairs of blocks; a block is two rounds of pulls")
    parser.add_argument("--gpu", action="store_true", help="use a GPU")
    parser.add_argument("--recorded", action="store_true", help="replay CUDA graphs, as the recipes' --cuda-graphs")
    args = parser.parse_args()
    accelerator = Accelerator(cpu=not args.gpu)
    torch.manual_seed(0)
    model = timm.create_model(args.model)
    data = load_data(args.data, model)
    split, processes, rank = data.train, accelerator.num_processes, accelerator.process_index
    size = args.batch_size // processes
    length, rounds = 2 * args.every, args.blocks + 1
    order = [batch for epoch in range(99) for batch in epoch_batches(len(split), args.batch_size, 0, epoch)]
    order = order[: 2 * length * rounds + 1]
    jobs = (
        TrainBatch(split.indices[batch], step, slice(rank * size, (rank + 1) * size))
        for step, batch in enumerate(order)
    )
    images = split.images.training(jobs, accelerator.device, 4)
    labels = (split.labels[batch[rank * size : (rank + 1) * size]].to(accelerator.device) for batch in order)
    plan = plan_of(model, ("cp", "channel"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    wrapped, optimizer = accelerator.prepare(model.train(), optimizer)
    penalty = arp_hub.AdaptiveRankPenalty(model, plan, total_steps=10**6, ramp=0.9, every=args.every)
    forward = recorded_training(wrapped, next(images)) if args.recorded else wrapped

    def now() -> float:
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def block(pull: bool) -> tuple[float, float]:
        """Seconds per step, and how many of them are spent on data."""
        loading, began = 0.0, now()
        for _ in range(length):
            started = now()
            x, y = next(images), next(labels)
            loading += now() - started
            loss = cross_entropy(forward(x), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            if pull:
                penalty.step()
        return (now() - began) / length, loading / length

    pairs = [(block(False), block(True)) for _ in range(rounds)][1:]  # the first warms up
    plain = statistics.median(a[0] for a, _ in pairs)
    ratio = statistics.median(b[0] / a[0] for a, b in pairs)
    row = {
        **environment(),
        "model": args.model,
        "data": data.name.rstrip("/").split("/")[-1],
        "seed": 0,
        "processes": processes,
        "device": accelerator.device.type,
        "recorded": args.recorded,
        "batch_size": args.batch_size,
        "every": args.every,
        "step_seconds": round(plain, 5),
        "step_seconds_with_penalty": round(statistics.median(b[0] for _, b in pairs), 5),
        "penalty_ratio": round(ratio, 4),
        "data_share": round(statistics.median(a[1] / a[0] for a, _ in pairs), 4),
        "images_per_second_of_the_data_path": round(size / statistics.median(a[1] for a, _ in pairs)),
        "blocks": len(pairs),
    }
    if accelerator.is_main_process:
        print(json.dumps({key: row[key] for key in list(row)[2:]}, indent=1))
        replace_row(RESULTS, row, same=("model", "processes", "device", "batch_size", "recorded"))
    wrapped, forward, optimizer = accelerator.free_memory(wrapped, forward, optimizer)  # they hold the process group
    accelerator.end_training()


if __name__ == "__main__":
    main()
