"""Training resumes to the same weights, bit for bit, with every optimiser of timm."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import timm.optim
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from arp_hub import AdaptiveRankPenalty, LayerPlan, RankPlan, training
from arp_hub.errors import ArpHubError
from arp_hub.training import TrainConfig, load_data
from arp_hub.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from arp_hub.training.loop import train
from arp_hub.training.phases import Phase, Run

STEPS = 3
PLAN = RankPlan({"0": LayerPlan("channel", 2), "5": LayerPlan("channel", 3)})
SKIPPED = {
    "bnb": "needs bitsandbytes",
    "fused": "needs apex and a GPU",
    "adahessian": "needs second derivatives, which a run refuses",
}
"""Optimisers that are not tried, by the beginning of their names."""
OPTIMIZERS = [
    pytest.param(name, marks=[pytest.mark.skip(reason=why) for start, why in SKIPPED.items() if name.startswith(start)])
    for name in timm.optim.list_optimizers()
]


@pytest.fixture(scope="module")
def data():
    return load_data("digits", timm.create_model("cifar_resnet20", num_classes=10))


def network() -> nn.Sequential:
    """A convolution, a BatchNorm and two linear layers, of which a plan decomposes two."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10),
    )  # fmt: skip


def trained(config: TrainConfig, data: Any, start: Checkpoint | None = None) -> dict[str, Tensor]:
    """The weights and their moving average after a phase with the penalty."""
    log = SimpleNamespace(
        bar=lambda *_: SimpleNamespace(close=lambda: None, update=lambda: None, set_postfix=lambda _: None),
        track=lambda *_: None, epoch=lambda _: None,
    )  # fmt: skip
    model = network()
    penalty = AdaptiveRankPenalty(model, PLAN, total_steps=STEPS, ramp=0.5)
    if start:
        model.load_state_dict(start.state["model"])
        penalty.load_state_dict(start.state["penalty"])
    run = Run(config, Accelerator(cpu=True), data, log, {}, scores={"dense": {}})  # checkpoints have its scores
    average = train(run, Phase("compress", model, 1, config.lr, penalty=penalty), start)
    assert average is not None
    return {**model.state_dict(), **{f"average.{name}": value for name, value in average.state_dict().items()}}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Save the time that a disk takes."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ("adahessian", "needs second derivatives"),
        ("bnbadamw8bit", "cannot be used here"),
        ("fusedlamb", "cannot be used here"),
    ],
)
def test_an_optimizer_that_cannot_train_is_refused_before_any_work(tmp_path, optimizer, words):
    config = TrainConfig(
        model="cifar_resnet20", data="nothing", keep_params=0.5, output=str(tmp_path / "out"), optimizer=optimizer,
        cpu=True, tracker="none",
    )  # fmt: skip
    with pytest.raises(ArpHubError, match=f"optimizer '{optimizer}' {words}.*choose another"):
        training.run(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_resumes_from_every_checkpoint(tmp_path, data, optimizer):
    config = TrainConfig(
        model="cifar_resnet20", keep_params=0.5, output=str(tmp_path / "out"), optimizer=optimizer, lr=1e-3,
        batch_size=8, max_steps=STEPS, checkpoint_every=1, keep_checkpoints=99, ema_decay=0.9, cpu=True,
    )  # fmt: skip
    before = trained(config, data)
    assert not torch.equal(before["7.weight"], network()[7].weight)
    assert all(value.isfinite().all() for value in before.values())
    kept = tmp_path / "kept"
    (config.run_folder / "checkpoints").rename(kept)
    checkpoints = list_checkpoints(kept)
    assert len(checkpoints) == STEPS + 1
    for checkpoint in checkpoints:
        after = trained(config, data, load_checkpoint(checkpoint))
        different = [name for name in before if not torch.equal(before[name], after[name])]
        assert different == [], checkpoint
