"""The penalty on weights that FSDP2 shards: two processes on a CPU end where one process ends."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
import torch.distributed as dist
from several_processes import by_group
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile

import arp_hub
from arp_hub import AdaptiveRankPenalty, ArpHubError, decompose, make_plan

STEPS = 40
FIRST, SECOND = range(STEPS // 2), range(STEPS // 2, STEPS)


def network() -> tuple[nn.Module, arp_hub.RankPlan]:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=10, img_size=32, patch_size=16)
    return model, make_plan(model, keep_params=0.5, schemes=["channel", "group_out"])


def train(model: nn.Module, penalty: AdaptiveRankPenalty, rank: int, world: int, steps: range) -> dict[str, float]:
    """Train on this process's share of each batch. Returns the violations at the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in steps:
        torch.manual_seed(step)
        images, labels = torch.randn(12, 3, 32, 32)[rank::world], torch.randint(10, (12,))[rank::world]
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        penalty.step()
    return penalty.violations()


def factorisations(penalty: AdaptiveRankPenalty) -> int:
    """How many factorisations this process does to measure the violations."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        penalty.violations()
    return sum(event.count for event in seen.key_averages() if event.key.startswith("aten::linalg_"))


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gathered weights, in every process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def trained(orders: tuple[str, ...], start: Path | None) -> dict[str, Any]:
    """What a process of a group finds in training a sharded model.

    Args:
        orders: When to build the penalty: "before" or "after" sharding.
        start: A file of what other processes found. The second half of their training is repeated.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))

    def shard(model: nn.Module) -> None:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    found: dict[str, Any] = {}
    for order in orders:
        model, plan = network()
        half = torch.load(start, weights_only=False)[order]["half"] if start else None
        if half:
            model.load_state_dict(half["state"])
        if order == "after":
            shard(model)
        penalty = AdaptiveRankPenalty(model, plan, total_steps=STEPS, ramp=0.6, every=4)
        if order == "before":
            shard(model)
        if half:
            penalty.load_state_dict(half["penalty"])
        else:
            violations = train(model, penalty, rank, world, FIRST)
            state = {name: value.clone() for name, value in whole_state(model).items()}
            half = {"violations": violations, "state": state, "penalty": penalty.state_dict()}
            half["factorisations"] = factorisations(penalty)
        train(model, penalty, rank, world, SECOND)
        saved = {"factors": penalty.factors(), "state": whole_state(model), "penalty": penalty.state_dict()}
        found[order] = {**saved, "half": half, "errors": errors(model, plan, penalty)}
    return found


def fails_in_second(call: Callable[[], object]) -> None:
    """Make a call with factorisations that fail in the second process."""
    wrong = patch("torch.linalg.solve_triangular", side_effect=torch.linalg.LinAlgError("not converged"))
    with wrong if dist.get_rank() == 1 else nullcontext():
        call()


def errors(model: nn.Module, plan: arp_hub.RankPlan, penalty: AdaptiveRankPenalty) -> dict[str, str]:
    """What calls that need whole weights say of a sharded model, and a pull while weights are gathered."""
    calls = {
        "decompose": lambda: decompose(model, plan),
        "make_plan": lambda: make_plan(model, keep_params=0.5),
        "low_rank_copy": lambda: penalty.low_rank_copy(model),
        "factorisation": lambda: fails_in_second(penalty.violations),
        "pull": penalty.violations,
    }
    messages = {}
    for name, call in calls.items():
        if name == "pull":
            for block in model.blocks:
                block.unshard()
        try:
            call()
        except ArpHubError as error:
            messages[name] = str(error)
    return messages


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    return by_group(functools.partial(trained, ("before", "after"), None), 2, folder)


@pytest.fixture(scope="module")
def sharded(both: list[dict[str, Any]]) -> dict[str, Any]:
    """What the first of two processes found."""
    return both[0]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    model, plan = network()
    penalty = AdaptiveRankPenalty(model, plan, total_steps=STEPS, ramp=0.6, every=4)
    violations, count = train(model, penalty, 0, 1, FIRST), factorisations(penalty)
    train(model, penalty, 0, 1, SECOND)
    return {
        "violations": violations,
        "factorisations": count,
        "factors": penalty.factors(),
        "state": model.state_dict(),
        "plan": plan,
    }


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}"
        )


@pytest.mark.parametrize("order", ["before", "after"])
def test_sharded_training_ends_where_one_process_ends(order, sharded, alone):
    check_same(sharded[order]["state"], alone["state"])
    found = sharded[order]["half"]["violations"]
    assert found == pytest.approx(alone["violations"], rel=1e-3)
    assert min(found.values()) > 1e-6  # the ramp has not ended: there is something to compare


def test_processes_share_the_factorisations(both, alone):
    counts = [one["before"]["half"]["factorisations"] for one in both]
    assert sum(counts) == alone["factorisations"]
    assert min(counts) > alone["factorisations"] / 3


@pytest.mark.parametrize("order", ["before", "after"])
def test_violations_are_those_of_the_gathered_weights(order, sharded):
    model, plan = network()
    half = sharded[order]["half"]
    model.load_state_dict(half["state"])
    penalty = AdaptiveRankPenalty(model, plan, total_steps=STEPS, ramp=0.6, every=4)
    penalty.load_state_dict(half["penalty"])
    assert penalty.violations() == pytest.approx(half["violations"], rel=1e-5)


def test_the_gathered_model_is_exactly_low_rank(sharded, alone):
    model, plan = network()
    found = sharded["after"]
    model.load_state_dict(found["state"])
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        dense = model.eval()(images)
        small = decompose(copy.deepcopy(model), plan, factors=found["factors"])(images)
    torch.testing.assert_close(small, dense, rtol=1e-4, atol=1e-5)


def test_one_process_continues_the_training_of_two(sharded):
    model, plan = network()
    half = sharded["before"]["half"]
    model.load_state_dict(half["state"])
    penalty = AdaptiveRankPenalty(model, plan, total_steps=STEPS, ramp=0.6, every=4)
    penalty.load_state_dict(half["penalty"])
    assert max(train(model, penalty, 0, 1, SECOND).values()) < 1e-9
    check_same(sharded["before"]["state"], model.state_dict())


@pytest.mark.slow
def test_three_processes_continue_the_training_of_two(sharded, tmp_path):
    torch.save(sharded, tmp_path / "two.pt")
    found = by_group(functools.partial(trained, ("before",), tmp_path / "two.pt"), 3, tmp_path / "run")
    check_same(sharded["before"]["state"], found[0]["before"]["state"])


def test_a_factorisation_that_fails_in_one_process_ends_all(both):
    first, second = (one["before"]["errors"]["factorisation"] for one in both)
    assert re.fullmatch(r"layer '\S+': its factorisation failed in process 1, whose message says why", first)
    assert re.match(r"layer '\S+' cannot be factorised, .*not converged", second)


@pytest.mark.parametrize(
    "call, message",
    [
        ("decompose", r"parameter '.*' is sharded over processes \(FSDP2\): gather the weights"),
        ("make_plan", r"parameter '.*' is sharded over processes"),
        ("low_rank_copy", r"parameter '.*' is sharded over processes"),
        ("pull", r"its weight is gathered at the moment.*model.reshard\(\)"),
    ],
)
def test_what_needs_whole_weights_refuses_shards(call, message, sharded):
    assert re.search(message, sharded["before"]["errors"][call])
