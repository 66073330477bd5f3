"""Planning and fitting on a GPU: images pass through the model there, small factorisations run on the CPU."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from arp_hub import ArpHubError, decompose, make_plan
from arp_hub.planning.output_errors import _stacks
from arp_hub.schemes import Scheme, make_scheme
from arp_hub.schemes.linalg import solving_device, stack_size
from arp_hub.schemes.shapes import LayerShape


@pytest.mark.parametrize(
    ("shape", "device"),
    [((64, 64, 3, 3), "cpu"), ((512, 1023, 1, 1), "cpu"), ((512, 1024, 1, 1), "meta"), ((8, 128, 3, 3), "meta")],
)
def test_only_wide_weights_are_factorised_where_they_are(shape, device):
    assert solving_device(torch.empty(shape, device="meta")).type == device
    assert solving_device(torch.empty(shape)).type == "cpu"


def test_a_stack_of_narrow_weights_is_factorised_where_they_are():
    weight = torch.empty(16, 16, 3, 3, device="meta")
    assert [solving_device(weight, layers).type for layers in (1, 7, 8)] == ["cpu", "cpu", "meta"]
    assert stack_size(weight) == stack_size(torch.empty(16, 16, 3, 3)) == 1  # no GPU: one by one


class Calls(TorchDispatchMode):
    """Counts calls of torch's operators."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_like_layers_are_planned_together_as_one_by_one(monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20").eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        elif isinstance(module, torch.nn.Conv2d):  # spectra that fall, as trained ones do: rounding hardly moves ranks
            outputs, inputs = (0.9 ** torch.arange(side) for side in module.weight.shape[:2])
            module.weight.data *= outputs[:, None, None, None] * inputs[:, None, None]
    images, plans, calls = torch.randn(32, 3, 32, 32), [], []
    for size in (1, 3, 32):
        monkeypatch.setattr("arp_hub.planning.output_errors.stack_size", lambda weight, size=size: size)
        with Calls() as counted:
            plans.append(make_plan(model, keep_params=0.4, calibration=images, effort="fast"))
        calls.append(counted.count)
    for plan in plans[1:]:
        assert plan.dense == plans[0].dense
        for name, layer in plans[0].layers.items():
            assert (plan.layers[name].scheme, plan.layers[name].groups) == (layer.scheme, layer.groups)
            assert plan.layers[name].rank == pytest.approx(layer.rank, rel=0.03, abs=1)
    assert 0.7 * calls[0] > calls[2]  # a fourth of those that fits make, and all others
    assert calls[0] > calls[1] > calls[2]


def test_layers_with_other_shapes_groups_or_schemes_are_not_planned_together(monkeypatch):
    monkeypatch.setattr("arp_hub.planning.output_errors.stack_size", lambda weight: 2)
    shapes = {
        "a": LayerShape(16, 16, (3, 3)),
        "b": LayerShape(16, 16, (3, 3), stride=(2, 2)),
        "c": LayerShape(16, 32, (3, 3), groups=2),
        "d": LayerShape(16, 16, (3, 3)),
        "e": LayerShape(16, 16, (3, 3)),
    }
    schemes = {name: [make_scheme("cp", shape)] for name, shape in shapes.items()}
    schemes["e"].append(make_scheme("spatial", shapes["e"]))
    weights = {name: torch.empty(16, 16, 3, 3) for name in shapes}
    assert _stacks(weights, schemes) == [["a", "b"], ["c"], ["d"], ["e"]]


def test_a_layer_of_a_stack_that_cannot_be_factorised_is_named(monkeypatch):
    monkeypatch.setattr("arp_hub.planning.output_errors.stack_size", lambda weight: 8)
    original = Scheme.fit

    def failing(self, target, *args, **kwargs):
        if (target.flatten(1).std(1) < 1e-5).any():
            raise torch.linalg.LinAlgError("singular")
        return original(self, target, *args, **kwargs)

    monkeypatch.setattr(Scheme, "fit", failing)
    model = timm.create_model("cifar_resnet20").eval()
    with torch.no_grad():
        model.get_submodule("layer1.1.conv2").weight.fill_(0.1)
    with pytest.raises(ArpHubError, match=r"layer 'layer1\.1\.conv2' cannot be factorised"):
        make_plan(model, keep_params=0.5, calibration=torch.randn(16, 3, 32, 32), schemes=["cp"], effort="fast")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("with_images", [True, False])
def test_a_model_on_a_gpu_is_planned_and_fitted_as_on_a_cpu(with_images):
    torch.manual_seed(0)
    model = timm.create_model("resnet18").eval()  # 3 x 3 convolutions of 576 to 4,608 inputs
    images = torch.randn(64, 3, 96, 96) if with_images else None
    outputs, plans = {}, {}
    for device in ("cpu", "cuda"):
        here = copy.deepcopy(model).to(device)
        plans[device] = make_plan(here, keep_params=0.5, calibration=images, input_size=(3, 96, 96), effort="fast")
        small = decompose(here, plans[device], images, effort="fast")
        assert {parameter.device.type for parameter in small.parameters()} == {device}
        with torch.no_grad():
            outputs[device] = small.cpu()(torch.ones(1, 3, 96, 96))
    assert plans["cpu"].layers.keys() == plans["cuda"].layers.keys()
    assert float((outputs["cpu"] - outputs["cuda"]).norm() / outputs["cpu"].norm()) < 0.1
