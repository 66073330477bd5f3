"""Latency in ONNX Runtime and OpenVINO: comparisons, budgets that are kept there, and refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import low_rank_model
from torch import nn

import arp_hub
from arp_hub import ArpHubError, Workload, benchmark, make_plan, timing
from arp_hub.planning.latency_table import LatencyTable
from arp_hub.runtimes import timed
from arp_hub.runtimes.runtime import Runtime
from arp_hub.schemes import make_scheme
from arp_hub.schemes.shapes import LayerShape
from arp_hub_cli import options
from arp_hub_cli.app import app

SIZE = (3, 32, 32)
CPU = torch.device("cpu")
ONNX = Workload(runtime="onnxruntime")
CASES = [
    pytest.param("onnxruntime", "float32", id="onnxruntime"),
    pytest.param("onnxruntime", "int8", id="onnxruntime-int8", marks=pytest.mark.slow),
    pytest.param("openvino", "float32", id="openvino", marks=pytest.mark.slow),
    pytest.param("openvino", "int8", id="openvino-int8", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of measurements for each test."""
    monkeypatch.setenv("ARP_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latency.json"


def installed(runtime: str, precision: str) -> Workload:
    """A workload, if the packages of its runtime are installed."""
    adapter = timed.TIMED[runtime]
    for package in adapter.packages + adapter.int8_packages * (precision == "int8"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    return Workload(runtime=runtime, precision=precision)


def wide() -> nn.Module:
    """A network whose time goes into two wide layers of one shape."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 128, 3, padding=1), *(nn.Conv2d(128, 128, 3, padding=1) for _ in range(2))]
    layers = [layer for conv in convs for layer in (conv, nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 5)).eval()


@pytest.mark.parametrize(("runtime", "precision"), CASES)
def test_a_budget_is_kept_in_the_runtime(runtime: str, precision: str, cache: Path) -> None:
    workload, dense = installed(runtime, precision), wide()
    plan = make_plan(dense, keep_latency=0.7, workload=workload, input_size=SIZE, schemes=["channel"], exclude=["0"])
    assert plan.layers.keys() == {"2", "4"}
    known = json.loads(cache.read_text())
    assert known and all(f"runtime='{runtime}', precision='{precision}'" in key for key in known)
    small = arp_hub.decompose(wide(), plan)
    found = benchmark(small, workload, dense=dense, input_size=SIZE, seconds=2)
    assert found.ratio is not None and found.ratio.median < 0.7 * 1.15  # 5 % is promised, the rest is noise
    shown = found.to_dict()
    assert (shown["runtime"], shown["precision"], shown["device"]) == (runtime, precision, "cpu")


def test_a_layer_is_exported_in_all_its_forms_at_once_and_remembered(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("onnxruntime", "float32")
    exports = []
    write = type(timed.TIMED["onnxruntime"]).write
    monkeypatch.setattr(
        type(timed.TIMED["onnxruntime"]), "write", lambda self, *args: exports.append(args) or write(self, *args)
    )
    shape = LayerShape(64, 64, (3, 3), padding=(1, 1))
    schemes = [make_scheme("channel", shape), make_scheme("cp", shape)]
    table = LatencyTable(ONNX, CPU)
    faster = table.faster(schemes, [(16, 16)])
    assert schemes[0] in faster
    costs = table.costs(schemes[0], [(16, 16)], 1.0)
    assert costs[8] <= costs[24] and costs[8] < 0.9  # equal where both timings are alike
    assert 1e-6 < table.dense_seconds(schemes[0], (16, 16)) < 1
    assert len(exports) == 1
    table.save()
    again = LatencyTable(ONNX, CPU)
    assert again.faster(schemes, [(16, 16)]) == faster and len(exports) == 1
    assert again.dense_seconds(schemes[0], (16, 16)) == table.dense_seconds(schemes[0], (16, 16))
    known = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: value for key, value in known.items() if not key.endswith("seconds")}))
    assert 1e-6 < LatencyTable(ONNX, CPU).dense_seconds(schemes[0], (16, 16)) < 1


def test_the_command_times_both_forms_in_the_runtime(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    installed("onnxruntime", "int8")
    model = low_rank_model("test_resnet", {"layer1.0.conv1": "channel"}, num_classes=3)
    arp_hub.save_pretrained(model, tmp_path / "out")
    words = f"bench --model local-dir:{tmp_path / 'out'} --runtime onnxruntime --precision int8 --batch-size 2"
    with pytest.raises(SystemExit) as stop:
        app([*words.split(), "--seconds", "0.2", "--input-size", "3", "32", "32", "--json"])
    out, err = capsys.readouterr()
    assert not stop.value.code, err
    found = json.loads(out)
    assert "onnxruntime" in found["versions"]
    timing = found["latency"][0]
    assert (timing["runtime"], timing["precision"], timing["batch_size"]) == ("onnxruntime", "int8", 2)
    assert timing["rounds"] >= 5 and timing["dense_latency_ms"]["median"] > 0


def test_choices_named_in_help_are_those_there_are() -> None:
    assert options.RUNTIMES == timing.RUNTIMES == ("torch", *timed.TIMED)
    assert options.PRECISIONS == timing.PRECISIONS


NONSENSE: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown runtime": ({"runtime": "tflite"}, "unknown runtime 'tflite': choose one of torch, onnxruntime, openvi"),
    "an unknown precision": ({"precision": "int4"}, "unknown precision 'int4': choose one of float32, int8"),
    "int8 in PyTorch": ({"precision": "int8"}, "choose runtime='onnxruntime' or runtime='openvino'"),
    "a dtype of PyTorch": ({"runtime": "openvino", "dtype": "bfloat16"}, "dtype=bfloat16 is a type of PyTorch"),
    "a memory format": ({"runtime": "onnxruntime", "channels_last": True}, "leave `channels_last` out"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_combinations_without_a_meaning_are_refused(case: str) -> None:
    given, message = NONSENSE[case]
    with pytest.raises(ArpHubError) as refused:
        Workload(**given)
    assert message in str(refused.value)


def test_a_compiled_model_in_another_runtime_is_refused() -> None:
    with pytest.raises(ArpHubError, match=r"torch.compile has no effect in runtime=onnxruntime"):
        benchmark(wide(), ONNX, compiled=True)


@pytest.mark.parametrize("runtime", timed.TIMED)
@pytest.mark.parametrize("ask", ["plan", "bench"])
def test_a_missing_runtime_is_named_with_the_command_that_installs_it(
    runtime: str, ask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    workload, adapter = Workload(runtime=runtime, precision="int8"), timed.TIMED[runtime]
    with pytest.raises(ArpHubError) as refused:
        if ask == "plan":
            make_plan(wide(), keep_latency=0.5, workload=workload, input_size=SIZE)
        else:
            benchmark(wide(), workload, input_size=SIZE)
    assert f'pip install "arp-hub[{adapter.extra}]"' in str(refused.value)


WORDS = {
    "unknown runtime": ("bench --runtime tflite", "unknown --runtime 'tflite': choose one of torch"),
    "int8 in torch": ("bench --precision int8", "choose --runtime 'onnxruntime' or --runtime 'openvino'"),
    "a memory format": ("plan --keep-latency 0.5 --runtime openvino --channels-last", "leave --channels-last out"),
    "compile": ("bench --runtime openvino --compile", "--compile has no effect with --runtime openvino"),
    "no latency": ("plan --keep-params 0.5 --runtime openvino", "--runtime and --precision apply to --keep-latency"),
}


@pytest.mark.parametrize("case", WORDS)
def test_the_commands_refuse_in_their_own_words(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, message = WORDS[case]
    with pytest.raises(SystemExit) as stop:
        app([*words.split(), "--model", "cifar_resnet20"])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_model_without_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "require", lambda self, int8: None)
    with pytest.raises(ArpHubError, match=r"one output \(N, classes\)"):
        benchmark(nn.Sequential(nn.Conv2d(3, 4, 1)), ONNX, input_size=SIZE)
