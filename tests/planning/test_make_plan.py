"""Plans on real models: budgets met, arguments refused, sensitivities measured."""

import copy
import re

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import Conv2dSame, ScaledStdConv2dSame, StdConv2dSame
from torch import nn

from arp_hub import ArpHubError, LayerPlan, RankPlan, decompose, make_plan
from arp_hub.effort import Effort
from arp_hub.layers.low_rank import layer_shape
from arp_hub.layers.model import count_params, weight_layers
from arp_hub.layers.trace import count_macs
from arp_hub.planning.output_errors import OutputErrors
from arp_hub.schemes import SCHEMES


@pytest.fixture(scope="module")
def resnet20(shared):
    model = timm.create_model("cifar_resnet20")
    model.load_state_dict(load_file(shared / "weights/resnet20_cifar10.safetensors"))
    return model.eval()


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


class SelfPadding(nn.Module):
    """Convolutions that pad their input before they convolve it, on maps of 7 and 4 pixels a side."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.standardised = StdConv2dSame(64, 64, 3)
        self.halving = ScaledStdConv2dSame(64, 64, 3, stride=2)
        self.same = Conv2dSame(64, 64, 3)
        self.mirrored = nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect")

    def forward(self, x):
        for layer in self.children():
            x = layer(x).relu()
        return x.mean((2, 3))


def test_a_budget_of_macs_counts_the_padding_that_layers_add():
    torch.manual_seed(0)
    model = SelfPadding().eval()
    size = (3, 7, 7)
    before = count_macs(model, size)
    plan = make_plan(model, keep_macs=0.5, input_size=size, schemes=["channel"])
    decompose(model, plan)
    assert 0.98 * 0.5 <= count_macs(model, size) / before <= 0.5


class Tiles(torch.nn.Module):
    """Cuts an image into four tiles, which a backbone sees one by one."""

    def __init__(self):
        super().__init__()
        self.backbone = timm.create_model("test_resnet", num_classes=10)

    def forward(self, x):
        tiles = x.unfold(2, x.shape[2] // 2, x.shape[2] // 2).unfold(3, x.shape[3] // 2, x.shape[3] // 2)
        return self.backbone(tiles.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)).unflatten(0, (len(x), 4)).mean(1)


def test_a_budget_of_macs_counts_every_tile_of_an_image():
    torch.manual_seed(0)
    model, size = Tiles().eval(), (3, 128, 128)
    before = count_macs(model, size)
    decompose(model, make_plan(model, keep_macs=0.7, input_size=size))
    assert 0.98 * 0.7 <= count_macs(model, size) / before <= 0.7


@pytest.mark.parametrize("multiple", [1, 2, 4, 8])
def test_the_share_that_a_refusal_names_can_be_asked_for(multiple):
    model = timm.create_model("test_resnet")
    with pytest.raises(ArpHubError, match="cannot be met") as refused:
        make_plan(model, keep_params=0.001, rank_multiple=multiple)
    lowest = float(re.search(r"lowest rank (0\.\d+)", str(refused.value))[1])
    plan = make_plan(model, keep_params=lowest, rank_multiple=multiple)
    before = count_params(model)
    assert count_params(decompose(model, plan)) <= lowest * before


def test_the_first_convolution_stays_dense_in_a_backbone_of_features():
    model = timm.create_model("test_convnext", features_only=True)
    assert make_plan(model, keep_params=0.6, input_size=(3, 64, 64)).dense["stem_0"] == "first convolution"


@pytest.mark.parametrize("rank", [2, None], ids=["of rank 2", "of full rank"])
def test_a_plan_says_that_it_leaves_budget_unspent(rank, recwarn):
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    for module in model.modules():
        if rank and isinstance(module, torch.nn.Linear):
            rows, columns = module.weight.shape
            module.weight.data = 0.02 * torch.randn(rows, rank) @ torch.randn(rank, columns)
    before = count_params(model)
    plan = make_plan(model, keep_params=0.9)
    decompose(model, plan)
    said = [str(warning.message) for warning in recwarn if "keep_params" in str(warning.message)]
    assert len(said) == (1 if rank else 0)
    if rank:
        assert said[0].startswith(f"keep_params=0.9, but the plan keeps {count_params(model) / before:.3f}: ")


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
    "one side": ({"keep_params": 0.5, "input_size": 224}, "input_size must be .*got 224"),
    "one-pass images": ({"keep_params": 0.5, "calibration": iter([torch.zeros(2, 3, 32, 32)])}, "one-pass"),
    "no images": ({"keep_params": 0.5, "calibration": []}, "no calibration images"),
    "bytes": ({"keep_params": 0.5, "calibration": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, "float tensors"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_BUDGETS.values(), ids=BAD_BUDGETS)
def test_bad_budget(arguments, message):
    with pytest.raises(ArpHubError, match=message):
        make_plan(timm.create_model("cifar_resnet20"), **arguments)


@pytest.mark.parametrize("name", ["images", "schemes_measured", "fit_iterations"])
def test_numbers_of_things_are_whole(name):
    with pytest.raises(ArpHubError, match=f"effort: {name} must be a whole number, got 1.5"):
        Effort(**{name: 1.5})


def test_an_effort_needs_two_points_of_a_curve():
    with pytest.raises(ArpHubError, match="curve_shares needs at least two shares"):
        Effort(curve_shares=(0.5,))


def test_planning_a_decomposed_model_is_refused():
    model = timm.create_model("cifar_resnet20")
    decompose(model, RankPlan({"layer1.0.conv1": LayerPlan("cp", 4)}))
    with pytest.raises(ArpHubError, match="to_dense"):
        make_plan(model, keep_params=0.5)


class TwoBranches(nn.Module):
    """Two convolutions with equal weights; the second hardly changes the output."""

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


@pytest.mark.parametrize("num_classes", [32, 0])
def test_sensitivities_predict_what_a_layer_does_to_the_output(num_classes):
    """Of a classifier the divergence is that of predictions softened by 4, times 16; of others the squared change."""
    model = TwoBranches(lambda y: 3 * y.mean((2, 3)), num_classes).eval()
    images, layers = torch.randn(2000, 32, 4, 4), {"loud": model.loud, "quiet": model.quiet}
    errors = OutputErrors(model, layers, images, macs=1.0, effort=Effort())
    schemes = {name: [SCHEMES["channel"](layer_shape(layer))] for name, layer in layers.items()}
    curves = {name: found[0] for name, found in errors.candidates(schemes)}
    for name, sensitivity in errors.sensitivities().items():
        plan = RankPlan({name: LayerPlan("channel", 12)}, {})
        with torch.no_grad():
            exact, found = model(images), decompose(copy.deepcopy(model), plan, images)(images)
        if num_classes:
            soft = (found / 4).log_softmax(-1), (exact / 4).softmax(-1)
            expected = 16 * nn.functional.kl_div(*soft, reduction="batchmean")
        else:
            expected = (found - exact).square().sum(1).mean() / 2
        assert sensitivity * curves[name].errors[11] == pytest.approx(float(expected), rel=0.15)


@pytest.mark.parametrize("pixels", [2, 5])
def test_a_model_that_says_no_size_is_planned_at_that_of_the_images(pixels):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), Conv2dSame(16, 32, 3, stride=2), nn.ReLU(), Conv2dSame(32, 32, 3)]
    model, images = nn.Sequential(*layers).eval(), torch.randn(64, 3, pixels, pixels)
    before = model(images)
    plan = make_plan(model, keep_params=0.5, calibration=images, exclude=["0"])
    assert list(plan.layers) == ["1", "3"]  # a map of two pixels is smaller than a kernel
    after = decompose(model, plan, images)(images)
    assert after.shape == before.shape
    assert (after - before).square().sum() < before.square().sum()
