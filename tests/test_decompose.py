"""Budgets and decompositions on real models and data: promises kept, floors held, errors before any harm."""

import copy
import os
import platform
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from timm.layers import Conv2dSame
from torch import nn

from arp_hub import ArpHubError, LayerPlan, RankPlan, make_plan, to_dense
from arp_hub import decomposition as decompose
from arp_hub._utils.torch_utils import give_back_memory
from arp_hub.calibration.batchnorm import renormalise
from arp_hub.calibration.images import batches
from arp_hub.calibration.moments import PatchMoments, StationaryMoments, patches
from arp_hub.calibration.passes import all_moments
from arp_hub.decomposition import passes_within
from arp_hub.layers.dense import refusal
from arp_hub.layers.low_rank import layer_shape
from arp_hub.layers.model import count_params, low_rank_layers, weight_layers
from arp_hub.layers.trace import count_macs, trace
from arp_hub.planning.output_errors import OutputErrors
from arp_hub.schemes import SCHEMES

SIZE = (3, 64, 64)


@pytest.fixture(scope="module")
def resnet20(shared):
    model = timm.create_model("cifar_resnet20")
    model.load_state_dict(load_file(shared / "weights/resnet20_cifar10.safetensors"))
    return model.eval()


def top1(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.inference_mode():
        found = torch.cat([model(batch).argmax(1) for batch in images.split(250)])
    return 100 * float((found == labels).float().mean())


@pytest.mark.parametrize("cost", ["params", "macs"])
@pytest.mark.parametrize("share", [0.7, 0.4])
@pytest.mark.parametrize("name", ["cifar_resnet20", "test_vit", "test_convnext", "test_efficientnet"])
def test_budget_is_met_from_below_on_the_model_itself(name, share, cost):
    torch.manual_seed(0)
    model = timm.create_model(name)
    size = model.pretrained_cfg["input_size"]
    count = {"params": count_params, "macs": lambda m: count_macs(m, size)}[cost]
    before = count(model)
    plan = make_plan(model, **{f"keep_{cost}": share})
    decompose(model, plan)
    assert 0.99 * share <= count(model) / before <= share
    assert plan.layers
    named = {name for name, _ in weight_layers(timm.create_model(name))}
    assert named <= set(plan.layers) | set(plan.dense)


def test_the_trace_counts_what_hand_counting_gives():
    strided = nn.Conv2d(8, 8, 3, stride=2, groups=4)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), strided, nn.Flatten(2), nn.Linear(225, 7))
    traced = trace(model, (3, 32, 32))
    assert traced.sizes == {"0": ((32, 32),), "1": ((32, 32),), "3": ((8, 1),)}
    assert traced.macs == 32 * 32 * 8 * 27 + 15 * 15 * 8 * 18 + 8 * 225 * 7
    assert traced.params == count_params(model)


def test_rank_multiple_exclude_and_schemes():
    model = timm.create_model("resnet18", num_classes=10)
    plan = make_plan(
        model, keep_params=0.5, rank_multiple=8, schemes=["tucker2", "channel"], exclude=["conv1", "layer4.1.*"]
    )
    assert all(layer.rank % 8 == 0 for layer in plan.layers.values())
    assert {layer.scheme for layer in plan.layers.values()} <= {"tucker2", "channel"}
    assert not any(name.startswith("layer4.1.") for name in plan.layers)
    assert plan.dense["layer4.1.conv1"] == "excluded by the user"


BAD_BUDGETS = {
    "none": ({}, "exactly one"),
    "both": ({"keep_params": 0.5, "keep_macs": 0.5}, "exactly one"),
    "zero": ({"keep_params": 0}, "between 0 and 1"),
    "above one": ({"keep_params": 1.5}, "between 0 and 1"),
    "not a number": ({"keep_macs": float("nan")}, "between 0 and 1"),
    "text": ({"keep_macs": "half"}, "between 0 and 1"),
    "out of reach": ({"keep_params": 0.001}, "cannot be met.* 0\\.0[0-9]+ of the params remain.*conv1"),
    "scheme": ({"keep_params": 0.5, "schemes": ["svd"]}, "unknown scheme 'svd'"),
    "no scheme": ({"keep_params": 0.5, "schemes": []}, "schemes is empty"),
    "multiple": ({"keep_params": 0.5, "rank_multiple": 0}, "rank_multiple"),
    "exclude": ({"keep_params": 0.5, "exclude": ["layer9.*"]}, "matches no layer"),
    "size": ({"keep_params": 0.5, "input_size": (3, 32)}, "input_size"),
    "one-pass images": ({"keep_params": 0.5, "calibration": iter([torch.zeros(2, 3, 32, 32)])}, "one-pass"),
    "no images": ({"keep_params": 0.5, "calibration": []}, "no calibration images"),
    "bytes": ({"keep_params": 0.5, "calibration": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, "float tensors"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_BUDGETS.values(), ids=BAD_BUDGETS)
def test_bad_budget(arguments, message):
    with pytest.raises(ArpHubError, match=message):
        make_plan(timm.create_model("cifar_resnet20"), **arguments)


def test_planning_a_decomposed_model_is_refused():
    model = timm.create_model("cifar_resnet20")
    decompose(model, RankPlan({"layer1.0.conv1": LayerPlan("cp", 4)}))
    with pytest.raises(ArpHubError, match="to_dense"):
        make_plan(model, keep_params=0.5)


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
        passes = 0

        def __iter__(self):
            Broken.passes += 1
            if Broken.passes > 3:  # the fourth is the second layer
                raise RuntimeError("disk gone")
            return super().__iter__()

    with pytest.raises(RuntimeError, match="disk gone"):
        decompose(model, plan, Broken([torch.randn(4, 3, 32, 32)]))
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with torch.no_grad():
        model.layer3[2].conv2.weight[0] = float("nan")
    with pytest.raises(ArpHubError, match=r"layer3\.2\.conv2.*NaN"):
        decompose(model, plan)
    assert not low_rank_layers(model)


def test_moments_do_not_depend_on_batches_and_match_the_plain_sum():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2, bias=False).double()
    shape, images = layer_shape(conv), torch.randn(10, 4, 9, 8, dtype=torch.float64)
    whole, parts = (PatchMoments(shape, torch.device("cpu")) for _ in range(2))
    whole.update(images, conv(images))
    for batch in images.split(3):
        parts.update(batch, conv(batch))
    for name in ("xx", "yx", "x", "y"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name))
    columns = patches(images, shape).permute(1, 2, 0, 3).flatten(2)
    torch.testing.assert_close(whole.xx.triu(), (columns @ columns.mT).triu())
    assert whole.count == parts.count == columns.shape[-1]
    problem = whole.regression(conv.weight.detach())
    torch.testing.assert_close(problem.target, conv.weight.detach(), rtol=1e-6, atol=1e-8)


class TwoBranches(nn.Module):
    """Two convolutions of equal weights, of which the second hardly reaches the output."""

    def __init__(self, wrap, num_classes=0):
        super().__init__()
        torch.manual_seed(0)
        self.num_classes = num_classes
        self.loud = nn.Conv2d(32, 32, 3, padding=1)
        self.quiet = copy.deepcopy(self.loud)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.loud(x) + 0.01 * self.quiet(x))


@pytest.mark.parametrize(
    ("wrap", "num_classes"),
    [
        (lambda y: 10 * y.mean((2, 3)), 32),
        (lambda y: y, 32),
        (lambda y: y.mean((2, 3)), 0),
        (lambda y: y.mean((1, 2, 3))[:, None], 1),
        (lambda y: [y, y.mean()], 0),
        (lambda y: {"map": y}, 0),
        (lambda y: y.half(), 0),
    ],
    ids=["logits", "a map of logits", "vector", "one number", "list", "dict", "half"],
)
def test_a_plan_with_images_knows_which_layer_matters(wrap, num_classes):
    model, images = TwoBranches(wrap, num_classes), torch.randn(24, 32, 12, 12)
    plan = make_plan(
        model, keep_params=0.5, calibration=images, exclude=(), schemes=["channel"], input_size=(32, 12, 12)
    )
    assert plan.layers["quiet"].rank < 0.5 * (plan.layers["loud"].rank if "loud" in plan.layers else 32)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("num_classes", "scale"), [(32, 1.0), (0, 1.0), (0, 7.0)])
def test_a_plan_is_tried_by_what_it_does_to_the_output(num_classes, scale):
    model = TwoBranches(lambda y: scale * y.mean((2, 3)), num_classes).eval()
    images, layers = torch.randn(24, 32, 12, 12), {"loud": model.loud, "quiet": model.quiet}
    errors = OutputErrors(model, layers, images, macs=1.0)
    for name, layer in layers.items():
        errors.candidates(name, [SCHEMES["channel"](layer_shape(layer))])
    plan = RankPlan({"loud": LayerPlan("channel", 6), "quiet": LayerPlan("channel", 3)}, {})
    small = copy.deepcopy(model)
    for name in plan.layers:  # each on its own, as it is tried
        alone = decompose(copy.deepcopy(model), RankPlan({name: plan.layers[name]}, {}), images)
        setattr(small, name, getattr(alone, name))
    with torch.no_grad():
        exact, found = model(images), small(images)
    expected = (found - exact).square().sum() / exact.square().sum()
    if num_classes:
        expected = nn.functional.kl_div(found.log_softmax(-1), exact.softmax(-1), reduction="batchmean")
    assert errors.divergence(plan) == pytest.approx(float(expected), rel=1e-2)


def test_of_several_plans_none_harms_clearly_less_than_the_one_taken(resnet20, cifar_test, monkeypatch):
    images, _ = cifar_test(64)
    tried, divergence = [], OutputErrors.divergence

    def watched(self, plan):
        tried.append((divergence(self, plan), plan))
        return tried[-1][0]

    monkeypatch.setattr(OutputErrors, "divergence", watched)
    plan = make_plan(resnet20, keep_params=0.3, calibration=images, schemes=["channel", "tucker2"])
    taken = next(value for value, found in tried if found == plan)
    assert 0.95 * taken <= min(value for value, _ in tried) < max(value for value, _ in tried)


@pytest.mark.parametrize("stride", [1, 2])
def test_patches_at_some_positions_are_those_of_all(stride):
    conv = nn.Conv2d(4, 6, (3, 5), padding=(1, 2), stride=stride, dilation=(1, 2), groups=2)
    images, positions = torch.randn(3, 4, 13, 14), torch.tensor([0, 5, 17, 2])
    shape = layer_shape(conv)
    torch.testing.assert_close(patches(images, shape, positions=positions), patches(images, shape)[..., positions])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_memory_freed_between_pieces_in_use_goes_back_to_the_system():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    pieces = [torch.ones(2**14) for _ in range(3000)]  # 64 KiB each
    del pieces[1::2]
    before = resident()
    give_back_memory()
    assert before - resident() > 1000 * 2**16
    assert len(pieces) == 1500


@pytest.mark.parametrize(("roughly", "known", "images"), [(False, False, 16), (True, False, 40), (False, True, 150)])
def test_few_positions_of_a_large_map_stand_for_all(roughly, known, images):
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 8, 3, padding=1)
    smooth = nn.functional.conv2d(torch.randn(images, 3, 68, 68), torch.randn(64, 3, 5, 5))
    shape, device = layer_shape(conv), torch.device("cpu")
    found = PatchMoments(shape, device, paired=False, roughly=roughly, images=images if known else None)
    found.update(smooth, conv(smooth))
    assert found.count < images * 64 * 64 * (0.1 if known else 1)
    columns = patches(smooth, layer_shape(conv)).permute(1, 2, 0, 3).flatten(2)
    exact = columns @ columns.mT / columns.shape[-1]
    moment = found.regression(conv.weight.detach()).moment
    assert float((moment - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize(
    ("kernel", "dilation", "groups"), [((3, 3), (1, 1), 1), ((3, 5), (2, 1), 2), ((1, 3), (1, 2), 1)]
)
def test_stationary_moments_are_those_of_patches_everywhere(kernel, dilation, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, kernel, padding=1, dilation=dilation, groups=groups, bias=False)
    shape, images = layer_shape(conv), 0.3 * torch.randn(10, 4, 9, 8) + torch.randn(10, 1, 9, 1) + 1
    found, exact = StationaryMoments(shape, torch.device("cpu")), PatchMoments(shape, torch.device("cpu"), paired=False)
    for batch in images.split(4):
        found.update(batch, conv(batch))
        exact.update(batch, conv(batch))
    (down, right), (height, width) = dilation, kernel
    reach = ((width - 1) * right,) * 2 + ((height - 1) * down,) * 2
    everywhere = nn.functional.unfold(nn.functional.pad(images, reach), kernel, dilation)
    columns = everywhere.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)
    covariances = torch.stack([rows.cov(correction=0) for rows in columns])
    for problem, moment in (
        (found.regression(conv.weight.detach()), columns @ columns.mT / columns.shape[-1]),
        (found.regression(conv.weight.detach(), centred=True), covariances),
    ):
        kept, whole = problem.moment.triu(1), moment.triu(1)  # the diagonal is shrunk to
        share = (kept * whole).sum((1, 2), keepdim=True) / whole.square().sum((1, 2), keepdim=True)
        assert 0.2 < float(share.min()) <= 1
        torch.testing.assert_close(kept, share * whole, rtol=1e-3, atol=1e-5)
        assert torch.linalg.eigvalsh(problem.moment).min() > 0
    known = exact.regression(conv.weight.detach())
    torch.testing.assert_close((problem.x_mean, problem.y_mean), (known.x_mean, known.y_mean), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(problem.bias(conv.weight.detach()), torch.zeros(6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [PatchMoments, StationaryMoments])
def test_few_images_tell_something_of_a_large_layer(kind):
    torch.manual_seed(0)
    conv = nn.Conv2d(128, 8, 3, padding=1, bias=False)
    images = torch.randn(128, 1, 1) * torch.randn(4, 1, 12, 12) + 0.1 * torch.randn(4, 128, 12, 12)
    found = kind(layer_shape(conv), torch.device("cpu"))
    found.update(images, conv(images))
    moment = found.regression(conv.weight.detach()).moment
    assert float(moment.triu(1).norm() / moment.norm()) > 0.1  # no mere identity


def test_planning_holds_little_of_large_kernels_and_ranks_layers_alike():
    torch.manual_seed(0)
    smooth = nn.functional.interpolate(torch.randn(48, 8, 6, 6), scale_factor=2, mode="bilinear")
    model = nn.Sequential(nn.Conv2d(8, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 32, 3, padding=1, bias=False))
    layers = {"2": model[2]}
    rough, exact = (all_moments(model, layers, smooth, roughly=roughly)["2"] for roughly in (True, False))
    assert isinstance(rough, StationaryMoments)
    curves = []
    for moments in (rough, exact):
        moment = moments.regression(model[2].weight.detach()).moment
        values = SCHEMES["channel"](layer_shape(model[2])).spectrum(model[2].weight.detach(), moment)[0].square()
        curves.append(1 - values.cumsum(0) / values.sum())
    assert curves[0][15] == pytest.approx(float(curves[1][15]), rel=0.2)


def test_batches_of_a_loader():
    loader = [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])), (torch.zeros(1, 3, 8, 8), torch.tensor([1]))]
    assert [len(batch) for batch in batches(loader)] == [2, 1]
    assert [len(batch) for batch in batches(loader, most=1)] == [1]
    assert [len(batch) for batch in batches(loader, most=9)] == [2, 1]


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
    elif len(passes) == len(names) and looked_at < len(names) * images:  # with twice as many it would be too much
        assert sum(min(images, 2 * count) for _, count in passes) > affordable


@pytest.mark.parametrize("pixels", [2, 5])
def test_a_model_that_says_no_size_is_planned_at_that_of_the_images(pixels):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), Conv2dSame(16, 32, 3, stride=2), nn.ReLU(), Conv2dSame(32, 32, 3)]
    model, images = nn.Sequential(*layers).eval(), torch.randn(64, 3, pixels, pixels)
    before = model(images)
    plan = make_plan(model, keep_params=0.5, calibration=images, exclude=["0"])
    assert list(plan.layers) == ["1", "3"]  # of which a map of two pixels is less than a kernel
    after = decompose(model, plan, images)(images)
    assert after.shape == before.shape
    assert (after - before).square().sum() < before.square().sum()


def test_merging_gives_the_decomposed_model_back(resnet20, cifar_test):
    images, _ = cifar_test(64)
    model = copy.deepcopy(resnet20)
    decompose(model, make_plan(model, keep_params=0.5))
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(to_dense(model)(images), expected, rtol=1e-4, atol=1e-4)
    assert count_params(model) == count_params(resnet20)


def test_weights_alone_hold_the_floor(resnet20, cifar_test):
    images, labels = cifar_test(1000)
    model = copy.deepcopy(resnet20)
    decompose(model, make_plan(model, keep_params=0.5))
    assert top1(model, images, labels) > 88.0


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
    aware = decompose(copy.deepcopy(resnet20), plan, cifar_train(128))
    assert top1(aware, images, labels) > plain + 5
    assert not aware.training


class Fading(nn.Module):
    """A layer to decompose, then dense ones behind BatchNorms that expect what it gives at full rank."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.num_classes = 16
        self.before = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.behind = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))
        self.last = nn.BatchNorm2d(16)

    def forward(self, x):
        return self.last(self.behind(self.middle(self.before(x)))).mean((2, 3))


def fading_with_statistics():
    model, images = Fading(), torch.randn(256, 16, 8, 8)
    for _ in range(60):
        model(torch.randn(64, 16, 8, 8))  # in training mode: the statistics of other images
    return model.eval(), images


def test_norms_of_dense_layers_follow_and_those_before_stay_as_they_are():
    model, images = fading_with_statistics()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    channels = {}
    for kind, network in (("dense", model), ("small", decompose(copy.deepcopy(model), FADED, [images]))):
        handle = network.last.register_forward_hook(
            lambda module, args, output, kind=kind: channels.update({kind: output})
        )
        with torch.no_grad():
            network(images)
        handle.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name in ("before.1.running_mean", "before.1.running_var"):
        assert torch.equal(network.state_dict()[name], before[name])
    dense, small = (channels[kind].transpose(0, 1).flatten(1) for kind in ("dense", "small"))
    torch.testing.assert_close(small.mean(1), dense.mean(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(small.std(1), dense.std(1), rtol=2e-2, atol=0)


FADED = RankPlan({"middle": LayerPlan("channel", 3)}, {})


@pytest.mark.parametrize("batch_size", [256, 32, 1])
def test_norms_follow_alike_in_batches_of_any_size(batch_size):
    model, images = fading_with_statistics()
    whole = decompose(copy.deepcopy(model), FADED, [images]).state_dict()
    parts = decompose(copy.deepcopy(model), FADED, list(images.split(batch_size))).state_dict()
    for name in ("behind.1.running_var", "last.running_var"):
        torch.testing.assert_close(parts[name], whole[name], rtol=0.1, atol=0)


def test_norms_follow_by_as_many_images_as_suffice():
    model, images = fading_with_statistics()
    parts, found = list(images.split(64)), []
    for seen, most in ((parts, 64), (parts[:1], None)):
        small = decompose(copy.deepcopy(model), FADED)
        renormalise(small, model, seen, set(), most)
        found.append(small.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_a_plan_is_tried_with_the_norms_that_it_will_have():
    model, images = fading_with_statistics()
    few = images[:64]
    errors = OutputErrors(model, {"middle": model.middle}, few, macs=1.0)
    errors.candidates("middle", [SCHEMES["channel"](layer_shape(model.middle))])
    small = decompose(copy.deepcopy(model), FADED, [few])
    with torch.no_grad():
        exact, found = model(few).log_softmax(-1), small(few).log_softmax(-1)
    expected = nn.functional.kl_div(found, exact.exp(), reduction="batchmean")
    assert errors.divergence(FADED) == pytest.approx(float(expected), rel=1e-2)
    assert errors.importance("middle", FADED) > 0


def test_a_layer_matters_less_where_the_norms_behind_it_follow():
    model, images = fading_with_statistics()
    layers = {name: model.get_submodule(name) for name in ("middle", "behind.0", "behind.3")}
    errors = OutputErrors(model, layers, images[:64], macs=1.0)
    for name, layer in layers.items():
        errors.candidates(name, [SCHEMES["channel"](layer_shape(layer))])
    every = RankPlan({name: LayerPlan("channel", 3) for name in layers}, {})
    assert errors.importance("middle", FADED) < errors.importance("middle", every)


def test_planning_leaves_norms_as_they_were():
    model, images = fading_with_statistics()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_plan(model, keep_params=0.6, calibration=images, exclude=(), input_size=(16, 8, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
