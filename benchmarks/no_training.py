"""Accuracy without any training: plan and decompose trained CIFAR-10 models with unlabelled images, then evaluate.

    python benchmarks/no_training.py --data DATA --checkpoint resnet20.safetensors --model cifar_resnet20

Calibration images are drawn from the training split, accuracy is on the whole test split. Each budget gives a row of
benchmarks/results/no_training.json; rows of other models and budgets that are there already stay.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch

import arp_hub
from arp_hub._env import environment
from arp_hub.layers import count_params
from arp_hub.loading import load_model
from arp_hub.tracing import count_macs
from arp_hub.training import calibration_images, evaluate, load_data

RESULTS = Path(__file__).parent / "results" / "no_training.json"


def main() -> None:
    """Measure every budget and write its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10: a folder of parquet or a Hub id")
    parser.add_argument("--model", default="cifar_resnet20", help="timm name")
    parser.add_argument("--checkpoint", required=True, help="weights of the trained model")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.35, 0.25, 0.2], help="shares of parameters")
    parser.add_argument("--images", type=int, default=1024, help="calibration images; 0: weights alone")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of images")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = load_model(args.model, args.checkpoint).eval()
    data = load_data(args.data, model, seed=args.seed)
    images = calibration_images(data, args.images, seed=args.seed) if args.images else None
    dense = {**evaluate(model, data.test), "params": count_params(model), "macs": count_macs(model)}
    print(f"{args.model}: dense {dense['top1']:.2f} top-1", flush=True)
    for keep in args.keep:
        began = time.perf_counter()
        plan = arp_hub.make_plan(model, keep_params=keep, calibration=images)
        small = arp_hub.decompose(copy.deepcopy(model), plan, images)
        seconds = time.perf_counter() - began
        row = {
            **environment(),
            "model": args.model,
            "keep": keep,
            "calibration_images": args.images,
            "seed": args.seed,
            "seconds": round(seconds, 1),
            **evaluate(small, data.test),
            "params": count_params(small),
            "macs": count_macs(small),
            "dense": dense,
            "plan": plan.to_dict(),
        }
        print(f"  keep {keep}: {row['top1']:.2f} top-1, {row['params']} parameters, {seconds:.0f} s", flush=True)
        write(row)


def write(row: dict[str, object]) -> None:
    """Put a row into the results in place of an earlier one of the same model, budget and images."""

    def key(one: dict[str, object]) -> tuple[object, ...]:
        return one["model"], one["keep"], one["calibration_images"], one["seed"]

    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    rows = sorted([old for old in rows if key(old) != key(row)] + [row], key=lambda one: tuple(map(str, key(one))))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
