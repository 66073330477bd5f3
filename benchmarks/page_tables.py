"""Write the tables of user pages and of the research notebook that come from results.

    python -m benchmarks.page_tables

Each table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. The pages name the commands that measure
the rows.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks import accuracy, effort, peers
from benchmarks.networks import NETWORKS
from benchmarks.planning import heuristics, planning_profile, shared, smaller_heads
from benchmarks.rows import HERE, load_results, load_rows, results_file

DOCS = HERE.parent / "docs"
PAGES = (
    DOCS / "speed.md",
    DOCS / "how-to" / "refine.md",
    DOCS / "research" / "speed.md",
    DOCS / "research" / "experiments.md",
)
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.S)
NAMES = {"resnet50": "ResNet-50", "vit_base_patch16_224": "ViT-B/16", "cifar_resnet20": "ResNet-20"}


def main() -> None:
    """Write the tables of all pages."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


def with_tables(page: str) -> str:
    """The text of a page with its tables as the results have them."""
    return MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}", page)


def latency() -> str:
    """Latency on one CPU thread over that of the dense model."""
    found = load_results(results_file("latency"))
    lines = []
    for model, row in (
        ("ResNet-50", "half/resnet50/all"),
        ("ResNet-50", "half/resnet50/latency"),
        ("VGG-16's convolutions", "quarter/vgg16/latency"),
    ):
        for batch in (1, 32):
            one = found[f"{row}/{batch}"]
            budget = f"{100 * one['asked']:.0f} % of the time" if "asked" in one else "half of the parameters"
            images = f"{batch} image{'s' if batch > 1 else ''}"
            lines.append((model, budget, images, f"{100 * one['params_kept']:.0f} %", f"{one['ratio']['median']:.2f}"))
    return _table(("model", "budget", "batch", "parameters kept", "latency"), lines)


def latency_on_a_gpu() -> str:
    """Latency on a GPU over that of the dense model."""
    found = load_results(results_file("latency"))
    rows = [(NAMES[name], *_ratios(found, f"gpu/{name}/half", (1, 256), "/eager")) for name in list(NAMES)[:2]]
    return _table(("model", "1 image", "256 images"), rows)


def _ratios(found: Mapping[str, Any], row: str, batches: Sequence[int], end: str = "") -> list[str]:
    return [f"{found[f'{row}/{batch}{end}']['ratio']['median']:.2f}" for batch in batches]


def planning(all_models: bool) -> str:
    """Time and memory of planning and decomposing on one thread of a CPU."""
    rows = [row for row in load_rows(results_file("planning_time")) if row["device"] == "cpu"]
    rows = [row for row in rows if row["hardware"]["threads"] == 1]
    rows = [row for row in rows if all_models or row["model"] in NAMES]
    rows.sort(key=lambda row: (row["images"], row["model"] not in NAMES, row["params"]))
    return _table(("model", "images", "planning", "decomposing", "memory"), map(_planned, rows))


def _planned(row: Mapping[str, Any]) -> list[str]:
    times = [f"{row[key]['wall']:.1f} s" for key in ("plan_seconds", "decompose_seconds")]
    name = NAMES.get(row["model"], f"{row['model']}, {row['params'] / 1e6:.0f} M parameters")
    return [
        name,
        f"{row['images']} of 224 pixels" if row["images"] else "none",
        *times,
        f"{row['peak_over_weights']:.1f}",
    ]


def penalty() -> str:
    """What the penalty adds to a training step."""
    found = {(row["model"], row["device"], row["batch_size"]): row for row in load_rows(results_file("penalty_cost"))}
    rows = []
    for model, batch in (("cifar_resnet20", 128), ("resnet50", 8)):
        share = 100 * found[model, "cpu", batch]["penalty_share_of_step"]
        rows.append((f"{NAMES[model]}, batch {batch}", f"{share:.{1 if share > 1 else 2}f} %"))
    return _table(("one thread of a CPU", "share of a training step"), rows)


def images() -> str:
    """Top-1 of the fit by the number of calibration images."""
    found = load_results(accuracy.RESULTS)
    rows = []
    for name, keep, others in accuracy.IMAGE_COUNTS:
        own = f"fit/{name}/{keep}"
        measured = {count: f"images/{name}/{count}" for count in others} | {NETWORKS[name].images: own}
        cells = [f"{found[row]['top1']:.2f} ({count:,d})" for count, row in sorted(measured.items())]
        rows.append((NETWORKS[name].title, f"{100 * keep:.0f} %", f"{found[own]['dense']['top1']:.2f}", *cells))
    return _table(("network", "kept", "dense", "fewest images", "more", "most"), rows)


def refined() -> str:
    """Top-1 of the dense network, of the fit and after refinement."""
    found = load_results(accuracy.RESULTS)
    rows = []
    for name, budgets in accuracy.BUDGETS.items():
        for keep in budgets:
            if (row := found.get(f"refine/{name}/{keep}")) is not None:
                shown = [f"{scores['top1']:.1f}" for scores in (row["dense"], row["fit"], row)]
                rows.append((NETWORKS[name].title, f"{100 * keep:.0f} %", *shown))
    return _table(("network", "parameters kept", "dense", "fit", "refined"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(line)} |\n" for line in (head, *rows)]
    return "".join([lines[0], f"|{'---|' * len(head)}\n", *lines[1:]])


TABLES: dict[str, Callable[[], str]] = {
    "latency": latency,
    "latency-gpu": latency_on_a_gpu,
    "planning": lambda: planning(all_models=False),
    "planning-all": lambda: planning(all_models=True),
    "effort": lambda: effort.table(load_results(effort.RESULTS)),
    "penalty": penalty,
    "images": images,
    "refined": refined,
    "heuristics": lambda: heuristics.table(load_results(heuristics.RESULTS)),
    "heads": lambda: smaller_heads.table(load_results(smaller_heads.RESULTS)),
    "peers": lambda: peers.table(load_rows(peers.RESULTS)),
    "processes": shared.table,
    "profile": lambda: planning_profile.table(load_results(planning_profile.RESULTS)),
}
"""The tables by the names in the marks."""


if __name__ == "__main__":
    main()
