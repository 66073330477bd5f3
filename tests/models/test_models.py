"""The CIFAR models: sizes, trained weights, and the interface that timm expects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from arp_hub.layers.model import count_params
from arp_hub.models.cifar_resnet import BasicBlock

NAMES = ["cifar_resnet20", "cifar_vgg16"]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("cifar_resnet20", 269_722),
        ("cifar_resnet32", 464_154),
        ("cifar_resnet44", 658_586),
        ("cifar_resnet56", 853_018),
        ("cifar_resnet110", 1_727_962),
        ("cifar_vgg16", 14_724_042),
    ],
)
def test_number_of_parameters(name: str, params: int) -> None:
    model = timm.create_model(name)
    assert count_params(model) == params
    assert model(IMAGES).shape == (2, 10)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("depth", "count", "top1"),
    [
        (20, 2_000, 91.65),
        pytest.param(56, 2_000, 92.95, marks=pytest.mark.slow),
        pytest.param(20, 10_000, 91.73, marks=pytest.mark.slow),
        pytest.param(56, 10_000, 93.39, marks=pytest.mark.slow),
    ],
)
def test_trained_weights(
    depth: int, count: int, top1: float, shared: Path, cifar_test: Callable[[int], tuple[Tensor, Tensor]]
) -> None:
    model = timm.create_model(f"cifar_resnet{depth}").eval()
    model.load_state_dict(load_file(shared / "weights" / f"resnet{depth}_cifar10.safetensors"), strict=True)
    images, labels = (part.split(500) for part in cifar_test(count))
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images, labels, strict=True))
    assert 100 * right / count == pytest.approx(top1, abs=0.005)


def test_option_a_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides() -> None:
    block = BasicBlock(2, 4, stride=2).eval()
    nn.init.zeros_(block.conv2.weight)  # the residual branch is then zero
    x = torch.rand(1, 2, 6, 6)
    y = block(x)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3]].any()


def test_he_initialisation() -> None:
    weight = timm.create_model("cifar_resnet20").layer3[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({"num_classes": 7}, (2, 7)),
        ({"num_classes": 0}, (2, "features")),
        ({"num_classes": 0, "global_pool": ""}, (2, "features", "side", "side")),
        ({"global_pool": "max"}, (2, 10)),
        ({"global_pool": "catavgmax"}, (2, 10)),
        ({"in_chans": 1}, (2, 10)),
        ({"in_chans": 4, "drop_rate": 0.5}, (2, 10)),
    ],
)
def test_arguments(name: str, arguments: dict[str, object], shape: tuple[object, ...]) -> None:
    model = timm.create_model(name, **arguments).eval()
    side = model.pretrained_cfg["pool_size"][0]
    expected = tuple({"features": model.num_features, "side": side}.get(n, n) for n in shape)
    x = IMAGES[:, :1].repeat(1, arguments.get("in_chans", 3), 1, 1)
    assert model(x).shape == expected


@pytest.mark.parametrize("name", NAMES)
def test_drop_rate_and_drop_path_act_in_training_only(name: str) -> None:
    rates = {"drop_rate": 0.5} | ({"drop_path_rate": 0.5} if "resnet" in name else {})
    torch.manual_seed(0)
    plain = timm.create_model(name).eval()
    model = timm.create_model(name, **rates).eval()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(IMAGES), plain(IMAGES))
    for module in model.modules():  # BatchNorm would change the output in training as well
        module.train(not isinstance(module, nn.BatchNorm2d))
    assert not torch.allclose(model(IMAGES), plain(IMAGES))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("feature_cls", [None, "getter", "hook"])
def test_features(name: str, feature_cls: str | None) -> None:
    torch.manual_seed(0)
    whole = timm.create_model(name).eval()
    final, maps = whole.forward_intermediates(IMAGES)
    assert torch.equal(final, whole.forward_features(IMAGES))
    assert torch.equal(whole.forward_head(final), whole(IMAGES))
    torch.manual_seed(0)
    features = timm.create_model(name, features_only=True, feature_cls=feature_cls).eval()
    info = features.feature_info
    found = features(IMAGES)
    assert info.channels() == [m.shape[1] for m in found]
    assert info.reduction() == [32 // m.shape[2] for m in found]
    chosen = [maps[index] for index in info.out_indices]
    assert len(chosen) == len(found) and all(torch.equal(a, b) for a, b in zip(chosen, found, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_chosen_features_prune_the_rest(name: str) -> None:
    torch.manual_seed(0)
    maps = timm.create_model(name).eval().forward_intermediates(IMAGES, indices=[1], intermediates_only=True)
    torch.manual_seed(0)
    features = timm.create_model(name, features_only=True, feature_cls="getter", out_indices=(1,)).eval()
    assert torch.equal(features(IMAGES)[0], maps[0])
    assert count_params(features) < count_params(timm.create_model(name)) / 2


@pytest.mark.parametrize("name", NAMES)
def test_classifier(name: str) -> None:
    model = timm.create_model(name).eval()
    assert model.get_classifier() is model.fc
    features = model.forward_features(IMAGES)
    before = model.forward_head(features, pre_logits=True)
    model.reset_classifier(5)
    assert model(IMAGES).shape == (2, 5) and model.num_classes == 5
    assert torch.equal(model.forward_head(features, pre_logits=True), before)
    model.reset_classifier(0, "")
    assert torch.equal(model(IMAGES), features)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_groups(name: str) -> None:
    model = timm.create_model(name)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(sum(groups.values(), [])) == sorted(n for n, _ in model.named_parameters())
        assert len(groups) > 3
    decayed = param_groups_weight_decay(model, no_weight_decay_list=model.no_weight_decay())
    assert sum(len(group["params"]) for group in decayed) == len(list(model.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    model = timm.create_model(name).eval()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(IMAGES.clone().requires_grad_()).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_registered_without_weights() -> None:
    assert len(timm.list_models("cifar_*")) == 6 and not timm.list_models("cifar_*", pretrained=True)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("cifar_resnet20", pretrained=True)
