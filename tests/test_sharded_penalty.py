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


def network() -> tuple[nn.Module, arp_hub.RankPlan]:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=10, img_size=32, patch_size=16)
    return model, make_plan(model, keep_params=0.5, schemes=["channel", "group_out"])


def train(model: nn.Module, penalty: AdaptiveRankPenalty, rank: int, world: int) -> dict[str, float]:
    """Train on this process's share of each batch. Returns the violations halfway."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    halfway: dict[str, float] = {}
    for step in range(STEPS):
        torch.manual_seed(step)
        images, labels = torch.randn(8, 3, 32, 32)[rank::world], torch.randint(10, (8,))[rank::world]
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        penalty.step()
        if step == STEPS // 2:
            halfway = penalty.violations()
    return halfway


def work(rank: int, world: int, folder: Path) -> None:
    """One process: the model is sharded before the penalty is built, or afterwards."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
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
    for order in ("before", "after"):
        model, plan = network()
        if order == "before":
            shard(model)
        penalty = AdaptiveRankPenalty(model, plan, total_steps=STEPS, ramp=0.6, every=4)
        if order == "after":
            shard(model)
        violations = train(model, penalty, rank, world)
        factors = penalty.factors()
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        saved = {"violations": violations, "factors": factors, "state": state, "penalty": penalty.state_dict()}
        found[order] = {**saved, "errors": errors(model, plan, penalty)}
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


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("sharded")
    code = "import sys, pathlib, test_sharded_penalty as t; t.work(int(sys.argv[1]), 2, pathlib.Path(sys.argv[2]))"
    command = [sys.executable, "-c", code]
    workers = [
        subprocess.Popen([*command, str(rank), str(folder)], cwd=Path(__file__).parent, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    failures = [worker.communicate(timeout=300)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], failures
    return torch.load(folder / "found.pt", weights_only=False)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    model, plan = network()
    penalty = AdaptiveRankPenalty(model, plan, total_steps=STEPS, ramp=0.6, every=4)
    violations = train(model, penalty, 0, 1)
    return {"violations": violations, "factors": penalty.factors(), "state": model.state_dict(), "plan": plan}


@pytest.mark.parametrize("order", ["before", "after"])
def test_sharded_training_ends_where_one_process_ends(order, sharded, alone):
    found = sharded[order]
    assert found["state"].keys() == alone["state"].keys()
    for name, tensor in alone["state"].items():
        torch.testing.assert_close(found["state"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert found["violations"] == pytest.approx(alone["violations"], rel=1e-2)
    assert min(found["violations"].values()) > 1e-6  # the ramp has not ended: there is something to compare


def test_the_gathered_model_is_exactly_low_rank(sharded, alone):
    model, plan = network()
    found = sharded["after"]
    model.load_state_dict(found["state"])
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        dense = model.eval()(images)
        small = decompose(copy.deepcopy(model), plan, factors=found["factors"])(images)
    torch.testing.assert_close(small, dense, rtol=1e-4, atol=1e-5)


def test_the_state_loads_in_one_process(sharded):
    model, plan = network()
    model.load_state_dict(sharded["before"]["state"])
    penalty = AdaptiveRankPenalty(model, plan, total_steps=STEPS, ramp=0.6, every=4)
    penalty.load_state_dict(sharded["before"]["penalty"])
    assert penalty.phase == "done"
    assert max(penalty.violations().values()) < 1e-9


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
