"""Images, weights and modes of torch of every kind are computed with, or refused in one line."""

import copy

import pytest
import timm
import torch
from torch import nn

from arp_hub import AdaptiveRankPenalty, ArpHubError, LayerPlan, RankPlan, decompose, make_plan, to_dense
from arp_hub.layers.model import low_rank_layers


def small_model() -> nn.Module:
    """Convolutions with and without a BatchNorm behind them, a linear layer, and a residual connection."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.num_classes = 10
            self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
            self.plain = nn.Conv2d(24, 24, 3, padding=1)
            self.last = nn.Linear(24, 10)

        def forward(self, x):
            x = self.stem(x)
            return self.last((x + self.plain(x)).mean((2, 3)))

    return Small().eval()


IMAGES = torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(0))
PLANNED = {"keep_params": 0.6, "schemes": ["channel", "cp"], "exclude": (), "input_size": (3, 12, 12), "effort": "fast"}


def compressed(model: nn.Module, images: torch.Tensor) -> nn.Module:
    plan = make_plan(model, calibration=images, **PLANNED)
    return decompose(copy.deepcopy(model), plan, images, effort="fast")


def relative_change(model: nn.Module, small: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        exact, found = model(images).double(), small(images).double()
    return float((found - exact).norm() / exact.norm().clamp_min(1e-30))


MIXES = {
    "half": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "double": (torch.float64, torch.float64),
    "a double model, single images": (torch.float64, torch.float32),
    "a bfloat16 model, single images": (torch.bfloat16, torch.float32),
    "a single model, half images": (torch.float32, torch.float16),
}


@pytest.mark.parametrize(("weights", "pixels"), MIXES.values(), ids=MIXES)
def test_any_floating_point_type(weights, pixels):
    model = small_model()
    expected = relative_change(model, compressed(model, IMAGES), IMAGES)
    other = copy.deepcopy(model).to(weights)
    small = compressed(other, IMAGES.to(pixels))
    assert {parameter.dtype for parameter in small.parameters()} == {weights}
    assert relative_change(other, small, IMAGES.to(weights)) < expected + 0.05
    merged = to_dense(copy.deepcopy(small))
    assert relative_change(small, merged, IMAGES.to(weights)) < (1e-5 if weights == torch.float64 else 0.05)


MODES = {
    "meta device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_ambient_modes_change_nothing(mode):
    model = small_model()
    expected = compressed(model, IMAGES).state_dict()
    small = copy.deepcopy(model)
    with mode():
        plan = make_plan(small, calibration=IMAGES, **PLANNED)
        decompose(small, plan, IMAGES, effort="fast")
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    small.train()(IMAGES).sum().backward()  # it can be trained afterwards
    assert all(parameter.grad is not None for parameter in small.parameters())
    with mode():
        to_dense(small)
    small.train()(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model, images = small_model(), IMAGES.clone()
    with pytest.raises(ArpHubError, match="made in inference mode"):
        make_plan(model, calibration=IMAGES, **PLANNED)
    assert low_rank_layers(compressed(small_model(), images))
    with pytest.raises(ArpHubError, match="made in inference mode"):
        decompose(model, make_plan(model, **PLANNED), IMAGES)
    decompose(copy.deepcopy(model), make_plan(model, **PLANNED), IMAGES)


ODD = {
    "black": torch.full_like(IMAGES, -2.0),
    "all zero": torch.zeros_like(IMAGES),
    "one image": IMAGES[:1],
    "the same image again and again": IMAGES[:1].expand(24, -1, -1, -1),
    "one pixel differs": torch.zeros_like(IMAGES).index_fill_(0, torch.tensor([3]), 1.0),
    "tiny": 1e-12 * IMAGES,
}


@pytest.mark.parametrize("images", ODD.values(), ids=ODD)
def test_images_that_say_little(images):
    model = small_model()
    small = compressed(model, images)
    assert all(bool(tensor.isfinite().all()) for tensor in small.state_dict().values())
    assert relative_change(model, small, IMAGES) < 2  # where images say nothing, the fit follows the weights


@pytest.mark.parametrize("dead", ["stem.0", "plain", "last"])
@pytest.mark.parametrize("images", [None, IMAGES], ids=["weights alone", "images"])
def test_a_dead_layer_fits_at_any_rank(dead, images):
    model = small_model()
    with torch.no_grad():
        model.get_submodule(dead).weight.zero_()
    small = decompose(copy.deepcopy(model), make_plan(model, calibration=images, **PLANNED), images)
    assert low_rank_layers(small)
    assert all(bool(tensor.isfinite().all()) for tensor in small.state_dict().values())


def test_a_dead_layer_fits_where_numbers_below_the_smallest_normal_one_are_zero():
    """Some processors take them for zero; here every one is made to."""
    model = small_model()
    with torch.no_grad():
        model.get_submodule("stem.0").weight.zero_()
    assert torch.set_flush_denormal(True)
    try:
        small = decompose(copy.deepcopy(model), make_plan(model, **PLANNED))
    finally:
        torch.set_flush_denormal(False)
    assert all(bool(tensor.isfinite().all()) for tensor in small.state_dict().values())


def spoilt(name, value):
    """A model with one odd number."""
    model = small_model()
    model.state_dict()[name].view(-1)[0] = value
    return model


SPOILT = {
    f"{name} {value}": (name, value, message)
    for name, values, message in (
        ("plain.weight", (float("nan"), float("inf")), "layer 'plain': its weight holds NaN or infinite"),
        ("last.bias", (float("nan"), -float("inf")), "layer 'last': its bias holds NaN or infinite"),
        ("stem.1.running_mean", (float("nan"),), "layer 'stem.1': its running_mean holds NaN"),
        ("stem.1.running_var", (-5.0, float("nan")), "NaN or infinite"),
    )
    for value in values
}


@pytest.mark.parametrize("case", SPOILT)
@pytest.mark.parametrize("images", [None, IMAGES], ids=["weights alone", "images"])
def test_a_model_that_gives_no_finite_output_is_refused(case, images):
    name, value, message = SPOILT[case]
    if value == -5.0 and images is None:
        pytest.skip("only images show it")
    model = spoilt(name, value)
    plan = make_plan(small_model(), **PLANNED)
    with pytest.raises(ArpHubError, match=message):
        make_plan(model, calibration=images, **PLANNED)
    with pytest.raises(ArpHubError, match=message):
        decompose(model, plan, images)
    assert not low_rank_layers(model)


nan, infinite = IMAGES.clone(), IMAGES.clone()
nan[5, 0, 3, 3], infinite[23, 1, 0, 0] = float("nan"), float("inf")
REFUSED = {
    "a NaN pixel": (nan, "calibration image 5 holds NaN or infinite pixels"),
    "an infinite pixel": (infinite, "calibration image 23 holds NaN or infinite pixels"),
    "a NaN in a later batch": ([IMAGES, nan], "calibration image 29 holds NaN"),
    "no images": (IMAGES[:0], "there are no calibration images"),
    "no pixels": (IMAGES[..., :0], "must have pixels"),
    "no memory": (IMAGES.to("meta"), "meta device"),
    "bytes": ((IMAGES * 50 + 128).byte(), "normalised float tensors"),
    "bytes as floats": ((IMAGES * 50 + 128).clamp(0, 255), "divide bytes by 255"),
    "one image without a batch": (IMAGES[0], r"\(N, C, H, W\), got \(3, 12, 12\)"),
    "a list of names": (["a.png"], "got str"),
    "a number": (5, "got int"),
    "sparse images": (IMAGES.to_sparse(), r"got torch.sparse_coo: call to_dense\(\)"),
    "grey images": (IMAGES[:, :1], "cannot run on an input"),
}


@pytest.mark.parametrize(("images", "message"), REFUSED.values(), ids=REFUSED)
def test_images_that_are_refused(images, message):
    model = small_model()
    plan = make_plan(model, **PLANNED)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArpHubError, match=message):
        decompose(model, plan, images)
    with pytest.raises(ArpHubError, match=message):
        make_plan(model, calibration=images, **{**PLANNED, "input_size": None})
    assert not low_rank_layers(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_images_of_a_model_that_normalises_by_itself():
    """Nothing is known of a model without a config: the message says how to tell that it takes bytes."""
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    settings = {"keep_params": 0.5, "calibration": 255 * torch.rand(40, 3, 8, 8), "effort": "fast"}
    with pytest.raises(
        ArpHubError, match=r"If the model takes such pixels, say so by (model.pretrained_cfg = .*)"
    ) as said:
        make_plan(model.eval(), **settings)
    exec(str(said.value).rpartition("say so by ")[2], {"model": model})
    assert make_plan(model, **settings).layers


def test_images_that_may_not_be_normalised_are_named():
    model = timm.create_model("cifar_resnet20").eval()  # its mean and std are ImageNet's
    with pytest.warns(UserWarning, match="no negative pixel"):
        make_plan(model, keep_params=0.5, calibration=torch.rand(8, 3, 32, 32), schemes=["channel"], effort="fast")


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e15, 1e19, 1e25])
def test_weights_of_any_size_are_planned_and_decomposed_alike(scale):
    model = small_model()
    plan = make_plan(model, **PLANNED)
    small = decompose(copy.deepcopy(model), plan)
    name = next(iter(plan.layers))
    with torch.no_grad():
        model.get_submodule(name).weight.mul_(scale)
    assert make_plan(model, **PLANNED).layers == plan.layers
    decompose(model, plan)
    found, expected = (each.get_submodule(name).weight.double() for each in (model, small))
    assert (found / scale - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("scale", [1e-20, 1e10, 1e19])
@pytest.mark.parametrize("name", ["stem.0", "plain"])
def test_weights_of_any_size_are_fitted_or_refused_by_name(scale, name):
    model = small_model()
    with torch.no_grad():
        model.get_submodule(name).weight.mul_(scale)
    try:
        small = compressed(model, IMAGES)
    except ArpHubError as error:
        assert str(error).startswith("layer '") and "too large or too small" in str(error) and scale > 1
    else:
        assert all(bool(tensor.isfinite().all()) for tensor in small.state_dict().values())


def test_a_pull_of_outsized_weights_names_the_layer():
    model, plan = small_model(), RankPlan({"plain": LayerPlan("channel", 4)})
    with torch.no_grad():
        model.plain.weight.mul_(1e25)
    penalty = AdaptiveRankPenalty(model, plan, total_steps=1, ramp=0)
    with pytest.raises(ArpHubError, match="layer 'plain' cannot be factorised"):
        penalty.step()


class Shared(nn.Module):
    """A layer whose output goes to a BatchNorm, and to one more reader."""

    def __init__(self, reader: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reader, self.num_classes = reader, 0
        self.conv = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norm, self.other = nn.BatchNorm2d(16), nn.BatchNorm2d(16)

    def forward(self, x):
        y = self.conv(x)
        if self.reader == "a sum":
            return self.norm(y) + y
        if self.reader == "a second BatchNorm":
            return self.norm(y) + self.other(y)
        if self.reader == "the caller":
            return self.norm(y), y
        if self.reader == "a second call":
            return self.norm(y) + self.norm(self.conv(x.flip(-1)))
        return self.norm(y)


HOOKED = {
    "a hook": lambda model: model.conv.register_forward_hook(lambda *_: None),
    "a hook of the whole": lambda model: model.register_forward_hook(lambda *_: None),
    "a hook of the norm": lambda model: model.norm.register_forward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("reader", ["no other", "a sum", "a second BatchNorm", "the caller", "a second call", *HOOKED])
def test_only_a_sole_reader_takes_up_a_change_of_mean(reader):
    model = Shared(reader).eval()
    if reader in HOOKED:
        HOOKED[reader](model)
    images = torch.randn(32, 8, 6, 6) + 2
    plan = make_plan(model, keep_params=0.5, schemes=["channel"], exclude=(), input_size=(8, 6, 6))
    small = decompose(copy.deepcopy(model), plan, images)
    moved = not torch.equal(small.norm.running_mean, model.norm.running_mean)
    assert moved  # by the fit, or by the later pass that updates the norms behind dense layers
    change = small.norm.running_mean - model.norm.running_mean
    with torch.no_grad():
        shift = (model.conv(images) - small.conv(images)).mean((0, 2, 3))
    taken_up = torch.allclose(change, -shift, rtol=1e-3, atol=1e-4) and torch.equal(
        small.norm.running_var, model.norm.running_var
    )
    assert taken_up == (reader in ("no other", "a hook of the whole"))
