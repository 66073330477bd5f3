"""Peers side by side on one network, without training: accuracy, cost, latency and time at the same budget.

    pip install "arp-hub[bench,export]"
    pip install --no-deps fasterai einops    # fastai, which its SVDs do not need, is left out
    OMP_NUM_THREADS=1 python -m benchmarks.peers --shared ../shared --network resnet20 --keep 0.5 0.35
    OMP_NUM_THREADS=1 python -m benchmarks.peers --shared ../shared --network mobilenetv2 --keep 0.84
    python -m benchmarks.peers --table

ResNet-20 is tested on 2,000 test images of CIFAR-10, the others on 900 images of ImageNet's validation set. Every peer
compresses the same layers. The BatchNorms of peers stay as they are, or are re-estimated on the calibration images:
whichever is better on the test images. A peer with several settings is measured with each, and tables show the best
one on the test images. Both favour the peers. A peer that is not installed or fails gets a row that says so. Other rows
in results/peers.json are kept.

- `arp_hub`: planned and fitted on unlabelled images; `arp_hub, no images`: on the weights alone.
- `svd`: truncated SVDs with ranks by energy per parameter, as at the end of torchao's low-rank training
  (`prototype/pat`), which has no method without training.
- `tltorch`: `FactorizedConv`, CP or Tucker; each layer keeps the same share of its parameters, or the same share of its
  energy.
- `fasterai`: its SVDs of convolutions and linear layers, at one share of the ranks or one share of the energy.
- `torch-pruning`: channels pruned by LAMP, group magnitude, or the first-order Taylor term of the loss on the
  calibration images with the dense network's predictions as labels. A layer loses at most 50 or 90 % of its channels.
- `int8 alone`: the dense network, quantised by ONNX Runtime on the calibration images. Its budget is in bytes, its
  latency relative to the dense network in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

import arp_hub
from arp_hub._utils.environment import environment
from arp_hub.deployment.job import Job
from arp_hub.deployment.parity import Check
from arp_hub.layers.low_rank import layer_shape
from arp_hub.layers.model import count_params
from arp_hub.layers.trace import count_macs, input_size_of
from arp_hub.planning.costs import rank_at
from arp_hub.reports.benchmark import benchmark
from arp_hub.runtimes.capture import Captured
from arp_hub.runtimes.formats import RUNTIMES
from arp_hub.schemes import make_scheme
from arp_hub.timing import paired_ratio, take_turns
from arp_hub.training import Split, evaluate
from benchmarks.networks import NETWORKS, calibration_of, load_network, test_images_of
from benchmarks.rows import load_rows, replace_row, results_file

RESULTS = results_file("peers")
TEST_IMAGES = 2000
Compress = Callable[[nn.Module, float, Tensor], nn.Module]


@dataclass(frozen=True)
class Peer:
    """A library, and how it compresses.

    Attributes:
        settings: What it does with each of its settings, by their name; ``""`` if there is one only.
        package: The package that it needs; None for this one.
        reloads: Whether its result reloads in one line of timm.
        fits_norms: Whether it corrects BatchNorm statistics itself.
    """

    settings: Mapping[str, Compress]
    package: str | None = None
    reloads: bool = False
    fits_norms: bool = False


def ours(model: nn.Module, keep: float, images: Tensor) -> nn.Module:
    """Plan and fit on images."""
    return arp_hub.decompose(model, arp_hub.make_plan(model, keep_params=keep, calibration=images), images)


def ours_without_images(model: nn.Module, keep: float, images: Tensor) -> nn.Module:
    """Plan and fit on the weights alone."""
    return arp_hub.decompose(model, arp_hub.make_plan(model, keep_params=keep))


def svd(model: nn.Module, keep: float, images: Tensor) -> nn.Module:
    """Truncated SVDs of the weights."""
    return arp_hub.decompose(model, plan_by_energy(model, keep))


def plan_by_energy(model: nn.Module, keep: float) -> arp_hub.RankPlan:
    """Ranks of truncated SVDs: each next one goes to the layer that gains most energy per parameter."""
    layers = _layers(model, (nn.Conv2d, nn.Linear))
    spectra, ranks = {}, dict.fromkeys(layers, 1)
    for name, layer in layers.items():
        values = torch.linalg.svdvals(layer.weight.detach().flatten(1)).square()
        spectra[name] = (values / values.sum()).tolist()
    cost = {name: sum(layer.weight.flatten(1).shape) for name, layer in layers.items()}
    room = _room(model, layers, keep) - sum(cost.values())
    while True:
        open_ = [n for n in layers if ranks[n] < len(spectra[n]) and cost[n] <= room]
        if not open_:
            return _channel_plan(ranks)
        best = max(open_, key=lambda name: spectra[name][ranks[name]] / cost[name])
        ranks[best] += 1
        room -= cost[best]


def plan_by_share(model: nn.Module, keep: float) -> arp_hub.RankPlan:
    """Ranks of truncated SVDs: the same share of the parameters of each layer."""
    layers = _layers(model, (nn.Conv2d, nn.Linear))
    share = _room(model, layers, keep) / sum(layer.weight.numel() for layer in layers.values())
    ranks = {}
    for name, layer in layers.items():
        ranks[name] = max(1, int(share * layer.weight.numel() / sum(layer.weight.flatten(1).shape)))
    return _channel_plan(ranks)


def _room(model: nn.Module, layers: Mapping[str, Any], keep: float) -> float:
    """The parameters that layers may have together."""
    return keep * count_params(model) - (count_params(model) - sum(layer.weight.numel() for layer in layers.values()))


def _channel_plan(ranks: Mapping[str, int]) -> arp_hub.RankPlan:
    return arp_hub.RankPlan({name: arp_hub.LayerPlan("channel", rank) for name, rank in ranks.items()})


def within_budget(at: Callable[[float, nn.Module, bool], nn.Module]) -> Compress:
    """Compress at the largest share whose result fits the budget, to within 1 %.

    Args:
        at: Compresses a model at a share; without its weights if the last argument is False.
    """

    def compress(model: nn.Module, keep: float, images: Tensor) -> nn.Module:
        goal, low, high = keep * count_params(model), 0.0, 1.0
        for _ in range(12):
            share = (low + high) / 2
            count = count_params(at(share, copy.deepcopy(model), False))
            low, high = (share, high) if count <= goal else (low, share)
            if 0.99 * goal < count <= goal:
                break
        small = at(low, model, True) if low else None
        if small is None or count_params(small) > goal:
            raise ValueError("no setting fits the budget")
        return small

    return compress


def tltorch(factorization: str, by_energy: bool, share: float, model: nn.Module, weights: bool) -> nn.Module:
    """Factorised convolutions of tensorly-torch.

    Args:
        factorization: ``"cp"`` or ``"tucker"``.
        by_energy: Whether each layer keeps the same share of the energy of its weight's singular values, instead of the
            same share of its parameters.
        share: This share.
        model: The dense network.
        weights: Whether the weights are decomposed, too.
    """
    from tltorch import FactorizedConv

    for name, conv in _layers(model, (nn.Conv2d,)).items():
        kept = _share_for_energy(conv.weight, share) if by_energy else share
        if kept >= 1:
            continue
        scheme = "cp" if conv.weight[0, 0].numel() > 1 else "channel"  # CP of a 1x1 layer is its SVD
        rank = rank_at(make_scheme(scheme, layer_shape(conv)), kept) if factorization == "cp" else kept
        new = FactorizedConv.from_conv(
            conv, rank=rank, factorization=factorization, implementation="factorized", decompose_weights=weights
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model


def _share_for_energy(weight: Tensor, energy: float) -> float:
    """The share of a layer's parameters in a truncated SVD that holds a share of its energy."""
    values = torch.linalg.svdvals(weight.detach().flatten(1)).square()
    rank = 1 + int((values.cumsum(0) / values.sum() < energy).sum())
    return rank * sum(weight.flatten(1).shape) / weight.numel()


def fasterai(by_energy: bool, share: float, model: nn.Module, weights: bool) -> nn.Module:
    """Fasterai's SVDs, at one share of the ranks of all layers, or one share of their energy."""
    from fasterai.misc.conv_decomposer import Conv_Decomposer
    from fasterai.misc.fc_decomposer import FC_Decomposer

    del weights  # its decomposition is fast
    how = {"energy_threshold": max(share, 1e-6)} if by_energy else {"percent_removed": 1 - share}
    convs, linears = (list(_layers(model, (kind,))) for kind in (nn.Conv2d, nn.Linear))
    return FC_Decomposer().decompose(
        Conv_Decomposer().decompose(model, method="svd", layers=convs, **how), layers=linears, **how
    )


def torch_pruning(importance: str, most: float, model: nn.Module, keep: float, images: Tensor) -> nn.Module:
    """Prune channels down to the budget.

    Args:
        importance: Name of a criterion of `torch_pruning.importance`.
        most: Share of the channels that a layer may lose.
        model: The dense network.
        keep: Share of its parameters to keep.
        images: Calibration images.
    """
    import torch_pruning as tp

    goal, taylor = keep * count_params(model), importance == "GroupTaylorImportance"
    with torch.no_grad():
        labels = model(images[:64]).argmax(1)
    pruner = tp.pruner.BasePruner(
        model,
        images[:1],
        importance=getattr(tp.importance, importance)(),
        iterative_steps=200,
        pruning_ratio=0.9,
        max_pruning_ratio=most,
        global_pruning=True,
        ignored_layers=[model.get_classifier()],
    )
    while count_params(model) > goal and pruner.current_step < 200:
        if taylor and pruner.current_step % 5 == 0:  # a step prunes the gradients together with the weights
            model.zero_grad()
            for batch, label in zip(images[:64].split(16), labels.split(16), strict=True):
                functional.cross_entropy(model(batch), label).backward()
        pruner.step()
    if count_params(model) > goal:
        raise ValueError("the budget is not reached")
    return model


def _reestimated(model: nn.Module, images: Tensor) -> nn.Module:
    """A network with the BatchNorm statistics of the calibration images."""
    model = model.eval().to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        for batch in images.split(64):
            model(batch)
    return model.eval().to(memory_format=torch.contiguous_format)


PEERS = {
    "arp_hub": Peer({"": ours}, reloads=True, fits_norms=True),
    "arp_hub, no images": Peer({"": ours_without_images}, reloads=True, fits_norms=True),
    "svd": Peer({"": svd}, reloads=True),
    "tltorch": Peer(
        {
            f"{kind}, one share of the {what}": within_budget(partial(tltorch, kind, what == "energy"))
            for kind in ("cp", "tucker")
            for what in ("parameters", "energy")
        },
        "tensorly-torch",
    ),
    "fasterai": Peer(
        {
            f"svd, one share of the {what}": within_budget(partial(fasterai, what == "energy"))
            for what in ("ranks", "energy")
        },
        "fasterai",
    ),
    "torch-pruning": Peer(
        {
            f"{name}, at most {most:.0%} of a layer": partial(torch_pruning, kind, most)
            for name, kind in (
                ("LAMP", "LAMPImportance"),
                ("magnitude", "GroupMagnitudeImportance"),
                ("Taylor", "GroupTaylorImportance"),
            )
            for most in (0.5, 0.9)
        },
        "torch-pruning",
    ),
}
INT8 = "int8 alone"


def measure(model: nn.Module, peer: Peer, setting: str, keep: float, images: Tensor, test: Split) -> dict[str, Any]:
    """The numbers of one peer with one of its settings at one budget."""
    row: dict[str, Any] = {}
    size = input_size_of(model)
    try:
        row["version"] = version(peer.package) if peer.package else arp_hub.__version__
        began, cpu = time.perf_counter(), time.process_time()
        small = peer.settings[setting](copy.deepcopy(model), keep, images)
        row["seconds"] = {
            "wall": round(time.perf_counter() - began, 1),
            "cpu": round(time.process_time() - cpu, 1),
        }
        row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        row["top1"], row["norms"] = _top1(small, test), "as they were"
        if not peer.fits_norms:
            again = _top1(_reestimated(copy.deepcopy(small), images), test)
            if again > row["top1"]:
                row["top1"], row["norms"] = again, "re-estimated"
        row["params"] = count_params(small)
        row["macs"] = count_macs(small, size)
        row["latency_ratio"] = benchmark(small, dense=model, input_size=size, seconds=3).ratio.to_dict()
        row["one_line_reload"] = peer.reloads
    except PackageNotFoundError:
        row["missing"] = f"{peer.package} is not installed"
    except Exception as error:  # a peer may raise anything; the table reports it
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return row


def _top1(model: nn.Module, test: Split) -> float:
    """Top-1 in per cent; channels last, in which depthwise convolutions are faster."""
    return float(evaluate(copy.deepcopy(model).to(memory_format=torch.channels_last), test)["top1"])


def int8_alone(model: nn.Module, images: Tensor, test: Split) -> dict[str, Any]:
    """The numbers of the dense network in int8, in ONNX Runtime."""
    job = Job(RUNTIMES["onnx"], images[:128].split(1))
    tested = Check.of(Captured(model, 1, input_size_of(model)), "test", *test.tensors())
    captured = Captured.of(model, input_size_of(model), dynamic_batch=True)
    with tempfile.TemporaryDirectory() as folder:
        began, cpu = time.perf_counter(), time.process_time()
        whole = Job(RUNTIMES["onnx"]).write(captured, _made(Path(folder) / "float32"), tested)
        small = job.write(captured, _made(Path(folder) / "int8"), tested)
        seconds = {"wall": round(time.perf_counter() - began, 1), "cpu": round(time.process_time() - cpu, 1)}
        one = images[:1]
        samples = take_turns(
            {"float32": lambda: whole.run(one), "int8": lambda: small.run(one)}, torch.device("cpu"), 6.0
        )
        found = small.to_dict()
        return {
            "version": version("onnxruntime"),
            "seconds": seconds,
            "top1": found["parity"]["top1"],
            "params": count_params(model),
            "macs": count_macs(model, input_size_of(model)),
            "bytes_kept": round(found["size_bytes"] / whole.to_dict()["size_bytes"], 3),
            "latency_ratio": paired_ratio(samples["int8"], samples["float32"]).to_dict(),
            "one_line_reload": False,
        }


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def main() -> None:
    """Measure every peer at every budget, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, help="folder with weights/ and data/")
    parser.add_argument("--network", default="resnet20", choices=list(NETWORKS))
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.35], help="shares of the parameters")
    parser.add_argument("--peers", nargs="+", default=[*PEERS, INT8], choices=[*PEERS, INT8])
    parser.add_argument("--table", action="store_true", help="print the table of docs/research/speed.md")
    args = parser.parse_args()
    if args.table:
        print(table(load_rows(RESULTS)))
        return
    if args.shared is None:
        parser.error("--shared is required: a folder with weights/ and data/")
    torch.manual_seed(0)
    model = load_network(args.network, args.shared)
    images = calibration_of(args.network, model, args.shared, copies=0)
    test = test_images_of(args.network, model, args.shared, TEST_IMAGES)
    dense = {"top1": _top1(model, test), "params": count_params(model)}

    def keep_row(keep: float, peer: str, setting: str, found: Mapping[str, Any]) -> None:
        row = {"network": args.network, "peer": peer, "settings": setting, "keep_params": keep, **environment()}
        row |= {**found, "dense": dense, "seed": 0}
        print(json.dumps({key: row[key] for key in row if key not in ("versions", "hardware")}), flush=True)
        replace_row(RESULTS, row, same=("network", "peer", "settings", "keep_params"))

    for name in args.peers:
        if name == INT8:
            keep_row(1.0, name, "", int8_alone(model, images, test))
            continue
        for keep in args.keep:
            for setting in PEERS[name].settings:
                keep_row(keep, name, setting, measure(model, PEERS[name], setting, keep, images, test))


def best_rows(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each network, budget and peer the most accurate row; one that failed if all did."""
    best: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in rows:
        key = (row["network"], row["keep_params"], row["peer"])
        if key not in best or row.get("top1", -math.inf) > best[key].get("top1", -math.inf):
            best[key] = row
    return list(best.values())


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """One Markdown table of all networks, with the best settings of each peer."""
    order = [*PEERS, INT8]
    lines = [
        "| network, kept | peer | best settings | top-1 | MACs | latency | CPU seconds | reloads in one line |",
        "|---" * 8 + "|",
    ]
    ranked = sorted(best_rows(rows), key=lambda row: (-row["keep_params"], order.index(row["peer"])))
    for network in NETWORKS:
        for row in (row for row in ranked if row["network"] == network):
            name = row["peer"] + (f" {row['version']}" if PEERS.get(row["peer"], PEERS["tltorch"]).package else "")
            if "top1" in row:
                found = f"{row['top1']:.1f} | {row['macs'] / 1e6:.1f} M | {row['latency_ratio']['median']:.2f}"
                found += f" | {row['seconds']['cpu']:.0f} | {'yes' if row['one_line_reload'] else 'no'}"
            else:
                found = "not installed | | | |" if "missing" in row else "fails | | | |"
            kept = "100 %" if row["peer"] == INT8 else f"{100 * row['keep_params']:.0f} %"
            norms = ", BatchNorm re-estimated" if row.get("norms") == "re-estimated" else ""
            settings = (row["settings"] + norms).removeprefix(", ")
            lines.append(f"| {NETWORKS[network].title}, {kept} | {name} | {settings} | {found} |")
    return "\n".join(lines) + "\n"


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
