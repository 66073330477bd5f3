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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import arp_hub
from arp_hub._utils.environment import environment
from arp_hub.effort import EFFORTS
from arp_hub.hub.load import load_model
from arp_hub.layers.model import count_params
from arp_hub.training import Split, evaluate, load_data
from arp_hub.training.seeds import keyed_generator
from benchmarks.rows import load_results, results_file, row_command, row_parser

RESULTS = results_file("effort")
SEED = 0


@dataclass(frozen=True)
class Network:
    """A trained network, its calibration images and its test images.

    Attributes:
        model: timm name.
        checkpoint: File under ``weights/``.
        keep: Share of the parameters to keep.
        data: Folder under ``data/`` with the calibration images.
        images: Number of calibration images.
        test: Folder under ``data/`` with the test images.
        test_images: Number of test images.
        args: Arguments of the model.
    """

    model: str
    checkpoint: str
    keep: float
    data: str
    images: int
    test: str
    test_images: int
    args: dict[str, Any] = field(default_factory=dict)


NETWORKS = {
    "resnet20": Network("cifar_resnet20", "resnet20_cifar10", 0.5, "cifar10", 1024, "cifar10", 10_000),
    "resnet56": Network("cifar_resnet56", "resnet56_cifar10", 0.35, "cifar10", 512, "cifar10", 10_000),
    "lite0": Network(
        "tf_efficientnet_lite0", "tf_efficientnet_lite0_imagenet", 0.84, "imagenet-sample", 128, "imagenet-val", 900
    ),
    "vit": Network(
        "vit_small_patch14_dinov2",
        "vit_small_patch14_dinov2_cifar10_112",
        0.67,
        "cifar10",
        128,
        "cifar10",
        1000,
        {"img_size": 112, "num_classes": 10, "pretrained_cfg_overlay": {"input_size": (3, 112, 112), "crop_pct": 1.0}},
    ),
}
ROWS = [f"{network}/{effort}" for network in NETWORKS for effort in EFFORTS]


def main() -> None:
    """Parse the command line and do what it asks for."""
    parser, runner = row_parser(__doc__, table="print the results as a table")
    runner.add_argument("--shared", type=Path, required=True, help="folder with weights/ and data/")
    torch.set_num_threads(1)
    row_command(parser, ROWS, RESULTS, lambda row, args: measure(row, args.shared), _short, print_table)


def network_and_images(name: str, shared: Path) -> tuple[nn.Module, Tensor, Split]:
    """The dense network, its calibration images and its test split."""
    network = NETWORKS[name]
    model = load_model(network.model, pretrained=False, **network.args)
    state = load_file(shared / "weights" / f"{network.checkpoint}.safetensors")
    model.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)
    train = load_data(str(shared / "data" / network.data), model, seed=SEED).train
    order = torch.randperm(len(train), generator=keyed_generator(SEED, "calibration"))[: network.images]
    images = torch.cat(list(train.images.evaluation(train.indices[order], 64, torch.device("cpu"), 0)))
    return model.eval(), images, load_data(str(shared / "data" / network.test), model, seed=SEED).test


def measure(row: str, shared: Path) -> dict[str, Any]:
    """Plan and decompose one network with one preset."""
    name, effort = row.split("/")
    network = NETWORKS[name]
    model, images, test = network_and_images(name, shared)
    began = _cpu()
    plan = arp_hub.make_plan(model, keep_params=network.keep, calibration=images, effort=effort)
    planned = _cpu()
    small = arp_hub.decompose(copy.deepcopy(model), plan, images, effort=effort)
    fitted = _cpu()
    return {
        **environment(),
        "seed": SEED,
        "keep_params": network.keep,
        "kept": round(count_params(small) / count_params(model), 4),
        "calibration_images": len(images),
        "plan_seconds": {"user": round(planned[0] - began[0], 1), "system": round(planned[1] - began[1], 1)},
        "decompose_seconds": {"user": round(fitted[0] - planned[0], 1), "system": round(fitted[1] - planned[1], 1)},
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "dense": evaluate(model, test, max_images=network.test_images),
        **evaluate(small, test, max_images=network.test_images),
    }


def _cpu() -> tuple[float, float]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime, usage.ru_stime


def _seconds(row: dict[str, Any]) -> float:
    return sum(row["plan_seconds"].values()) + sum(row["decompose_seconds"].values())


def print_table() -> None:
    """One line a row: accuracy and CPU seconds."""
    print("| network | kept | images | effort | top-1 (dense) | CPU seconds, plan and fit |\n|---|---|---|---|---|---|")
    for name, row in sorted(load_results(RESULTS).items(), key=lambda item: ROWS.index(item[0])):
        network, effort = name.split("/")
        accuracy = f"{row['top1']:.2f} ({row['dense']['top1']:.2f})"
        print(
            f"| {network} | {row['kept']:.0%} | {row['calibration_images']:,d} | `{effort}` | {accuracy} "
            f"| {_seconds(row):.0f} |"
        )


def _short(row: dict[str, Any]) -> str:
    return f"top-1 {row['top1']:.2f}, {_seconds(row):.0f} s"


if __name__ == "__main__":
    main()
