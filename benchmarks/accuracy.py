"""The rows of the accuracy tables: without training, and with the penalty.

    python -m benchmarks.accuracy list
    python -m benchmarks.accuracy run fit/resnet20/0.5 --shared ../shared
    python -m benchmarks.accuracy run 'fit/*' 'weights/*' --shared ../shared
    python -m benchmarks.accuracy table

`--shared` is a folder with `weights/` (trained checkpoints) and `data/` (CIFAR-10 and a sample of ImageNet, as
parquet). `run` writes one entry for each row to results/accuracy.json, and skips rows with an entry unless `--again` is
given. With `--cuda-graphs`, training on a GPU uses CUDA graphs. The finished models of the rows in `KEPT` are stored in
models/. `table` writes docs/research/results.md, its figure, the table of the README, and the cards of models/.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import arp_hub
from arp_hub._utils.environment import environment
from arp_hub.hub.card import PICTURES, draw_pictures, keep_by_hand, model_card
from arp_hub.hub.export_files import read_export
from arp_hub.hub.save import CARD, CONFIG, METRICS
from arp_hub.layers.low_rank import layer_shape
from arp_hub.layers.model import count_params
from arp_hub.layers.trace import count_macs
from arp_hub.plan import LayerPlan, RankPlan
from arp_hub.schemes import make_scheme
from arp_hub.training import TrainConfig, evaluate, load_data, refinement_images
from arp_hub.training import run as train
from benchmarks.activation_svd import RANK_RULES, activation_svd
from benchmarks.networks import NETWORKS, SEED, calibration_of, load_network, test_images_of
from benchmarks.rows import HERE, load_results, results_file, row_command, row_parser, without_folder

RESULTS, MODELS = results_file("accuracy"), HERE / "models"


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        network: A key of `NETWORKS`.
        keep: Share of the parameters to keep.
        images: Number of calibration images; None: the network's own number, 0: weights alone.
        schemes: Schemes to choose from; empty: all.
        uniform: Scheme for all k x k layers at the same share of parameters, instead of a plan by error.
        peer: Rank rule of a plain activation-aware SVD, which is measured in place of our plan and fit; empty for ours.
        refine: Minutes of refinement after the fit.
        refine_images: Unlabelled images of the refinement, those held out included; None: as by default.
        seed: Seed of the choice of calibration images, and of the refinement.
        train: Settings of the recipe, if the row trains.
    """

    network: str
    keep: float
    images: int | None = None
    schemes: tuple[str, ...] = ()
    uniform: str = ""
    peer: str = ""
    refine: float = 0.0
    refine_images: int | None = None
    seed: int = SEED
    train: Mapping[str, Any] = field(default_factory=dict, hash=False)


BUDGETS = {
    "resnet20": (0.5, 0.35, 0.25, 0.2),
    "resnet56": (0.5, 0.35, 0.25),
    "lite0": (0.84, 0.7),
    "mobilenetv2": (0.84, 0.7),
    "vit": (0.67, 0.5),
}
IMAGE_COUNTS = (
    ("resnet20", 0.35, (64, 256)),
    ("resnet56", 0.35, (64, 256)),
    ("lite0", 0.84, (64, 1000)),
    ("vit", 0.67, (64, 1024)),
)
"""Networks and budgets that are also measured with other numbers of calibration images than those of `fit` rows."""
REFINE_IMAGES = (("resnet20", 0.35, 1000), ("resnet20", 0.2, 1000), ("vit", 0.67, 10_000))
"""Networks and budgets that are also refined on another number of images than in `refine` rows."""
TIMED = {"resnet20": 0.2, "lite0": 0.7, "mobilenetv2": 0.7, "vit": 0.5}
"""Networks and budgets that are also refined for other times than the 15 minutes of `refine` rows."""
SCHEME_SETS = {
    "channel": ("channel",),
    "+spatial": ("channel", "spatial"),
    "+groups": ("channel", "spatial", "group_in", "group_out"),
    "+tucker2": ("channel", "spatial", "group_in", "group_out", "tucker2"),
    "cp": ("cp",),
}


def _rows() -> dict[str, Row]:
    rows = {}
    for network, budgets in BUDGETS.items():
        for keep in budgets:
            rows[f"fit/{network}/{keep}"] = Row(network, keep)
            rows[f"weights/{network}/{keep}"] = Row(network, keep, images=0)
            rows[f"svd/{network}/{keep}"] = Row(network, keep, images=0, schemes=("channel",))
            rows[f"refine/{network}/{keep}"] = Row(network, keep, refine=15)
            for rule in RANK_RULES:
                rows[f"activation-svd-{rule}/{network}/{keep}"] = Row(network, keep, peer=rule)
    for network, keep, counts in IMAGE_COUNTS:
        for count in counts:
            rows[f"images/{network}/{count}"] = Row(network, keep, images=count)
    for network, keep, count in REFINE_IMAGES:
        rows[f"unlabelled-{count}/{network}/{keep}"] = Row(network, keep, refine=15, refine_images=count)
    for network, keep in TIMED.items():
        for minutes in (1, 3, 10):
            rows[f"refine-{minutes}/{network}/{keep}"] = Row(network, keep, refine=minutes)
    for network, keep in (("lite0", 0.7), ("vit", 0.5)):
        for seed in (1, 2):
            rows[f"seed-{seed}/{network}/{keep}"] = Row(network, keep, refine=15, seed=seed)
    for keep in BUDGETS["resnet20"]:
        rows[f"uniform-cp/resnet20/{keep}"] = Row("resnet20", keep, uniform="cp")
    for name, schemes in SCHEME_SETS.items():
        rows[f"schemes/{name}/resnet20/0.35"] = Row("resnet20", 0.35, schemes=schemes)
    for keep in (0.5, 0.35, 0.2):
        rows[f"train/resnet20/{keep}"] = Row("resnet20", keep, train=TRAIN | {"epochs": 10})
        rows[f"factors/resnet20/{keep}"] = Row("resnet20", keep, train=TRAIN | FACTORS)
    for keep in (0.35, 0.2):
        rows[f"teacher/resnet20/{keep}"] = Row("resnet20", keep, train=TRAIN | {"epochs": 10} | TEACHER)
        rows[f"ramp/resnet20/{keep}"] = Row("resnet20", keep, train=TRAIN | {"epochs": 10} | RAMP)
        rows[f"train/resnet56/{keep}"] = Row("resnet56", keep, train=TRAIN | {"epochs": 2})
        rows[f"factors/resnet56/{keep}"] = Row("resnet56", keep, train=TRAIN | FACTORS | {"finetune_epochs": 2})
        rows[f"long/resnet20/{keep}"] = Row("resnet20", keep, train=TRAIN | LONG)
        rows[f"long/resnet56/{keep}"] = Row("resnet56", keep, train=TRAIN | LONG | {"epochs": 10})
        rows[f"long-teacher/resnet20/{keep}"] = Row("resnet20", keep, train=TRAIN | {"epochs": 20} | TEACHER)
    for teacher, settings in CHOICES.items():
        rows[f"choose-{teacher}/resnet20/0.2"] = Row("resnet20", 0.2, train=TRAIN | CHOOSE | settings)
    rows["train-10000/vit/0.5"] = Row("vit", 0.5, train=PART | {"ramp": 0.0, "epochs": 10, "lr": 5e-5})
    rows["factors-10000/vit/0.5"] = Row(
        "vit", 0.5, train=PART | {"epochs": 0, "finetune_epochs": 10, "finetune_lr": 5e-5}
    )
    rows["long/resnet110/0.35"] = Row("resnet110", 0.35, train=TRAIN | FROM_NOTHING)
    return rows


TRAIN: dict[str, Any] = {"ramp": 0.0, "lr": 0.03, "distill": 0.9, "clip_grad": 5.0}
LONG: dict[str, Any] = {"epochs": 30, "mixed_precision": "bf16"}
FROM_NOTHING: dict[str, Any] = {
    "dense_epochs": 60,
    "dense_lr": 0.2,
    "warmup_epochs": 1,
    "epochs": 40,
    "batch_size": 256,
    "weight_decay": 5e-4,
    "mixed_precision": "bf16",
    "checkpoint_every": 0,
}
"""Settings that train the dense network first, for fewer epochs than usual."""
RAMP: dict[str, Any] = {"start_from": "dense", "ramp": 0.65}
"""Settings that start from the dense network, with a ramp of the penalty."""
TEACHER: dict[str, Any] = {"teacher": "cifar_resnet56", "teacher_checkpoint": "weights/resnet56_cifar10.safetensors"}
"""Settings that distil from a larger network."""
CHOOSE: dict[str, Any] = {"epochs": 5, "val_fraction": 0.1, "mixed_precision": "bf16"}
"""Short training that holds images back, to choose settings by."""
CHOICES: dict[str, dict[str, Any]] = {"own": {}, "teacher": TEACHER}
"""Teachers to choose from: the dense network itself, or a larger one."""
FACTORS: dict[str, Any] = {"epochs": 0, "finetune_epochs": 10, "finetune_lr": 0.003}
"""Settings that fine-tune the factors of the fit, without a penalty, at a rate at which they converge."""
PART: dict[str, Any] = {
    "streaming": True,
    "epoch_images": 1000,
    "workers": 1,
    "calibration_images": 256,
    "batch_size": 32,
    "optimizer": "adamw",
    "layer_decay": 0.75,
    "weight_decay": 0.05,
    "clip_grad": 1.0,
    "distill": 0.5,
}
"""Settings that fine-tune a transformer on a part of CIFAR-10: about as many images as in 15 minutes of refinement."""
ROWS = _rows()
KEPT = (
    "train/resnet20/0.5",
    "long/resnet20/0.35",
    "long/resnet20/0.2",
    "long/resnet56/0.35",
    "long/resnet56/0.2",
)
"""Rows whose trained models are stored in models/: the longest one that is taught by the dense network, of each network
and budget. The `choose-*` rows chose that teacher."""


def main() -> None:
    """Parse the command line and do what it asks for."""
    parser, runner = row_parser(__doc__, table="write the results page, its figure, the table of the README, and cards")
    runner.add_argument("--shared", type=Path, required=True, help="folder with weights/ and data/")
    runner.add_argument("--cuda-graphs", action="store_true", help="train with CUDA graphs on a GPU")
    row_command(
        parser, ROWS, RESULTS, lambda name, args: measure(name, args.shared, args.cuda_graphs), _short, write_pages
    )


def write_pages() -> None:
    """Write docs/research/results.md, its figure, the table of the README, and the cards of the kept models."""
    from benchmarks.accuracy_report import write_report

    write_report(load_results(RESULTS))
    for folder in MODELS.iterdir():
        write_card(folder)


def measure(name: str, shared: Path, cuda_graphs: bool = False) -> dict[str, Any]:
    """Measure one row."""
    row = ROWS[name]
    began = time.perf_counter()
    found = measure_trained(name, row, shared, cuda_graphs) if row.train else measure_fit(row, shared)
    seconds = round(time.perf_counter() - began, 1)
    result = {"network": row.network, "keep": row.keep, "row": _plain(row), "seed": row.seed, "seconds": seconds}
    return {**environment(), **result, **found}


def _short(row: dict[str, Any]) -> str:
    return f"top-1 {row['top1']:.2f} (dense {row['dense']['top1']:.2f}), {row['seconds']:.0f} s"


def measure_fit(row: Row, shared: Path) -> dict[str, Any]:
    """Plan and decompose without training, refine if the row does, and evaluate on the test images."""
    dense = _dense(row.network, shared)
    if row.peer:
        return {**measure_peer(row, dense, shared), "dense": dense}
    fitted, fit = _fit(dataclasses.replace(row, refine=0.0, refine_images=None), shared)
    if not row.refine:
        return {**fit, "dense": dense}
    model, small = load_network(row.network, shared), copy.deepcopy(fitted)
    refinement = refine_without_labels(row, model, small, shared)
    refined = evaluate(small, test_images_of(row.network, model, shared))
    before = {name: fit[name] for name in refined}
    return {**fit, **refined, "fit": before, "refinement": refinement, "dense": dense}


def measure_peer(row: Row, dense: Mapping[str, Any], shared: Path) -> dict[str, Any]:
    """Compress by a plain activation-aware SVD, and evaluate."""
    model = load_network(row.network, shared)
    used = NETWORKS[row.network].images if row.images is None else row.images
    images = calibration_of(row.network, model, shared, used, copies=0, seed=row.seed)
    began = time.perf_counter()
    peer = activation_svd(model, row.keep, images, row.peer)
    seconds = round(time.perf_counter() - began, 1)
    measured = {"params": peer.params, "macs": dense["macs"] - peer.saved_macs, "calibration_images": used}
    tested = evaluate(peer.model, test_images_of(row.network, model, shared))
    return {**tested, **measured, "seconds_decompose": seconds}


@functools.lru_cache(maxsize=1)
def _fit(row: Row, shared: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The fit, and what was measured of it: the same for all rows that only refine it differently."""
    torch.manual_seed(row.seed)
    model, images = load_network(row.network, shared), None
    used = NETWORKS[row.network].images if row.images is None else row.images
    if used:
        images = calibration_of(row.network, model, shared, used, seed=row.seed)
    began = time.perf_counter()
    if row.uniform:
        plan = uniform_plan(model, row.keep, row.uniform)
    else:
        plan = arp_hub.make_plan(model, keep_params=row.keep, schemes=row.schemes or None, calibration=images)
    planned = time.perf_counter()
    small, fitted = arp_hub.decompose(copy.deepcopy(model), plan, images), time.perf_counter()
    return small, {
        **evaluate(small, test_images_of(row.network, model, shared)),
        **_counts(small),
        "calibration_images": used,
        "calibration_copies": 0 if images is None else len(images) // used - 1,
        "seconds_plan": round(planned - began, 1),
        "seconds_decompose": round(fitted - planned, 1),
        "plan": plan.to_dict(),
    }


@functools.cache
def _dense(network: str, shared: Path) -> dict[str, Any]:
    """Accuracy and size of a dense network, the same for all of its rows."""
    model = load_network(network, shared)
    return {**evaluate(model, test_images_of(network, model, shared)), **_counts(model)}


def refine_without_labels(row: Row, dense: nn.Module, small: nn.Module, shared: Path) -> dict[str, Any]:
    """Refine a decomposed model in place, on images that the fit has not seen as far as the data has enough."""
    data = load_data(str(shared / "data" / NETWORKS[row.network].data), dense, seed=SEED)
    images, held_out = refinement_images(data, row.refine_images, seed=row.seed)
    done = arp_hub.refine(small, dense, images, held_out=held_out, minutes=row.refine, seed=row.seed)
    return dataclasses.asdict(done)


def uniform_plan(model: nn.Module, keep: float, scheme: str) -> RankPlan:
    """A plan with one share of parameters for every k x k convolution but the first, so that ``keep`` of all remain."""
    convs = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1) and module.in_channels > 3
    }
    inside, total = sum(conv.weight.numel() for conv in convs.values()), count_params(model)
    share = (keep * total - (total - inside)) / inside
    plans = {}
    for name, conv in convs.items():
        bound = make_scheme(scheme, layer_shape(conv))
        plans[name] = LayerPlan(scheme, max(1, int(share * conv.weight.numel() / bound.params(1))), 1)
    return RankPlan(plans, {})


def measure_trained(name: str, row: Row, shared: Path, cuda_graphs: bool = False) -> dict[str, Any]:
    """Run the recipe's trainer, or resume a stopped run. Models of `KEPT` rows are stored in ``models/``."""
    network = NETWORKS[row.network]
    output = Path("runs") / "accuracy" / name.replace("/", "-")
    settings = {"checkpoint_every": 100, **row.train}
    # small images are taken whole, whatever the crop of the overlay
    arguments = {key: value for key, value in network.args.items() if key != "pretrained_cfg_overlay"}
    if arguments:
        settings["model_kwargs"] = arguments
    if "teacher_checkpoint" in settings:
        settings["teacher_checkpoint"] = str(shared / settings["teacher_checkpoint"])
    config = TrainConfig(
        model=network.model,
        checkpoint=str(shared / "weights" / f"{network.checkpoint}.safetensors") if network.checkpoint else "",
        data=str(shared / "data" / network.data),
        keep_params=row.keep,
        output=str(output),
        resume="auto",
        cuda_graphs=cuda_graphs,
        seed=SEED,
        overwrite=True,
        **settings,
    )
    metrics = train(config)
    if config.val_fraction:
        metrics["held_out"] = metrics["history"][-1]["val"]
    if name in KEPT:
        kept = MODELS / f"{network.model}-keep{round(100 * row.keep)}"
        _copy_model(output, kept, shared)
        write_card(kept)
        metrics["model_folder"] = f"benchmarks/models/{kept.name}"
    result = {key: metrics[key] for key in metrics if key not in ("command", "data", "layers", "history")}
    return json.loads(without_folder(json.dumps(result), shared))


def _copy_model(source: Path, target: Path, shared: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix == ".json":
            (target / path.name).write_text(without_folder(path.read_text(encoding="utf-8"), shared), encoding="utf-8")
        elif path.is_file():
            (target / path.name).write_bytes(path.read_bytes())


def card(folder: Path) -> str:
    """The model card of a folder in models/, with the notes that its owner added by hand."""
    config, metrics = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (CONFIG, METRICS))
    pictures = [path.name for path in folder.glob("*.png")]
    name = f"local-dir:{folder.relative_to(HERE.parent).as_posix()}"  # loads from the root of a clone
    written = model_card(
        config, metrics | {"runs": _runs(metrics)}, name, pictures=pictures, export=read_export(folder)
    )
    return keep_by_hand(written, (folder / CARD).read_text(encoding="utf-8"))


def _runs(metrics: Mapping[str, Any]) -> str:
    """How many training runs a kept model was chosen from: the rows of its network and budget that train."""
    config = metrics["config"]
    rows = [
        name
        for name, row in load_results(RESULTS).items()
        if name in ROWS and ROWS[name].train and row["keep"] == config["keep_params"]
        if NETWORKS[row["network"]].model == config["model"] and not name.startswith("choose-")
    ]
    if len(rows) == 1:
        return "1"
    if not any("teacher" in name for name in rows):
        return f"{len(rows)}. This one is the longest"
    return (
        f"{len(rows)}. This one is the longest that distils from the dense model. Held-out training images chose that "
        "teacher, for ResNet-20 at 20 %"
    )


def write_card(folder: Path) -> None:
    """Rewrite the card of a folder in models/, and its pictures."""
    for picture in PICTURES:
        (folder / picture).unlink(missing_ok=True)
    draw_pictures(folder, json.loads((folder / METRICS).read_text(encoding="utf-8")))
    (folder / CARD).write_text(card(folder), encoding="utf-8")


def _counts(model: nn.Module) -> dict[str, int]:
    return {"params": count_params(model), "macs": count_macs(model)}


def _plain(row: Row) -> dict[str, Any]:
    """The settings of the row that are not empty."""
    defaults = {item.name for item in dataclasses.fields(row) if getattr(row, item.name) in (None, "", (), {})}
    values = {item.name: getattr(row, item.name) for item in dataclasses.fields(row) if item.name not in defaults}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}


if __name__ == "__main__":
    main()
