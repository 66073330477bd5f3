"""Accuracy gained by sensitivities, and how well the trial of a plan predicts the decomposed model.

    python -m benchmarks.planning.sensitivity list
    python -m benchmarks.planning.sensitivity run 'resnet20/0.2/*' --shared ../shared
    python -m benchmarks.planning.sensitivity table

A row is NETWORK/KEEP/EXPONENT: layer errors are weighted by sensitivities to this power. (`make_plan` tries several
exponents.) `run` records how far predictions diverge from the dense model's, in nats: in the trial of the plan, and
after decomposition. The latter is measured on held-out images; lite0 has none, so its calibration images are used.
`run` also records top-1 on the test images. It writes results/sensitivity.json; `table` prints it.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import arp_hub
from arp_hub._utils.environment import environment
from arp_hub.effort import Effort
from arp_hub.hub.load import load_model
from arp_hub.planning.output_errors import OutputErrors
from arp_hub.training import evaluate, load_data
from arp_hub.training.seeds import keyed_generator
from benchmarks.accuracy import NETWORKS, SEED, Network, images_and_test
from benchmarks.rows import load_results, results_file, row_command, row_parser

RESULTS = results_file("sensitivity")
ROWS = {
    f"{network}/{keep}/{power}": (network, keep, power)
    for network, keep in (("resnet20", 0.2), ("lite0", 0.84), ("lite0", 0.7))
    for power in (0.0, *Effort().exponents)
}
HELD_OUT = 2000
"""Number of held-out training images on which the divergence is measured, for data with a test split."""


def main() -> None:
    """Parse the command line and do what it asks for."""
    parser, runner = row_parser(__doc__, table="print the results as a table")
    runner.add_argument("--shared", type=Path, required=True, help="folder with weights/ and data/")
    row_command(parser, ROWS, RESULTS, lambda name, args: measure(*ROWS[name], args.shared), _short, print_table)


def measure(name: str, keep: float, power: float, shared: Path) -> dict[str, Any]:
    """Plan with one exponent, decompose, and measure divergence and top-1."""
    network = NETWORKS[name]
    model = load_model(network.model, str(shared / "weights" / network.checkpoint)).eval()
    images, test = images_and_test(network, model, shared)
    judged = images if network.one_split else _held_out(network, model, shared)
    began, tried = time.perf_counter(), []
    divergence = OutputErrors.divergence

    def noted(errors: OutputErrors, plan: arp_hub.RankPlan) -> float:
        tried.append(divergence(errors, plan))
        return -float(len(tried))  # lowest for the last plan, so that `make_plan` returns it

    effort = Effort(exponents=() if power == 0 else (power,))
    with patch.object(OutputErrors, "divergence", noted):
        plan = arp_hub.make_plan(model, keep_params=keep, calibration=images, effort=effort)
    small = arp_hub.decompose(copy.deepcopy(model), plan, images)
    return {
        **environment(),
        "seed": SEED,
        "tried": tried[-1],
        "divergence": _divergence(model, small, judged),
        "judged_images": len(judged),
        "top1": evaluate(small, test)["top1"],
        "seconds": round(time.perf_counter() - began, 1),
    }


def _held_out(network: Network, model: nn.Module, shared: Path) -> Tensor:
    """Training images that are not used for calibration, without augmentation."""
    split = load_data(str(shared / "data" / network.data), model, seed=SEED).train
    order = torch.randperm(
        len(split), generator=keyed_generator(SEED, "calibration")
    )  # the order of the calibration images
    rest = split.indices[order[network.images : network.images + HELD_OUT]]
    return torch.cat(list(split.images.evaluation(rest, 64, torch.device("cpu"), 0)))


@torch.no_grad()
def _divergence(dense: nn.Module, small: nn.Module, images: Tensor) -> float:
    """Mean Kullback-Leibler divergence of the predictions of ``small`` from those of ``dense``."""
    total = 0.0
    for batch in images.split(64):
        exact, found = dense(batch).log_softmax(-1), small(batch).log_softmax(-1)
        total += float((exact.exp() * (exact - found)).sum())
    return total / len(images)


def print_table() -> None:
    """One line a row: divergences and accuracy."""
    print("| row | divergence in the trial | decomposed | top-1 |\n|---|---|---|---|")
    for name, row in load_results(RESULTS).items():
        print(f"| `{name}` | {row['tried']:.4f} | {row['divergence']:.4f} | {row['top1']:.2f} |")


def _short(row: dict[str, Any]) -> str:
    return f"top-1 {row['top1']:.2f}, {row['seconds']:.0f} s"


if __name__ == "__main__":
    main()
