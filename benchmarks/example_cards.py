"""The cards under docs/examples/: two models as they are on the Hub, without their weights.

    python -m benchmarks.example_cards cards
    python -m benchmarks.example_cards make resnet20-cifar10 --shared ../shared

`make` compresses the model, measures its latency at batch sizes 1 and 32, and stores everything but the weights.
`cards` writes the cards from what is stored. `--shared` is a folder with `weights/` and `data/`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import arp_hub
from arp_hub._utils.environment import environment
from arp_hub.hub.card import PICTURES, draw_pictures, model_card
from arp_hub.hub.save import CARD, CONFIG, METRICS
from arp_hub.reports.benchmark import benchmark
from arp_hub.reports.spectra import decays
from arp_hub.timing import Workload
from arp_hub.training import evaluate
from benchmarks.networks import NETWORKS, SEED, calibration_of, load_network, test_images_of
from benchmarks.rows import HERE, without_folder

FOLDER = HERE.parent / "docs" / "examples"


@dataclass(frozen=True)
class Example:
    """A network of `NETWORKS`, and the share of its parameters to keep."""

    network: str
    keep: float


EXAMPLES = {"resnet20-cifar10": Example("resnet20", 0.5), "tf-efficientnet-lite0": Example("lite0", 0.84)}


def main() -> None:
    """Parse the command line and do what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("cards", help="write the cards from the stored numbers")
    maker = commands.add_parser("make", help="compress a model and write its card")
    maker.add_argument("name", choices=EXAMPLES)
    maker.add_argument("--shared", type=Path, required=True, help="folder with weights/ and data/")
    args = parser.parse_args()
    if args.command == "make":
        with tempfile.TemporaryDirectory() as scratch:
            store(compress(EXAMPLES[args.name], args.shared, Path(scratch) / args.name), args.shared)
    for folder in sorted(FOLDER.iterdir()):
        write_card(folder)


def compress(example: Example, shared: Path, output: Path) -> Path:
    """Plan, decompose and evaluate without training, and save the model."""
    network = NETWORKS[example.network]
    model = load_network(example.network, shared)
    test, images = test_images_of(example.network, model, shared), calibration_of(example.network, model, shared)
    dense: dict[str, Any] = evaluate(model, test)
    began = time.perf_counter()
    plan = arp_hub.make_plan(model, keep_params=example.keep, calibration=images)
    spectra = decays(model, plan)
    arp_hub.decompose(model, plan, images)
    metrics = {
        **evaluate(model, test),
        "dense": dense,
        "data": network.test or network.data,
        "split": test.name,
        "calibration_images": network.images,
        "calibration_copies": len(images) // network.images - 1,
        "trained": False,
        "seed": SEED,
        "seconds": round(time.perf_counter() - began, 1),
        "plan": plan.to_dict(),
        "spectra": spectra,
        "latency": _latency(model),
    }
    return arp_hub.save_pretrained(model, output, metrics=metrics)


def store(made: Path, shared: Path) -> None:
    """Store a saved model without its weights as the example of the same name."""
    folder = FOLDER / made.name
    folder.mkdir(parents=True, exist_ok=True)
    for file in (CONFIG, METRICS, CARD):
        text = without_folder((made / file).read_text(encoding="utf-8"), shared)
        (folder / file).write_text(text, encoding="utf-8")


def _latency(model: nn.Module) -> list[dict[str, Any]]:
    hardware = environment()["hardware"]["cpu"]
    return [{**benchmark(model, Workload(size)).to_dict(), "hardware": hardware} for size in (1, 32)]


def card(folder: Path) -> str:
    """The card of an example, as a push to ``me/NAME-arp`` writes it."""
    config, metrics = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (CONFIG, METRICS))
    pictures = [path.name for path in folder.glob("*.png")]
    return model_card(config, metrics, f"hf-hub:me/{folder.name}-arp", pictures=pictures, dense="dense", tag="v1")


def write_card(folder: Path) -> None:
    """Rewrite the card of an example, and its pictures."""
    for picture in PICTURES:
        (folder / picture).unlink(missing_ok=True)
    draw_pictures(folder, json.loads((folder / METRICS).read_text(encoding="utf-8")))
    (folder / CARD).write_text(card(folder), encoding="utf-8")


if __name__ == "__main__":
    main()
