"""Wrong arguments, and layers whose weight is computed, shared or wrapped: left dense or refused, by name."""

import copy
import socket

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

from arp_hub import (
    AdaptiveRankPenalty,
    ArpHubError,
    LayerPlan,
    RankPlan,
    benchmark,
    decompose,
    make_plan,
    push_to_hub,
    save_pretrained,
    to_dense,
)
from arp_hub.layers.model import count_params, refusals
from arp_hub.reports.summary import plan_report

NAME = "layer3.1.conv1"
PLAN = RankPlan({NAME: LayerPlan("channel", 4)})


class Adapter(nn.Module):
    """A layer with a parallel low-rank update, as in PEFT's LoRA layers."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.update = copy.deepcopy(base_layer)

    def forward(self, x):
        return self.base_layer(x) + self.update(x)


def model_with(change) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20").eval()
    change(model.layer3[1])
    with torch.no_grad():  # computed weights are then without a graph, so that the model can be copied
        model(torch.zeros(1, 3, 32, 32))
    return model


def put(name, make):
    return lambda block: setattr(block, name, make(getattr(block, name)))


ALTERED = {
    "weight_norm": (put("conv1", weight_norm), "remove_weight_norm"),
    "spectral_norm": (put("conv1", spectral_norm), "remove_spectral_norm"),
    "prune": (lambda block: prune.l1_unstructured(block.conv1, "weight", 0.5), r"prune\.remove"),
    "parametrized": (put("conv1", parametrizations.weight_norm), "remove_parametrizations"),
    "extra parameter": (lambda block: block.conv1.register_parameter("scale", nn.Parameter(torch.ones(1))), "'scale'"),
    "extra buffer": (lambda block: block.conv1.register_buffer("mask", torch.ones(1)), "'mask'"),
    "own forward": (lambda block: setattr(block.conv1, "forward", block.conv1.forward), "'forward' was replaced"),
    "shared": (lambda block: setattr(block.conv2, "weight", block.conv1.weight), r"with 'layer3\.1\.conv2'"),
}


@pytest.mark.parametrize(("change", "message"), ALTERED.values(), ids=ALTERED)
def test_altered_layers_stay_dense_and_are_refused_by_name(change, message):
    model = model_with(change)
    plan = make_plan(model, keep_params=0.7, schemes=["channel"])
    with pytest.raises(ArpHubError, match=message):
        raise ArpHubError(plan.dense[NAME])
    before = count_params(model)
    assert count_params(decompose(model, plan)) / before <= 0.7
    for use in (decompose, lambda model, plan: AdaptiveRankPenalty(model, plan, total_steps=10)):
        with pytest.raises(ArpHubError, match=rf"layer '{NAME}' cannot be decomposed.*{message}"):
            use(model, PLAN)


def test_a_computed_weight_that_cannot_be_copied_is_refused_at_once():
    model = timm.create_model("cifar_resnet20")
    prune.l1_unstructured(model.layer3[1].conv1, "weight", 0.5)
    for use in (lambda: make_plan(model, keep_params=0.5), lambda: decompose(model, PLAN, torch.zeros(2, 3, 32, 32))):
        with pytest.raises(ArpHubError, match=rf"{NAME}.*prune\.remove"):
            use()
    prune.remove(model.layer3[1].conv1, "weight")
    assert make_plan(model, keep_params=0.5).layers


def test_layers_of_an_adapter_stay_dense():
    model = model_with(put("conv1", Adapter))
    plan = make_plan(model, keep_params=0.7, schemes=["channel"])
    for part in ("base_layer", "update"):
        assert f"adapter '{NAME}': merge it first" in plan.dense[f"{NAME}.{part}"]
    with pytest.raises(ArpHubError, match=rf"'{NAME}\.base_layer' cannot be decomposed: part of the adapter"):
        decompose(model, RankPlan({f"{NAME}.base_layer": LayerPlan("channel", 4)}))


def quantised(layer: nn.Module) -> nn.Module:
    layer.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return torch.ao.nn.quantized.dynamic.Linear.from_float(layer)


def low_rank_vit() -> nn.Module:
    model = timm.create_model("test_vit").eval()
    return decompose(model, RankPlan({"blocks.0.mlp.fc1": LayerPlan("channel", 8)}))


FACTORS = {
    "adapter": (Adapter, "Adapter: merge adapters"),
    "quantised": (quantised, "quantise only the merged model"),
    "parametrized": (parametrizations.weight_norm, "remove_parametrizations"),
    "pruned": (lambda factor: prune.random_unstructured(factor, "weight", 0.5), r"prune\.remove"),
}


def longer(layer):
    layer.factors.append(nn.Linear(192, 192))


def of_another_rank(layer):
    layer.factors[0], layer.factors[1] = nn.Linear(64, 16, bias=False), nn.Linear(16, 192)


def with_a_bias_within(layer):
    layer.factors[0].bias = nn.Parameter(torch.ones(8))


ADDED = {
    "parameter": (lambda layer: layer.register_parameter("scale", nn.Parameter(torch.ones(1))), "holds 'scale'"),
    "buffer": (lambda layer: layer.register_buffer("mask", torch.ones(1)), "holds 'mask'"),
    "module": (lambda layer: layer.add_module("adapter", nn.Linear(2, 2)), "holds 'adapter'"),
    "forward": (lambda layer: setattr(layer, "forward", lambda x: 2 * layer.factors(x)), "'forward' was replaced"),
    "forward of factors": (lambda layer: setattr(layer.factors, "forward", lambda x: x), "'forward' was replaced"),
    "a factor": (longer, "its factors have shapes"),
    "another rank": (of_another_rank, "its factors have shapes"),
    "a bias": (with_a_bias_within, "factor 0 has a bias"),
}


@pytest.mark.parametrize(("change", "message"), ADDED.values(), ids=ADDED)
def test_what_was_added_to_a_low_rank_layer_is_not_lost(change, message, tmp_path):
    model = low_rank_vit()
    change(model.blocks[0].mlp.fc1)
    for use in (to_dense, lambda model: save_pretrained(model, tmp_path / "out")):
        with pytest.raises(ArpHubError, match=rf"layer 'blocks\.0\.mlp\.fc1' cannot be merged: .*{message}"):
            use(model)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*will be removed:UserWarning")
def test_a_quantised_model_is_refused_by_layer(tmp_path):
    model = torch.ao.quantization.quantize_dynamic(timm.create_model("test_vit").eval(), {nn.Linear})
    with pytest.raises(ArpHubError, match="layer '.*' is quantised: plan the model before"):
        make_plan(model, keep_params=0.5)
    with pytest.raises(ArpHubError, match="belongs to a quantised layer"):
        save_pretrained(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("change", "message"), FACTORS.values(), ids=FACTORS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*will be removed:UserWarning")
def test_altered_factors_are_neither_merged_nor_saved(change, message, tmp_path):
    model = low_rank_vit()
    factors = model.blocks[0].mlp.fc1.factors
    factors[0] = change(factors[0])
    with torch.no_grad():  # computed weights are then without a graph
        model(torch.zeros(1, *model.pretrained_cfg["input_size"]))
    for use in (to_dense, benchmark, lambda model: save_pretrained(model, tmp_path / "out")):
        with pytest.raises(ArpHubError, match=rf"layer 'blocks\.0\.mlp\.fc1' cannot be merged: factor 0.*{message}"):
            use(model)
    with pytest.raises(ArpHubError, match=message):
        _ = model.blocks[0].mlp.fc1.weight
    assert not list(tmp_path.iterdir())


def test_lora_of_peft():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = low_rank_vit()
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*fc1\.factors\.0", init_lora_weights=False))
    with pytest.raises(ArpHubError, match="merge_and_unload"):
        to_dense(lora)
    with torch.no_grad():
        expected = lora.eval()(x)
        with pytest.raises(ArpHubError, match=r"'blocks\.0\.mlp\.fc1' cannot be merged"):
            to_dense(lora.base_model.model)
        torch.testing.assert_close(to_dense(lora.merge_and_unload())(x), expected, rtol=1e-4, atol=1e-5)


def zero_item(weight):
    weight[0] = 0


def double(weight):
    weight *= 2


def rows(weight):
    for row in weight:
        row.zero_()


WRITES = {
    "several at once": lambda weight: torch._foreach_mul_([weight], 0),
    "in place by name": lambda weight: nn.functional.relu(weight, inplace=True),
    "an operator": lambda weight: torch.ops.aten.mul_.Scalar(weight, 0),
    "views": lambda weight: weight.unbind()[0].zero_(),
    "parts": lambda weight: weight.chunk(2)[0].zero_(),
    "rows": rows,
    "in place": lambda weight: weight.mul_(0),
    "augmented": double,
    "through data": lambda weight: weight.data.zero_(),
    "new data": lambda weight: setattr(weight, "data", torch.zeros(8, 8)),
    "by init": nn.init.zeros_,
    "an item": zero_item,
    "a view": lambda weight: weight[0].zero_(),
    "detached": lambda weight: weight.detach().copy_(torch.zeros(8, 8)),
    "out": lambda weight: torch.add(1, 1, out=weight),
    "freezing": lambda weight: weight.requires_grad_(False),
    "freezing by attribute": lambda weight: setattr(weight, "requires_grad", False),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("ambient", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_write_to_a_computed_weight_is_an_error(write, ambient):
    model = decompose(nn.Sequential(nn.Linear(8, 8)), RankPlan({"0": LayerPlan("channel", 2)}))
    with ambient(), pytest.raises(ArpHubError, match=r"change layer\.factors"):
        write(model[0].weight)


COUNTED = {
    "in place by place": lambda weight: nn.functional.relu(weight, True),
    "one of two results": lambda weight: torch.max(torch.randn(8, 8), 0, out=(weight[0], torch.zeros(8).long())),
}


@pytest.mark.parametrize("write", COUNTED.values(), ids=COUNTED)
def test_a_write_that_no_name_shows_is_an_error(write):
    model = decompose(nn.Sequential(nn.Linear(8, 8)), RankPlan({"0": LayerPlan("channel", 2)}))
    with torch.no_grad(), pytest.raises(ArpHubError, match=r"change layer\.factors"):
        write(model[0].weight)


PRUNINGS = {
    "one layer": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "all layers": lambda layer: prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=0.5),
    "whole rows": lambda layer: prune.random_structured(layer, "weight", 0.5, 0),
}


@pytest.mark.parametrize("change", PRUNINGS.values(), ids=PRUNINGS)
def test_a_low_rank_layer_is_not_pruned_itself(change):
    layer = low_rank_vit().blocks[0].mlp.fc1
    with pytest.raises(ArpHubError, match=r"'weight_orig' cannot be added.*layer\.factors"):
        change(layer)
    prune.l1_unstructured(layer.factors[0], "weight", 0.5)


def test_a_computed_weight_can_be_read_like_any_other():
    model = decompose(nn.Sequential(nn.Linear(8, 8)), RankPlan({"0": LayerPlan("channel", 2)}))
    weight, x = model[0].weight, torch.randn(3, 8)
    assert type(nn.functional.linear(x, weight)) is type(weight + 1) is type(weight.double()) is torch.Tensor
    x.copy_(weight[:3])
    nn.functional.linear(x, weight).relu_().sum().backward()
    assert model[0].factors[0].weight.grad is not None
    assert torch.equal(copy.deepcopy(weight.detach()), weight)


MODELS = {
    "name": (lambda: "resnet18", "got str 'resnet18'"),
    "class": (lambda: nn.Linear, "got type"),
    "weights": (lambda: timm.create_model("cifar_resnet20").state_dict(), "got OrderedDict"),
    "nothing": (lambda: None, "got NoneType"),
    "compiled": (lambda: torch.compile(timm.create_model("cifar_resnet20")), r"pass model\._orig_mod"),
    "partly compiled": (lambda: nn.Sequential(torch.compile(nn.Sequential(nn.Linear(8, 8)))), "part '0' is compiled"),
    "moving average of timm": (lambda: ModelEmaV3(timm.create_model("cifar_resnet20")), r"unwrapped, as model\.module"),
    "moving average of torch": (
        lambda: AveragedModel(timm.create_model("cifar_resnet20")),
        r"unwrapped, as model\.module",
    ),
    "data parallel": (lambda: nn.DataParallel(timm.create_model("cifar_resnet20")), r"unwrapped, as model\.module"),
    "scripted": (lambda: torch.jit.script(nn.Sequential(nn.Linear(8, 8))), "TorchScript"),
}
ENTRIES = {
    "make_plan": lambda model, folder: make_plan(model, keep_params=0.5),
    "decompose": lambda model, folder: decompose(model, PLAN),
    "to_dense": lambda model, folder: to_dense(model),
    "save_pretrained": lambda model, folder: save_pretrained(model, folder / "out"),
    "AdaptiveRankPenalty": lambda model, folder: AdaptiveRankPenalty(model, PLAN, total_steps=10),
    "benchmark": lambda model, folder: benchmark(model),
    "plan_report": lambda model, folder: plan_report(model, PLAN),
}


@pytest.mark.parametrize(("make", "message"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("use", ENTRIES.values(), ids=ENTRIES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_no_bare_model_is_refused_everywhere(make, message, use, tmp_path):
    with pytest.raises(ArpHubError, match=message):
        use(make(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "message"),
    [*(case for name, case in MODELS.items() if name != "name"), (lambda: "resnet18", "'resnet18' is not a folder")],
    ids=[*(name for name in MODELS if name != "name"), "no folder"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_push_is_refused_before_the_first_call_to_the_hub(make, message, monkeypatch):
    calls = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: calls.append(address) or [])
    with pytest.raises(ArpHubError, match=message):
        push_to_hub(make(), "user/name", token="none")
    assert calls == []


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("plan.json", r"got str 'plan\.json'.*RankPlan\.load"),
        ({"layers": {}}, "RankPlan.from_dict"),
        (None, "got NoneType"),
        (LayerPlan("cp", 3), "got LayerPlan"),
    ],
)
def test_what_is_no_plan_is_refused(plan, message):
    for use in (decompose, lambda model, plan: AdaptiveRankPenalty(model, plan, total_steps=10)):
        with pytest.raises(ArpHubError, match=f"plan must be a RankPlan, .*{message}"):
            use(timm.create_model("cifar_resnet20"), plan)


def test_a_model_that_is_one_layer_cannot_be_replaced_in_place():
    with pytest.raises(ArpHubError, match=r"wrap it in nn\.Sequential"):
        decompose(nn.Linear(64, 64), RankPlan({"": LayerPlan("channel", 4)}))


def test_a_factor_is_not_decomposed_again():
    model = decompose(nn.Sequential(nn.Linear(64, 64)), RankPlan({"0": LayerPlan("channel", 32)}))
    with pytest.raises(ArpHubError, match="part of the low-rank layer '0'"):
        decompose(model, RankPlan({"0.factors.0": LayerPlan("channel", 4)}))


class Listed(nn.Module):
    """Layers that are registered one by one, and held in a plain container, too."""

    def __init__(self, hold):
        super().__init__()
        for number in range(3):
            self.add_module(f"conv{number}", nn.Conv2d(16, 16, 3, padding=1))
        self.head = nn.Linear(16, 10)
        vars(self)["held"] = hold([self.conv0, self.conv1])


@pytest.mark.parametrize(
    ("hold", "stay"),
    [
        (list, {"conv0", "conv1"}),
        (tuple, {"conv0", "conv1"}),
        (lambda layers: {"first": layers[0]}, {"conv0"}),
        (lambda layers: {"deep": [layers[1:]]}, {"conv1"}),
        (lambda layers: layers[0], {"conv0"}),
        (lambda layers: ["conv0"], set()),
    ],
    ids=["list", "tuple", "dict", "nested", "attribute", "names"],
)
def test_layers_that_an_attribute_also_holds_stay_dense(hold, stay):
    """The container would keep the dense layer, and ``forward`` might call that one."""
    found = refusals(model := Listed(hold))
    names = {name for name, module in model.named_modules() if "'held'" in found.get(module, "")}
    assert names == stay
    plan = make_plan(Running(model), keep_params=0.8, input_size=(16, 8, 8))
    kept = {f"body.{name}" for name in stay}
    assert kept <= set(plan.dense) and not kept & set(plan.layers)


class Running(nn.Module):
    """Calls the registered layers."""

    def __init__(self, body):
        super().__init__()
        self.body, self.num_classes = body, 10

    def forward(self, x):
        return self.body.head(self.body.conv2(self.body.conv1(self.body.conv0(x))).mean((2, 3)))
