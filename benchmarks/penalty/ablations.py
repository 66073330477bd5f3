"""Ablations of the penalty: ResNet-20 on CIFAR-10, one epoch, one change at a time.

    python -m benchmarks.penalty.ablations list
    python -m benchmarks.penalty.ablations run '0.35/*' --shared ../shared
    python -m benchmarks.penalty.ablations table

All rows of a budget share data, batches, learning rate and plan. Unless their name says otherwise, they also share the
start: the trained network, or its data-aware fit. `run` writes results/ablations.json, and skips rows with a result
unless `--again` is given. `table` writes docs/research/ablations.md.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

import arp_hub
from arp_hub._utils.environment import environment
from arp_hub.hub.load import load_model
from arp_hub.layers.model import count_params, low_rank_layers
from arp_hub.penalty import AdaptiveRankPenalty
from arp_hub.schemes import Factors
from arp_hub.training import ImageData, calibration_images, evaluate, load_data
from arp_hub.training.data.batches import epoch_batches, steps_per_epoch
from arp_hub.training.data.images import TrainBatch
from arp_hub.training.seeds import keyed_seed
from benchmarks.peers import plan_by_energy, plan_by_share
from benchmarks.penalty.rival_penalties import (
    LR,
    RAMP,
    FixedShare,
    InLoss,
    KeepsEnergy,
    MinRank,
    Nothing,
    NuclearNorm,
    NuclearTail,
    Pull,
    Replanned,
)
from benchmarks.rows import HERE, chosen, load_results, print_rows, results_file, row_parser, write_result

RESULTS, CACHE = results_file("ablations"), Path("runs/ablations")
PAGE = HERE.parent / "docs" / "research" / "ablations.md"
BATCH, DISTILL, HEAT, CLIP = 128, 0.9, 4.0, 5.0


@dataclass(frozen=True)
class Variant:
    """One ablation.

    Attributes:
        what: In words, for the table.
        start: The trained network, its fit, or the compressed model kept in models/.
        penalty: The penalty; None for a rival that has none.
        pull: What runs before and after the optimiser's step.
        ramp: Share of the steps in the ramp.
        every: Steps between two pulls.
        distill: Share of the distillation in the loss.
        lr: Learning rate.
        schemes: Schemes to plan with; empty: all.
        minrank: Of torchao's `MinRankConstraint` the rule for ranks: ``"share"``, ``"energy"`` or ``"plan"``, with
            ``", scheduled"`` where they fall along its schedule.
        bf16: Forward passes in bfloat16.
        held_out: Tested on 5,000 training images that are held out, to choose settings by.
        epochs: Epochs of training.
        seed: Seed of batches and augmentation.
    """

    what: str
    start: str = "dense"
    penalty: Callable[..., AdaptiveRankPenalty] | None = AdaptiveRankPenalty
    pull: type[Pull] = Pull
    ramp: float = RAMP
    every: int = 4
    distill: float = DISTILL
    lr: float = LR
    schemes: tuple[str, ...] = ()
    minrank: str = ""
    bf16: bool = False
    held_out: bool = False
    epochs: int = 1
    seed: int = 0


FIT: dict[str, Any] = {"start": "fit", "ramp": 0.0}
FACTORS: dict[str, Any] = {"start": "fit", "penalty": None, "pull": Nothing}
MINRANK: dict[str, Any] = {"penalty": None, "bf16": True}
VARIANTS = {
    "fit-hold": Variant("the fit, then the hold (the default of the recipes)", **FIT),
    "fit-factors": Variant("the fit, then its factors are trained: no penalty", **FACTORS),
    "dense-ramp": Variant("the trained network, ramp 0.65, schedule tracking"),
    "fit-factors-slow": Variant("its factors are trained at a tenth of the rate", **FACTORS, lr=LR / 10),
    "fit-hold-slow": Variant("the fit, then the hold, at a tenth of the rate", **FIT, lr=LR / 10),
    "dense-fixed": Variant("a fixed strength", penalty=FixedShare),
    "dense-in-loss": Variant("a fixed strength, as a term of the loss", pull=InLoss),
    "dense-nuclear": Variant("nuclear norm with subgradients, as a term of the loss", pull=NuclearNorm),
    "fit-no-distillation": Variant("the fit, then the hold, no distillation", **FIT, distill=0.0),
    "fit-every-8": Variant("the fit, then the hold, a pull every 8th step", **FIT, every=8),
    "fit-every-16": Variant("the fit, then the hold, a pull every 16th step", **FIT, every=16),
    "fit-every-32": Variant("the fit, then the hold, a pull every 32nd step", **FIT, every=32),
    "fit-every-64": Variant("the fit, then the hold, a pull every 64th step", **FIT, every=64),
    "fit-every-1": Variant("the fit, then the hold, a pull every step", **FIT, every=1),
    "dense-every-32": Variant("the trained network, ramp 0.65, a pull every 32nd step", every=32),
    "dense-short-hold": Variant("ramp 0.9: a short hold", ramp=0.9),
    "dense-long-hold": Variant("ramp 0.3: a long hold", ramp=0.3),
    "dense-replanned": Variant("ranks chosen again in the middle of the ramp", pull=Replanned),
    "fit-keeps-energy": Variant("the fit, then the hold, projections keep the norm", penalty=KeepsEnergy, **FIT),
    "channel-energy-tail": Variant("channel alone, the tail's energy shrinks", schemes=("channel",)),
    "channel-nuclear-tail": Variant(
        "channel alone, the tail's nuclear norm shrinks", schemes=("channel",), penalty=NuclearTail
    ),
    "kept-finetuned": Variant(
        "the kept model of penalty training, then three epochs of its factors",
        start="kept",
        penalty=None,
        pull=Nothing,
        lr=LR / 10,
        epochs=3,
    ),
    "fit-hold-seed-1": Variant("the fit, then the hold, another seed", **FIT, seed=1),
    "fit-factors-seed-1": Variant("factors trained, another seed", **FACTORS, seed=1),
    "fit-factors-slow-seed-1": Variant(
        "factors trained at a tenth of the rate, another seed", **FACTORS, lr=LR / 10, seed=1
    ),
    "dense-ramp-seed-1": Variant("the trained network, ramp 0.65, another seed", seed=1),
    **{
        f"choose-minrank-{rule.replace(', ', '-')}": Variant(
            f"torchao's MinRankConstraint, ranks by {rule}; held-out images", minrank=rule, held_out=True, **MINRANK
        )
        for rule in ("share", "share, scheduled", "energy, scheduled", "plan, scheduled")
    },
    "minrank-10": Variant(
        "torchao's MinRankConstraint, ten epochs, bfloat16", minrank="plan, scheduled", epochs=10, **MINRANK
    ),
    "channel-10": Variant(
        "channel alone, ramp 0.65, ten epochs, bfloat16", schemes=("channel",), every=8, epochs=10, bf16=True
    ),
    "fit-10": Variant("the fit, then the hold, ten epochs, bfloat16", every=8, epochs=10, bf16=True, **FIT),
}
ROWS = {f"{keep}/{name}": (keep, name) for keep in (0.35, 0.2) for name in VARIANTS}


@dataclass(frozen=True)
class Task:
    """Model, data and budget that all rows of a budget share."""

    keep: float
    dense: nn.Module
    data: ImageData
    images: Tensor

    @property
    def steps(self) -> int:
        """Steps of the one epoch."""
        return steps_per_epoch(len(self.data.train), BATCH)

    def plan(self, schemes: tuple[str, ...] = ()) -> arp_hub.RankPlan:
        """The plan from the calibration images, cached on disk."""
        path = CACHE / f"plan-{self.keep}{''.join('-' + name for name in schemes)}.json"
        if not path.exists():
            plan = arp_hub.make_plan(
                copy.deepcopy(self.dense), keep_params=self.keep, calibration=self.images, schemes=schemes or None
            )
            CACHE.mkdir(parents=True, exist_ok=True)
            path.write_text(plan.to_json(), encoding="utf-8")
        return arp_hub.RankPlan.from_json(path.read_text(encoding="utf-8"))

    def minrank_plan(self, rule: str) -> arp_hub.RankPlan:
        """Ranks for torchao's constraint, which has no rule of its own for a budget of parameters."""
        if rule == "plan":
            return self.plan(("channel",))
        if rule == "energy":
            return plan_by_energy(self.dense, self.keep)
        return plan_by_share(self.dense, self.keep)

    def fitted(self) -> nn.Module:
        """The data-aware decomposition, cached on disk."""
        folder = CACHE / f"fit-{self.keep}"
        if not folder.exists():
            arp_hub.save_pretrained(
                arp_hub.decompose(copy.deepcopy(self.dense), self.plan(), calibration=self.images), folder
            )
        return load_model(f"local-dir:{folder}", pretrained=True)

    def kept(self) -> nn.Module:
        """The model of the longest penalty training."""
        return load_model(
            f"local-dir:{HERE / 'models' / f'cifar_resnet20-keep{round(100 * self.keep)}'}", pretrained=True
        )

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images, labels and the dense network's logits of an epoch; every row of a seed gets the same batches."""
        split = self.data.train
        order = epoch_batches(len(split), BATCH, keyed_seed(seed, "order"), 0)
        jobs = (
            TrainBatch(split.indices[batch], keyed_seed(seed, "augment", step), slice(0, BATCH))
            for step, batch in enumerate(order)
        )
        guide = self._guide(seed)
        for step, images in enumerate(split.images.training(jobs, torch.device("cpu"), 0)):
            images = images.contiguous(memory_format=torch.channels_last)
            if guide is None:
                with torch.no_grad():
                    logits = self.dense(images)
            else:
                logits = guide[step]
            yield images, split.labels[order[step]], logits

    def _guide(self, seed: int) -> Tensor | None:
        path = self._guide_file(seed)
        return load_file(path)["logits"] if path.exists() else None

    def _guide_file(self, seed: int) -> Path:
        return CACHE / f"guide-{seed}-{len(self.data.train)}.safetensors"

    def keep_guide(self, seed: int, logits: list[Tensor]) -> None:
        """Cache the dense network's logits of an epoch for the next row."""
        CACHE.mkdir(parents=True, exist_ok=True)
        save_file({"logits": torch.stack(logits)}, self._guide_file(seed))


def main() -> None:
    """Parse the command line and do what it asks for."""
    parser, runner = row_parser(__doc__, table="write docs/research/ablations.md")
    runner.add_argument("--shared", type=Path, required=True, help="folder with weights/ and data/")
    runner.add_argument(
        "--max-steps", type=int, default=0, help="trial run: stop after this many steps and write no result"
    )
    args = parser.parse_args()
    if args.command == "list":
        print_rows(ROWS, load_results(RESULTS), lambda row: f"{row['top1']:.2f}")
    elif args.command == "table":
        PAGE.write_text(page(load_results(RESULTS)), encoding="utf-8")
        print(f"wrote {PAGE.name}")
    else:
        run(chosen(ROWS, args.rows), args.shared, args.again, args.max_steps)


def run(names: list[str], shared: Path, again: bool, max_steps: int) -> None:
    """Measure rows one by one and write each result at once."""
    dense = load_model("cifar_resnet20", str(shared / "weights" / "resnet20_cifar10.safetensors")).eval()
    data = load_data(str(shared / "data" / "cifar10"), dense)
    held = load_data(str(shared / "data" / "cifar10"), dense, val_fraction=0.1)
    images = calibration_images(data)
    for name in names:
        if name in load_results(RESULTS) and not again:
            continue
        keep, key = ROWS[name]
        task = Task(keep, dense, held if VARIANTS[key].held_out else data, images)
        result = measure(task, VARIANTS[key], max_steps)
        print(f"{name}: top-1 {result['top1']:.2f}, {result['seconds']:.0f} s", flush=True)
        if not max_steps:
            result = {**environment(), "what": VARIANTS[key].what, "seed": VARIANTS[key].seed, **result}
            write_result(RESULTS, name, result)


def measure(task: Task, variant: Variant, max_steps: int = 0) -> dict[str, Any]:
    """Train one variant, decompose it, and evaluate it on the test images."""
    torch.manual_seed(variant.seed)
    plan, total = task.plan(variant.schemes), max_steps or variant.epochs * task.steps
    starts = {"dense": lambda: copy.deepcopy(task.dense), "fit": task.fitted, "kept": task.kept}
    model = starts[variant.start]()
    model.requires_grad_(True)
    begin = evaluate(model.eval(), task.data.test)["top1"] if variant.start != "dense" else None
    factors = None
    if variant.start == "fit" and variant.penalty is not None:
        layers = low_rank_layers(model)
        factors = {key: tuple(w.detach().clone() for w in layer.factor_weights()) for key, layer in layers.items()}
        arp_hub.to_dense(model)
    model = model.to(memory_format=torch.channels_last)
    pull = _pull(task, variant, model, plan, total, factors)
    began = time.perf_counter()
    loss = train(task, variant, model, pull, total)
    seconds = time.perf_counter() - began
    model.eval()
    split = task.data.val if variant.held_out and task.data.val else task.data.test
    before = evaluate(model, split)["top1"]
    small = pull.cut(model, plan)
    scores = evaluate(small, split)
    return {
        **scores,
        "before_cut": before,
        "start": begin,
        "params": count_params(small),
        "epochs": variant.epochs,
        "steps": total,
        "train_loss": loss,
        "seconds": round(seconds, 1),
    }


def _pull(
    task: Task,
    variant: Variant,
    model: nn.Module,
    plan: arp_hub.RankPlan,
    total: int,
    factors: dict[str, Factors] | None,
) -> Pull:
    if variant.minrank:
        rule, _, scheduled = variant.minrank.partition(", ")
        return MinRank(model, task.minrank_plan(rule), total, bool(scheduled))
    if variant.penalty is None:
        return Nothing()
    if variant.pull is Replanned:
        return Replanned(model, plan, task.keep, task.images, total)
    penalty = variant.penalty(
        model,
        plan,
        total_steps=total,
        ramp=variant.ramp,
        every=variant.every,
        factors=factors,
    )
    return variant.pull(penalty)


def train(task: Task, variant: Variant, model: nn.Module, pull: Pull, total: int) -> float:
    """Train all epochs; returns the mean loss of the last 50 steps."""
    optimizer = create_optimizer_v2(model, opt="sgd", lr=variant.lr, weight_decay=1e-4, momentum=0.9)
    optimizer = pull.optimizer(optimizer)
    schedule = CosineLRScheduler(optimizer, t_initial=total, t_in_epochs=False)
    model.train()
    losses, guides = [], []
    epochs = chain.from_iterable(task.batches(variant.seed + epoch) for epoch in range(variant.epochs))
    for step, (images, labels, guide) in enumerate(epochs):
        if step == total:
            break
        schedule.step_update(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=variant.bf16):
            logits = model(images)
        logits = logits.float()
        soft = F.kl_div(
            F.log_softmax(logits / HEAT, 1), F.log_softmax(guide / HEAT, 1), reduction="batchmean", log_target=True
        )
        loss = (1 - variant.distill) * F.cross_entropy(logits, labels) + variant.distill * HEAT**2 * soft
        optimizer.zero_grad()
        loss.backward()
        pull.before(step)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        pull.after(step)
        losses.append(loss.item())
        guides.append(guide)
    for epoch in range(total // task.steps):
        task.keep_guide(variant.seed + epoch, guides[epoch * task.steps :][: task.steps])
    return round(sum(losses[-50:]) / len(losses[-50:]), 4)


HEAD = """# Ablations

Written by `python -m benchmarks.penalty.ablations table`; reproduce a row with
`OMP_NUM_THREADS=1 python -m benchmarks.penalty.ablations run ROW --again --shared ../shared`.

ResNet-20 on CIFAR-10 from one trained checkpoint (91.73). In every row: one epoch of the same batches, SGD with
momentum 0.9 from a rate of 0.03 along a cosine, distillation 0.9 at temperature 4, gradients clipped at 5, the same
plan, and no fine-tuning after the cut, unless its name says otherwise. Top-1 is that of the last epoch on the 10,000
test images; no choice depends on it. The rows `dense-dual` and `dense-output-metric` belong to modes of the penalty
that lost: they are recorded here, and their code has been removed.
"""

RETIRED = ("dense-dual", "dense-output-metric")
"""Variants whose results are kept although their code has been removed."""


def page(results: dict[str, Any]) -> str:
    """The text of docs/research/ablations.md."""
    parts = [HEAD]
    for keep in (0.35, 0.2):
        names = (f"{keep}/{variant}" for variant in (*VARIANTS, *RETIRED))
        rows = {name: results[name] for name in names if name in results}
        starts = {name: VARIANTS[ROWS[name][1]].start for name in rows if name in ROWS}
        parts.append(f"## {100 * (1 - keep):.0f} % of the parameters removed\n")
        fits = {f"{row['start']:.2f}" for name, row in rows.items() if starts.get(name) == "fit"}
        parts.append(f"The fit that some rows start from: {', '.join(sorted(fits))}.\n")
        parts.append("| row | what | top-1 before the cut | after it | seconds |\n|---|---|---|---|---|")
        for name, row in rows.items():
            numbers = f"{row['before_cut']:.2f} | {row['top1']:.2f} | {row['seconds']:.0f}"
            start = f", from {row['start']:.2f}" if starts.get(name) == "kept" else ""
            what = VARIANTS[ROWS[name][1]].what if name in ROWS else row["what"]
            parts.append(f"| `{name}` | {what}{start} | {numbers} |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
