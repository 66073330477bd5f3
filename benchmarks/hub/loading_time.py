"""Loading time of a decomposed model and of its dense form, and what `import arp_hub` adds to `import timm`.

    OMP_NUM_THREADS=1 python -m benchmarks.hub.loading_time resnet50

Loads take turns in one process; imports take turns in new processes. Times are CPU seconds, medians with quartiles. The
script writes results/loading_time.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile

import timm
import torch

import arp_hub
from arp_hub._utils.environment import environment
from arp_hub.timing import Spread, paired_ratio, take_turns
from benchmarks.rows import results_file

RESULTS = results_file("loading_time")
IMPORT = "import time; import {}; print(time.process_time())"


def import_seconds(modules: str) -> float:
    """CPU seconds of a new process that imports modules."""
    done = subprocess.run([sys.executable, "-c", IMPORT.format(modules)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    """Measure one model and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="timm name")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long to measure loads")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(args.model).eval()
    with tempfile.TemporaryDirectory() as folder:
        arp_hub.save_pretrained(model, f"{folder}/dense")
        plan = arp_hub.make_plan(model, keep_params=0.5, schemes=["channel"])
        arp_hub.save_pretrained(arp_hub.decompose(model, plan), f"{folder}/small")
        loads = {
            name: lambda name=name: timm.create_model(f"local-dir:{folder}/{name}", pretrained=True)
            for name in ("small", "dense")
        }
        samples = take_turns(loads, torch.device("cpu"), args.seconds)
    imports = [(import_seconds("timm"), import_seconds("timm, arp_hub")) for _ in range(7)]
    result = {
        **environment(),
        "model": args.model,
        "seed": 0,
        "load_seconds": Spread.of(samples["small"]).to_dict(),
        "dense_load_seconds": Spread.of(samples["dense"]).to_dict(),
        "ratio": paired_ratio(samples["small"], samples["dense"]).to_dict(),
        "import_timm_seconds": Spread.of([alone for alone, _ in imports]).to_dict(),
        "import_adds_seconds": Spread.of([both - alone for alone, both in imports]).to_dict(),
    }
    print(json.dumps(result, indent=1))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
