"""What it costs to plan with large kernels' patches taken to be stationary, as `make_plan` does for large layers.

    OMP_NUM_THREADS=1 python benchmarks/stationary.py list
    OMP_NUM_THREADS=1 python benchmarks/stationary.py run 'resnet20/*' --shared ../shared
    python benchmarks/stationary.py table

A row is NETWORK/KEEP. The networks are small, so that their plans use exact moments: here they are planned both ways,
and decomposed alike. `run` notes top-1 on the test images and the CPU seconds of planning, and writes
results/stationary.json; `table` prints it.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accuracy import NETWORKS, SEED, images_and_test
from rows import chosen, load_results, print_rows, row_parser, run_rows

import arp_hub
from arp_hub._utils.environment import environment
from arp_hub.calibration import passes
from arp_hub.hub.load import load_model
from arp_hub.training import evaluate

RESULTS = Path(__file__).parent / "results" / "stationary.json"
ROWS = {f"{network}/{keep}": (network, keep) for network in ("resnet20", "resnet56") for keep in (0.5, 0.35)}


def main() -> None:
    """Parse the command line and do what it asks for."""
    parser, runner = row_parser(__doc__, table="print the results as a table")
    runner.add_argument("--shared", type=Path, required=True, help="folder with weights/ and data/")
    args = parser.parse_args()
    if args.command == "list":
        print_rows(ROWS, load_results(RESULTS), _short)
    elif args.command == "run":
        run_rows(chosen(ROWS, args.rows), RESULTS, args.again, lambda name: measure(*ROWS[name], args.shared), _short)
    else:
        print("| row | exact: top-1 | planning | stationary: top-1 | planning |\n|---|---|---|---|---|")
        for name, row in load_results(RESULTS).items():
            cells = [f"{row[way]['top1']:.2f} | {row[way]['plan_seconds']:.1f} s" for way in ("exact", "stationary")]
            print(f"| `{name}` | {' | '.join(cells)} |")


def measure(name: str, keep: float, shared: Path) -> dict[str, Any]:
    """Plan with either kind of moments, decompose, and judge."""
    network = NETWORKS[name]
    model = load_model(network.model, str(shared / "weights" / network.checkpoint)).eval()
    images, test = images_and_test(network, model, shared)
    result: dict[str, Any] = {**environment(), "seed": SEED}
    for way, large in (("exact", passes.LARGE), ("stationary", 0)):
        with patch.object(passes, "LARGE", large):  # columns beyond which a kernel's patches are stationary
            began = time.process_time()
            plan = arp_hub.make_plan(model, keep_params=keep, calibration=images)
            taken = time.process_time() - began
        small = arp_hub.decompose(copy.deepcopy(model), plan, images)
        result[way] = {"top1": evaluate(small, test)["top1"], "plan_seconds": round(taken, 1)}
    return result


def _short(row: dict[str, Any]) -> str:
    return f"top-1 {row['exact']['top1']:.2f} exact, {row['stationary']['top1']:.2f} stationary"


if __name__ == "__main__":
    main()
