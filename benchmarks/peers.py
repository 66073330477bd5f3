"""Peers side by side on one network with no training: accuracy, cost, latency and time at the same kept parameters.

    pip install "arp-hub[bench]"
    OMP_NUM_THREADS=1 python benchmarks/peers.py --shared ../shared --keep 0.7 0.5 0.35

CIFAR-10 ResNet-20, 2,000 test images. Every peer gets its fair best: the same layers, BatchNorm re-estimated where that
helps it. A peer that is not installed, or fails, leaves a row that says so. Rows of other peers and budgets that are in
results/peers.json stay.

- `arp_hub`: planned and fitted on unlabelled training images; `arp_hub, no images`: on the weights alone.
- `svd`: a plain loop of truncated SVDs, ranks by energy per parameter.
- `tltorch`: `FactorizedConv` with CP, the same rank share in every layer.
- `torch-pruning`: LAMP magnitude over groups of channels, BatchNorm re-estimated.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import arp_hub
from arp_hub._env import environment
from arp_hub.bench import benchmark
from arp_hub.curves import rank_at
from arp_hub.layers import count_params, layer_shape
from arp_hub.loading import load_model
from arp_hub.schemes import make_scheme
from arp_hub.tracing import count_macs
from arp_hub.training import calibration_images, evaluate, load_data

RESULTS = Path(__file__).parent / "results" / "peers.json"
TEST_IMAGES = 2000
Peer = Callable[[nn.Module, float, Tensor], nn.Module]


def ours(model: nn.Module, keep: float, images: Tensor) -> nn.Module:
    """Planned and fitted on images."""
    return arp_hub.decompose(model, arp_hub.make_plan(model, keep_params=keep, calibration=images), images)


def ours_without_images(model: nn.Module, keep: float, images: Tensor) -> nn.Module:
    """On the weights alone."""
    return arp_hub.decompose(model, arp_hub.make_plan(model, keep_params=keep))


def svd(model: nn.Module, keep: float, images: Tensor) -> nn.Module:
    """Truncated SVDs of the weights; the next rank goes where it saves most energy for its parameters."""
    convs = _convs(model)
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


def tltorch_cp(model: nn.Module, keep: float, images: Tensor) -> nn.Module:
    """Factorised convolutions of tensorly-torch, CP."""
    from tltorch import FactorizedConv

    convs = _convs(model)
    inside = sum(conv.weight.numel() for conv in convs.values())
    share = (keep * count_params(model) - (count_params(model) - inside)) / inside
    for name, conv in convs.items():
        rank = rank_at(make_scheme("cp", layer_shape(conv)), share)
        new = FactorizedConv.from_conv(conv, rank=rank, factorization="cp", implementation="factorized")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model


def torch_pruning_lamp(model: nn.Module, keep: float, images: Tensor) -> nn.Module:
    """Channels pruned by LAMP magnitude until the parameters are kept, BatchNorm re-estimated."""
    import torch_pruning as tp

    goal = keep * count_params(model)
    pruner = tp.pruner.MagnitudePruner(
        model,
        images[:1],
        importance=tp.importance.LAMPImportance(p=2),
        iterative_steps=200,
        pruning_ratio=0.9,
        global_pruning=True,
        ignored_layers=[model.fc],
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
    "tltorch": (tltorch_cp, "tensorly-torch", False),
    "torch-pruning": (torch_pruning_lamp, "torch-pruning", False),
}
"""How a peer compresses, the package it needs, and whether its result reloads in one line of timm."""


def measure(model: nn.Module, peer: str, keep: float, images: Tensor, data: Any) -> dict[str, Any]:
    """The row of one peer at one budget."""
    compress, package, reloads = PEERS[peer]
    row: dict[str, Any] = {"peer": peer, "keep_params": keep}
    try:
        row["version"] = version(package) if package else arp_hub.__version__
        began, cpu = time.perf_counter(), time.process_time()
        small = compress(copy.deepcopy(model), keep, images)
        row["seconds"] = {
            "wall": round(time.perf_counter() - began, 1),
            "cpu": round(time.process_time() - cpu, 1),
        }
        row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        row["top1"] = evaluate(small, data.test, max_images=TEST_IMAGES)["top1"]
        row["params"] = count_params(small)
        row["macs"] = count_macs(small, (3, 32, 32))
        # with dense= there always is a ratio
        row["latency_ratio"] = benchmark(small, dense=model, seconds=3).ratio.to_dict()
        row["one_line_reload"] = reloads
    except PackageNotFoundError:
        row["missing"] = f"{package} is not installed"
    except Exception as error:  # a peer may fail in any way, and the table says so
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return row


def main() -> None:
    """Measure every peer at every budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with weights/ and data/")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5, 0.35], help="shares of the parameters")
    parser.add_argument("--images", type=int, default=1024, help="calibration images")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    args = parser.parse_args()
    torch.manual_seed(0)
    model = load_model("cifar_resnet20", args.shared / "weights" / "resnet20_cifar10.safetensors")
    data = load_data(str(args.shared / "data" / "cifar10"), model, seed=0)
    images = calibration_images(data, args.images, seed=0)
    dense = {"top1": evaluate(model, data.test, max_images=TEST_IMAGES)["top1"], "params": count_params(model)}
    rows = []
    for keep in args.keep:
        for peer in args.peers:
            rows.append(measure(model, peer, keep, images, data))
            print(json.dumps(rows[-1]), flush=True)
    done = {(row["peer"], row["keep_params"]) for row in rows}
    old = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    rows = [row for row in old if (row["peer"], row["keep_params"]) not in done] + rows
    result = {**environment(), "seed": 0, "images": args.images, "test_images": TEST_IMAGES, "dense": dense}
    RESULTS.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def _convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels > 3}


if __name__ == "__main__":
    main()
