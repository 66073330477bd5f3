"""Exports: files that the runtimes load by themselves, checked against PyTorch; refusals; balanced factors."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import low_rank_model, search_path
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import arp_hub
from arp_hub import ArpHubError
from arp_hub.deployment.balance import balance_factors
from arp_hub.deployment.int8_errors import int8_divergences
from arp_hub.hub.load import load_model
from arp_hub.layers.low_rank import GroupedLinear
from arp_hub.layers.model import low_rank_layers
from arp_hub.runtimes.capture import Captured
from arp_hub.runtimes.formats import RUNTIMES
from arp_hub.runtimes.grouped import with_convolutions
from arp_hub.runtimes.torch_export import TorchExport
from arp_hub.runtimes.weight_names import nodes_of
from arp_hub_cli.app import app
from arp_hub_cli.commands import export as command

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "models" / "cifar_resnet20-keep20"
IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def vit() -> nn.Module:
    """A small ViT, one of whose layers has groups."""
    layers = {"blocks.0.attn.qkv": "group_in", "blocks.0.mlp.fc1": "channel"}
    return low_rank_model("test_vit", layers, img_size=32, num_classes=5, dynamic_img_size=False)


@torch.no_grad()
def expected(model: nn.Module, images: Tensor) -> Tensor:
    return model.eval()(images)


def run_onnx(folder: Path, images: Tensor) -> Tensor:
    """Run a file with what its export.json says, without arp_hub."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    record = json.loads((folder / "export.json").read_text())
    session = onnxruntime.InferenceSession(folder / record["file"])
    name, output = record["input"]["name"], record["output"]["name"]
    return torch.cat([torch.from_numpy(session.run([output], {name: x.numpy()})[0]) for x in images.split(1)])


def files_naming(folder: Path, word: str) -> list[str]:
    return [file.name for file in folder.iterdir() if word.encode() in file.read_bytes()]


def test_a_folder_in_int8_for_onnxruntime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    labels = expected(timm.create_model(f"local-dir:{FOLDER}", pretrained=True), IMAGES).argmax(1)
    done = arp_hub.export(
        FOLDER, tmp_path / "out", int8=True, images=IMAGES, test_images=IMAGES, test_labels=labels, seconds=0.2
    )
    record = json.loads((tmp_path / "out/export.json").read_text())
    assert record == json.loads(json.dumps(done.record))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", "model.onnx"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    found = run_onnx(tmp_path / "out", IMAGES)
    agreement = 100 * (found.argmax(1) == labels).double().mean()
    assert record["parity"]["top1"] == pytest.approx(float(agreement), abs=0.01) and agreement > 80
    assert record["parity"]["torch_top1"] == 100
    assert 0 < record["parity"]["divergence"] < 0.5
    assert record["size_bytes"] == done.file.stat().st_size
    assert record["dense"]["size_bytes"] > record["size_bytes"]
    assert record["latency"]["ratio"]["median"] == pytest.approx(
        record["latency"]["latency_ms"]["median"] / record["latency"]["dense_latency_ms"]["median"], rel=0.5
    )
    assert record["verdict"] == done.latency.verdict("ONNX Runtime, int8")
    assert record["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert (record["num_classes"], len(record["label_names"])) == (10, 10)
    assert {"onnxruntime", "torch", "timm"} <= record["versions"].keys()
    assert files_naming(tmp_path / "out", str(ROOT)) == []


def test_a_dense_form_that_is_too_large_is_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    largest = sum(tensor.nbytes for tensor in vit().state_dict().values()) + 1000
    monkeypatch.setattr("arp_hub.runtimes.onnx_runtime._LARGEST", largest)
    done = arp_hub.export(vit(), tmp_path / "out", seconds=0.2)
    assert done.latency is not None and done.latency.dense is None and done.file.stat().st_size > 0
    assert "dense" not in done.record and "verdict" not in done.record
    assert "the comparison with the dense form is left out: the weights take" in caplog.text


@pytest.mark.parametrize(("vnni", "largest"), [(True, 127), (False, 64)])
def test_weights_have_seven_bits_where_products_overflow(
    vnni: bool, largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni, raising=False)
    done = arp_hub.export(FOLDER, tmp_path / "out", int8=True, images=IMAGES, seconds=0)
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(done.file).graph.initializer]
    found = [int(abs(weight.astype(int)).max()) for weight in weights if weight.dtype == "int8" and weight.ndim > 1]
    assert found and max(found) in (largest - 1, largest)


def largest_weight_of_openvino(file: Path) -> int:
    """Of the middle layer: NNCF leaves a third of the layers at eight bits."""
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    constants = [node for node in openvino.Core().read_model(file).get_ops() if node.get_type_name() == "Constant"]
    weights = [node.data for node in constants if node.get_element_type() == openvino.Type.i8]
    return int(np.median([abs(weight.astype(int)).max() for weight in weights]))


def largest_activation_of_torch(file: Path) -> int:
    nodes = torch.export.load(file).graph_module.graph.nodes
    return max(node.args[4] for node in nodes if "quantize_per_tensor" in str(node.target))


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize(
    ("format", "largest", "numbers"),
    [("openvino", largest_weight_of_openvino, (127, 64)), ("torch-export", largest_activation_of_torch, (255, 127))],
)
def test_other_runtimes_have_seven_bits_where_products_overflow(
    format: str,
    largest: Callable[[Path], int],
    numbers: tuple[int, int],
    vnni: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package in RUNTIMES[format].packages + RUNTIMES[format].int8_packages:
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.setattr("arp_hub.runtimes.runtime.torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni, raising=False)
    captured = Captured.of(load_model(f"local-dir:{FOLDER}"), (3, 32, 32), 8, False)
    file = tmp_path / RUNTIMES[format].file
    RUNTIMES[format].write_int8(captured, file, IMAGES.split(8))
    assert numbers[not vnni] - 1 <= largest(file) <= numbers[not vnni]


def test_preprocessing_is_that_of_the_model(tmp_path: Path) -> None:
    """A model of one channel has no mean of three; a small data set is resized without a crop."""
    grey = timm.create_model("test_resnet", in_chans=1)
    done = arp_hub.export(grey, tmp_path / "grey", format="torch-export", input_size=(1, 32, 32), seconds=0)
    assert not {"mean", "std"} & done.record["preprocessing"].keys()
    words = [
        "export",
        "test_resnet",
        "--no-pretrained",
        "--num-classes",
        "10",
        "--data",
        "digits",
        "--format",
        "torch-export",
    ]
    result = CliRunner().invoke(app, [*words, "--seconds", "0", "--output", str(tmp_path / "digits")])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "digits" / "export.json").read_text())
    assert record["preprocessing"]["crop_mode"] == "squash" and record["preprocessing"]["crop_pct"] == 1


def test_a_quantiser_that_fails_gives_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")

    def fail(*args: object) -> None:
        raise RuntimeError("no scale for node 7\nmore")

    monkeypatch.setattr(TorchExport, "write_int8", fail)
    with pytest.raises(ArpHubError, match="torch.export cannot quantise the model: no scale for node 7$"):
        arp_hub.export(FOLDER, tmp_path / "out", format="torch-export", int8=True, images=IMAGES, seconds=0)
    assert list(tmp_path.iterdir()) == []


def test_nan_in_the_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchExport, "load", lambda self, path: lambda x: torch.full((len(x), 10), torch.nan))
    with pytest.raises(ArpHubError, match="outputs in torch.export, float32, are NaN or infinite"):
        arp_hub.export(FOLDER, tmp_path / "out", format="torch-export", images=IMAGES[:4])
    assert list(tmp_path.iterdir()) == []


IDLE: dict[str, tuple[list[str], str]] = {
    "images to calibrate int8": (["export", "OUT", "--data", "digits", "--calibration-images", "8"], "is about int8"),
    "a bound for int8": (["export", "OUT", "--int8-divergence", "0.1"], "is about int8"),
    "images to check": (["export", "OUT", "--max-images", "8"], "is about images, and there are none"),
    "images of spectra": (["inspect", "--model", "OUT", "--calibration-images", "8"], "is about images"),
}


@pytest.mark.parametrize("case", IDLE)
def test_options_without_an_effect_are_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.chdir(tmp_path)
    words, message = IDLE[case]
    result = CliRunner().invoke(app, [f"local-dir:{FOLDER}" if word == "OUT" else word for word in words])
    assert result.exit_code != 0 and list(tmp_path.iterdir()) == []
    assert message in " ".join(f"{result.output} {result.exception}".split())


@pytest.mark.parametrize("name", [".", "local-dir:.", "./"])
def test_the_default_folder_of_the_current_one_lies_beside_it(name: str, tmp_path: Path) -> None:
    assert Path(command._stem("out")) == Path("out") and Path(command._stem("hf-hub:ann/cats")) == Path("ann/cats")
    assert Path(command._stem(name)) == Path.cwd()


def test_names_of_other_classes_are_left_out(tmp_path: Path) -> None:
    model = load_model(f"local-dir:{FOLDER}", num_classes=5)
    done = arp_hub.export(model, tmp_path / "out", format="torch-export", seconds=0)
    assert done.record["num_classes"] == 5 and "label_names" not in done.record


def test_a_vit_in_float32_for_onnxruntime(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = vit()
    done = arp_hub.export(model, tmp_path / "out", opset=20, seconds=0)
    torch.testing.assert_close(
        run_onnx(tmp_path / "out", IMAGES[:3]), expected(model, IMAGES[:3]), rtol=1e-3, atol=1e-4
    )
    assert done.parity.source == "random" and done.latency is None
    import onnx

    assert onnx.load(done.file).opset_import[0].version == 20


def test_openvino(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    model = vit()
    done = arp_hub.export(model, tmp_path / "out", format="openvino", batch_size=2, seconds=0)
    # a CPU with bfloat16 computes in it by default
    compiled = openvino.Core().compile_model(done.file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(compiled({"images": IMAGES[:2].numpy()})["logits"])
    torch.testing.assert_close(found, expected(model, IMAGES[:2]), rtol=1e-3, atol=1e-4)
    assert done.record["size_bytes"] == sum(
        (tmp_path / "out" / f"model.{end}").stat().st_size for end in ("xml", "bin")
    )


@pytest.mark.slow
@pytest.mark.parametrize("format", ["openvino", "torch-export"])
def test_int8(format: str, tmp_path: Path) -> None:
    for package in RUNTIMES[format].packages + RUNTIMES[format].int8_packages:
        pytest.importorskip(package, reason=f"{package} is not installed")
    done = arp_hub.export(FOLDER, tmp_path / "out", format=format, int8=True, images=IMAGES, seconds=0)
    assert 80 < done.parity.agreement <= 100
    assert 0 < done.parity.divergence < 0.5
    assert files_naming(tmp_path / "out", str(ROOT)) == []


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        app([str(word) for word in words])
    return (int(stop.value.code or 0), *capsys.readouterr())


def test_the_command_writes_a_file_with_a_dynamic_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--format", "torch-export", "--dynamic-batch", "--data", "digits", "--max-images", 40, "--seconds", 0]
    code, out, err = call(capsys, "export", FOLDER, *words, "--output", tmp_path / "out", "--json")
    assert code == 0, err
    printed = json.loads(out)
    assert printed["input"]["shape"] == ["batch", 3, 32, 32] and printed["folder"] == str(tmp_path / "out")
    assert (printed["parity"]["images"], printed["parity"]["source"]) == (40, "test")
    assert printed["parity"]["top1"] == printed["parity"]["torch_top1"]
    graph = torch.export.load(tmp_path / "out/model.pt2").module()
    model = timm.create_model(f"local-dir:{FOLDER}", pretrained=True)
    for count in (1, 3):
        torch.testing.assert_close(graph(IMAGES[:count]), expected(model, IMAGES[:count]))
    assert files_naming(tmp_path / "out", str(ROOT)) == []
    code, out, err = call(capsys, "export", FOLDER, "--output", FOLDER, "--overwrite")
    assert code == 2 and "contains the saved model" in err and (FOLDER / "config.json").is_file()


def test_images_that_calibrate_are_not_called_test_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without classes and splits: all of its images calibrate."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    (tmp_path / "flat").mkdir()
    for number in range(24):
        Image.new("RGB", (32, 32), (10 * number, 0, 0)).save(tmp_path / "flat" / f"{number}.png")
    words = ["--format", "onnx", "--int8", "--data", tmp_path / "flat", "--seconds", 0, "--output", tmp_path / "out"]
    code, out, err = call(capsys, "export", FOLDER, *words, "--json")
    assert code == 0, err
    assert json.loads(out)["parity"]["source"] == "calibration"


def test_the_command_prints_the_verdict_with_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", FOLDER, "--format", "torch-export", "--seconds", 0.2, "--output", tmp_path / "out"]
    code, out, err = call(capsys, *words)
    assert code == 0, err
    record = json.loads((tmp_path / "out/export.json").read_text())
    assert out.splitlines()[-1] == record["verdict"]
    assert record["verdict"] not in err and f"export.json written to {tmp_path / 'out'}" in err
    code, out, err = call(capsys, *words, "--json")
    assert code == 0 and json.loads(out)["verdict"] and "written to" not in out + err


def test_a_file_that_differs_from_pytorch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/export.json").write_text("{}")
    load = TorchExport.load
    monkeypatch.setattr(TorchExport, "load", lambda self, path: lambda x: load(self, path)(x) * 1.001)
    with pytest.raises(ArpHubError, match="differ from PyTorch by 0.001 of the largest output, at most 0.0001"):
        arp_hub.export(FOLDER, tmp_path / "out", format="torch-export", images=IMAGES[:4])
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/export.json"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown format": ({"format": "tflite"}, "unknown format 'tflite': choose one of onnx, openvino, torch-export"),
    "int8 without images": ({"int8": True}, "int8 needs calibration images"),
    "labels without images": ({"test_labels": torch.zeros(3)}, "test_labels are the classes of test_images"),
    "labels of other images": (
        {"test_images": IMAGES, "test_labels": torch.zeros(3, dtype=torch.long)},
        r"one class an image, 24 whole numbers in all, got the shape \(3,\)",
    ),
    "labels in columns": (
        {"test_images": IMAGES, "test_labels": torch.zeros(24, 1, dtype=torch.long)},
        r"got the shape \(24, 1\) of torch.int64",
    ),
    "labels that are no classes": ({"test_images": IMAGES, "test_labels": torch.zeros(24)}, "of torch.float32"),
    "a class too many": (
        {"test_images": IMAGES, "test_labels": torch.arange(24) % 11},
        "test_labels go from 0 to 10, the model has 10 classes: count them from 0",
    ),
    "classes below 0": ({"test_images": IMAGES, "test_labels": torch.arange(24) % 3 - 1}, "go from -1 to 1"),
    "names of classes": ({"test_images": IMAGES, "test_labels": ["cat"] * 24}, "must be whole numbers"),
    "images of another size": ({"images": torch.randn(4, 3, 48, 48)}, r"images have the size \(3, 48, 48\)"),
    "bytes": ({"images": 255 * torch.rand(4, 3, 32, 32)}, "divide bytes by 255"),
    "too few images": ({"int8": True, "images": IMAGES[:3], "batch_size": 4}, "of 4 images: pass at least 4, got 3"),
    "a divergence without int8": ({"int8_divergence": 0.1}, "int8_divergence is about int8"),
    "an opset of another format": ({"format": "torch-export", "opset": 18}, "format 'torch-export' has none"),
    "no opset": ({"opset": 0}, "opset must be a whole number above 0, got 0"),
    "no batch": ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
    "a negative divergence": (
        {"int8": True, "int8_divergence": -1},
        "int8_divergence must be a number of at least 0, got -1",
    ),
    "no divergence": (
        {"int8": True, "int8_divergence": float("nan")},
        "int8_divergence must be a number of at least 0, got nan",
    ),
    "endless timing": ({"seconds": float("inf")}, "seconds must be a number of at least 0, got inf"),
    "a size that does not fit": ({"input_size": (1, 32, 32)}, "cannot run on an input of size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_come_before_any_work(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # each format counts as installed
    arguments, message = REFUSED[case]
    with pytest.raises(ArpHubError, match=message):
        arp_hub.export(FOLDER, tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", RUNTIMES)
def test_missing_packages_are_named_with_the_command_that_installs_them(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
    with pytest.raises(ArpHubError) as refused:
        arp_hub.export(FOLDER, tmp_path / "out", format=format, int8=True, images=IMAGES)
    runtime = RUNTIMES[format]
    assert ", ".join(runtime.packages + runtime.int8_packages) in str(refused.value)
    assert f'pip install "arp-hub[{runtime.extra}]"' in str(refused.value) and runtime.extra in extras


@pytest.mark.parametrize("place", ["a file", "another folder", "somebody else's file", "the current folder"])
def test_folders_that_are_not_written_to(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    output, reason = tmp_path / "out", "choose"
    if place == "a file":
        output.write_text("mine")
    elif place == "another folder":
        output.mkdir()
        (output / "mine.txt").write_text("mine")
        reason = "holds 'mine.txt', which export did not write"
    elif place == "somebody else's file":  # it has a name that export uses
        output.mkdir()
        (output / "model.onnx").write_text("mine")
        reason = "holds 'model.onnx', which export did not write"
    else:
        output.mkdir()
        monkeypatch.chdir(output)
        reason = "contains the current directory"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArpHubError, match=reason):
        arp_hub.export(FOLDER, output)
    assert sorted(tmp_path.rglob("*")) == before


NO_LOGITS: dict[str, tuple[dict[str, Any], str]] = {
    "maps": ({"num_classes": 0, "global_pool": ""}, r"gives features \(num_classes=0\)"),
    "features": ({"num_classes": 0}, r"gives features \(num_classes=0\)"),
    "two outputs": ({"features_only": True}, r"one output \(N, classes\)"),
}


@pytest.mark.parametrize("kind", NO_LOGITS)
def test_models_without_logits_are_refused(kind: str, tmp_path: Path) -> None:
    options, message = NO_LOGITS[kind]
    model = timm.create_model("test_resnet", **options)
    with pytest.raises(ArpHubError, match=message):
        arp_hub.export(model, tmp_path / "out", format="torch-export", input_size=(3, 32, 32))


def test_the_exported_model_stays_as_it_is(tmp_path: Path) -> None:
    model = vit().half().train()
    before = copy.deepcopy(model.state_dict())
    arp_hub.export(model, tmp_path / "out", format="torch-export", seconds=0)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("scheme", ["channel", "spatial", "group_in", "group_out", "cp", "tucker2"])
def test_balanced_factors_give_the_same_outputs_and_even_ranges(scheme: str) -> None:
    model = low_rank_model("cifar_resnet20", {"layer2.1.conv1": scheme})
    layer = low_rank_layers(model)["layer2.1.conv1"]
    with torch.no_grad():
        next(iter(layer.factors)).weight[0] *= 1e3  # one channel hides all others in one int8 scale
        layer.factors[1].weight.view(layer.factors[1].groups, -1, *layer.factors[1].weight.shape[1:])[0, :, 0] /= 1e3
    before, uneven = expected(model, IMAGES), spread_of_channels(model, layer)
    assert balance_factors(model, [IMAGES[:8], IMAGES[8:]]) is model
    torch.testing.assert_close(expected(model, IMAGES), before, rtol=1e-4, atol=1e-4)
    assert spread_of_channels(model, layer) < uneven / 20


@torch.no_grad()
def broken_in_int8() -> tuple[nn.Module, str]:
    """ResNet-20, and the name of a low-rank layer that int8 harms most.

    A channel of its input is zero, and the weights of that channel are large: they coarsen the scale of all others.
    """
    model = timm.create_model(f"local-dir:{FOLDER}", pretrained=True).eval()
    name, norm = "layer2.1.conv1", model.layer2[0].bn2
    norm.weight[0], norm.bias[0] = 0, -5
    weight = low_rank_layers(model)[name].factors[0].weight
    weight[:, 0] = 100 * weight.abs().max()
    return model, name


def test_int8_harms_most_where_weights_and_inputs_vary_most() -> None:
    """Whether or not the model says how many classes it has: its outputs are logits."""
    model, name = broken_in_int8()
    found = int8_divergences(model, IMAGES, 10)
    model.num_classes = 0
    assert int8_divergences(model, IMAGES, 10) == found
    assert found.keys() == low_rank_layers(model).keys() and found.pop(name) > 5 * max(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("format", RUNTIMES)
def test_layers_that_int8_harms_stay_in_float(format: str, tmp_path: Path) -> None:
    for package in RUNTIMES[format].packages + RUNTIMES[format].int8_packages:
        pytest.importorskip(package, reason=f"{package} is not installed")
    model, name = broken_in_int8()
    found = {}
    for most in (0.5, float("inf")):
        folder = tmp_path / str(most)
        found[most] = arp_hub.export(
            model, folder, format=format, int8=True, images=IMAGES, seconds=0, int8_divergence=most
        ).parity.divergence
        record = json.loads((folder / "export.json").read_text())
        assert record.get("layers_in_float") == ([name] if most < 1 else None)
    assert found[0.5] < found[float("inf")] / 2


PRODUCTS: dict[str, Any] = {
    "as it is": lambda weight: weight,
    "transposed": lambda weight: weight.T,
    "with the scales of a BatchNorm": lambda weight: weight * np.linspace(-2, 2, len(weight))[:, None],
    "in groups": lambda weight: weight.reshape(2, len(weight) // 2, -1, 1, 1),
}


@pytest.mark.parametrize("form", PRODUCTS)
def test_layers_are_found_in_a_graph_by_their_weights(form: str) -> None:
    model = nn.ModuleDict({"one": nn.Linear(6, 8), "other": nn.Linear(6, 8), "square": nn.Linear(8, 8)})
    weights = {name: layer.weight.detach().numpy() for name, layer in model.items()}
    products = {f"node of {name}": PRODUCTS[form](weight) for name, weight in weights.items()}
    for name in model:
        assert nodes_of(model, [name], products) == [f"node of {name}"]
    assert nodes_of(model, [], products) == []


@pytest.mark.parametrize("shape", [(2, 12), (2, 5, 12), (2, 3, 4, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_grouped_linear_layers_as_convolutions_give_the_same(shape: tuple[int, ...], bias: bool) -> None:
    model, x = nn.Sequential(GroupedLinear(12, 8, 4, bias=bias)), torch.randn(shape)
    if bias:
        nn.init.normal_(model[0].bias)
    found = with_convolutions(model)
    assert isinstance(model[0], GroupedLinear) and not isinstance(found[0], GroupedLinear)
    torch.testing.assert_close(found(x), model(x))


@pytest.mark.slow
def test_grouped_linear_layers_are_quantised_in_torch_export(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    model = vit()
    groups = model.get_submodule("blocks.0.attn.qkv").factors[0].groups
    assert groups > 1
    done = arp_hub.export(model, tmp_path / "out", format="torch-export", int8=True, images=IMAGES, seconds=0)
    importlib.import_module("torchao.quantization.pt2e")  # registers the operators of the file
    graph = torch.export.load(done.file).graph
    layers = [node for node in graph.nodes if re.search(r"aten\.(conv2d|linear)", str(node.target))]
    assert any("conv2d" in str(node.target) and node.args[-1] == groups for node in layers)  # the layer with groups
    assert [str(node) for node in layers if "dequantize" not in str(node.args[1].target)] == []


@pytest.mark.slow
def test_every_layer_of_a_vit_with_groups_is_quantised(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    done = arp_hub.export(vit(), tmp_path / "out", int8=True, images=IMAGES, seconds=0)
    graph = onnx.load(done.file).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    weights = {tensor.name for tensor in graph.initializer}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(layers) > 25
    assert [node.name for node in layers if weights.intersection(node.input[:2])] == []
    assert {makers[name] for node in layers for name in node.input[:2]} == {"DequantizeLinear"}


def spread_of_channels(model: nn.Module, layer: nn.Module) -> float:
    """The largest range of a channel after the first factor, over the median one."""
    seen: list[Tensor] = []
    hook = layer.factors[0].register_forward_hook(lambda module, args, output: seen.append(output))
    expected(model, IMAGES)
    hook.remove()
    ranges = seen[0].abs().amax((0, 2, 3))
    return float(ranges.max() / ranges.median())


def test_the_command_knows_all_formats() -> None:
    assert tuple(RUNTIMES) == command.FORMATS


@pytest.mark.slow
def test_snippets_that_need_other_packages_run(tmp_path: Path) -> None:
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    page = (ROOT / "docs/how-to/export.md").read_text(encoding="utf-8")
    code = re.findall(r"^```py\n(.*?)^```$", page, re.M | re.S)
    assert len(code) == 3
    Image.new("RGB", (48, 40)).save(tmp_path / "dog.jpg")
    env = {**os.environ, "PYTHONPATH": search_path(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "dense one" in done.stdout or "equally fast" in done.stdout
