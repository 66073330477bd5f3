"""Budgets and decompositions on real models and data: sizes, lowest accuracies, and errors that leave models intact."""

import copy

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from arp_hub import ArpHubError, LayerPlan, RankPlan, decompose, make_plan, to_dense
from arp_hub.decomposition import passes_within
from arp_hub.layers.dense import refusal
from arp_hub.layers.low_rank import layer_shape
from arp_hub.layers.model import count_params, low_rank_layers, weight_layers
from arp_hub.schemes import SCHEMES

SIZE = (3, 64, 64)


@pytest.fixture(scope="module")
def resnet20(shared):
    model = timm.create_model("cifar_resnet20")
    model.load_state_dict(load_file(shared / "weights/resnet20_cifar10.safetensors"))
    return model.eval()


@pytest.fixture(scope="module")
def half(resnet20):
    """ResNet-20 decomposed to half of its parameters by its weights alone."""
    return decompose(copy.deepcopy(resnet20), make_plan(resnet20, keep_params=0.5))


def top1(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.inference_mode():
        found = torch.cat([model(batch).argmax(1) for batch in images.split(250)])
    return 100 * float((found == labels).float().mean())


@pytest.mark.parametrize("scheme", ["channel", "spatial", "group_in", "group_out", "cp", "tucker2"])
def test_full_rank_network_is_exact_with_and_without_images(scheme):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5).eval()
    groups = 2 if scheme.startswith("group") else 1
    names = [n for n, m in weight_layers(model) if n != "conv1" and refusal(m) is None]
    schemes = {n: (SCHEMES[scheme], layer_shape(model.get_submodule(n))) for n in names}
    full = {n: kind(s, groups) for n, (kind, s) in schemes.items() if kind.refusal(s, groups) is None and "layer1" in n}
    plan = RankPlan({n: LayerPlan(scheme, bound.max_rank, groups) for n, bound in full.items()})
    images = torch.randn(8, *SIZE)
    with torch.no_grad():
        expected = model(images)
        for calibration in (None, images):
            found = decompose(copy.deepcopy(model), plan, calibration)(images)
            assert (found - expected).norm() < 1e-4 * expected.norm()


def test_an_error_midway_leaves_the_model_whole():
    model = timm.create_model("cifar_resnet20").eval()
    plan = RankPlan({"layer1.0.conv1": LayerPlan("cp", 4), "layer3.2.conv2": LayerPlan("cp", 4)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    class Broken(list):
        """Images whose source fails at a chosen read."""

        reads = 0

        def __iter__(self):
            self.reads -= 1
            if self.reads < 0:
                raise RuntimeError("disk gone")
            return super().__iter__()

    images, reads = Broken([torch.randn(4, 3, 32, 32)]), 0
    while True:  # whichever read fails, from the first to the last
        images.reads = reads
        try:
            decompose(copy.deepcopy(model), plan, images)
            break
        except RuntimeError:
            images.reads = reads
            with pytest.raises(RuntimeError, match="disk gone"):
                decompose(model, plan, images)
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
            assert not low_rank_layers(model)
            reads += 1
    assert reads > 3  # at least one read for each layer, and those before and after
    with torch.no_grad():
        model.layer3[2].conv2.weight[0] = float("nan")
    with pytest.raises(ArpHubError, match=r"layer3\.2\.conv2.*NaN"):
        decompose(model, plan)
    assert not low_rank_layers(model)


@given(
    needs=st.lists(st.integers(1, 300), min_size=1, max_size=30),
    images=st.integers(1, 5000),
    affordable=st.floats(0, 1e6),
)
def test_passes_look_at_as_many_images_as_are_affordable(needs, images, affordable):
    names = {f"layer{k}": need for k, need in enumerate(needs)}
    passes = passes_within(affordable, names, images)
    assert [name for group, _ in passes for name in group] == list(names)
    looked_at = sum(count for _, count in passes)
    assert looked_at <= affordable or len(passes) == 1
    for group, count in passes:
        assert min(images, max(names[name] for name in group)) <= count <= images
    if len(names) * images <= affordable:
        assert passes == [([name], images) for name in names]
    elif len(passes) == len(names) and looked_at < len(names) * images:  # twice as many would exceed it
        assert sum(min(images, 2 * count) for _, count in passes) > affordable


def test_merging_gives_the_decomposed_model_back(resnet20, half, cifar_test):
    images, _ = cifar_test(64)
    model = copy.deepcopy(half)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(to_dense(model)(images), expected, rtol=1e-4, atol=1e-4)
    assert count_params(model) == count_params(resnet20)


def test_weights_alone_hold_the_floor(half, cifar_test):
    assert top1(half, *cifar_test(1000)) > 88.0


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "floor"), [(0.5, 91.3), (0.35, 90.7), (0.25, 87.8)])
def test_images_hold_the_floor(resnet20, cifar_test, cifar_train, keep, floor):
    images, labels = cifar_test(2000)
    calibration = cifar_train(1024)
    model = copy.deepcopy(resnet20)
    decompose(model, make_plan(model, keep_params=keep, calibration=calibration), calibration)
    assert top1(model, images, labels) >= floor


def test_images_beat_weights_alone(resnet20, cifar_test, cifar_train):
    images, labels = cifar_test(500)
    plan = make_plan(resnet20, keep_params=0.3)
    plain = top1(decompose(copy.deepcopy(resnet20), plan), images, labels)
    aware = decompose(copy.deepcopy(resnet20), plan, cifar_train(128), effort="fast")
    assert top1(aware, images, labels) > plain + 2
    assert not aware.training
