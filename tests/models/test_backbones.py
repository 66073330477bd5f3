"""timm backbones of every kind: timm treats a decomposed model as it treats a dense one."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from typer.testing import CliRunner

import arp_hub
from arp_hub.hub.load import load_model
from arp_hub.layers.model import count_params, low_rank_layers
from arp_hub.training import evaluate, load_data
from arp_hub_cli.app import app
from benchmarks.layers.timm_checks import CHECKS, EXPORTS, full_rank_plan, make_case, random_model, run_check
from benchmarks.layers.timm_fits import FITS, Fitted, distance, make_fitted, normalised, smooth_images

# One small model for each special case; arguments of timm's entrypoints make them small.
TINY_VIT = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
ODDITIES: dict[str, tuple[str, dict[str, Any]]] = {
    "strided and plain convolutions": ("test_resnet", {}),
    "padding by the input's size": ("tf_mobilenetv3_small_minimal_100", {}),
    "standardised convolutions": ("test_nfnet", {}),
    "a stem of standardised convolutions": ("vit_tiny_r_s16_p8_224", {"img_size": 64, "depth": 1}),
    "layers to fuse": ("efficientvit_m0", {"img_size": 64, "depth": (1, 1, 1)}),
    "branches to merge": ("repghostnet_050", {}),
    "a fused qkv": ("test_vit", {}),
    "biases of qkv apart, relative positions": ("beit_base_patch16_224", TINY_VIT),
    "biases of qkv apart, rotary positions": ("eva02_tiny_patch14_224", {**TINY_VIT, "img_size": 28}),
    "biases of qkv apart, windows": (
        "swinv2_tiny_window8_256",
        {"img_size": 64, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4},
    ),
    "two classifiers": ("deit_tiny_distilled_patch16_224", TINY_VIT),
    "maps in NHWC": ("test_convnext", {}),
    "an LSTM": ("sequencer2d_s", {"img_size": 56, "layers": (1, 1, 1, 1), "embed_dims": (24, 24, 24, 24)}),
    "pooling by attention": ("vit_base_patch16_siglip_224", TINY_VIT),
}


FAST = {
    "padding by the input's size",
    "standardised convolutions",
    "branches to merge",
    "a fused qkv",
    "biases of qkv apart, windows",
    "maps in NHWC",
}
MANY_LAYERS = {"layers to fuse", "branches to merge", "an LSTM"}
FEW_CHECKS = (
    "feature maps",
    "half of the parameters",
    "training",
    "init_weights",
    "reparameterize",
    "load",
    "features_only",
)


def outcomes(name: str, folder: Path, checks: Any, **arguments: Any) -> dict[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = make_case(name, folder, **arguments)
        return {check: run_check(case, check) for check in checks}


@pytest.mark.parametrize(
    "oddity", [pytest.param(one, marks=() if one in FAST else pytest.mark.slow) for one in ODDITIES]
)
def test_entry_points_are_those_of_the_dense_model(oddity: str, tmp_path: Path) -> None:
    name, arguments = ODDITIES[oddity]
    checks = FEW_CHECKS if oddity in MANY_LAYERS else CHECKS  # the slow tests run all of them
    found = outcomes(name, tmp_path, checks, **arguments)
    assert not {check: outcome for check, outcome in found.items() if outcome.startswith("fails")}
    assert sum(outcome == "ok" for outcome in found.values()) >= len(checks) // 2


FITTED_FAST = {"a fused qkv", "maps in NHWC"}


@pytest.mark.parametrize(
    "oddity", [pytest.param(one, marks=() if one in FITTED_FAST else pytest.mark.slow) for one in ODDITIES]
)
def test_fitted_and_refined_on_images(oddity: str) -> None:
    name, arguments = ODDITIES[oddity]
    fitted = make_fitted(name, **arguments)
    found = {check: run_check(fitted, check, FITS) for check in FITS}
    assert not {check: outcome for check, outcome in found.items() if not outcome.startswith(("ok", "n/a"))}
    assert found["refinement"] == "ok"


@torch.no_grad()
def test_errors_are_nearer_than_no_answer_where_random_weights_give_large_logits() -> None:
    dense = random_model("test_resnet", (3, 64, 64)).eval()
    images = normalised(smooth_images(8, (3, 64, 64)), dense)
    dense.fc.weight *= 250 / dense(images).std()
    near, silent = copy.deepcopy(dense), copy.deepcopy(dense)
    weight = dense.fc.weight
    near.fc.weight += 0.4 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    silent.fc.weight.zero_()
    fitted = Fitted("test_resnet", dense, images, arp_hub.make_plan(dense, keep_params=0.5), near)
    assert distance(fitted, near) < distance(fitted, silent) / 2


@pytest.mark.parametrize("name", ["test_resnet", pytest.param("test_vit", marks=pytest.mark.slow)])
def test_exports_hold_the_small_layers(name: str, tmp_path: Path) -> None:
    ways = [way for way in EXPORTS if way != "ONNX" or importlib.util.find_spec("onnxruntime")]
    assert outcomes(name, tmp_path, ways) == dict.fromkeys(ways, "ok")


SURVEY = """
resnet50 vit_base_patch16_224 convnext_tiny tf_efficientnet_b0 mobilenetv3_small_100 swin_tiny_patch4_window7_224
beit_base_patch16_224 swinv2_tiny_window8_256 eva02_tiny_patch14_224 vit_tiny_patch16_dinov3_qkvb eca_nfnet_l0
dm_nfnet_f0 resnetv2_50x1_bit vit_tiny_r_s16_p8_224 repvgg_a0 fastvit_t8 levit_128s efficientvit_m0 repvit_m0_9
convit_tiny davit_tiny edgenext_xx_small mobilevitv2_050 regnety_016 densenet121 vgg11 tf_efficientnet_cc_b0_4e
tf_mixnet_s skresnet18 resnest14d halonet26t coat_tiny sequencer2d_s inception_v3 maxvit_tiny_tf_224
naflexvit_base_patch16_gap convmixer_768_32 efficientnet_b1_pruned deit_tiny_distilled_patch16_224
vit_base_patch16_siglip_224
""".split()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SURVEY)
def test_surveyed_models(name: str, tmp_path: Path) -> None:
    found = outcomes(name, tmp_path, CHECKS)
    assert not {check: outcome for check, outcome in found.items() if outcome.startswith("fails")}


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("tf_efficientnet_cc_b0_4e", {"CondConv2d", "depthwise", "first convolution"}),
        ("sequencer2d_s", {"LSTM"}),
        ("lambda_resnet26t", {"Conv3d"}),
        ("ecaresnet26t", {"Conv1d"}),
        ("vit_small_patch16_224", {"a parameter of the model itself"}),
    ],
)
def test_nothing_is_passed_over_in_silence(name: str, reasons: set[str]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **({"img_size": 56} if "sequencer" in name else {}))
    with pytest.warns(UserWarning, match="by shape alone"):
        plan = arp_hub.make_plan(model, keep_params=0.95, input_size=(3, 56, 56) if "sequencer" in name else None)
    for reason in reasons:
        assert any(reason in given for given in plan.dense.values()), reason
    named = plan.layers.keys() | plan.dense.keys()
    for key, parameter in model.named_parameters():
        if sum(side > 1 for side in parameter.shape) >= 2:
            assert key in named or key.rpartition(".")[0] in named, key


def test_the_largest_models_are_planned_by_shape() -> None:
    with torch.device("meta"):
        model = timm.create_model("eva02_enormous_patch14_clip_224")
    total = count_params(model)
    with pytest.warns(UserWarning, match="by shape alone"):
        plan = arp_hub.make_plan(model, keep_params=0.5)
    with pytest.raises(arp_hub.ArpHubError, match="no weight .meta device"):
        arp_hub.decompose(model, plan)
    kept = count_params(arp_hub.layers.apply_plan.apply_plan(model, plan))
    assert total > 4e9 and 0.49 * total < kept <= 0.5 * total
    with pytest.raises(arp_hub.ArpHubError, match="calibration needs a model with weights"):
        arp_hub.make_plan(
            timm.create_model("test_vit").to("meta"), keep_params=0.5, calibration=torch.zeros(1, 3, 8, 8)
        )


def test_the_command_line_plans_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    done = CliRunner().invoke(
        app,
        ["plan", "--model", "vit_large_patch16_224", "--device", "meta", "--keep-params", "0.5"]
        + ["--output", str(path), "--json"],
    )
    assert done.exit_code == 0, done.output
    layers = {layer["name"]: layer for layer in json.loads(done.stdout)["layers"]}
    assert layers["pos_embed"]["reason"] == "a parameter of the model itself, no layer's weight"
    assert arp_hub.RankPlan.load(path).layers


@pytest.mark.parametrize("name", ["efficientvit_m0", "repghostnet_050"])
def test_reparameterize_first_then_decompose(name: str) -> None:
    dense = random_model(name, (3, 64, 64), **({"img_size": 64} if "vit" in name else {}))
    low = arp_hub.decompose(copy.deepcopy(dense), full_rank_plan(dense, (3, 64, 64)))
    with pytest.raises(arp_hub.ArpHubError, match="call reparameterize_model on the dense model"):
        reparameterize_model(low)
    merged = reparameterize_model(arp_hub.to_dense(low))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(merged(x), dense(x), rtol=1e-3, atol=1e-3)


def test_a_resampled_position_embedding_is_that_of_the_dense_backbone(tmp_path: Path) -> None:
    name, small = "flexivit_small", {**TINY_VIT, "img_size": 64}  # its filter has its own settings
    dense = random_model(name, (3, 64, 64), **small)
    timm.models.save_for_hf(dense, tmp_path / "dense", safe_serialization=True)
    arp_hub.save_pretrained(arp_hub.decompose(dense, full_rank_plan(dense, (3, 64, 64))), tmp_path / "low")
    ours, theirs = (
        timm.create_model(f"local-dir:{tmp_path / kind}", pretrained=True, img_size=96) for kind in ("low", "dense")
    )
    assert torch.equal(ours.pos_embed, theirs.pos_embed)


def test_layers_that_arguments_remove_are_left_out(tmp_path: Path) -> None:
    dense = random_model("vit_base_patch16_siglip_224", (3, 32, 32), **TINY_VIT)
    plan = full_rank_plan(dense, (3, 32, 32))
    assert any(name.startswith("attn_pool.") for name in plan.layers)
    folder = arp_hub.save_pretrained(arp_hub.decompose(dense, plan), tmp_path / "out")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, global_pool="avg")
    assert model.attn_pool is None and low_rank_layers(model)


class OnnxModel(nn.Module):
    """An ONNX file as a module, so that `evaluate` accepts it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        onnxruntime = pytest.importorskip("onnxruntime")
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.device = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (entry,) = self.session.get_inputs()
        return torch.from_numpy(self.session.run(None, {entry.name: x.numpy()})[0])


@pytest.mark.slow
def test_a_trained_model_is_the_same_here_in_a_fresh_process_and_in_onnx(shared: Path, tmp_path: Path) -> None:
    batch = 50
    model = load_model("tf_efficientnet_lite0", shared / "weights" / "tf_efficientnet_lite0_imagenet.safetensors")
    arp_hub.decompose(model, arp_hub.make_plan(model, keep_params=0.85))
    folder = arp_hub.save_pretrained(model, tmp_path / "out")
    source = str(shared / "data" / "imagenet-sample")
    data = load_data(source, model)
    here = evaluate(model, data.test, batch_size=batch)

    command = ["evaluate", "--model", f"local-dir:{folder}", "--data", source, "--json"]
    run = [sys.executable, "-c", "from arp_hub_cli.app import app; app()", *command]
    fresh = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)

    torch.onnx.export(model, (torch.zeros(batch, 3, 224, 224),), tmp_path / "model.onnx", dynamo=True, verbose=False)
    exported = evaluate(OnnxModel(tmp_path / "model.onnx"), data.test, batch_size=batch)

    print(here, exported)
    assert here["images"] == 1000 and here["top1"] > 50
    assert here["top1"] == fresh["top1"] == exported["top1"]
    assert (tmp_path / "model.onnx").stat().st_size < 1.1 * (folder / "model.safetensors").stat().st_size + 1e6
