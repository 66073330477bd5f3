"""The tables and the figure that `accuracy.py table` writes from results/accuracy.json and published.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.accuracy_chart import timed_networks, write_chart, write_time_chart
from benchmarks.rows import HERE, load_rows, results_file

README, DOCS = HERE.parent / "README.md", HERE.parent / "docs"
PAGE, FIGURE = DOCS / "research" / "results.md", DOCS / "img" / "accuracy.png"
TIME_FIGURE = DOCS / "img" / "accuracy_over_time.png"
NETWORKS = {
    "resnet20": "ResNet-20, CIFAR-10",
    "resnet56": "ResNet-56, CIFAR-10",
    "resnet110": "ResNet-110, CIFAR-10",
    "lite0": "tf_efficientnet_lite0, ImageNet",
    "mobilenetv2": "mobilenetv2_100, ImageNet",
    "vit": "ViT-S/14, CIFAR-10 at 112 px",
}
SUMMARY = (("resnet20", 0.5), ("resnet20", 0.35), ("resnet56", 0.35), ("lite0", 0.84), ("vit", 0.5))
"""Networks and budgets in the table of the README."""
METHODS = {
    "fit": "data-aware fit, no training",
    "refine": "the fit, refined for 15 minutes on unlabelled images",
    "unlabelled-1000": "the fit, refined for 15 minutes on 1,000 unlabelled images",
    "unlabelled-10000": "the fit, refined for 15 minutes on 10,000 unlabelled images",
    "activation-svd-energy": "plain activation-aware SVD, ranks by energy per parameter",
    "activation-svd-threshold": "plain activation-aware SVD, one share of energy everywhere",
    "activation-svd-inside": "plain activation-aware SVD, one share of parameters in all but the first and the last",
    "activation-svd-share": "plain activation-aware SVD, one share of parameters everywhere",
    "uniform-cp": "CP at one share everywhere, data-aware, no training",
    "weights": "weights alone, no images",
    "svd": "plain SVD, weights alone",
    "factors": "the fit, its factors fine-tuned, no penalty",
    "train": "penalty training",
    "factors-10000": "the fit, its factors fine-tuned on 10,000 images in ten epochs, no penalty",
    "train-10000": "penalty training on 10,000 images in ten epochs",
    "ramp": "penalty training from the dense network",
    "teacher": "penalty training, ResNet-56 as the teacher",
    "long": "penalty training, three to five times as long",
    "long-teacher": "penalty training, ResNet-56 as the teacher, twice as long",
}
Results = Mapping[str, Mapping[str, Any]]
WHICH_TEACHER = """Short runs that hold back 5,000 training images, to choose the teacher without the test images. Both
teachers had learned from these images, which raises both numbers.
"""

SUMMARY_MARKS = "<!-- written by benchmarks/accuracy.py table -->\n", "<!-- to here -->"
PEERS_MARKS = "<!-- written by benchmarks/accuracy.py table: peers -->\n", "<!-- to here: peers -->"
"""Marks in the README before and after each table."""
LIBRARIES = {
    "arp_hub": ("arp_hub", "low rank, planned and fitted on images"),
    "tltorch": ("[tltorch](https://github.com/tensorly/torch)", "CP and Tucker layers at given ranks"),
    "torch-pruning": ("[Torch-Pruning](https://github.com/VainF/Torch-Pruning)", "removes whole channels"),
    "fasterai": ("[fasterai](https://github.com/nathanhubens/fasterai)", "SVDs of the weights alone"),
    "svd": ("SVD, as in [torchao](https://github.com/pytorch/ao)'s low-rank training", "low rank of the weights alone"),
    "int8": ("int8 of [ONNX Runtime](https://onnxruntime.ai)", "all parameters, a quarter of the bytes"),
}
COMPARED = (("resnet20", 0.5), ("mobilenetv2", 0.84))
"""Networks and budgets of the comparison with other libraries."""

HEAD = """# Results

Written by `python -m benchmarks.accuracy table` from
[benchmarks/results/accuracy.json](https://github.com/arp-hub/arp-hub/blob/main/benchmarks/results/accuracy.json), which
holds seed, hardware, versions, time and the whole plan of every row. Reproduce a row with

```bash
python -m benchmarks.accuracy run ROW --again --shared ../shared
```

CIFAR-10: calibration on 1,024 training images without their labels (256 for the ViT), top-1 on all 10,000 test images
(some rows of the ViT: the first 2,000). ImageNet: calibration on 256 training images, top-1 on 900 images of the
validation set; compare a network only with its own dense form. Refinement: on 10,000 unlabelled training images for
CIFAR ResNets, on 1,000 for the others. Of the dense ViT, only the linear head was fitted to CIFAR-10, on 8,000 images;
so training with labels can take it above its dense form.

Every row is the last epoch of one run, seed 0. A model that is stored in `benchmarks/models/` is that of the longest
run of its network and budget in which the dense network is the teacher. The `choose-*` rows chose that teacher on
held-out training images; the test images chose nothing. Rows were recorded at different commits and on different
processors: each entry names its own, and `git log benchmarks/results/accuracy.json` the commit.

The penalty pulls every 32nd step, or every eighth in the rows recorded first; more frequent pulls do not end in better
accuracy ([ablations](ablations.md)). `long/resnet110/0.35` trained the dense network first, on a GPU.

![Points of top-1 lost over the share of parameters kept](../img/accuracy.png)
"""
OVER_TIME = """
What time buys: planning, fitting and refinement without labels. Each point is a refinement of its own from the
fit, on one thread.

![Points of top-1 lost over minutes of one CPU thread](../img/accuracy_over_time.png)
"""


def write_report(results: Results) -> None:
    """Write docs/research/results.md, its figure, and the tables of the README."""
    if not results:
        raise SystemExit("there are no results yet: run some rows first")
    PAGE.write_text(page(results), encoding="utf-8")
    write_chart(results, FIGURE)
    if timed_networks(results):
        write_time_chart(results, TIME_FIGURE)
    peers = load_rows(results_file("peers"))
    README.write_text(with_tables(README.read_text(encoding="utf-8"), results, peers), encoding="utf-8")
    print(f"wrote {PAGE.name}, {FIGURE.name} and the tables of {README.name}")


def page(results: Results) -> str:
    """The text of docs/research/results.md."""
    parts = [HEAD, OVER_TIME] if timed_networks(results) else [HEAD]
    for network, title in NETWORKS.items():
        own = {name: result for name, result in results.items() if result["network"] == network}
        if own:
            parts.append(_network(network, title, own))
    return "\n".join(parts)


def with_tables(readme: str, results: Results, peers: Iterable[Mapping[str, Any]]) -> str:
    """The README with both of its tables written from results."""
    for (begin, end), table in ((SUMMARY_MARKS, _summary(results)), (PEERS_MARKS, _libraries(peers))):
        before, _, rest = readme.partition(begin)
        readme = before + begin + table + end + rest.partition(end)[2]
    return readme


def _libraries(peers: Iterable[Mapping[str, Any]]) -> str:
    """The most accurate row of each library on two networks at one budget each."""
    measured = [row for row in peers if row.get("top1") is not None]
    head = ["library", "what it does"]
    rows = {prefix: [name, does] for prefix, (name, does) in LIBRARIES.items()}
    for network, keep in COMPARED:
        own = [row for row in measured if row["network"] == network and row["keep_params"] in (keep, 1.0)]
        title = NETWORKS[network].partition(",")[0]
        head += [f"{title} at {100 * keep:.0f} %: top-1", "latency"]
        for prefix, cells in rows.items():
            best = max(
                (row for row in own if row["peer"].startswith(prefix)), key=lambda row: row["top1"], default=None
            )
            cells += ["", ""] if best is None else [f"{best['top1']:.1f}", f"{best['latency_ratio']['median']:.2f}"]
        dense = own[0]["dense"]["top1"]
        head[-2] += f" (dense {dense:.1f})"
    return _table(head, rows.values())


def _summary(results: Results) -> str:
    """Top-1 of the dense network, of the fit, refined and not, and of the trained model that is stored."""
    rows = []
    for network, keep in SUMMARY:
        fit = results.get(f"fit/{network}/{keep}")
        if fit is None:
            continue
        stored = [row for row in results.values() if (row["network"], row["keep"]) == (network, keep)]
        trained = next((row for row in stored if "model_folder" in row), None)
        every = (fit["dense"], fit, results.get(f"refine/{network}/{keep}"), trained)
        shown = ["" if row is None else f"{row['top1']:.1f}" for row in every]
        rows.append([NETWORKS[network], f"{100 * keep:.0f} %", *shown])
    columns = ["dense", "fit, no labels", "refined, no labels", "penalty training"]
    return _table(["network, data", "parameters kept", *columns], rows)


def _part(name: str, row: Mapping[str, Any]) -> str:
    """What a row changes: the schemes, the number of calibration images or their seed."""
    kind, part = name.split("/")[:2]
    if kind == "images":
        return f"{row['calibration_images']:,} calibration images"
    if kind.startswith("refine-"):
        return f"refined for {kind.removeprefix('refine-')} min without labels"
    if kind.startswith("seed-"):
        return ("refined for 15 min, " if "refinement" in row else "") + kind.replace("-", " ")
    return part


def _network(network: str, title: str, results: Results) -> str:
    dense = max((result["dense"] for result in results.values()), key=lambda scores: scores["images"])
    lines = [f"## {title}\n", f"Dense: top-1 {dense['top1']:.2f} on {dense['images']:,} images, {_size(dense)}.\n"]
    main = [name for name in results if name.split("/")[0] in METHODS]
    order = list(METHODS)
    main.sort(key=lambda name: (-results[name]["keep"], order.index(name.split("/")[0])))
    lines.append(
        _table(
            ["parameters kept", "how", "top-1", "against dense", "parameters", "MACs", "test images", "row"],
            (_row(name, METHODS[name.split("/")[0]], results[name]) for name in main),
        )
    )
    if choices := [name for name in results if name.startswith("choose-")]:
        lines += ["### Which teacher\n", WHICH_TEACHER]
        head = ["parameters kept", "distilled from", "epochs", "held-out top-1", "row"]
        lines.append(_table(head, (_choice(name, results[name]) for name in choices)))
    others = [name for name in results if name not in main and name not in choices]
    if others:
        lines += ["### What each part is worth\n"]
        others.sort()
        lines.append(
            _table(
                ["parameters kept", "what", "top-1", "against dense", "parameters", "MACs", "test images", "row"],
                (_row(name, _part(name, results[name]), results[name]) for name in others),
            )
        )
    peers = [row for row in json.loads((HERE / "published.json").read_text())["rows"] if row["network"] == network]
    if peers:
        lines += ["### Published numbers of others\n"]
        lines.append(
            _table(
                ["parameters removed", "method", "dense", "top-1", "difference", "trained or fine-tuned", "source"],
                (_peer(row) for row in sorted(peers, key=lambda row: row["removed"])),
            )
        )
    return "\n".join(lines)


def _row(name: str, method: str, result: Mapping[str, Any]) -> list[str]:
    dense = result["dense"]
    share = 100 * result["params"] / dense["params"] if "params" in dense else 100 * result["keep"]
    return [
        f"{share:.1f} %",
        method,
        f"{result['top1']:.2f}",
        f"{result['top1'] - dense['top1']:+.2f}",
        f"{result['params']:,}",
        f"{result['macs'] / 1e6:.1f} M",
        f"{result['images']:,}",
        f"`{name}`",
    ]


def _choice(name: str, result: Mapping[str, Any]) -> list[str]:
    teacher = "ResNet-56" if "teacher" in result["row"]["train"] else "the dense network itself"
    epochs = f"{result['row']['train']['epochs']}"
    return [f"{100 * result['keep']:.0f} %", teacher, epochs, f"{result['held_out']['top1']:.2f}", f"`{name}`"]


def _peer(row: Mapping[str, Any]) -> list[str]:
    drop = row.get("drop", None if row["top1"] is None else row["top1"] - row["dense"])
    number = ["?" if row[key] is None else f"{row[key]:.2f}" for key in ("dense", "top1")]
    return [f"{row['removed']:g} %", row["method"], *number, f"{drop:+.2f}", row["fine_tuned"], row["source"]]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _size(counts: Mapping[str, Any]) -> str:
    return f"{counts['params']:,} parameters, {counts['macs'] / 1e6:.1f} M multiply-accumulates"
