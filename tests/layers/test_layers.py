"""Decomposed layers inside models: attributes, odd paddings, standardised weights, what stays dense."""

import pytest
import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import nn

from arp_hub import ArpHubError, LayerPlan, RankPlan, decompose, to_dense
from arp_hub.layers.dense import refusal
from arp_hub.layers.low_rank import GroupedLinear, effective_weight, layer_shape, low_rank_layer
from arp_hub.layers.model import weight_layers
from arp_hub.schemes import make_scheme
from arp_hub.timing import paired_ratio, take_turns

LAYERS = {
    "same padding by size": (lambda: Conv2dSame(6, 8, 3, stride=2), "cp"),
    "same padding by name": (lambda: nn.Conv2d(6, 8, (4, 3), padding="same"), "tucker2"),
    "valid by name": (lambda: nn.Conv2d(6, 8, 3, padding="valid"), "cp"),
    "reflect": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), "spatial"),
    "standardised": (lambda: StdConv2d(6, 8, 3, padding=1), "cp"),
    "scaled and standardised": (lambda: ScaledStdConv2d(6, 8, 3, padding=1), "channel"),
    "grouped 1x1": (lambda: nn.Conv2d(8, 8, 1, groups=2, bias=False), "channel"),
    "timm linear": (lambda: timm.layers.Linear(6, 8), "group_out"),
}


@pytest.mark.parametrize(("make", "scheme"), LAYERS.values(), ids=LAYERS)
def test_full_rank_stands_in_for_the_dense_layer(make, scheme):
    torch.manual_seed(0)
    dense = make()
    x = torch.randn(2, 5, 6) if isinstance(dense, nn.Linear) else torch.randn(2, dense.in_channels, 11, 14)
    groups = 2 if scheme.startswith("group") else 1
    rank = make_scheme(scheme, layer_shape(dense), groups).max_rank
    layer = low_rank_layer(dense, LayerPlan(scheme, rank, groups))
    layer.load_factors(layer.scheme.nearest(effective_weight(dense).double(), rank), dense.bias)
    for other in (layer, layer.dense_layer()):
        torch.testing.assert_close(other(x), dense(x), rtol=1e-4, atol=1e-5)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "in_features"):
        if hasattr(dense, name):
            assert getattr(layer, name) == getattr(dense, name)


@pytest.mark.parametrize(("make", "scheme"), LAYERS.values(), ids=LAYERS)
def test_outputs_have_the_precision_of_the_dense_layer(make, scheme):
    """Under autocast, too: a grouped linear layer is several operations, of which not all round."""
    dense = make()
    x = torch.randn(2, 5, 6) if isinstance(dense, nn.Linear) else torch.randn(2, dense.in_channels, 11, 14)
    layer = low_rank_layer(dense, LayerPlan(scheme, 2, 2 if scheme.startswith("group") else 1))
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            assert layer(x).dtype is dense(x).dtype is dtype


def test_a_merged_weight_cannot_be_written():
    dense = nn.Conv2d(8, 8, 3)
    layer = low_rank_layer(dense, LayerPlan("cp", 4))
    with pytest.raises(ArpHubError, match=r"change layer\.factors"):
        layer.weight = nn.Parameter(torch.zeros(8, 8, 3, 3))


@pytest.mark.parametrize(
    "module", [nn.Conv2d(8, 8, 3, groups=8), nn.Conv1d(4, 4, 3), nn.Conv3d(4, 4, 3), nn.Embedding(4, 4), nn.LSTM(4, 4)]
)
def test_what_stays_dense_says_why(module):
    assert refusal(module)
    with pytest.raises(ArpHubError):
        layer_shape(module)


def test_a_shared_layer_is_found_once():
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    assert [name for name, _ in weight_layers(model)] == ["a"]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_deepcopy_half_and_export(memory_format):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=4).eval().to(memory_format=memory_format)
    plan = RankPlan({"layer1.0.conv1": LayerPlan("cp", 20), "layer2.0.conv1": LayerPlan("spatial", 20)})
    decompose(model, plan)
    x = torch.randn(2, 3, 32, 32).to(memory_format=memory_format)
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), expected, rtol=0.1, atol=0.1)


def test_to_dense_gives_plain_modules_and_the_same_outputs():
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=4).eval()
    convs = [n for n, m in weight_layers(model) if refusal(m) is None and n != model.pretrained_cfg["first_conv"]]
    shapes = {name: layer_shape(model.get_submodule(name)) for name in convs}
    plan = {name: LayerPlan("channel", min(4, make_scheme("channel", shapes[name]).max_rank)) for name in convs}
    decompose(model, RankPlan(plan))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        keys = set(timm.create_model("test_efficientnet", num_classes=4).state_dict())
        merged = to_dense(model)
        assert set(merged.state_dict()) == keys
        torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)


def test_a_grouped_linear_layer_is_no_slower_than_a_dense_one():
    grouped, dense, x = GroupedLinear(768, 3072, 4), torch.nn.Linear(768, 3072), torch.randn(2, 196, 768)
    torch.nn.init.normal_(grouped.weight)
    with torch.inference_mode():
        samples = take_turns({"grouped": lambda: grouped(x), "dense": lambda: dense(x)}, x.device, seconds=0.2)
    assert paired_ratio(samples["grouped"], samples["dense"]).median < 1.5  # the measured ratio is about a third


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_grouped_linear_layer_exports_to_onnx(dynamo, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, file = nn.Sequential(nn.Linear(12, 8)).eval(), str(tmp_path / "model.onnx")
    decompose(model, RankPlan({"0": LayerPlan("group_in", 2, 2)}))
    x, dynamic = torch.randn(2, 5, 12), {0: "batch", 1: "tokens"}
    names = {"input_names": ["x"], "output_names": ["y"]}
    shapes = {"dynamic_shapes": ({0: torch.export.Dim("b"), 1: torch.export.Dim("t")},)} if dynamo else {}
    axes = {} if dynamo else {"dynamic_axes": {"x": dynamic, "y": dynamic}}
    torch.onnx.export(model, (x,), file, dynamo=dynamo, verbose=False, **names, **shapes, **axes)
    session, other = onnxruntime.InferenceSession(file), torch.randn(3, 7, 12)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": other.numpy()})[0]), model(other))


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 5, 12), (2, 3, 4, 12), (0, 12)])
def test_a_grouped_linear_layer_is_a_block_diagonal_one(shape):
    torch.manual_seed(0)
    layer, x = GroupedLinear(12, 8, 4), torch.randn(shape)
    nn.init.normal_(layer.weight)
    expected = nn.functional.linear(x, torch.block_diag(*layer.weight.chunk(4)), layer.bias)
    for found in (layer, torch.jit.script(layer), torch.export.export(layer, (x,)).module()):
        torch.testing.assert_close(found(x), expected, rtol=1e-4, atol=1e-5)
