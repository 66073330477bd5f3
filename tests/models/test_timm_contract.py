"""What timm's tests ask of every architecture holds for decomposed ones, made by timm, decomposed or loaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import FeatureGraphNet
from timm.models._features_fx import create_feature_extractor, get_notrace_functions, get_notrace_modules
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torchvision.models.feature_extraction import get_graph_node_names

import arp_hub
from arp_hub.layers.cfg_names import names_of
from arp_hub.layers.model import low_rank_layers
from benchmarks.layers.timm_checks import flat, full_rank_plan

Arguments = dict[str, Any]

# One small architecture of each family, with an image side. Stem and classifier are decomposed, too.
FAST: dict[str, tuple[int, Arguments]] = {"test_resnet": (64, {}), "test_vit": (160, {})}
SLOW: dict[str, tuple[int, Arguments]] = {
    "resnet18": (64, {}),
    "mobilenetv3_small_050": (64, {}),
    "tf_efficientnet_lite0": (64, {}),
    "regnetx_002": (64, {}),
    "densenet121": (64, {}),
    "vgg11_bn": (64, {}),
    "convnext_atto": (64, {}),
    "dla46_c": (64, {}),
    "ghostnet_050": (64, {}),
    "resnest14d": (64, {}),
    "test_nfnet": (96, {}),
    "inception_v3": (128, {}),
    "poolformerv2_s12": (64, {}),
    "mobilevitv2_050": (64, {}),
    "deit_tiny_distilled_patch16_224": (32, {"img_size": 32, "depth": 2}),
    "swin_tiny_patch4_window7_224": (56, {"img_size": 56, "depths": (1, 1, 1, 1), "embed_dim": 48}),
    "mixer_s32_224": (224, {}),
    "levit_128s": (224, {}),
    "xcit_nano_12_p16_224": (64, {"img_size": 64, "depth": 2}),
    "test_mambaout": (96, {}),
}  # fmt: skip


class Family:
    """One decomposed architecture with random weights."""

    def __init__(self, name: str, side: int, arguments: Arguments) -> None:
        self.name, self.arguments, self.images = name, arguments, torch.randn(2, 3, side, side)
        with torch.device("meta"):
            dense = timm.create_model(name, **arguments)
        layers = full_rank_plan(dense, (3, side, side)).layers
        self.plan = arp_hub.RankPlan(
            {key: arp_hub.LayerPlan(one.scheme, max(1, one.rank // 2), one.groups) for key, one in layers.items()}
        )

    def dense(self, **arguments: Any) -> Any:
        """The dense architecture."""
        return _settled(timm.create_model(self.name, **self.arguments, **arguments))

    def model(self, **arguments: Any) -> Any:
        """The decomposed architecture, as timm makes it."""
        torch.manual_seed(0)
        given = self.arguments | arguments
        return _settled(timm.create_model("arp_lowrank", backbone=self.name, plan=self.plan, **given))


def _settled(model: nn.Module) -> Any:
    """A map of one pixel has no statistics, so that BatchNorms keep theirs."""
    for norm in (module for module in model.modules() if isinstance(module, BatchNorm)):
        norm.momentum = 0.0
    return model.eval()


def forward(family: Family) -> None:
    model = family.model()
    found = model(family.images)
    assert found.shape == (2, model.num_classes) and bool(found.isfinite().all())
    features = model.forward_features(family.images)
    for y, z in zip(flat(model.forward_head(features)), flat(found), strict=True):
        torch.testing.assert_close(y, z)
    assert flat(model.forward_head(features, pre_logits=True))[0].shape == (2, model.head_hidden_size)


def backward(family: Family) -> None:
    model = family.model().train()
    with _frozen_statistics(model):
        found = torch.cat(flat(model(family.images)))
    found.mean().backward()
    assert found.shape[-1] == model.num_classes
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


class _frozen_statistics:
    """BatchNorms in evaluation mode within a model that trains."""

    def __init__(self, model: nn.Module) -> None:
        self.norms = [module for module in model.modules() if isinstance(module, BatchNorm)]

    def __enter__(self) -> None:
        for norm in self.norms:
            norm.eval()

    def __exit__(self, *_: object) -> None:
        for norm in self.norms:
            norm.train()


def config(family: Family) -> None:
    model = family.model()
    dense, state = family.dense().pretrained_cfg, model.state_dict()
    for key in ("classifier", "first_conv"):
        named = model.pretrained_cfg[key]
        assert set(names_of(named)) == set(names_of(dense[key]))
        for name in (named,) if isinstance(named, str) else named:
            assert f"{name}.weight" in state, name
    assert model.default_cfg is model.pretrained_cfg
    assert model.num_features > 0 and model.head_hidden_size > 0
    assert {key: model.pretrained_cfg[key] for key in ("input_size", "pool_size", "num_classes", "mean")} == {
        key: dense[key] for key in ("input_size", "pool_size", "num_classes", "mean")
    }


def classifier(family: Family) -> None:
    model, bare = family.model(), family.model(num_classes=0)
    for layer in flat(model.get_classifier()):
        assert layer.out_features == model.num_classes if hasattr(layer, "out_features") else True
    model.reset_classifier(0)
    assert model.num_classes == bare.num_classes == 0
    for one in (model, bare):
        assert flat(one(family.images))[0].shape == (2, model.head_hidden_size)
    model.reset_classifier(5)
    assert flat(model(family.images))[0].shape == (2, 5)
    fresh = family.model(num_classes=5)
    for name in names_of(fresh.pretrained_cfg["classifier"]):
        assert f"{name}.weight" in fresh.state_dict()


def features(family: Family) -> None:
    try:
        expected = family.dense(features_only=True)
    except (RuntimeError, AttributeError, AssertionError, TypeError):
        return  # the dense architecture has none
    model = family.model(features_only=True)
    assert low_rank_layers(model)
    maps = model(family.images)
    assert model.feature_info.channels() == expected.feature_info.channels()
    assert [y.shape for y in maps] == [y.shape for y in expected(family.images)]
    assert all(bool(y.isfinite().all()) for y in maps)


def intermediates(family: Family) -> None:
    model = family.model()
    if not hasattr(model, "forward_intermediates"):
        assert not hasattr(family.dense(), "forward_intermediates")
        return
    last, found = model.forward_intermediates(family.images)
    for y, z in zip(flat(last), flat(model.forward_features(family.images)), strict=True):
        torch.testing.assert_close(y, z)
    shapes = [y.shape for y in family.dense().forward_intermediates(family.images, intermediates_only=True)]
    assert [y.shape for y in found] == shapes


def traced(family: Family) -> None:
    """Timm's own way of following a model with torch.fx, forwards and backwards."""
    try:
        _graph(family.dense())
    except Exception:  # the dense architecture cannot be traced
        return
    model = family.model()
    graph = _graph(model)
    for y, z in zip(flat(list(graph(family.images).values())), flat(model(family.images)), strict=True):
        torch.testing.assert_close(y, z)
    torch.cat(flat(list(graph(family.images).values()))).mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def _graph(model: nn.Module) -> nn.Module:
    options = {"leaf_modules": list(get_notrace_modules()), "autowrap_functions": list(get_notrace_functions())}
    nodes = get_graph_node_names(model, tracer_kwargs=options, suppress_diff_warning=True)[1]
    return create_feature_extractor(model, [nodes[-1]])


def checkpointed(family: Family) -> None:
    plain, saving = family.model(), family.model()
    try:
        family.dense().set_grad_checkpointing(True)
    except (AssertionError, AttributeError):
        return  # the dense architecture does not support it
    saving.set_grad_checkpointing(True)
    for model in (plain, saving):
        model.train()
        with _frozen_statistics(model):
            torch.manual_seed(1)
            torch.cat(flat(model(family.images))).square().mean().backward()
    saved = dict(saving.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(saved[name].grad, parameter.grad, msg=name)


def scripted(family: Family) -> None:
    try:
        torch.jit.script(family.dense(scriptable=True))
    except Exception:  # the dense architecture cannot be scripted
        return
    model = family.model(scriptable=True)
    for y, z in zip(flat(torch.jit.script(model)(family.images)), flat(model(family.images)), strict=True):
        torch.testing.assert_close(y, z)


CHECKS: dict[str, Callable[[Family], None]] = {
    "forward": forward,
    "backward": backward,
    "config": config,
    "classifier": classifier,
    "features": features,
    "intermediates": intermediates,
    "fx": traced,
    "gradient checkpointing": checkpointed,
    "TorchScript": scripted,
}
"""A check returns where it holds, or where the dense architecture does not have what is checked."""

KNOWN = {("xcit_nano_12_p16_224", "TorchScript"): "timm reads a layer's weight there, which scripted factors lack"}
"""Checks that do not hold, with the reason."""


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest) -> Family:
    name = request.param
    return Family(name, *(FAST | SLOW)[name])


ALL = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("family", ALL, indirect=True)
def test_what_timm_asks_of_an_architecture(family: Family, check: str) -> None:
    if reason := KNOWN.get((family.name, check)):
        pytest.xfail(reason)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CHECKS[check](family)


def _weight_names(model: Any, key: str) -> list[str]:
    named = model.pretrained_cfg[key]
    return [f"{name}.weight" for name in ((named,) if isinstance(named, str) else named)]


@pytest.mark.parametrize("name", FAST)
def test_the_cfg_names_parameters_in_memory_saved_and_loaded(name: str, tmp_path: Path) -> None:
    side, arguments = FAST[name]
    dense = timm.create_model(name, **arguments)
    before = {key: dense.pretrained_cfg[key] for key in ("classifier", "first_conv")}
    model: Any = arp_hub.decompose(dense, Family(name, side, arguments).plan)
    folder = arp_hub.save_pretrained(model, tmp_path / "low")
    loaded: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    for one in (model, loaded):
        for key in before:
            assert all(".factors." in weight and weight in one.state_dict() for weight in _weight_names(one, key)), key
        one.reset_classifier(4)
        assert one.get_classifier().out_features == 4
    for classes in (0, 4):
        other: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=classes)
        assert other.num_classes == classes and other.pretrained_cfg["classifier"] == before["classifier"]
    again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    arp_hub.to_dense(again)
    assert {key: again.pretrained_cfg[key] for key in before} == before
    written = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert {key: written[key] for key in before} == before


AFTER_A_RESET: dict[str, Callable[[Any, Path], Any]] = {
    "saved and loaded": lambda model, path: timm.create_model(
        f"local-dir:{arp_hub.save_pretrained(model, path / 'again')}", pretrained=True
    ),
    "merged": lambda model, path: arp_hub.to_dense(model),
    "decomposed again": lambda model, path: arp_hub.decompose(
        model, arp_hub.RankPlan({"layer2.0.conv1": arp_hub.LayerPlan("channel", 4)})
    ),
    "its new classifier decomposed": lambda model, path: arp_hub.decompose(
        model, arp_hub.RankPlan({"fc": arp_hub.LayerPlan("channel", 2)})
    ),
    "built again by transformers' way": lambda model, path: timm.create_model(
        "arp_lowrank", pretrained_cfg=model.pretrained_cfg, num_classes=model.num_classes,
        **{key: value for key, value in model._model_args.items() if key != "num_classes"},
    ),
}  # fmt: skip
"""What follows ``reset_classifier``, in which timm leaves the pretrained_cfg as it is."""


@pytest.mark.parametrize("classes", [0, 4])
@pytest.mark.parametrize("loaded", [False, True], ids=["in memory", "loaded"])
@pytest.mark.parametrize("step", AFTER_A_RESET)
def test_the_cfg_names_parameters_after_the_classifier_is_reset(
    step: str, loaded: bool, classes: int, tmp_path: Path
) -> None:
    layers = {name: arp_hub.LayerPlan("channel", 4) for name in ("fc", "layer1.0.conv1")}
    model: Any = arp_hub.decompose(timm.create_model("test_resnet"), arp_hub.RankPlan(layers))
    if loaded:
        model = timm.create_model(f"local-dir:{arp_hub.save_pretrained(model, tmp_path / 'out')}", pretrained=True)
    elif step.startswith("built"):
        pytest.skip("timm did not make it")
    model.reset_classifier(classes)
    if step.startswith("its") and not classes:
        pytest.skip("there is no classifier")
    model = AFTER_A_RESET[step](model, tmp_path)
    named = ["fc.factors.0", "fc.factors.1"] if step.startswith("its") else ["fc"]
    found = model.pretrained_cfg["classifier"]
    assert ([found] if isinstance(found, str) else list(found)) == named
    assert [f"{name}.weight" in model.state_dict() for name in named] == [classes > 0] * len(named)
    assert model.num_classes == classes and model(torch.randn(1, 3, 64, 64)).shape[-1] == classes or not classes


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("test_resnet", {"fc": ("group_in", 4, 2), "layer1.0.conv1": ("cp", 4, 1)}),
        ("tf_efficientnet_lite0", {"blocks.1.0.conv_pw": ("channel", 4, 1), "conv_stem": ("spatial", 4, 1)}),
    ],
)
def test_torch_fx_follows_every_kind_of_factor(name: str, layers: dict[str, tuple[str, int, int]]) -> None:
    plan = arp_hub.RankPlan({key: arp_hub.LayerPlan(*entry) for key, entry in layers.items()})
    model: Any = timm.create_model("arp_lowrank", backbone=name, plan=plan).eval()
    x: Tensor = torch.randn(2, 3, 64, 64)
    graph = _graph(model) if name.startswith("tf_") else torch.fx.symbolic_trace(model)  # timm's own layers need leaves
    (found,) = flat(graph(x))
    torch.testing.assert_close(found, model(x))
    assert len(FeatureGraphNet(model, out_indices=(0, 1))(x)) == 2


def test_a_model_made_from_a_plan_starts_as_pytorch_starts_it() -> None:
    plan = arp_hub.RankPlan({"fc": arp_hub.LayerPlan("group_in", 4, 2)})
    torch.full((10**6,), float("nan"))  # memory that is reused
    model: Any = timm.create_model("arp_lowrank", backbone="test_resnet", plan=plan)
    weights = [factor.weight for factor in model.fc.factors]
    assert all(0 < float(weight.abs().max()) <= weight.shape[1] ** -0.5 for weight in weights)


def test_a_part_named_base_layer_is_no_adapter() -> None:
    with torch.device("meta"), pytest.warns(UserWarning, match="by shape alone"):
        plan = arp_hub.make_plan(timm.create_model("dla46_c"), keep_params=0.6)
    assert not any("adapter" in reason for reason in plan.dense.values())
