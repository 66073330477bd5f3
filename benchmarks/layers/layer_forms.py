"""Latency of a decomposed layer over the dense one: four schemes, two memory layouts, two shares of the parameters.

    OMP_NUM_THREADS=1 python -m benchmarks.layers.layer_forms

A ratio is the median over runs in turns, of CPU seconds on one thread. Below 1 the decomposed layer is faster than the
dense one in the same layout. `gain` is the ratio of the dense layer channels-last to contiguous. The script writes
results/layer_forms.json.
"""

from __future__ import annotations

import argparse
import json

import torch
from torch import nn

from arp_hub import LayerPlan, Workload
from arp_hub._utils.environment import environment
from arp_hub.layers.low_rank import layer_shape, low_rank_layer
from arp_hub.planning.costs import rank_at
from arp_hub.schemes import make_scheme
from arp_hub.timing import forward_call, paired_ratio, take_turns
from benchmarks.rows import results_file

RESULTS = results_file("layer_forms")
CASES = ((64, 56, 1), (256, 14, 1), (512, 7, 1), (64, 8, 32), (256, 14, 32))
"""Channels, side of the feature map in pixels, batch size."""
SHARES, SCHEMES = (0.5, 0.25), ("channel", "spatial", "cp", "tucker2")


def main() -> None:
    """Measure all cases."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    rows = []
    for channels, side, batch in CASES:
        dense = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        x = torch.randn(batch, channels, side, side)
        calls = {"dense": forward_call(dense, x, Workload(batch))}
        calls["dense, channels last"] = forward_call(dense, x, Workload(batch, channels_last=True))
        for name in SCHEMES:
            for share in SHARES:
                scheme = make_scheme(name, layer_shape(dense))
                small = low_rank_layer(dense, LayerPlan(name, rank_at(scheme, share)))
                calls[f"{name} {share}"] = forward_call(small, x, Workload(batch))
                calls[f"{name} {share}, channels last"] = forward_call(small, x, Workload(batch, channels_last=True))
        with torch.inference_mode():
            samples = take_turns(calls, torch.device("cpu"), seconds=3)
        gain = paired_ratio(samples["dense, channels last"], samples["dense"]).median
        row = {"channels": channels, "side": side, "batch": batch, "gain": round(gain, 3), "ratios": {}}
        for name in calls:
            if not name.startswith("dense"):
                reference = "dense, channels last" if name.endswith("last") else "dense"
                row["ratios"][name] = round(paired_ratio(samples[name], samples[reference]).median, 3)
        print(json.dumps(row), flush=True)
        rows.append(row)
    RESULTS.write_text(json.dumps({**environment(), "seed": 0, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
