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
from arp_hub.plan import BETTER_DENSE
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
    plan = RankPlan({"layer1.0.conv1": LayerPlan("cp", 4), "layer1.2.conv2": LayerPlan("cp", 4)})
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
        model.layer1[2].conv2.weight[0] = float("nan")
    with pytest.raises(ArpHubError, match=r"layer1\.2\.conv2.*NaN"):
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


class Classifier(nn.Module):
    """A convolution to decompose and a classifier. ``before`` runs ahead of both; ``norm`` is behind the classifier."""

    def __init__(self, kind: type[nn.Conv2d] = nn.Conv2d, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_classes = 8
        self.before, self.conv = nn.Conv2d(4, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.head = kind(12, 8, 1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.tied = nn.Conv2d(12, 8, 1)

    def forward(self, x):
        y = self.conv(self.before(x).relu()).relu().mean((2, 3), keepdim=True)
        return self.norm(self.head(y)).flatten(1)


CONV_AT_2 = {"conv": LayerPlan("channel", 2)}
HEAD_DENSE = {"before": "first convolution", "head": BETTER_DENSE}


def tie(model: Classifier) -> Classifier:
    model.tied.weight = model.head.weight
    return model


@pytest.mark.parametrize(
    "model, dense, images, changed",
    [
        (Classifier, HEAD_DENSE, 256, True),
        (Classifier, HEAD_DENSE, 47, False),  # fewer than 4 for each of 12 columns
        (Classifier, {"head": "excluded by the user"}, 256, False),
        (Classifier, {}, 256, False),
        (lambda: Classifier(norm=True), HEAD_DENSE, 256, False),
        (lambda: Classifier(timm.layers.StdConv2d), HEAD_DENSE, 256, False),
        (lambda: tie(Classifier()), HEAD_DENSE, 256, False),
    ],
    ids=["a classifier", "too few images", "excluded", "not planned", "a norm behind", "standardised", "tied"],
)
def test_a_dense_layer_that_nothing_corrects_is_fitted_to_its_new_input(model, dense, images, changed):
    teacher = model().eval()
    teacher.head.requires_grad_(False)
    student = copy.deepcopy(teacher)
    parameters = list(student.head.parameters())
    decompose(student, RankPlan(CONV_AT_2, dense), torch.randn(images, 4, 8, 8))
    assert (not torch.equal(student.head.weight, teacher.head.weight)) == changed
    for name in ("before.weight", "tied.weight" if not changed else "before.bias"):
        assert torch.equal(student.get_parameter(name), teacher.get_parameter(name))
    for new, old in zip(student.head.parameters(), parameters, strict=True):
        assert new is old and not new.requires_grad  # the parameters that an optimiser may hold


def test_a_dense_classifier_that_is_fitted_makes_up_for_errors_before_it():
    teacher = Classifier().eval()
    images, others = torch.randn(2000, 4, 8, 8), torch.randn(2000, 4, 8, 8)
    errors, seen = [], []
    for reason in (BETTER_DENSE, "excluded by the user"):
        student = copy.deepcopy(teacher)
        student.head.register_forward_hook(lambda *_: seen.append(1))
        decompose(student, RankPlan(CONV_AT_2, {"head": reason}), images)
        seen.clear()
        with torch.no_grad():
            errors.append(float((student(others) - teacher(others)).square().mean()))
        assert len(seen) == 1  # the user's hook
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("planned", [["conv"], ["head"], ["before", "head"]])
def test_dense_layers_before_the_last_decomposed_one_stay_as_they_are(planned):
    teacher = Classifier().eval()
    others = [name for name in ("before", "conv", "head") if name not in planned]
    plan = RankPlan({name: LayerPlan("channel", 2) for name in planned}, dict.fromkeys(others, BETTER_DENSE))
    student = decompose(copy.deepcopy(teacher), plan, torch.randn(256, 4, 8, 8))
    for name in others:
        same = torch.equal(student.get_submodule(name).weight, teacher.get_submodule(name).weight)
        assert same == (name != "head")  # the classifier is behind them all


def test_a_plan_may_name_a_shared_layer_by_its_second_path():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.add_module("again", nn.Identity())
    model.again.inside = model[2]  # named_modules lists it as "2" only
    plan, images = RankPlan({"again.inside": LayerPlan("channel", 8)}, {}), torch.randn(40, 3, 8, 8)
    decompose(model.eval(), plan, images)
    assert model[2] is model.again.inside and low_rank_layers(model)
    assert model(images).isfinite().all()


@pytest.mark.parametrize("scale", [2.0, 0.5])
@pytest.mark.parametrize("normed", [False, True])
def test_a_hook_that_changes_an_output_acts_once(scale, normed):
    """The hook stays on the new layer, so the fit is to the output before it."""
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, bias=not normed), nn.BatchNorm2d(16) if normed else nn.ReLU()]
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8))
    images = torch.randn(64, 3, 8, 8) + 1
    for _ in range(20):
        model(images)  # statistics of the BatchNorm
    model.eval()[1].register_forward_hook(lambda module, args, output: output * scale)
    small = decompose(copy.deepcopy(model), RankPlan({"1": LayerPlan("channel", 16)}), images)
    torch.testing.assert_close(small(images), model(images), rtol=1e-3, atol=1e-3)


class MapAttention(nn.Module):
    """Attention over a map, whose heads are views of the batch: impossible for two images in channels last."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.query, self.key, self.value = (nn.Conv2d(32, 32, 1) for _ in range(3))
        self.head, self.num_classes = nn.Linear(32, 10), 10

    def forward(self, x):
        x = self.stem(x).relu()
        query, key, value = (part(x).view(len(x) * 4, 8, -1) for part in (self.query, self.key, self.value))
        mixed = value @ (query.transpose(1, 2) @ key).softmax(-1).transpose(1, 2)
        return self.head(mixed.view(x.shape).mean((2, 3)))


@pytest.mark.parametrize("first", [1, 8], ids=["a first batch of one image", "batches of eight"])
@pytest.mark.filterwarnings("error")
def test_a_model_that_views_maps_is_planned_and_decomposed(first):
    model, images = MapAttention().eval(), [torch.randn(count, 3, 8, 8) for count in (first, 8, 8)]
    plan = make_plan(model, keep_params=0.7, calibration=images)
    small = decompose(copy.deepcopy(model), plan, images)
    assert plan.layers and count_params(small) < 0.75 * count_params(model)
