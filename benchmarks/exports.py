"""Exports of twenty architectures, decomposed at 60 % of their parameters, beside their outputs in PyTorch.

    python -m benchmarks.exports list
    OMP_NUM_THREADS=1 python -m benchmarks.exports run '*'
    python -m benchmarks.exports table

A row is an architecture with random weights, decomposed by its weights. It is written as a float32 file in every
format, and the largest difference from PyTorch on four random images is recorded, over the largest output. `run` writes
results/exports.json, `table` prints it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch

import arp_hub
from arp_hub._utils.environment import environment
from arp_hub.layers.model import count_params
from arp_hub.runtimes.formats import RUNTIMES
from benchmarks.rows import load_results, results_file, row_command, row_parser

RESULTS = results_file("exports")
SEED, KEEP, SIDE = 0, 0.6, 96
FIXED = {
    "cifar_resnet20": 32,
    "swin_tiny_patch4_window7_224": 224,
    "mixer_s32_224": 224,
    "resmlp_12_224": 224,
    "pvt_v2_b0": 224,
    "pit_ti_224": 224,
}
"""Sides of the images of models that do not take any size."""
MODELS = (
    "cifar_resnet20",
    "test_byobnet",
    "test_convnext",
    "test_efficientnet",
    "test_mambaout",
    "test_nfnet",
    "test_resnet",
    "resnet18",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "tf_efficientnet_lite0",
    "regnetx_002",
    "repvgg_a0",
    "convnext_atto",
    "test_vit",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "mixer_s32_224",
    "resmlp_12_224",
    "pvt_v2_b0",
    "pit_ti_224",
)
SIZED = ("test_vit", "vit_tiny_patch16_224", "deit_tiny_patch16_224")
"""Models that are built for one size of images."""


def main() -> None:
    """Parse the command line and do what it asks for."""
    parser, _ = row_parser(__doc__, table="print the results as a table")
    torch.set_num_threads(1)
    row_command(parser, MODELS, RESULTS, measure, _short, print_table)


def measure(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Export one architecture to every format."""
    torch.manual_seed(SEED)
    side = FIXED.get(row, SIDE)
    model = timm.create_model(row, **({"img_size": side} if row in SIZED else {})).eval()
    dense = count_params(model)
    plan = arp_hub.make_plan(model, keep_params=KEEP, input_size=(3, side, side), schemes=("channel", "group_in"))
    arp_hub.decompose(model, plan)
    found: dict[str, Any] = {}
    for name in RUNTIMES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                done = arp_hub.export(
                    model,
                    Path(folder) / "out",
                    format=name,
                    input_size=(3, side, side),
                    test_images=torch.randn(4, 3, side, side),
                    seconds=0,
                )
                found[name] = {"relative_error": done.parity.relative_error, "size_bytes": done.record["size_bytes"]}
            except arp_hub.ArpHubError as error:
                found[name] = {"refused": str(error)}
    return {**environment(), "seed": SEED, "kept": round(count_params(model) / dense, 4), "side": side, **found}


def print_table() -> None:
    """One line an architecture: the error in each format."""
    print(f"| architecture | kept | {' | '.join(RUNTIMES)} |\n|---|---|{'---|' * len(RUNTIMES)}")
    for name, row in load_results(RESULTS).items():
        errors = [_error(row[kind]) for kind in RUNTIMES]
        print(f"| {name} | {row['kept']:.0%} | {' | '.join(errors)} |")


def _error(found: dict[str, Any]) -> str:
    return "refused" if "refused" in found else f"{found['relative_error']:.1e}"


def _short(row: dict[str, Any]) -> str:
    return ", ".join(f"{kind} {_error(row[kind])}" for kind in RUNTIMES)


if __name__ == "__main__":
    main()
