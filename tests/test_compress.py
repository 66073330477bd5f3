"""One call plans, decomposes and refines a copy of a model."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from arp_hub import ArpHubError, compress, decompose, make_plan, refine
from arp_hub.effort import Effort

EFFORT = Effort(fit_iterations=8, curve_iterations=3, curve_shares=(0.2, 0.5), start_sweeps=5, schemes_measured=1)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, zero_init_last=False)
    with torch.no_grad():  # a random classifier hardly tells images apart
        model.fc.weight.mul_(10)
    return model.train()


def images(count: int = 40) -> Tensor:
    """Smooth random images: each is a few waves."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic")


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("data", [None, images(8)], ids=["weights alone", "calibration images"])
def test_same_as_a_plan_and_its_decomposition(data):
    model, untouched = network(), network()
    small = compress(model, keep_params=0.6, schemes=["channel", "cp"], calibration=data, effort=EFFORT)
    plan = make_plan(model, keep_params=0.6, schemes=["channel", "cp"], calibration=data, effort=EFFORT)
    assert same(model, untouched) and model.training and small.training
    assert same(small, decompose(model, plan, data, effort=EFFORT))


def test_inference_mode_around_it_changes_nothing():
    model = network()
    options = {"keep_params": 0.6, "schemes": ["channel"], "calibration": images(8), "effort": EFFORT}
    with torch.inference_mode():
        small = compress(model, **options)
    assert same(small, compress(model, **options))
    assert not any(parameter.is_inference() for parameter in small.parameters())


@pytest.mark.parametrize("kept", ["a tensor", "a list", "a dict"])
def test_a_model_that_keeps_activations_is_compressed(kept):
    model, other = network(), network()

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        module.last = {"a tensor": output, "a list": [output], "a dict": {"map": output}}[kept]

    hook = model.layer1.register_forward_hook(keep)
    for one in (model, other):
        one(images(2)).sum().backward()
    hook.remove()
    options = {"keep_params": 0.6, "schemes": ["channel"], "calibration": images(8), "effort": EFFORT}
    assert same(compress(model, **options), compress(other, **options))


def test_a_model_that_is_compiled_in_place_is_compressed():
    model = network().eval()
    options = {"keep_params": 0.6, "schemes": ["channel"], "calibration": images(8), "effort": EFFORT}
    expected = compress(model, **options)
    model.compile(backend="eager")
    model(images(2))
    assert same(compress(model, **options), expected)


@pytest.mark.parametrize("data", [images(60), list(images(60).split(16))], ids=["tensor", "batches"])
def test_refinement_is_measured_on_images_that_the_fit_has_not_seen(data):
    model, seed = network(), 3
    small = compress(model, keep_params=0.3, calibration=data, effort=EFFORT, refine=True, steps=80, seed=seed)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    learnt, held_out = images(60)[order[6:]], images(60)[order[:6]]
    plan = make_plan(model, keep_params=0.3, calibration=learnt, effort=EFFORT)
    fitted = decompose(copy.deepcopy(model), plan, learnt, effort=EFFORT)
    done = refine(fitted, model, learnt, held_out=held_out, steps=80, seed=seed)
    assert done.after < done.before
    assert same(small, fitted)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "exactly one"),
        ({"keep_params": 0.6, "refine": True}, "pass calibration="),
        ({"keep_params": 0.6, "refine": True, "calibration": images(19)}, "at least 20 images, got 19"),
        ({"keep_params": 0.6, "refine": True, "calibration": [images(20), images(2)[..., :16]]}, "of one shape"),
        ({"keep_params": 0.6, "refine": True, "calibration": images(), "minutes": 1, "steps": 1}, "not both"),
        ({"keep_params": 0.6, "refine": True, "calibration": images(), "minutes": 0}, "minutes must be"),
        ({"keep_params": 0.6, "calibration": images(), "steps": 4}, "pass refine=True"),
    ],
    ids=["no budget", "no images", "few images", "two shapes", "two amounts", "no time", "no refinement"],
)
def test_bad_arguments_are_refused_before_any_work(options, said, monkeypatch):
    for work in ("decompose", "make_plan") if options else ("decompose",):  # the plan refuses a missing budget
        monkeypatch.setattr(f"arp_hub.compression.{work}", lambda *_, **__: pytest.fail("work has begun"))
    with pytest.raises(ArpHubError, match=said):
        compress(network(), **options)


def test_models_that_cannot_be_refined_are_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("arp_hub.compression.make_plan", lambda *_, **__: pytest.fail("work has begun"))
    with pytest.raises(ArpHubError, match=r"call \.float\(\)"):
        compress(network().half(), keep_params=0.6, calibration=images(), refine=True)
    decomposed = decompose(network(), make_plan(network(), keep_params=0.6))
    with pytest.raises(ArpHubError, match="decomposed already"):
        compress(decomposed, keep_params=0.6, calibration=images(), refine=True)
    with pytest.raises(ArpHubError, match="all parameters are frozen"):
        compress(network().requires_grad_(False), keep_params=0.6, calibration=images(), refine=True)
    with pytest.raises(ArpHubError, match="model must be a torch.nn.Module"):
        compress("resnet18", keep_params=0.6, calibration=images(), refine=True)
