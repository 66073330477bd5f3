"""The penalty on weights that FSDP2 shards: two processes on a CPU end where one process ends."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn

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


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gathered weights, in every process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def work(rank: int, world: int, folder: Path, orders: tuple[str, ...], start: Path | None) -> None:
    """One process.

    Args:
        rank: Its number.
        world: Number of all processes.
        folder: Where the first process stores what it found.
        orders: When to build the penalty: "before" or "after" sharding.
        start: What other processes found. The second half of their training is repeated.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{folder / 'store'}")
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
        train(model, penalty, rank, world, SECOND)
        saved = {"factors": penalty.factors(), "state": whole_state(model), "penalty": penalty.state_dict()}
        found[order] = {**saved, "half": half, "errors": errors(model, plan, penalty)}
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


def errors(model: nn.Module, plan: arp_hub.RankPlan, penalty: AdaptiveRankPenalty) -> dict[str, str]:
    """What calls that need whole weights say of a sharded model, and a pull while weights are gathered."""
    calls = {
        "decompose": lambda: decompose(model, plan),
        "make_plan": lambda: make_plan(model, keep_params=0.5),
        "low_rank_copy": lambda: penalty.low_rank_copy(model),
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


def by_processes(world: int, folder: Path, orders: tuple[str, ...], start: Path | None = None) -> dict[str, Any]:
    """What some processes found."""
    work = "t.work(rank, {world}, pathlib.Path({folder!r}), {orders!r}, {start!r})"
    call = work.format(world=world, folder=str(folder), orders=orders, start=str(start) if start else None)
    code = f"import sys, pathlib, test_sharded_penalty as t; rank = int(sys.argv[1]); {call}"
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], cwd=Path(__file__).parent, stderr=subprocess.PIPE)
        for rank in range(world)
    ]
    failures = [worker.communicate(timeout=300)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * world, failures
    return torch.load(folder / "found.pt", weights_only=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def sharded(folder: Path) -> dict[str, Any]:
    """What two processes found."""
    return by_processes(2, folder, ("before", "after"))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    model, plan = network()
    penalty = AdaptiveRankPenalty(model, plan, total_steps=STEPS, ramp=0.6, every=4)
    violations = train(model, penalty, 0, 1, FIRST)
    train(model, penalty, 0, 1, SECOND)
    return {"violations": violations, "factors": penalty.factors(), "state": model.state_dict(), "plan": plan}


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
def test_three_processes_continue_the_training_of_two(folder, sharded, tmp_path):
    found = by_processes(3, tmp_path, ("before",), folder / "found.pt")
    check_same(sharded["before"]["state"], found["before"]["state"])


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
