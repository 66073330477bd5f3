"""Hooks, attributes, mode, dtype and ``requires_grad`` of a layer, before and after decomposing and merging."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn

from arp_hub import LayerPlan, RankPlan, decompose, make_plan, to_dense

PLAN = RankPlan({"0": LayerPlan("cp", 5), "3": LayerPlan("group_out", 2, 2)})


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8))


def images() -> torch.Tensor:
    return torch.randn(4, 6, 9, 9, generator=torch.Generator().manual_seed(1))


WAYS = {
    "by weights": lambda model: decompose(model, PLAN),
    "by images": lambda model: decompose(model, PLAN, images()),
    "and back": lambda model: to_dense(decompose(model, PLAN)),
    "by images and back": lambda model: to_dense(decompose(model, PLAN, images())),
}


def forward_hook(module, log):
    return module.register_forward_hook(lambda *args: log.append(type(args[0]).__name__))


HOOKS = {
    "forward": forward_hook,
    "forward with keywords": lambda m, log: m.register_forward_hook(lambda *a: log.append(len(a)), with_kwargs=True),
    "forward always": lambda m, log: m.register_forward_hook(lambda *a: log.append(1), always_call=True),
    "forward pre": lambda m, log: m.register_forward_pre_hook(lambda *a: log.append(1)),
    "forward pre with keywords": lambda m, log: m.register_forward_pre_hook(
        lambda m, args, kwargs: log.append(1), with_kwargs=True
    ),
    "backward": lambda m, log: m.register_full_backward_hook(lambda *a: log.append(1)),
    "backward pre": lambda m, log: m.register_full_backward_pre_hook(lambda *a: log.append(1)),
    "state dict": lambda m, log: m.register_state_dict_post_hook(lambda *a: log.append(1)),
    "state dict pre": lambda m, log: m.register_state_dict_pre_hook(lambda *a: log.append(1)),
    "load pre": lambda m, log: m.register_load_state_dict_pre_hook(lambda module, *a: log.append(type(module))),
    "load post": lambda m, log: m.register_load_state_dict_post_hook(lambda module, keys: log.append(type(module))),
}


def use(model: nn.Module) -> None:
    """Calls that fire each kind of hook."""
    model(images().to(next(model.parameters()).dtype).requires_grad_()).sum().backward()
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_hooks_fire_after_the_layer_is_replaced_and_can_be_removed(register, way):
    model, log = network(), []
    handle = register(model[0], log)
    use(model)
    expected = len(log)
    assert expected
    old = model[0]
    way(model)
    assert model[0] is not old
    del old
    log.clear()
    use(model)
    assert len(log) == expected
    if isinstance(log[0], type):  # the hook gets the new layer
        assert log[0] is type(model[0])
    handle.remove()
    log.clear()
    use(model)
    assert not log


def test_a_hook_that_changes_the_output_still_does():
    model = network()
    model[0].register_forward_hook(lambda module, args, output: output + 100)
    before = model(images())
    full = RankPlan({"0": LayerPlan("cp", 48), "3": LayerPlan("channel", 8)})
    torch.testing.assert_close(decompose(copy.deepcopy(model), full)(images()), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("weight", "bias"), [(False, False), (False, True), (True, False), (True, True)])
def test_frozen_layers_stay_frozen(way, weight, bias):
    model = network()
    model[0].weight.requires_grad_(weight)
    model[0].bias.requires_grad_(bias)
    way(model)
    trainable = {name: p.requires_grad for name, p in model[0].named_parameters()}
    last = max(name for name in trainable if name.endswith("bias"))
    assert trainable.pop(last) is bias
    assert set(trainable.values()) == {weight}
    assert all(p.requires_grad for p in model[3].parameters())


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_attributes_and_mode_are_kept_and_none_is_added(way):
    model = network()
    model[0].tag, model[3].tags = "mine", (tags := ["mine"])
    model[0].eval()
    dense = set(vars(model[0]))
    way(model)
    assert model[0].tag == "mine"
    assert model[3].tags is tags
    assert [model[0].training, model[3].training, model.training] == [False, True, True]
    if type(model[0]) is nn.Conv2d:
        assert set(vars(model[0])) == dense


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_marks_of_parameters_are_kept(way):
    model = network()
    model[3].weight.no_decay, model[3].bias.rate = True, 0.1
    way(model)
    parameters = dict(model[3].named_parameters())
    assert all(vars(p) == ({"rate": 0.1} if "bias" in name else {"no_decay": True}) for name, p in parameters.items())
    assert not any(vars(parameter) for parameter in model[0].parameters())


@pytest.mark.parametrize("back", ["by weights", "by images"])
def test_the_memory_layout_is_kept(back):
    model = network().to(memory_format=torch.channels_last)
    decompose(model, RankPlan({"0": LayerPlan("channel", 5)}), images() if back == "by images" else None)
    for weight in (model[0].factors[0].weight, to_dense(model)[0].weight):
        assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scheme", ["channel", "spatial", "group_in", "group_out", "cp", "tucker2"])
def test_any_dtype_is_kept_there_and_back(scheme, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)).to(dtype)
    before, groups = copy.deepcopy(model), 2 if scheme.startswith("group") else 1
    rank = {"channel": 8, "spatial": 24, "group_in": 8, "group_out": 4, "cp": 64, "tucker2": 8}[scheme]
    decompose(model, RankPlan({"0": LayerPlan(scheme, rank, groups)}))
    expected = before[0].weight.double()
    for weight in (model[0].weight, to_dense(model)[0].weight):
        assert weight.dtype == dtype
        error = (weight.double() - expected).norm() / expected.norm()
        assert error < max(2 * torch.finfo(dtype).eps, 1e-6)
    assert all(parameter.dtype == dtype for parameter in model.parameters())


def test_feature_hooks_give_the_same_maps():
    model = timm.create_model("tf_efficientnet_lite0", features_only=True, feature_location="expansion").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = [tuple(y.shape) for y in model(x)]
        plan = make_plan(model, keep_params=0.7, schemes=["channel"])
        assert any(name.endswith("conv_pwl") for name in plan.layers)
        assert [tuple(y.shape) for y in decompose(model, plan)(x)] == before
        assert [tuple(y.shape) for y in to_dense(model)(x)] == before
    assert len(before) == 5


LOST = {
    "gradient hook": (lambda model: model[0].weight.register_hook(lambda grad: grad), WAYS["by weights"]),
    "gradient hook by images": (lambda model: model[0].bias.register_hook(lambda grad: grad), WAYS["by images"]),
    "accumulation hook": (
        lambda model: model[0].weight.register_post_accumulate_grad_hook(lambda parameter: None),
        WAYS["by weights"],
    ),
    "hook on a factor": (lambda model: forward_hook(decompose(model, PLAN)[0].factors[1], []), to_dense),
}


@pytest.mark.parametrize(("register", "way"), LOST.values(), ids=LOST)
def test_hooks_that_cannot_be_carried_over_are_named(register, way):
    model = network()
    register(model)
    with pytest.warns(UserWarning, match="hooks on parameters.* such as '0'"):
        way(model)


def test_nothing_is_warned_of_without_such_hooks():
    model = network()
    forward_hook(model[0], [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_dense(decompose(model, PLAN))
