"""Latency of compressed over dense models: under latency budgets, and at half of the parameters.

    OMP_NUM_THREADS=1 python -m benchmarks.planning.latency list
    OMP_NUM_THREADS=1 python -m benchmarks.planning.latency run 'budget/*' 'half/*' 'forms/*'
    OMP_NUM_THREADS=1 python -m benchmarks.planning.latency run 'curve/*' --shared ../shared
    python -m benchmarks.planning.latency run 'gpu/*'
    python -m benchmarks.planning.latency table

Weights are random, except in `curve`: the trained tf_efficientnet_lite0 under latency budgets, planned and fitted on
256 images of a sample of ImageNet, and tested on its other images. `gpu` rows are in bfloat16, channels last. On one
thread, times are CPU seconds of the process. `run` writes results/latency.json, one entry a row; `table` prints the
tables of docs/research/speed.md.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import arp_hub
from arp_hub import Workload
from arp_hub._utils.environment import environment
from arp_hub.layers.low_rank import layer_shape
from arp_hub.layers.model import count_params
from arp_hub.schemes import make_scheme
from arp_hub.timing import paired_ratio, take_turns
from benchmarks.rows import chosen, load_results, print_rows, results_file, row_parser, run_rows

RESULTS = results_file("latency")
MODELS = ("resnet18", "resnet50", "vgg16", "tf_efficientnet_lite0", "convnext_atto", "vit_tiny_patch16_224")
BATCHES = (1, 32)
BUDGET = 0.7
CURVE = (0.95, 0.9, 0.85, 0.8, 0.7)
FORMS = ("eager", "channels_last", "compiled", "onnxruntime")
SECONDS, GPU_SECONDS = 20.0, 4.0
GPU_BATCHES = (1, 256)

Row = Callable[[argparse.Namespace], dict[str, Any]]


def _rows() -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for model in MODELS:
        for batch in BATCHES:
            rows[f"budget/{model}/{batch}"] = lambda _, m=model, b=batch: under_budget(m, Workload(batch_size=b))
    for scheme in ("channel", "cp", "all"):
        for batch in BATCHES:
            rows[f"half/resnet50/{scheme}/{batch}"] = lambda _, s=scheme, b=batch: half(s, b)
    for batch in BATCHES:
        rows[f"half/resnet50/latency/{batch}"] = lambda _, b=batch: two_thirds(b)
        rows[f"quarter/vgg16/{batch}"] = lambda _, b=batch: vgg_quarter(b)
        rows[f"quarter/vgg16/latency/{batch}"] = lambda _, b=batch: vgg_third(b)
    for form in FORMS:
        rows[f"forms/resnet50/{form}"] = lambda _, f=form: in_form(f)
    for batch in GPU_BATCHES:
        for how in ("eager", "compiled"):
            rows[f"gpu/resnet50/half/{batch}/{how}"] = lambda _, b=batch, h=how: gpu_half(
                "resnet50", b, h == "compiled"
            )
        rows[f"gpu/vit_base_patch16_224/half/{batch}/eager"] = lambda _, b=batch: gpu_half("vit_base_patch16_224", b)
    rows["gpu/resnet50/latency/256"] = lambda _: gpu_budget("resnet50", 256)
    for keep in CURVE:
        rows[f"curve/{keep}"] = lambda args, k=keep: trade_off(k, args.shared)
    return rows


def fresh(model: str) -> nn.Module:
    """The model with random weights from seed 0."""
    torch.manual_seed(0)
    return timm.create_model(model).eval()


def ratio_of(
    small: nn.Module, dense: nn.Module, workload: Workload, compiled: bool = False, seconds: float = SECONDS
) -> dict[str, Any]:
    """Latencies, their ratio and the share of parameters kept."""
    found = arp_hub.benchmark(small, workload, dense=dense, compiled=compiled, seconds=seconds).to_dict()
    keys = (
        "batch_size",
        "dtype",
        "channels_last",
        "compiled",
        "threads",
        "clock",
        "latency_ms",
        "dense_latency_ms",
        "ratio",
    )
    return {key: found[key] for key in keys} | {"params_kept": round(count_params(small) / count_params(dense), 4)}


def least_plan(
    dense: nn.Module, asked: float, by: float, workload: Workload, **options: Any
) -> tuple[arp_hub.RankPlan | None, dict[str, Any]]:
    """Plan for a share of the latency; raise the share step by step while it is refused.

    Returns:
        The plan, or None if every share below 1 is refused; and the row: the share that was planned for, and the
        refusal of the first one.
    """
    refusal = None
    while asked < 1:
        try:
            plan = arp_hub.make_plan(dense, keep_latency=asked, workload=workload, **options)
            return plan, {"asked": asked, "refused": refusal, "layers": len(plan.layers)}
        except arp_hub.ArpHubError as error:
            refusal, asked = refusal or str(error), round(asked + by, 2)
    return None, {"asked": asked, "refused": refusal, "ratio": None}


def under_budget(name: str, workload: Workload) -> dict[str, Any]:
    """Plan for 70 % of the latency, or for the lowest share that is not refused."""
    dense = fresh(name)
    plan, row = least_plan(dense, BUDGET, 0.05, workload)
    if plan is None:
        return row
    return row | ratio_of(arp_hub.decompose(copy.deepcopy(dense), plan), dense, workload)


def half(scheme: str, batch: int) -> dict[str, Any]:
    """ResNet-50 at half of its parameters, by one scheme where it applies or by all."""
    dense = fresh("resnet50")
    schemes = {"channel": ("channel",), "cp": ("cp", "channel"), "all": None}[scheme]
    plan = arp_hub.make_plan(dense, keep_params=0.5, schemes=schemes, rank_multiple=8)
    small = arp_hub.decompose(copy.deepcopy(dense), plan)
    return ratio_of(small, dense, Workload(batch_size=batch, channels_last=True))


def two_thirds(batch: int) -> dict[str, Any]:
    """Plan ResNet-50 for 65 % of its latency, and lower the budget until at most half of the parameters remain."""
    dense, workload, asked = fresh("resnet50"), Workload(batch_size=batch, channels_last=True), 0.65
    while True:
        plan = arp_hub.make_plan(dense, keep_latency=asked, workload=workload)
        small = arp_hub.decompose(copy.deepcopy(dense), plan)
        if count_params(small) <= count_params(dense) / 2:
            return {"asked": asked, "layers": len(plan.layers), **ratio_of(small, dense, workload)}
        asked = round(asked - 0.03, 2)


def vgg_quarter(batch: int) -> dict[str, Any]:
    """VGG-16 without its classifier, each convolution but the first at a quarter of its weights by `channel`."""
    dense = fresh("vgg16").features
    plans = {}
    for name, layer in dense.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels > 3:
            scheme = make_scheme("channel", layer_shape(layer))
            rank = max(8, int(0.25 * layer.weight.numel() / scheme.params(1)) // 8 * 8)
            plans[name] = arp_hub.LayerPlan("channel", rank)
    small = arp_hub.decompose(copy.deepcopy(dense), arp_hub.RankPlan(plans, {}))
    return convolutions_ratio(small, dense, batch)


def vgg_third(batch: int) -> dict[str, Any]:
    """The convolutions of VGG-16 planned for a third of their latency, or for the lowest share that is not refused."""
    dense = fresh("vgg16").features
    workload = Workload(batch_size=batch, channels_last=True)
    plan, row = least_plan(dense, 0.33, 0.03, workload, input_size=(3, 224, 224))
    if plan is None:
        return row
    return row | convolutions_ratio(arp_hub.decompose(copy.deepcopy(dense), plan), dense, batch)


def convolutions_ratio(small: nn.Module, dense: nn.Module, batch: int) -> dict[str, Any]:
    """As `ratio_of`, channels last, for models without a classifier."""
    layout = torch.channels_last
    images = torch.randn(batch, 3, 224, 224).to(memory_format=layout)
    small, dense = (copy.deepcopy(model).to(memory_format=layout) for model in (small, dense))
    with torch.inference_mode():
        samples = take_turns({"small": lambda: small(images), "dense": lambda: dense(images)}, images.device, SECONDS)
    ratio = paired_ratio(samples["small"], samples["dense"]).to_dict()
    kept = round(count_params(small) / count_params(dense), 4)
    return {"batch_size": batch, "channels_last": True, "ratio": ratio, "params_kept": kept}


def gpu_half(name: str, batch: int, compiled: bool = False) -> dict[str, Any]:
    """A model at half of its parameters by `channel`, on a GPU."""
    dense, workload = fresh(name), Workload(batch, "bfloat16", channels_last=True)
    plan = arp_hub.make_plan(dense, keep_params=0.5, schemes=("channel",), rank_multiple=8)
    small = arp_hub.decompose(copy.deepcopy(dense), plan).cuda()
    return ratio_of(small, dense.cuda(), workload, compiled, GPU_SECONDS)


def gpu_budget(name: str, batch: int) -> dict[str, Any]:
    """As `under_budget`, on a GPU, by `channel`."""
    dense, workload = fresh(name).cuda(), Workload(batch, "bfloat16", channels_last=True)
    plan, row = least_plan(dense, BUDGET, 0.05, workload, schemes=("channel",))
    if plan is None:
        return row
    return row | ratio_of(arp_hub.decompose(copy.deepcopy(dense), plan), dense, workload, seconds=GPU_SECONDS)


def in_form(form: str) -> dict[str, Any]:
    """ResNet-50 at half of its parameters, one image, in one of `FORMS`."""
    dense = fresh("resnet50")
    small = arp_hub.decompose(copy.deepcopy(dense), arp_hub.make_plan(dense, keep_params=0.5, rank_multiple=8))
    if form != "onnxruntime":
        return ratio_of(small, dense, Workload(channels_last=form != "eager"), form == "compiled")
    import onnxruntime

    image = torch.randn(1, 3, 224, 224)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    calls = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("small", small), ("dense", dense)):
            path = Path(folder) / f"{name}.onnx"
            torch.onnx.export(model, (image,), path, dynamo=True, verbose=False)
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            feed = {session.get_inputs()[0].name: image.numpy()}
            calls[name] = lambda session=session, feed=feed: session.run(None, feed)
    samples = take_turns(calls, torch.device("cpu"), SECONDS)
    return {"batch_size": 1, "ratio": paired_ratio(samples["small"], samples["dense"]).to_dict()}


def trade_off(keep: float, shared: Path) -> dict[str, Any]:
    """Top-1 and measured latency of the trained network under a latency budget, without training."""
    from arp_hub.training import evaluate
    from benchmarks.networks import calibration_of, load_network, test_images_of

    dense = load_network("lite0", shared)
    images, test = calibration_of("lite0", dense, shared), test_images_of("lite0", dense, shared)
    before = evaluate(dense, test)
    try:
        plan = arp_hub.make_plan(dense, keep_latency=keep, calibration=images, exclude=())
    except arp_hub.ArpHubError as error:
        return {"asked": keep, "refused": str(error), "ratio": None}
    small = arp_hub.decompose(copy.deepcopy(dense), plan, images)
    scores = {"top1": evaluate(small, test)["top1"], "dense_top1": before["top1"], "images": before["images"]}
    return {"asked": keep, **scores, "layers": len(plan.layers), **ratio_of(small, dense, Workload())}


ROWS = _rows()


def main() -> None:
    """Parse the command line and do what it asks for."""
    parser, runner = row_parser(__doc__, table="print the tables of docs/research/speed.md")
    runner.add_argument("--shared", type=Path, help="folder with weights/ and data/, for `curve`")
    args = parser.parse_args()
    found = load_results(RESULTS)
    if args.command == "list":
        print_rows(ROWS, found, _short)
    elif args.command == "table":
        print_tables(found)
    else:
        run(args)


def run(args: argparse.Namespace) -> None:
    """Measure the rows that the command line names."""
    names = chosen(ROWS, args.rows)
    if args.shared is None and any(name.startswith("curve/") for name in names):
        raise SystemExit("'curve' needs --shared, a folder with weights/ and data/")
    if not torch.cuda.is_available() and any(name.startswith("gpu/") for name in names):
        raise SystemExit("'gpu' needs a CUDA GPU")
    run_rows(names, RESULTS, args.again, lambda name: {**environment(), "seed": 0, **ROWS[name](args)}, _short)


def print_tables(found: dict[str, Any]) -> None:
    """Print one Markdown table for each kind of row."""
    print("| model | batch | budget | latency, measured | parameters kept |" + "\n" + "|---" * 5 + "|")
    for name in ROWS:
        if name.startswith("budget/") and name in found:
            row, (_, model, batch) = found[name], name.split("/")
            budget = f"{row['asked']:g}" + (f"; {BUDGET} is refused" if row["refused"] else "")
            print(f"| {model} | {batch} | {budget} | {_median(row)} | {_kept(row)} |")
    print("\n| budget | latency, measured | parameters kept | top-1 |" + "\n" + "|---" * 4 + "|")
    for name in ROWS:
        if name.startswith("curve/") and name in found:
            row = found[name]
            print(f"| {row['asked']:g} | {_median(row)} | {_kept(row)} | {row.get('top1', math.nan):.1f} |")
    print("\n| row | latency | parameters kept |" + "\n" + "|---" * 3 + "|")
    for name, row in found.items():
        if name.split("/")[0] in ("half", "quarter", "forms", "gpu"):
            print(f"| `{name}` | {_short(row)} | {_kept(row)} |")


def _median(row: dict[str, Any]) -> str:
    return "refused" if row["ratio"] is None else f"{row['ratio']['median']:.2f}"


def _kept(row: dict[str, Any]) -> str:
    if "params_kept" not in row:
        return ""
    percent = 100 * row["params_kept"]
    return f"{percent:.0f} %" if percent < 99.5 else f"{percent:.2f} %"


def _short(row: dict[str, Any]) -> str:
    ratio = row["ratio"]
    return "refused" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


if __name__ == "__main__":
    main()
