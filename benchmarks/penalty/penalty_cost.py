"""Time that the penalty adds to a training step, compared with a nuclear norm by full SVDs.

    OMP_NUM_THREADS=1 python -m benchmarks.penalty.penalty_cost cifar_resnet20 --batch-size 128
    OMP_NUM_THREADS=1 python -m benchmarks.penalty.penalty_cost resnet50 --batch-size 8
    OMP_NUM_THREADS=1 python -m benchmarks.penalty.penalty_cost vit_large_patch16_224 --batch-size 1 --seconds 1 --alone
    python -m benchmarks.penalty.penalty_cost resnet50 --batch-size 256 --device cuda --bf16 --alone

The step and the penalties take turns in one run; times are medians of CPU seconds on one thread. torchao's nuclear norm
is included if torchao is installed. Every k x k layer is `cp` and every other layer `channel`, at 45 % of their
weights. On a GPU, blocks of steps with and without a pull at their end take turns. (A pull timed alone would count its
kernel launches, which in training overlap with work on the GPU.) Rows of other models and devices in
results/penalty_cost.json are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable

import timm
import torch
from torch import nn

import arp_hub
from arp_hub._utils.environment import environment
from arp_hub.layers.dense import refusal
from arp_hub.layers.low_rank import layer_shape
from arp_hub.layers.model import weight_layers
from arp_hub.layers.trace import input_size_of
from arp_hub.planning.costs import rank_at
from arp_hub.schemes import make_scheme
from arp_hub.timing import Spread, paired_ratio, take_turns
from benchmarks.rows import replace_row, results_file

RESULTS = results_file("penalty_cost")
SHARE = 0.45


def plan_of(model: nn.Module, schemes: tuple[str, str]) -> arp_hub.RankPlan:
    """A plan for all but the first layer and the classifier: k x k layers by the first scheme, others by the second."""
    plans = {}
    for name, layer in weight_layers(model):
        if refusal(layer) is None and name not in ("conv1", "fc"):
            shape = layer_shape(layer)
            scheme = make_scheme(schemes[0] if shape.taps > 1 else schemes[1], shape)
            plans[name] = arp_hub.LayerPlan(scheme.name, rank_at(scheme, SHARE))
    return arp_hub.RankPlan(plans)


def main() -> None:
    """Measure one model and write its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="timm name")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--every", type=int, default=32, help="steps from one pull to the next")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long to measure")
    parser.add_argument(
        "--alone", action="store_true", help="skip the other penalties, which take minutes on large models"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="forward passes in bfloat16, channels last")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = timm.create_model(args.model).to(device)
    plan = plan_of(model, ("cp", "channel"))
    layout = torch.channels_last if args.bf16 else torch.contiguous_format
    model = model.to(memory_format=layout)
    images = torch.randn(args.batch_size, *input_size_of(model), device=device).to(memory_format=layout)
    labels = torch.randint(model.num_classes, (args.batch_size,), device=device)
    trained, pulled = model.train(), copy.deepcopy(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01, momentum=0.9)
    penalty = arp_hub.AdaptiveRankPenalty(pulled, plan, total_steps=10**6, ramp=0.9, every=1)
    weights = [pulled.get_submodule(name).weight.detach().flatten(1) for name in plan.layers]

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss = nn.functional.cross_entropy(trained(images), labels)
        loss.backward()
        optimizer.step()

    def nuclear_norm() -> None:
        for weight in weights:
            u, _, v = torch.linalg.svd(weight, full_matrices=False)
            u @ v  # the gradient

    rivals: dict[str, Callable[[], object]] = {}
    if not args.alone:
        rivals = {"nuclear": nuclear_norm, **torchao_steps(copy.deepcopy(model), list(plan.layers))}
    samples = take_turns({"step": step, "pull": penalty.step, **rivals}, device, args.seconds)
    spread = {name: Spread.of(times) for name, times in samples.items()}
    amortised = spread["pull"].median / args.every
    in_training = {} if device.type == "cpu" else share_in_training(trained, plan, step, args.every, args.seconds)
    bases = sum(part.nbytes for stack in penalty._stacks for part in stack.basis or ())
    row = {
        **environment(),
        "model": args.model,
        "seed": 0,
        "device": device.type,
        "bf16": args.bf16,
        "batch_size": args.batch_size,
        "every": args.every,
        "params": sum(p.numel() for p in model.parameters()),
        "seconds": {name: one.to_dict() for name, one in spread.items()},
        "rounds": len(samples["step"]),
        "amortised_seconds": round(amortised, 5),
        "penalty_share_of_step": round(amortised / spread["step"].median, 4),
        "nuclear_norm_share_of_step": share(spread, "nuclear"),
        "torchao_share_of_step": share(spread, "torchao", without="sgd"),
        "min_rank_share_of_step": share(spread, "min_rank", without="sgd"),
        "bases_share_of_weights": round(bases / sum(weight.nbytes for weight in weights), 4),
        "energy_gap": None if args.alone else captured(args.model, args.every, device),
        **in_training,
    }
    print(json.dumps({key: row[key] for key in list(row)[3:]}, indent=1))
    replace_row(RESULTS, row, same=("model", "device"))


def share_in_training(
    model: nn.Module, plan: arp_hub.RankPlan, step: Callable[[], None], every: int, seconds: float
) -> dict[str, float]:
    """Time of training steps on a GPU with the penalty, over the time without it."""
    penalty = arp_hub.AdaptiveRankPenalty(model, plan, total_steps=10**6, ramp=0.9, every=1)

    def steps() -> None:
        for _ in range(every):
            step()

    def steps_and_pull() -> None:
        steps()
        penalty.step()

    device = next(model.parameters()).device
    penalty.step()  # the first pull computes the factors from scratch
    samples = take_turns({"plain": steps, "with": steps_and_pull}, device, seconds)
    ratio = paired_ratio(samples["with"], samples["plain"]).to_dict()
    torch.cuda.set_sync_debug_mode("error")  # raises where the host waits for the GPU
    try:
        penalty.step()
        waits = False
    except RuntimeError:
        waits = True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"ratio_in_training": ratio, "waits_for_the_gpu": waits}


def torchao_steps(model: nn.Module, names: list[str]) -> dict[str, Callable[[], object]]:
    """Optimiser steps with torchao's penalties (prototype/pat), and without one; none without torchao.

    They are the proximal nuclear norm, and `MinRankConstraint` at half of each layer's rank.
    """
    try:
        from torchao.prototype.pat.optim import PruneOptimizer
    except ImportError:
        return {}
    rules: dict[str, dict[str, object]] = {
        "torchao": {"group_type": "SVDGrouper", "prox_type": "ProxNuclearNorm", "reg_lambda": 1e-6},
        "min_rank": {"group_type": "SVDGrouper", "prox_type": "MinRankConstraint", "min_sparsity": 0.5},
        "sgd": {},
    }
    steps: dict[str, Callable[[], object]] = {}
    for name, rule in rules.items():
        weights = [nn.Parameter(model.get_submodule(layer).weight.detach().clone()) for layer in names]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        plain = torch.optim.SGD([{"params": weights, **rule}], lr=0.01, momentum=0.9)
        steps[name] = (PruneOptimizer(plain) if rule else plain).step
    return steps


def share(spread: dict[str, Spread], rival: str, without: str = "") -> float | None:
    """Time of a rival over that of a training step, less the time ``without`` it; None if it was not timed."""
    if rival not in spread:
        return None
    less = spread[without].median if without else 0.0
    return round((spread[rival].median - less) / spread["step"].median, 4)


def captured(name: str, every: int, device: torch.device, steps: int = 20) -> float:
    """The largest share of a layer's captured energy that warm-started bases lose against exact ones, after some steps.

    Each step moves the weights at random by 0.1 % of their norm, about as much as training does.
    """
    torch.manual_seed(0)
    model = timm.create_model(name).to(device)
    plan = plan_of(model, ("channel", "channel"))
    penalty = arp_hub.AdaptiveRankPenalty(model, plan, total_steps=10**6, ramp=0.99, every=every)
    layers = {name: model.get_submodule(name).weight for name in plan.layers}
    for _ in range(steps):
        penalty.step()
        for weight in layers.values():
            noise = torch.randn_like(weight)
            weight.data += 1e-3 * weight.data.norm() / noise.norm() * noise
    gaps = []
    for stack in penalty._stacks:
        weight, rank = stack.dense_weights(), stack.layers[0].rank
        exact = torch.linalg.svdvals(stack.scheme.fold(weight))[:, :rank].square().sum(1)
        start = tuple(part.float() for part in stack.basis or ())
        kept = stack.scheme.compose(stack.scheme.nearest(weight, rank, start=start))
        kept = kept.view(len(exact), -1).square().sum(1)
        gaps.append(float(((exact - kept) / exact).max()))
    return round(max(gaps), 6)


if __name__ == "__main__":
    main()
