"""``arp_lowrank`` through ``timm.create_model``: decomposed backbones take every argument as dense ones do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import half_rank_plan, load, low_rank_model, outputs
from safetensors.torch import load_file, save_file
from timm.models import FeatureListNet
from torch import nn

import arp_hub
from arp_hub.layers.apply_plan import plan_of
from arp_hub.layers.model import low_rank_layers

STEM_TO_HEAD = {"conv1": "channel", "layer1.0.conv1": "cp", "layer2.0.conv1": "tucker2", "fc": "channel"}
NARROW = {"channels": (16, 32, 64, 128)}

# Backbone: arguments that make it small, its decomposed layers (always the stem and the classifier, and a spread of
# schemes), and an image side.
BACKBONES: dict[str, tuple[dict[str, Any], dict[str, str], int]] = {
    "resnet18": ({**NARROW, "layers": (1, 1, 1, 1)}, STEM_TO_HEAD, 64),
    "mobilenetv3_small_100": (
        {},
        {"conv_stem": "cp", "blocks.1.0.conv_pw": "group_out", "classifier": "channel"},
        64,
    ),
    "test_convnext": ({}, {"stem.0": "spatial", "stages.1.blocks.0.mlp.fc1": "group_out", "head.fc": "channel"}, 64),
    "test_vit": ({}, {"patch_embed.proj": "tucker2", "blocks.2.attn.qkv": "group_out", "head": "group_in"}, 160),
    "regnetx_002": ({}, {"stem.conv": "channel", "s2.b1.conv2.conv": "channel", "head.fc": "channel"}, 64),
    "densenet121": (
        {"block_config": (2, 2, 2, 2)},
        {"features.conv0": "cp", "features.transition1.conv": "group_in", "classifier": "channel"},
        64,
    ),
    "cifar_resnet20": ({}, {"conv1": "channel", "layer2.1.conv2": "cp", "fc": "channel"}, 32),
    # features in NHWC
    "test_mambaout": ({}, {"stem.conv1": "channel", "stages.2.blocks.1.fc1": "group_out", "head.fc": "channel"}, 160),
}

ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"num_classes": 0},
    {"num_classes": 7},
    {"in_chans": 1},
    {"in_chans": 4},
    {"num_classes": 7, "in_chans": 1},
    {"num_classes": 0, "global_pool": ""},
    {"drop_rate": 0.3},
    {"features_only": True},
    {"features_only": True, "out_indices": (1,)},
    {"features_only": True, "in_chans": 1},
]


@pytest.fixture(scope="module", params=BACKBONES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A decomposed backbone and its dense form, both saved, and an image side."""
    arguments, layers, side = BACKBONES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = low_rank_model(request.param, layers, **arguments)
    low_rank = arp_hub.save_pretrained(model, folder / "low_rank")
    dense = arp_hub.save_pretrained(arp_hub.to_dense(model), folder / "dense")
    return low_rank, dense, side


def test_arguments_mean_what_they_mean_for_the_dense_backbone(saved: tuple[Path, Path, int]) -> None:
    low_rank, dense, side = saved
    for arguments in ARGUMENTS:
        torch.manual_seed(1)
        ours = load(low_rank, **arguments)
        torch.manual_seed(1)
        theirs = load(dense, **arguments)
        x = torch.randn(2, arguments.get("in_chans", 3), side, side)
        if "num_classes" in arguments and arguments["num_classes"]:  # a new classifier is random: compare its inputs
            assert ours(x).shape == (2, arguments["num_classes"])
            ours.reset_classifier(0)
            theirs.reset_classifier(0)
        found, expected = outputs(ours, x), outputs(theirs, x)
        assert [y.shape for y in found] == [y.shape for y in expected], arguments
        for y, z in zip(found, expected, strict=True):
            torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5 * float(z.abs().max()), msg=str(arguments))
        if arguments.get("features_only"):
            for what in ("channels", "reduction", "module_name"):
                assert getattr(ours.feature_info, what)() == getattr(theirs.feature_info, what)()
            assert isinstance(ours, FeatureListNet) == isinstance(theirs, FeatureListNet)
            assert low_rank_layers(ours)


def test_a_head_that_loses_more_than_the_classifier(tmp_path: Path) -> None:
    """Without classes, CAFormer has neither layer of its head."""
    layers = {"stages.0.blocks.0.mlp.fc1": "channel", "head.fc.fc1": "channel", "head.fc.fc2": "channel"}
    model = low_rank_model("caformer_s18", layers)
    folder = arp_hub.save_pretrained(model, tmp_path / "out")
    bare, x = load(folder, num_classes=0), torch.randn(2, 3, 64, 64)
    assert low_rank_layers(bare).keys() == {"stages.0.blocks.0.mlp.fc1"}
    with torch.no_grad():
        torch.testing.assert_close(bare(x), model.eval().forward_head(model.forward_features(x), pre_logits=True))


@pytest.mark.parametrize(
    ("backbone", "layers", "arguments", "side"),
    [
        ("test_vit", BACKBONES["test_vit"][1], {"img_size": 96}, 96),
        ("test_vit", BACKBONES["test_vit"][1], {"img_size": (96, 192), "num_classes": 0}, (96, 192)),
        ("test_vit", {"blocks.0.mlp.fc1": "channel"}, {"drop_path_rate": 0.2, "dynamic_img_size": True}, 96),
        ("resnet18", {"layer1.0.conv1": "cp"}, {"drop_path_rate": 0.2, "global_pool": "max"}, 64),
        ("resnet18", {"layer1.0.conv1": "cp"}, {"features_only": True, "output_stride": 8}, 64),
        ("resnet18", {"layer1.0.conv1": "cp"}, {"features_only": True, "feature_cls": "getter"}, 64),
    ],
)
def test_arguments_of_single_backbones(
    backbone: str, layers: dict[str, str], arguments: dict[str, Any], side: Any, tmp_path: Path
) -> None:
    model = low_rank_model(backbone, layers, **(NARROW if backbone == "resnet18" else {}))
    ours = load(arp_hub.save_pretrained(model, tmp_path / "low_rank"), **arguments)
    theirs = load(arp_hub.save_pretrained(arp_hub.to_dense(model), tmp_path / "dense"), **arguments)
    x = torch.randn(1, 3, *((side, side) if isinstance(side, int) else side))
    for y, z in zip(outputs(ours, x), outputs(theirs, x), strict=True):
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)
    probabilities = [m.drop_prob for m in ours.modules() if type(m).__name__ == "DropPath"]
    assert bool(probabilities) == ("drop_path_rate" in arguments)


def test_only_what_must_be_dense_is_dense(tmp_path: Path) -> None:
    folder = arp_hub.save_pretrained(low_rank_model("resnet18", STEM_TO_HEAD, **NARROW), tmp_path / "out")
    everything = set(STEM_TO_HEAD)
    for arguments, dense in [
        ({}, set()),
        ({"num_classes": 1000, "in_chans": 3}, set()),
        ({"num_classes": 7}, {"fc"}),
        ({"in_chans": 1}, {"conv1"}),
    ]:
        assert set(plan_of(load(folder, **arguments)).layers) == everything - dense


@pytest.mark.parametrize(
    "arguments", [{"num_classes": 100}, {"in_chans": 1}, {"num_classes": 100, "in_chans": 4}], ids=str
)
def test_built_as_transformers_builds_it(arguments: dict[str, int], tmp_path: Path) -> None:
    """Without a pretrained_cfg, a plan is of the model that is asked for: no layer of it becomes dense."""
    plan = {"conv1.0": "spatial", "fc": "channel", "layer1.0.conv1": "channel"}
    folder = arp_hub.save_pretrained(low_rank_model("test_resnet", plan, **arguments), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    model = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
    assert set(plan_of(model).layers) == set(plan)
    model.load_state_dict(load_file(folder / "model.safetensors"))


def test_built_from_its_arguments_alone() -> None:
    plan = half_rank_plan(timm.create_model("resnet18"), {"layer1.0.conv1": "cp"})
    for given in (plan, plan.to_dict(), json.loads(plan.to_json())):
        model = timm.create_model("arp_lowrank", backbone="resnet18.a1_in1k", plan=given, num_classes=3)
        assert plan_of(model) == plan and model.num_classes == 3
        cfg = model.pretrained_cfg
        assert cfg["architecture"] == "arp_lowrank" and cfg["classifier"] == "fc"
        assert not {"url", "hf_hub_id", "tag"} & cfg.keys()
    assert timm.list_models("arp_*") == ["arp_lowrank"]


def test_timm_methods_work_on_a_decomposed_model() -> None:
    model = low_rank_model("resnet18", STEM_TO_HEAD, **NARROW)
    x = torch.randn(1, 3, 64, 64)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    assert torch.equal(model.forward_intermediates(x)[0], features)
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert sorted(sum(groups.values(), [])) == sorted(name for name, _ in model.named_parameters())
    model.reset_classifier(4)
    assert isinstance(model.get_classifier(), nn.Linear) and model(x).shape == (1, 4)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 224, 224)


def change_backbone(value: Any) -> Any:
    return lambda config: config["model_args"].update(backbone=value)


def change_plan(**values: Any) -> Any:
    return lambda config: config["model_args"]["plan"].update(values)


def change_layer(name: str, **values: Any) -> Any:
    return lambda config: config["model_args"]["plan"]["layers"].setdefault(name, {}).update(values)


BAD_CONFIGS = {
    "no backbone": (change_backbone(""), "needs backbone="),
    "backbone of another type": (change_backbone(["resnet18"]), "needs backbone="),
    "backbone on the Hub": (change_backbone("hf-hub:someone/model"), "is not a timm name"),
    "backbone in a folder": (change_backbone("local-dir:/tmp"), "is not a timm name"),
    "backbone by a path": (change_backbone("../../resnet18"), "is not a timm name"),
    "backbone that is a decomposed one": (change_backbone("arp_lowrank"), "cannot be arp_lowrank itself"),
    "unknown backbone": (change_backbone("resnet19"), "unknown backbone 'resnet19'.*did you mean 'resnet18'"),
    "another backbone": (change_backbone("resnet34"), "do not fit .*layer1.2.conv1"),
    "no plan": (lambda config: config["model_args"].pop("plan"), "a plan is a JSON object"),
    "plan of a newer format": (change_plan(format_version=99), "upgrade with `pip install"),
    "plan that needs a newer library": (change_plan(magic=1, requires=["magic"]), "upgrade with `pip install"),
    "unknown scheme": (change_layer("layer1.0.conv1", scheme="magic"), "unknown scheme 'magic'"),
    "rank beyond the layer": (change_layer("layer1.0.conv1", rank=10**9), "beyond .* the full rank"),
    "rank of other weights": (change_layer("layer1.0.conv1", rank=5), "do not fit the plan of the layer"),
    "layer that is missing": (change_layer("layer9.0", scheme="cp", rank=2), "'layer9.0', which this ResNet lacks"),
    "layer without factors": (
        change_layer("layer1.1.conv1", scheme="cp", rank=2),
        "layer 'layer1.1.conv1' .*the file holds none",
    ),
    "layer without its plan": (
        lambda config: config["model_args"]["plan"]["layers"].pop("layer1.0.conv1"),
        "factors of the layer 'layer1.0.conv1', which the plan leaves dense",
    ),
    "unknown pretrained_cfg": (lambda config: config["pretrained_cfg"].update(x=1), "does not know this pretrained"),
}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = low_rank_model("resnet18", STEM_TO_HEAD, **NARROW)
    return arp_hub.save_pretrained(model, tmp_path_factory.mktemp("resnet") / "out")


@pytest.mark.parametrize("case", BAD_CONFIGS)
@pytest.mark.parametrize("arguments", [{}, {"num_classes": 7}])  # timm loads leniently if the classifier is new
def test_bad_configs_are_refused(case: str, arguments: dict[str, Any], resnet: Path, tmp_path: Path) -> None:
    change, message = BAD_CONFIGS[case]
    folder = shutil.copytree(resnet, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(arp_hub.ArpHubError, match=message):
        load(folder, **arguments)


@pytest.mark.parametrize("arguments", [{}, {"in_chans": 1}])
def test_damaged_weights_are_refused(arguments: dict[str, Any], resnet: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(resnet, tmp_path / "out")
    # Copied, because some releases of safetensors map the file, which is overwritten below.
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    for key, message in [
        ("conv1.factors.0.weight", "do not fit the plan of the layer 'conv1'"),
        ("layer2.0.conv1.factors.1.weight", "do not fit the plan of the layer 'layer2.0.conv1'"),
        ("layer3.0.bn1.weight", "layer3.0.bn1.weight"),
    ]:
        for broken in ({k: v for k, v in tensors.items() if k != key}, {**tensors, key: tensors[key][:3].clone()}):
            save_file(broken, folder / "model.safetensors")
            with pytest.raises(arp_hub.ArpHubError, match=message):
                load(folder, **arguments)


def test_a_pickle_is_never_opened(resnet: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(resnet, tmp_path / "out")
    (folder / "model.safetensors").unlink()
    torch.save(low_rank_model("resnet18", STEM_TO_HEAD, **NARROW).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(arp_hub.ArpHubError, match="holds no model.safetensors"):
        load(folder)
    assert load_without_weights(folder)


def load_without_weights(folder: Path) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}")


def test_a_config_cannot_point_to_other_weights(resnet: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(resnet, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    elsewhere = {"url": "http://127.0.0.1:9/w.pth", "hf_hub_id": "someone/model", "hf_hub_filename": "w.bin"}
    config["pretrained_cfg"].update(elsewhere, custom_load=True, source="hf-hub", file="/nowhere")
    (folder / "config.json").write_text(json.dumps(config))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(load(folder)(x), load(resnet)(x))


def test_it_has_no_pretrained_weights() -> None:
    plan = half_rank_plan(timm.create_model("resnet18"), {"layer1.0.conv1": "cp"})
    with pytest.raises(arp_hub.ArpHubError, match="no weights of its own"):
        timm.create_model("arp_lowrank", pretrained=True, backbone="resnet18", plan=plan)
    with pytest.raises(arp_hub.ArpHubError, match="has no tags"):
        timm.create_model("arp_lowrank.a1_in1k", backbone="resnet18", plan=plan)
    with pytest.raises(arp_hub.ArpHubError, match="needs backbone="):
        timm.create_model("arp_lowrank")


def test_a_linear_layer_of_the_head_may_come_back_as_a_convolution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("coatnet_pico_rw_224", head_hidden_size=32, img_size=64).eval()
    plan = arp_hub.RankPlan({"head.pre_logits.fc": arp_hub.LayerPlan("group_out", 8, groups=2)})
    arp_hub.save_pretrained(arp_hub.decompose(model, plan), tmp_path / "out")
    found = load(tmp_path / "out", global_pool="").eval()
    assert isinstance(found.head.pre_logits.fc.factors[0], torch.nn.Conv2d)
    dense = timm.create_model("coatnet_pico_rw_224", head_hidden_size=32, img_size=64, global_pool="").eval()
    weights = arp_hub.to_dense(model).state_dict()
    dense.load_state_dict({name: weights[name].reshape(value.shape) for name, value in dense.state_dict().items()})
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(found(x), dense(x), rtol=1e-4, atol=1e-5)
