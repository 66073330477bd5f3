"""Refinement brings a decomposed model closer to its dense model, and never farther away."""

from __future__ import annotations

import copy
import dataclasses
import errno
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from several_processes import by_group
from torch import Tensor, nn

from arp_hub import ArpHubError, LayerPlan, RankPlan, decompose, make_plan, refine
from arp_hub.layers.model import low_rank_layers
from arp_hub.refinement.losses import block_error
from arp_hub.refinement.steps import Steps, _augmentation
from arp_hub.training import calibration_images, load_data, refinement_images


def pixels(count: int, side: int = 32, seed: int = 1) -> Tensor:
    """Smooth random images: each is a few waves."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")


class Unchained(nn.Module):
    """Two branches: not one module takes the output of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 24, 5), nn.Conv2d(3, 24, 5)
        self.head = nn.Linear(48, 10)
        self.num_classes = 10

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.cat([self.left(x).relu().mean((2, 3)), self.right(x).relu().amax((2, 3))], 1)
        return self.head(maps)


def pair(kind: str, keep: float = 0.4) -> tuple[nn.Module, nn.Module, Tensor]:
    """A decomposed model, its dense model, and images."""
    torch.manual_seed(0)
    side = 32
    if kind == "unchained":
        dense: nn.Module = Unchained()
    elif kind == "features":
        dense = timm.create_model("test_resnet", num_classes=0)
    elif kind == "windows":
        side, options = 64, {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 1, 1, 1)}
        dense = timm.create_model("swin_tiny_patch4_window7_224", num_heads=(1, 1, 2, 2), num_classes=10, **options)
    elif kind == "vit":
        side, dense = 64, timm.create_model("test_vit", num_classes=10, img_size=64)
    else:
        dense = timm.create_model("test_resnet", num_classes=10)
    images = pixels(60, side)
    with torch.no_grad():  # random classifiers hardly tell images apart
        for parameter in (dense.head if kind == "unchained" else dense.get_classifier()).parameters():
            parameter.mul_(10)
    plan = make_plan(dense, keep_params=keep, schemes=["channel"], input_size=(3, side, side))
    return decompose(copy.deepcopy(dense), plan), dense, images


@pytest.mark.parametrize("kind", ["resnet", "vit", "windows", "features", "unchained"])
def test_all_kinds_of_models_get_closer(kind):
    model, dense, images = pair(kind)
    before = copy.deepcopy(dense.state_dict())
    fixed = {name: tensor.clone() for name, tensor in model.named_buffers()}
    model.train()
    with torch.no_grad():
        wanted, given = (one.eval()(images) for one in (dense, copy.deepcopy(model)))
    found = refine(model, dense.train(), images, steps=40, batch_size=8)
    assert (found.images, found.held_out, found.steps) == (54, 6, 40)
    assert found.after < 0.9 * found.before
    assert model.training and dense.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert all(torch.equal(tensor, fixed[name]) for name, tensor in model.named_buffers())
    with torch.no_grad():
        closer = model.eval()(images)
    assert (closer - wanted).square().mean() < (given - wanted).square().mean()


def checkpointing(model: nn.Module) -> nn.Module:
    model.set_grad_checkpointing()
    return model


FORMS: dict[str, tuple[str, Callable[[nn.Module], nn.Module], Callable[[Tensor], Tensor]]] = {
    "half images": ("resnet", lambda model: model, Tensor.half),
    "double images": ("resnet", lambda model: model, Tensor.double),
    "channels last": ("resnet", lambda model: model.to(memory_format=torch.channels_last), lambda x: x),
    "ResNet with checkpoints of gradients": ("resnet", checkpointing, lambda x: x),
    "ViT with checkpoints of gradients": ("vit", checkpointing, lambda x: x),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_models_and_images(form):
    kind, change, convert = FORMS[form]
    model, dense, images = pair(kind)
    model, dense = change(model), change(dense)
    found = refine(model, dense, convert(images), steps=40, batch_size=8)
    assert found.after < 0.9 * found.before
    flags = [module.grad_checkpointing for module in model.modules() if hasattr(module, "grad_checkpointing")]
    assert all(flags) == (change is checkpointing)


def test_random_numbers_of_the_caller_are_its_own(monkeypatch):
    """On every device: torch.manual_seed would seed GPUs as well."""
    model, dense, images = pair("resnet")
    monkeypatch.setattr(torch, "manual_seed", pytest.fail)
    before = torch.random.get_rng_state()
    refine(model, dense, images, steps=2)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("size", [(8, 64), (64, 8), (1, 32), (32, 32)], ids=str)
def test_small_images_of_any_shape_are_shifted(size):
    image = torch.randn(3, *size)
    assert _augmentation(size)(image).shape == image.shape


@pytest.mark.parametrize("size", [(128, 512), (512, 128), (96, 96)], ids=str)
def test_crops_keep_the_shape_of_images(size):
    """A column per pixel tells which part of the image a crop has taken."""
    height, width = size
    image = torch.linspace(0, 1, width).expand(3, height, width)
    torch.manual_seed(0)
    crops = [_augmentation(size)(image) for _ in range(50)]
    shares = torch.stack([crop.amax() - crop.amin() for crop in crops])
    assert all(crop.shape == image.shape for crop in crops)
    assert shares.max() > 0.85 and shares.min() > 0.45
    assert torch.stack([crop.amin() for crop in crops]).min() < 0.02


def test_pooled_features_of_one_image_have_no_block_error():
    assert block_error(torch.randn(1, 8), torch.randn(1, 8), -1) == 0
    assert block_error(torch.randn(2, 8), torch.randn(2, 8), -1) > 0


def test_an_interrupted_model_is_not_worse_than_before():
    model, dense, images = pair("resnet")
    held_out, calls = pixels(30, seed=5), 0

    def divergence() -> float:
        with torch.no_grad():
            wanted, given = (one.eval()(held_out).log_softmax(-1) for one in (dense, model))
        return float((wanted.exp() * (wanted - given)).sum(-1).mean())

    weight = next(iter(low_rank_layers(model).values())).factors[0].weight

    def interrupt(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1
        with torch.no_grad():  # as a rate that is too high does
            weight.mul_(1.5)
        if calls == 12:
            raise KeyboardInterrupt

    before = divergence()
    hook = dense.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        refine(model, dense, images, held_out=held_out, steps=40, batch_size=8)
    hook.remove()
    assert divergence() <= before * (1 + 1e-4)


def test_a_trained_network_agrees_more(shared, cifar_train, cifar_test):
    """With real weights, on images that it has not seen."""
    dense = timm.create_model("cifar_resnet20").eval()
    dense.load_state_dict(load_file(shared / "weights/resnet20_cifar10.safetensors"))
    images, (test, _) = cifar_train(200), cifar_test(300)
    plan = make_plan(dense, keep_params=0.3, calibration=images, schemes=["channel"], effort="fast")
    model = decompose(copy.deepcopy(dense), plan, images, effort="fast")

    def divergence() -> float:
        with torch.no_grad():
            wanted, given = dense(test).log_softmax(-1), model.eval()(test).log_softmax(-1)
        return float((wanted.exp() * (wanted - given)).sum(-1).mean())

    before = divergence()
    refine(model, dense, images, steps=50)
    assert divergence() < before


def test_images_held_out_by_the_caller_measure():
    model, dense, images = pair("resnet")
    with torch.no_grad():
        wanted, given = (one.eval()(images[40:]).log_softmax(-1) for one in (dense, model))
    found = refine(model, dense, images[:40], held_out=images[40:].split(6), steps=20, batch_size=8)
    assert (found.images, found.held_out) == (40, 20)
    assert found.before == pytest.approx(float((wanted.exp() * (wanted - given)).sum(-1).mean()), rel=1e-4)
    with torch.no_grad():
        given = model(images[40:]).log_softmax(-1)
    assert found.after == pytest.approx(float((wanted.exp() * (wanted - given)).sum(-1).mean()), rel=1e-4)


@pytest.mark.parametrize(("count", "measure"), [(20, 2), (300, 30), (5000, 143), (None, 143)])
def test_the_fit_has_not_seen_the_images_held_out(count, measure):
    data = load_data("digits", timm.create_model("cifar_resnet20"))
    seen = {image.numpy().tobytes() for image in calibration_images(data, 1024, copies=0, seed=3)}
    learnt, held_out = refinement_images(data, count, seed=3)
    assert len(learnt) + len(held_out) == min(count or 10_000, len(data.train))
    assert len(held_out) == measure
    assert not seen & {image.numpy().tobytes() for image in held_out}


def test_many_images_hold_out_no_more_than_256():
    model, dense, _ = pair("resnet")
    found = refine(model, dense, pixels(2600, side=8), steps=1)
    assert (found.images, found.held_out) == (2344, 256)


def test_measuring_takes_a_small_part_of_a_short_time(monkeypatch):
    """A slow model measures on some of the held-out images, and has no trials of learning rates.

    The clock goes on by the images that the model computes, whatever the machine does.
    """
    model, dense, images = pair("resnet")
    rates, step, computed, cost = [], Steps.step, 0, 0.0025

    def compute(module: nn.Module, args: tuple[Tensor]) -> None:
        nonlocal computed
        computed += len(args[0])

    model.register_forward_pre_hook(compute)
    monkeypatch.setattr(time, "monotonic", lambda: computed * cost)

    def spy(self: Steps, optimizer: torch.optim.Optimizer, rate: float, number: int, by_blocks: bool) -> None:
        rates.append(rate)
        step(self, optimizer, rate, number, by_blocks)

    monkeypatch.setattr(Steps, "step", spy)
    held_out = pixels(40, seed=7)
    slow = copy.deepcopy(model)
    assert refine(model, dense, images, held_out=held_out, minutes=0.1, batch_size=8).held_out == 40
    assert len(rates) > 20 and max(rates) > 5e-5
    rates.clear()
    cost = 0.02
    found = refine(slow, dense, images, held_out=held_out, minutes=0.1, batch_size=8)
    assert found.held_out == 32 and found.after <= found.before
    assert len(rates) > 10 and 1e-5 < max(rates) < 3.1e-5


def test_what_makes_it_worse_is_undone():
    """The decomposed model is exact, so that no step can improve it."""
    torch.manual_seed(0)
    dense = timm.create_model("cifar_resnet20").eval()
    layer = dense.get_submodule("layer3.0.conv2")
    with torch.no_grad():
        layer.weight[32:] = layer.weight[:32]
    plan = RankPlan({"layer3.0.conv2": LayerPlan("channel", 32)}, {})
    model = decompose(copy.deepcopy(dense), plan)
    before = copy.deepcopy(model.state_dict())
    found = refine(model, dense, pixels(40), steps=20)
    assert found.after == found.before < 1e-6
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_frozen_and_dense_weights_stay():
    model, dense, images = pair("resnet")
    model.get_submodule("layer2").requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    refine(model, dense, images, steps=20)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and not any(name.startswith("layer2.") or name == "conv1.0.weight" for name in changed)
    assert not any(p.requires_grad for p in model.get_submodule("layer2").parameters())


@pytest.mark.parametrize("bound", [{"steps": 1}, {"steps": 4}, {"minutes": 1e-6}], ids=str)
def test_too_little_work_for_all_phases_ends(bound):
    model, dense, images = pair("resnet")
    found = refine(model, dense, images, batch_size=8, **bound)
    assert found.after <= found.before and found.steps <= bound.get("steps", 1)


@pytest.fixture
def steps_made(monkeypatch) -> list[tuple[float, bool]]:
    """Rate of each step that is made from now on, and whether blocks learn."""
    made, step = [], Steps.step

    def spy(self: Steps, optimizer: torch.optim.Optimizer, rate: float, number: int, by_blocks: bool) -> None:
        made.append((rate, by_blocks))
        step(self, optimizer, rate, number, by_blocks)

    monkeypatch.setattr(Steps, "step", spy)
    return made


def test_blocks_learn_for_a_fifth_of_the_time(steps_made):
    model, dense, images = pair("resnet")
    refine(model, dense, images, steps=40, batch_size=8)
    assert [by_blocks for _, by_blocks in steps_made] == [True] * 8 + [False] * 32


@pytest.mark.parametrize("steps", [1, 4, 10, 100])
def test_few_steps_are_spent_on_learning_and_not_on_trials_of_rates(steps, steps_made):
    model, dense, images = pair("resnet")
    assert refine(model, dense, images, steps=steps, batch_size=8).steps == steps == len(steps_made)
    assert max(rate for rate, _ in steps_made) <= 3e-5


def test_a_finished_state_gives_the_model_again_until_it_is_deleted(tmp_path):
    model, dense, images = pair("resnet")
    again, state = copy.deepcopy(model), tmp_path / "state.safetensors"
    found = refine(model, dense, images, steps=12, batch_size=8, state=state, keep_state=True)
    assert state.exists()
    with pytest.raises(ArpHubError, match="of a refinement with steps=12, not 13"):
        refine(again, dense, images, steps=13, batch_size=8, state=state)
    second = refine(again, dense, images, steps=12, batch_size=8, state=state)
    assert dataclasses.replace(second, seconds=found.seconds) == found and not state.exists()
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("stop", [8, 40, 53, 150], ids=["trial of rates", "blocks", "second trial", "whole model"])
def test_a_stopped_refinement_goes_on_as_if_it_had_not_been_stopped(stop, tmp_path):
    model, dense, images = pair("resnet")
    whole, state, calls = copy.deepcopy(model), tmp_path / "state.safetensors", 0

    def interrupt(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += dense.training is False and len(args[0]) == 8
        if calls == stop:
            raise KeyboardInterrupt

    refine(whole, dense, images, steps=250, batch_size=8)
    hook = dense.register_forward_pre_hook(interrupt)
    start = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt):
        refine(model, dense, images, steps=250, batch_size=8, state=state)
    hook.remove()
    found = refine(start, dense, images, steps=250, batch_size=8, state=state)
    assert found.steps == 250 and not list(tmp_path.iterdir())
    assert all(torch.equal(one, other) for one, other in zip(start.parameters(), whole.parameters(), strict=True))


REFUSALS: dict[str, tuple[Callable[[nn.Module, nn.Module, Tensor], Any], str]] = {
    "dense": (lambda m, d, x: refine(d, d, x, steps=2), "no low-rank layer to refine"),
    "two decomposed": (lambda m, d, x: refine(m, m, x, steps=2), "`dense` is decomposed itself"),
    "another network": (
        lambda m, d, x: refine(m, timm.create_model("test_vit", img_size=32), x, steps=2),
        "`dense` has no layer 'layer",
    ),
    "few images": (lambda m, d, x: refine(m, d, x[:19], steps=2), "at least 20 images, got 19"),
    "few held out": (
        lambda m, d, x: refine(m, d, x[:30], held_out=x[:1], steps=2),
        "held_out needs at least 2 images to measure on, got 1",
    ),
    "other shape": (lambda m, d, x: refine(m, d, x, held_out=x[..., :16], steps=2), "pass images of one shape"),
    "held-out bytes": (lambda m, d, x: refine(m, d, x, held_out=255 * x.abs(), steps=2), "divide bytes by 255"),
    "both bounds": (lambda m, d, x: refine(m, d, x, steps=2, minutes=1), "minutes or steps, not both"),
    "no step": (lambda m, d, x: refine(m, d, x, steps=0), "steps must be a whole number above 0, got 0"),
    "half a step": (lambda m, d, x: refine(m, d, x, steps=1.5), "steps must be a whole number above 0, got 1.5"),
    "no time": (lambda m, d, x: refine(m, d, x, minutes=float("nan")), "minutes must be a number above 0, got nan"),
    "no batch": (lambda m, d, x: refine(m, d, x, steps=2, batch_size=0), "batch_size must be a whole number above 0"),
    "a part of a batch": (lambda m, d, x: refine(m, d, x, steps=2, batch_size=8.0), "got 8.0"),
    "half": (lambda m, d, x: refine(m.half(), d, x, steps=2), "needs weights in float32, got torch.float16"),
    "bytes": (lambda m, d, x: refine(m, d, 255 * x.abs(), steps=2), "divide bytes by 255"),
    "NaN": (lambda m, d, x: refine(m, d, x.index_fill(0, torch.tensor(7), torch.nan), steps=2), "image 7 holds NaN"),
    "NaN far behind": (
        lambda m, d, x: refine(m, d, x.repeat(5, 1, 1, 1).index_fill(0, torch.tensor(290), torch.nan), steps=2),
        "image 290 holds NaN",
    ),
    "NaN held out": (
        lambda m, d, x: refine(m, d, x, held_out=x.index_fill(0, torch.tensor(3), torch.inf), steps=2),
        "image 3 holds NaN",
    ),
}


def test_predictions_that_are_no_numbers_are_refused():
    model, dense, images = pair("resnet")
    mask = torch.zeros(10).index_fill(0, torch.tensor([3, 7]), -torch.inf)
    for network in (model, dense):
        network.register_forward_hook(lambda module, args, output: output + mask)
    with pytest.raises(ArpHubError, match="the divergence of the predictions is nan, .*take the mask off"):
        refine(model, dense, images, steps=4)


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_before_any_work(case):
    model, dense, images = pair("resnet")
    call, message = REFUSALS[case]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArpHubError, match=message.replace("(", r"\(")):
        call(model, dense, images)
    if case != "half":
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"\xff" * 8 + b"{}"], ids=["empty", "zeros", "long header"])
def test_a_file_that_is_no_state_is_refused(content, tmp_path):
    model, dense, images = pair("resnet")
    state = tmp_path / "state.safetensors"
    state.write_bytes(content)
    with pytest.raises(ArpHubError, match="holds no state of a refinement.*delete it"):
        refine(model, dense, images, steps=2, state=state)
    assert state.read_bytes() == content


def of_ranks(dense: nn.Module, one: int, two: int) -> nn.Module:
    """A model with two decomposed layers of one shape."""
    ranks = {"layer1.0.conv1": one, "layer1.0.conv2": two}
    plan = RankPlan({name: LayerPlan("channel", rank) for name, rank in ranks.items()}, {})
    return decompose(copy.deepcopy(dense), plan)


def other_weights(dense: nn.Module) -> nn.Module:
    found = copy.deepcopy(dense)
    with torch.no_grad():
        next(found.parameters())[0, 0, 0, 0] += 1e-3
    return found


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


OTHER_STATES: dict[str, tuple[Callable[[nn.Module, nn.Module, Tensor], Any], str]] = {
    "steps": (lambda m, d, x: (m, d, x, 30), "steps=20, not 30"),
    "dense model": (lambda m, d, x: (m, other_weights(d), x, 20), "other dense weights"),
    "images": (lambda m, d, x: (m, d, x.flip(0), 20), "other images"),
    "ranks": (lambda m, d, x: (of_ranks(d, 8, 4), d, x, 20), "other ranks"),
}


@pytest.mark.parametrize("case", OTHER_STATES)
def test_a_state_of_another_refinement_is_refused(case, tmp_path):
    change, message = OTHER_STATES[case]
    _, dense, images = pair("resnet")
    model, state, calls = of_ranks(dense, 4, 8), tmp_path / "new" / "state.safetensors", 0

    def interrupt(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 15:
            raise KeyboardInterrupt

    hook = model.fc.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        refine(model, dense, images, steps=20, batch_size=8, state=state)
    hook.remove()
    kept = state.read_bytes()
    model, dense, images, steps = change(model, dense, images)
    with pytest.raises(ArpHubError, match=f"is of a refinement with {message}: delete it"):
        refine(model, dense, images, steps=steps, batch_size=8, state=state)
    assert state.read_bytes() == kept


def test_a_state_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    """A place that cannot be written is refused before any work; a disk that fills up later ends nothing."""
    model, dense, images = pair("resnet")
    (tmp_path / "file").touch()
    with pytest.raises(ArpHubError, match="cannot write '.*file/state': nothing can be written"):
        refine(model, dense, images, steps=2, state=tmp_path / "file" / "state")
    monkeypatch.setattr("arp_hub.refinement.state.save_file", full_disk)
    assert refine(model, dense, images, steps=4, batch_size=8, state=tmp_path / "state").steps == 4
    assert "cannot save the state of the refinement" in caplog.text and "No space left" in caplog.text


def refined() -> tuple[float, float, list[Tensor]]:
    """Divergences before and after, and the parameters, of a refinement by the processes of the group."""
    model, dense, images = pair("resnet")
    found = refine(model, dense, images, steps=30, batch_size=8)
    return found.before, found.after, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    model, dense, images = pair("vit")
    found = refine(model.cuda(), dense.cuda(), images, steps=60, batch_size=8)
    assert found.steps == 60 and found.after < found.before
    assert all(parameter.isfinite().all() and parameter.is_cuda for parameter in model.parameters())


def refined_by_few_held_out() -> tuple[float, float]:
    model, dense, images = pair("vit")
    found = refine(model, dense, images, held_out=pixels(2, 64), steps=4, batch_size=8)
    return found.before, found.after


def test_more_processes_than_held_out_images(tmp_path):
    found = by_group(refined_by_few_held_out, 3, tmp_path / "run")
    assert found[0] == found[1] == found[2] and 0 < found[0][1] <= found[0][0]


def test_two_processes_share_the_work(tmp_path):
    (before, after, one), (_, _, other) = by_group(refined, 2, tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    model, dense, images = pair("resnet")
    alone = refine(model, dense, images, steps=30, batch_size=8)
    assert before == pytest.approx(alone.before, rel=1e-4)
    assert after == pytest.approx(alone.after, rel=0.2)
