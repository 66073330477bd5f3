"""Planning and fitting on a GPU: images pass through the model there, small factorisations run on the CPU."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from arp_hub import decompose, make_plan
from arp_hub.schemes.linalg import solving_device


@pytest.mark.parametrize(
    ("shape", "device"),
    [((64, 64, 3, 3), "cpu"), ((512, 1023, 1, 1), "cpu"), ((512, 1024, 1, 1), "meta"), ((8, 128, 3, 3), "meta")],
)
def test_only_wide_weights_are_factorised_where_they_are(shape, device):
    assert solving_device(torch.empty(shape, device="meta")).type == device
    assert solving_device(torch.empty(shape)).type == "cpu"


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
