"""Peers side by side on one network, without training: accuracy, cost, latency and time at the same budget.

    pip install "arp-hub[bench]"
    OMP_NUM_THREADS=1 python -m benchmarks.peers --shared ../shared --network resnet20 --keep 0.7 0.5 0.35
    OMP_NUM_THREADS=1 python -m benchmarks.peers --shared ../shared --network lite0 --keep 0.84 0.7
    python -m benchmarks.peers --shared ../shared --table

ResNet-20 is tested on 2,000 test images of CIFAR-10, tf_efficientnet_lite0 on all images of the ImageNet sample that
are not used for calibration. Every peer compresses the same layers. BatchNorms are re-estimated where that
helps. A peer that is not installed or fails gets a row that says so. Other rows in results/peers.json are kept.

- `arp_hub`: planned and fitted on unlabelled images; `arp_hub, no images`: on the weights alone.
- `svd`: truncated SVDs with ranks by energy per parameter, as at the end of torchao's low-rank training
  (`prototype/pat`), which has no method without training.
- `tltorch cp`, `tltorch tucker`: `FactorizedConv`, the same share of parameters in every layer.
- `torch-pruning lamp`, `torch-pruning group`: channels pruned by LAMP or group magnitude, BatchNorm re-estimated.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import arp_hub
from arp_hub._utils.environment import environment
from arp_hub.layers.low_rank import layer_shape
from arp_hub.layers.model import count_params
from arp_hub.layers.trace import count_macs, input_size_of
from arp_hub.planning.costs import rank_at
from arp_hub.reports.benchmark import benchmark
from arp_hub.schemes import make_scheme
from arp_hub.training import Split, evaluate
from benchmarks.networks import NETWORKS, calibration_of, load_network, test_images_of
from benchmarks.rows import load_rows, replace_row, results_file

RESULTS = results_file("peers")
TEST_IMAGES = 2000
Peer = Callable[[nn.Module, float, Tensor], nn.Module]


def ours(model: nn.Module, keep: float, images: Tensor) -> nn.Module:
    """Plan and fit on images."""
    return arp_hub.decompose(model, arp_hub.make_plan(model, keep_params=keep, calibration=images), images)


def ours_without_images(model: nn.Module, keep: float, images: Tensor) -> nn.Module:
    """Plan and fit on the weights alone."""
    return arp_hub.decompose(model, arp_hub.make_plan(model, keep_params=keep))


def svd(model: nn.Module, keep: float, images: Tensor) -> nn.Module:
    """Truncated SVDs of the weights; each next rank goes to the layer that gains most energy per parameter."""
    convs = _layers(model, (nn.Conv2d, nn.Linear))
    spectra, ranks = {}, dict.fromkeys(convs, 1)
    for name, conv in convs.items():
        values = torch.linalg.svdvals(conv.weight.detach().flatten(1)).square()
        spectra[name] = (values / values.sum()).tolist()
    cost = {name: sum(conv.weight.flatten(1).shape) for name, conv in convs.items()}
    room = keep * count_params(model) - (count_params(model) - sum(conv.weight.numel() for conv in convs.values()))
    room -= sum(cost.values())
    while True:
        open_ = [n for n in convs if ranks[n] < len(spectra[n]) and cost[n] <= room]
        if not open_:
            break
        best = max(open_, key=lambda name: spectra[name][ranks[name]] / cost[name])
        ranks[best] += 1
        room -= cost[best]
    return arp_hub.decompose(model, arp_hub.RankPlan({n: arp_hub.LayerPlan("channel", r) for n, r in ranks.items()}))


def tltorch(factorization: str, model: nn.Module, keep: float, images: Tensor) -> nn.Module:
    """Factorised convolutions of tensorly-torch, whose share is lowered until the budget holds."""
    inside = sum(conv.weight.numel() for conv in _layers(model, (nn.Conv2d,)).values())
    share = (keep * count_params(model) - (count_params(model) - inside)) / inside
    while True:
        small = tltorch_at(share, factorization, copy.deepcopy(model))
        if count_params(small) <= keep * count_params(model):
            return small
        share *= 0.97


def tltorch_at(share: float, factorization: str, model: nn.Module) -> nn.Module:
    """Every convolution factorised at about the same share of its parameters."""
    from tltorch import FactorizedConv

    for name, conv in _layers(model, (nn.Conv2d,)).items():
        scheme = "cp" if conv.weight[0, 0].numel() > 1 else "channel"  # CP of a 1x1 layer is its SVD
        rank = rank_at(make_scheme(scheme, layer_shape(conv)), share) if factorization == "cp" else share
        new = FactorizedConv.from_conv(conv, rank=rank, factorization=factorization, implementation="factorized")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model


def torch_pruning(importance: str, model: nn.Module, keep: float, images: Tensor) -> nn.Module:
    """Prune channels by magnitude down to the budget, and re-estimate the BatchNorms."""
    import torch_pruning as tp

    goal = keep * count_params(model)
    pruner = tp.pruner.MagnitudePruner(
        model,
        images[:1],
        importance=getattr(tp.importance, importance)(p=2),
        iterative_steps=200,
        pruning_ratio=0.9,
        global_pruning=True,
        ignored_layers=[model.get_classifier()],
    )
    while count_params(model) > goal and pruner.current_step < 200:
        pruner.step()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for batch in images.split(128):
            model.train()(batch)
    return model.eval()


PEERS: dict[str, tuple[Peer, str | None, bool]] = {
    "arp_hub": (ours, None, True),
    "arp_hub, no images": (ours_without_images, None, True),
    "svd": (svd, None, True),
    "tltorch cp": (partial(tltorch, "cp"), "tensorly-torch", False),
    "tltorch tucker": (partial(tltorch, "tucker"), "tensorly-torch", False),
    "torch-pruning lamp": (partial(torch_pruning, "LAMPImportance"), "torch-pruning", False),
    "torch-pruning group": (partial(torch_pruning, "GroupMagnitudeImportance"), "torch-pruning", False),
}
"""For each peer: how it compresses, the package it needs, and whether its result reloads in one line of timm."""


def measure(network: str, model: nn.Module, peer: str, keep: float, images: Tensor, test: Split) -> dict[str, Any]:
    """The row of one peer at one budget."""
    compress, package, reloads = PEERS[peer]
    row: dict[str, Any] = {"network": network, "peer": peer, "keep_params": keep, **environment()}
    size = input_size_of(model)
    try:
        row["version"] = version(package) if package else arp_hub.__version__
        began, cpu = time.perf_counter(), time.process_time()
        small = compress(copy.deepcopy(model), keep, images)
        row["seconds"] = {
            "wall": round(time.perf_counter() - began, 1),
            "cpu": round(time.process_time() - cpu, 1),
        }
        row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        row["top1"] = evaluate(small, test, max_images=TEST_IMAGES)["top1"]
        row["params"] = count_params(small)
        row["macs"] = count_macs(small, size)
        row["latency_ratio"] = benchmark(small, dense=model, input_size=size, seconds=3).ratio.to_dict()
        row["one_line_reload"] = reloads
    except PackageNotFoundError:
        row["missing"] = f"{package} is not installed"
    except Exception as error:  # a peer may raise anything; the table reports it
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return row


def main() -> None:
    """Measure every peer at every budget, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, help="folder with weights/ and data/")
    parser.add_argument("--network", default="resnet20", choices=list(NETWORKS))
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5, 0.35], help="shares of the parameters")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--table", action="store_true", help="print the table of docs/research/speed.md")
    args = parser.parse_args()
    if args.table:
        print_table(load_rows(RESULTS))
        return
    if args.shared is None:
        parser.error("--shared is required: a folder with weights/ and data/")
    torch.manual_seed(0)
    model = load_network(args.network, args.shared)
    images = calibration_of(args.network, model, args.shared)
    test = test_images_of(args.network, model, args.shared)
    dense = {"top1": evaluate(model, test, max_images=TEST_IMAGES)["top1"], "params": count_params(model)}
    for keep in args.keep:
        for peer in args.peers:
            row = measure(args.network, model, peer, keep, images, test)
            print(json.dumps({key: row[key] for key in row if key not in ("versions", "hardware")}), flush=True)
            replace_row(RESULTS, {**row, "dense": dense, "seed": 0}, same=("network", "peer", "keep_params"))


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one Markdown table for each network."""
    for network in dict.fromkeys(row["network"] for row in rows):
        print("| kept | peer | top-1 | MACs | latency | CPU seconds | reloads in one line |\n" + "|---" * 7 + "|")
        own = [row for row in rows if row["network"] == network]
        for row in sorted(own, key=lambda row: (-row["keep_params"], list(PEERS).index(row["peer"]))):
            name = row["peer"] + (f" {row['version']}" if PEERS[row["peer"]][1] and "version" in row else "")
            if "top1" in row:
                found = f"{row['top1']:.2f} | {row['macs'] / 1e6:.1f} M | {row['latency_ratio']['median']:.2f}"
                found += f" | {row['seconds']['cpu']:.1f} | {'yes' if row['one_line_reload'] else 'no'}"
            else:
                found = f"{'not installed' if 'missing' in row else 'fails'} | | | |"
            print(f"| {row['keep_params']:g} | {name} | {found} |")
        print()


def _layers(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[str, Any]:
    """The layers that peers compress: all but the first convolution, depthwise layers and the CIFAR classifier."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        and getattr(module, "groups", 1) == 1
        and min(cast(Tensor, module.weight).shape[:2]) > 10
    }


if __name__ == "__main__":
    main()
