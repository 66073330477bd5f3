"""A model in training mode: what plans, fits, measures or writes it gives the same result and leaves it alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from arp_hub import Workload, benchmark, decompose, export, make_plan, refine, save_pretrained, to_dense
from arp_hub.reports.spectra import decays

SIZE = (3, 32, 32)
IMAGES = torch.randn(20, *SIZE, generator=torch.Generator().manual_seed(0))


def network(low_rank: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, drop_rate=0.5, drop_path_rate=0.5).eval()
    return decompose(model, make_plan(model, keep_params=0.6, schemes=["channel"])) if low_rank else model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def plan(model: nn.Module, folder: Path) -> Any:
    return make_plan(model, keep_params=0.6, schemes=["channel"], calibration=IMAGES, effort="fast").to_json()


def plan_by_batches(model: nn.Module, folder: Path) -> Any:
    batches = [IMAGES[:1], IMAGES[1:]]
    return make_plan(model, keep_params=0.6, schemes=["channel"], calibration=batches, effort="fast").to_json()


def file(model: nn.Module, folder: Path) -> Any:
    done = export(model, folder / "out", format="torch-export", test_images=IMAGES, input_size=SIZE, seconds=0)
    return done.parity.agreement


def saved(model: nn.Module, folder: Path) -> Any:
    save_pretrained(model, folder / "saved")
    return (folder / "saved" / "model.safetensors").read_bytes()


def refined(model: nn.Module, folder: Path) -> Any:
    small = copy.deepcopy(network(low_rank=True)).train(model.training)
    refine(small, model, IMAGES, steps=2, batch_size=4)
    return state(small)


LEAVE_ALONE: dict[str, Callable[[nn.Module, Path], Any]] = {
    "make_plan": plan,
    "make_plan, one image first": plan_by_batches,
    "benchmark": lambda model, folder: benchmark(model, Workload(2), input_size=SIZE, seconds=0.1).to_dict().keys(),
    "export": file,
    "refine, as the dense model": refined,
    "save_pretrained": saved,
    "spectra": lambda model, folder: decays(model, make_plan(model, keep_params=0.6, schemes=["channel"])),
}


@pytest.mark.parametrize("call", LEAVE_ALONE)
def test_training_mode_changes_nothing(call: str, tmp_path: Path) -> None:
    model, found = network(), {}
    before = state(model)
    for mode in (False, True):
        (tmp_path / f"{mode}").mkdir()
        found[mode] = LEAVE_ALONE[call](model.train(mode), tmp_path / f"{mode}")
        assert all(module.training == mode for module in model.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    same(found[True], found[False])


CHANGE: dict[str, Callable[[nn.Module], object]] = {
    "decompose": lambda model: decompose(model, make_plan(network(), keep_params=0.6, schemes=["channel"])),
    "decompose by images": lambda model: decompose(
        model, make_plan(network(), keep_params=0.6, schemes=["channel"]), IMAGES, effort="fast"
    ),
    "to_dense": to_dense,
}


@pytest.mark.parametrize("call", CHANGE)
def test_training_mode_gives_the_same_model(call: str) -> None:
    found = {}
    for mode in (False, True):
        model = network(low_rank=call == "to_dense").train(mode)
        CHANGE[call](model)
        assert all(module.training == mode for module in model.modules())
        found[mode] = state(model)
    same(found[True], found[False])


def same(found: Any, expected: Any) -> None:
    """Compare tensors bit for bit, and anything else as it is."""
    if isinstance(found, dict) and found and isinstance(next(iter(found.values())), Tensor):
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    else:
        assert found == expected
