"""Low rank, int8 or both: latency, size and accuracy of six networks in three runtimes.

    python -m benchmarks.deployment list
    OMP_NUM_THREADS=1 python -m benchmarks.deployment run 'lite0/*' --shared ../shared
    python -m benchmarks.deployment table

A row is NETWORK/RUNTIME: the dense and the compressed network, each in float32 and in int8, timed in turns on one
thread, at batch sizes 1 and 32. Trained networks are planned and decomposed with effort "fast", without training, and
tested on images that nothing was tuned on. Networks with random weights give latencies only. `--models` keeps the
compressed networks in a folder, so that the rows of one network share them. `run` writes results/deployment.json,
`table` the tables of docs/int8.md.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import arp_hub
from arp_hub._utils.environment import environment
from arp_hub.deployment.job import Exported, Job
from arp_hub.deployment.parity import Check
from arp_hub.layers.apply_plan import apply_plan
from arp_hub.layers.model import count_params
from arp_hub.layers.trace import input_size_of
from arp_hub.runtimes.capture import Captured
from arp_hub.runtimes.formats import RUNTIMES
from arp_hub.runtimes.runtime import Run
from arp_hub.timing import Spread, paired_ratio, take_turns
from benchmarks.networks import calibration_of, load_network, test_images_of
from benchmarks.rows import HERE, load_results, results_file, row_command, row_parser

RESULTS, PAGE = results_file("deployment"), HERE.parent / "docs" / "int8.md"
SEED, SECONDS, BATCHES, INT8_IMAGES = 0, 8.0, (1, 32), 64
BEGIN, END = "<!-- written by benchmarks/deployment.py table -->\n", "<!-- to here -->"
"""Marks in the page before and after the tables."""
FORMS = ("dense float32", "dense int8", "low rank float32", "low rank int8")
UNBALANCED, ALL_INT8 = "low rank int8, factors not balanced", "low rank int8, all layers"
TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch, eager"}
FORMATS = {"onnxruntime": "onnx", "openvino": "openvino"}


@dataclass(frozen=True)
class Case:
    """A network and its budget.

    Attributes:
        title: Name in tables.
        keep: Share of the parameters to keep.
        images: Calibration images of the fit; 0 for random weights.
        test_images: Number of test images.
    """

    title: str
    keep: float
    images: int = 0
    test_images: int = 0


CASES = {
    "resnet20": Case("ResNet-20", 0.5, 1024, 2000),
    "mobilenetv2": Case("MobileNetV2", 0.84, 128, 450),
    "lite0": Case("EfficientNet-Lite0", 0.84, 128, 450),
    "vit": Case("ViT-S/14, 112 px", 0.67, 128, 400),
    "resnet50": Case("ResNet-50, random weights", 0.5),
    "convnext_atto": Case("ConvNeXt-Atto, random weights", 0.5),
}
ROWS = [f"{network}/{runtime}" for network in CASES for runtime in TITLES]


def main() -> None:
    """Parse the command line and do what it asks for."""
    parser, runner = row_parser(__doc__, table="write the tables of docs/int8.md")
    runner.add_argument("--shared", type=Path, required=True, help="folder with weights/ and data/")
    runner.add_argument("--models", type=Path, help="folder that keeps the compressed networks")
    torch.set_num_threads(1)
    row_command(parser, ROWS, RESULTS, measure, _short, write_page)


def measure(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Write the four forms of one network in one runtime, check them and time them."""
    name, runtime = row.split("/")
    case = CASES[name]
    dense, small, images = networks(name, args.shared, args.models)
    size = input_size_of(dense)
    test, labels = torch.randn(4, *size), None
    if case.images:
        test, labels = test_images_of(name, dense, args.shared, case.test_images).tensors()
    with tempfile.TemporaryDirectory() as folder:
        if runtime == "torch":
            runs, found = eager(dense, small, test, labels)
        else:
            job = Job(RUNTIMES[FORMATS[runtime]])
            runs, found = files(job, dense, small, images[:INT8_IMAGES], (test, labels), Path(folder))
        for batch in BATCHES:
            for form, timed in turns(runs, torch.randn(batch, *size)).items():
                found[form].setdefault("latency", {})[str(batch)] = timed
    facts = environment()
    if runtime != "torch":
        facts["versions"] |= RUNTIMES[FORMATS[runtime]].versions(int8=True)
    return {
        **facts,
        "seed": SEED,
        "keep_params": case.keep,
        "kept": round(count_params(small) / count_params(dense), 4),
        "random_weights": not case.images,
        "calibration_images": case.images,
        "int8_images": INT8_IMAGES,
        "test_images": len(test) if case.images else 0,
        "forms": found,
    }


def networks(name: str, shared: Path, models: Path | None) -> tuple[nn.Module, nn.Module, Tensor]:
    """The dense and the compressed network, and images to calibrate on."""
    case = CASES[name]
    torch.manual_seed(SEED)
    if not case.images:
        with torch.device("meta"):
            plan = arp_hub.make_plan(timm.create_model(name), keep_params=case.keep)
        dense = timm.create_model(name).eval()
        return dense, apply_plan(copy.deepcopy(dense), plan), torch.randn(INT8_IMAGES, *input_size_of(dense))
    dense = load_network(name, shared)
    images = calibration_of(name, dense, shared, case.images, copies=0)
    kept = models and models / name
    if kept and kept.is_dir():
        return dense, timm.create_model(f"local-dir:{kept}", pretrained=True).eval(), images
    plan = arp_hub.make_plan(dense, keep_params=case.keep, calibration=images, effort="fast")
    small = arp_hub.decompose(copy.deepcopy(dense), plan, images, effort="fast")
    if kept:
        arp_hub.save_pretrained(small, kept)
    return dense, small, images


def files(
    job: Job, dense: nn.Module, small: nn.Module, images: Tensor, tested: tuple[Tensor, Tensor | None], folder: Path
) -> tuple[dict[str, Run], dict[str, dict[str, Any]]]:
    """Files of the four forms with a dynamic batch, and how they compare with PyTorch.

    The steps for int8 are measured, too: the compressed network with all layers in int8, and with unbalanced factors.
    """
    runs, found = {}, {}
    for kind, model in (("dense", dense), ("low rank", small)):
        captured = Captured.of(model, input_size_of(dense), dynamic_batch=True)
        check = Check.of(captured, "test", *tested)
        for precision, calibration in (("float32", None), ("int8", images.split(1))):
            form = f"{kind} {precision}"
            written = _write(Job(job.runtime, calibration), captured, folder / form, check)
            runs[form], found[form] = written.run, written.to_dict()
        if kind == "low rank" and tested[1] is not None:
            for form, balance in ((ALL_INT8, True), (UNBALANCED, False)):
                plain = Job(job.runtime, images.split(1), balance=balance, most_divergence=math.inf)
                found[form] = _write(plain, captured, folder / form, check).to_dict()
    return runs, found


def _write(job: Job, captured: Captured, folder: Path, check: Check) -> Exported:
    folder.mkdir()
    return job.write(captured, folder, check)


@torch.no_grad()
def eager(
    dense: nn.Module, small: nn.Module, test: Tensor, labels: Tensor | None
) -> tuple[dict[str, Run], dict[str, dict[str, Any]]]:
    """Both networks in PyTorch."""
    runs, found = {}, {}
    for kind, model in (("dense", dense), ("low rank", small)):
        form = f"{kind} float32"
        runs[form] = torch.no_grad()(model.__call__)
        check = Check.of(Captured(model, 1, input_size_of(dense)), "test", test, labels)
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        found[form] = {"size_bytes": size, "parity": check.parity(runs[form]).to_dict()}
    return runs, found


def turns(runs: Mapping[str, Run], images: Tensor) -> dict[str, dict[str, Any]]:
    """Latency of each form, and its ratios to the dense float32 form and to the dense form of equal precision."""
    calls: dict[str, Callable[[], Any]] = {form: partial(run, images) for form, run in runs.items()}
    samples = take_turns(calls, torch.device("cpu"), SECONDS)
    return {
        form: {
            "latency_ms": Spread.of(taken).scaled(1e3).to_dict(),
            "ratio": paired_ratio(taken, samples["dense float32"]).to_dict(),
            "ratio_to_dense": paired_ratio(taken, samples[form.replace("low rank", "dense")]).to_dict(),
        }
        for form, taken in samples.items()
    }


def tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The latency table and the table of sizes and accuracies."""
    rows = sorted(results.items(), key=lambda item: ROWS.index(item[0]))
    lines = [
        "Median latency of one forward pass on one thread in ms. In brackets is the median of its paired ratios to",
        "dense float32:",
        "",
        f"| network | runtime | batch | {' | '.join(FORMS)} |",
        f"|---|---|---|{'---|' * len(FORMS)}",
    ]
    for name, row in rows:
        network, runtime = name.split("/")
        for batch in BATCHES:
            cells = [_latency(row["forms"].get(form), batch) for form in FORMS]
            best = min((c for c in cells if c), key=lambda cell: cell[0])
            shown = [f"**{cell[1]}**" if cell == best else cell[1] if cell else "" for cell in cells]
            head = f"{CASES[network].title}, {row['kept']:.0%} kept"
            lines.append(f"| {head} | {TITLES[runtime]} | {batch} | {' | '.join(shown)} |")
    lines += [
        "",
        "Size of the file in MB and top-1 in per cent. These are fewer test images than in the",
        "[results](research/results.md), so compare within a row:",
        "",
        f"| network | runtime | images | {' | '.join(FORMS)} |",
        f"|---|---|---|{'---|' * len(FORMS)}",
    ]
    for name, row in rows:
        network, runtime = name.split("/")
        if runtime != "torch":
            cells = [_size(row["forms"][form]) for form in FORMS]
            images = f"{row['test_images']:,d}" if row["test_images"] else ""
            lines.append(f"| {CASES[network].title} | {TITLES[runtime]} | {images} | {' | '.join(cells)} |")
    lines += [
        "",
        "Effect of each step for int8: divergence from the same network in float32 (nats), and top-1. In the last",
        "column, low-rank layers that int8 harms stay in float32:",
        "",
        "| network | runtime | dense int8 | low rank int8 | + balanced factors | + layers in float32 (number) |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows:
        network, runtime = name.split("/")
        if UNBALANCED in row["forms"]:
            kept = len(row["forms"]["low rank int8"].get("layers_in_float", ()))
            forms = [row["forms"][form]["parity"] for form in ("dense int8", UNBALANCED, ALL_INT8, "low rank int8")]
            cells = [f"{form['divergence']:.4f}, {form['top1']:.1f}" for form in forms]
            cells[-1] += f" ({kept})"
            lines.append(f"| {CASES[network].title} | {TITLES[runtime]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _latency(form: Mapping[str, Any] | None, batch: int) -> tuple[float, str] | None:
    if form is None:
        return None
    timed = form["latency"][str(batch)]
    ratio = timed["ratio"]["median"]
    median = timed["latency_ms"]["median"]
    return ratio, f"{median:,.0f} ({ratio:.2f})" if median >= 100 else f"{median:.3g} ({ratio:.2f})"


def _size(form: Mapping[str, Any]) -> str:
    size, top1 = f"{form['size_bytes'] / 1e6:.2f}", form["parity"].get("top1")
    return size if top1 is None else f"{size}, {top1:.1f}"


def with_tables(page: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with the tables between its marks."""
    before, after = page.split(BEGIN)[0], page.split(END, 1)[1]
    return before + BEGIN + "\n" + tables(results) + "\n" + END + after


def write_page() -> None:
    """Write the tables into docs/int8.md."""
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), load_results(RESULTS)), encoding="utf-8")


def _short(row: dict[str, Any]) -> str:
    timed = row["forms"].get("low rank int8", row["forms"]["low rank float32"])["latency"]["1"]
    return f"low rank {timed['ratio_to_dense']['median']:.2f} of dense in its precision"


if __name__ == "__main__":
    main()
