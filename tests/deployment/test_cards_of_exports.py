"""An export in a saved folder: the card lists it, a push uploads it, and the owner's words stay."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import low_rank_model
from torch import nn

import arp_hub
from arp_hub.hub.card import model_card
from arp_hub.hub.export_files import read_export
from arp_hub.hub.load import load_model
from arp_hub.hub.staging import stage

SIZE = (3, 32, 32)
IMAGES = torch.randn(6, *SIZE, generator=torch.Generator().manual_seed(2))
NOTES = "Ask Ann about\nthe cats."
RECORD: dict[str, Any] = {
    "format": "onnx", "precision": "int8", "file": "model.onnx", "size_bytes": 600_000,
    "parity": {"images": 450, "source": "test", "agreement": 98.44, "divergence": 0.0084, "top1": 69.5,
               "torch_top1": 70.0},
    "params": 50,
    "latency": {"batch_size": 1, "threads": 2, "latency_ms": {"median": 3.7}, "dense_latency_ms": {"median": 1.33}},
}  # fmt: skip
METRICS = {"params": 50, "bytes": 2_000_000, "top1": 70.0, "images": 450, "input_size": [3, 32, 32],
           "dense": {"params": 100, "bytes": 4_000_000, "top1": 71.0}}  # fmt: skip
CONFIG = {"architecture": "arp_lowrank", "num_classes": 10, "pretrained_cfg": {"license": "apache-2.0"},
          "model_args": {"backbone": "cifar_resnet20", "plan": {"layers": {}}}}  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved folder whose card has an owner's words."""
    model = low_rank_model("test_resnet", {"layer1.0.conv1": "channel"}, num_classes=3)
    folder = arp_hub.save_pretrained(model, tmp_path / "out", metrics={"top1": 50.0, "dense": {"top1": 60.0}})
    card = folder / "README.md"
    mark = "between these two lines -->\n"
    text = card.read_text(encoding="utf-8").replace(mark, f"{mark}{NOTES}").replace("\ntags:\n", "\ntags:\n- cats\n")
    card.write_text(text, encoding="utf-8")
    return folder


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_card_lists_an_export_and_a_push_uploads_it(saved: Path, tmp_path: Path) -> None:
    assert "Exported files" not in card_of(saved)
    done = arp_hub.export(saved, saved / "pt2", format="torch-export", input_size=SIZE, images=IMAGES, seconds=0.1)
    card = card_of(saved)
    size = done.record["size_bytes"] / 1e6
    assert f"- `pt2/model.pt2` (torch-export, float32, {size:.2f} MB): same top-1 class as PyTorch for 100.0 %" in card
    assert "of 6 calibration images" in card and " ms at batch 1 on " in card and ", the dense model " in card
    assert NOTES in card and "\n- cats\n" in card and "local-dir:out" in card
    assert str(tmp_path) not in card
    (saved / "pt2" / "link").symlink_to(tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (upload,) = stage(saved, scratch, "ann/cats", "main", None, metrics=None, tag=None, earlier_card=lambda branch: "")
    assert {name for name in upload.files if "/" in name} == {"pt2/model.pt2", "pt2/export.json"}
    pushed = upload.files["README.md"].read_text(encoding="utf-8")
    assert "`pt2/model.pt2`" in pushed and NOTES in pushed and "hf-hub:ann/cats" in pushed


def test_a_second_export_replaces_its_line(saved: Path) -> None:
    for seconds, timed in ((0.1, True), (0, False)):
        arp_hub.export(saved, saved / "pt2", format="torch-export", input_size=SIZE, images=IMAGES, seconds=seconds)
        assert card_of(saved).count("`pt2/model.pt2`") == 1
        assert (" ms at batch" in card_of(saved)) == timed
    assert NOTES in card_of(saved)


def test_a_damaged_folder_keeps_its_card_and_its_export(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    (saved / "metrics.json").write_text("[]")
    before = card_of(saved)
    model = low_rank_model("test_resnet", {"layer1.0.conv1": "channel"}, num_classes=3)
    with caplog.at_level(logging.WARNING):
        done = arp_hub.export(model, saved / "pt2", format="torch-export", input_size=SIZE, seconds=0)
    assert done.file.is_file() and card_of(saved) == before
    assert "does not list the export" in caplog.text and "metrics.json" in caplog.text


@pytest.mark.parametrize("folder", ["", "onnx-int8"])
def test_int8_has_a_column_with_what_export_json_says(folder: str) -> None:
    export = {folder: RECORD} if folder else RECORD
    card = model_card(CONFIG, METRICS, "hf-hub:ann/small", export=export)
    assert "|  | dense | compressed | of dense | compressed, int8 |" in card
    assert "| weights | 4.00 MB | 2.00 MB | 50.0 % | 0.60 MB |" in card
    assert "| top-1, % | 71.00 | 70.00 |  | 69.50 |" in card
    name = f"{folder}/model.onnx" if folder else "model.onnx"
    assert (
        f"- `{name}` (onnx, int8, 0.60 MB): top-1 69.50 % (in PyTorch 70.00 %), same top-1 class as PyTorch for "
        "98.4 % of 450 test images, divergence 0.0084 nats; 3.7 ms at batch 1 on 2 threads, the dense model 1.33 ms."
        in card
    )


def other(**changes: Any) -> dict[str, Any]:
    return {**RECORD, **changes, "parity": {**RECORD["parity"], **changes.get("parity", {})}}


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "the dense model in int8": ({"dense-onnx-int8": other(params=100)}, ""),
    "float32 in a folder that says int8": ({"onnx-int8": other(precision="float32")}, ""),
    "the dense model beside this one": ({"a-int8": other(params=100, size_bytes=1), "b": RECORD}, "0.60 MB"),
    "other images": ({"onnx": other(parity={"images": 100})}, "0.60 MB"),
    "as many images of another data set": ({"onnx": other(parity={"torch_top1": 68.2})}, "0.60 MB"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_int8_column_is_of_this_model_and_of_the_images_of_the_card(case: str) -> None:
    export, size = OTHERS[case]
    card = model_card(CONFIG, METRICS, "hf-hub:ann/small", export=export)
    assert ("compressed, int8" in card) == bool(size)
    if size:
        assert f"| weights | 4.00 MB | 2.00 MB | 50.0 % | {size} |" in card
        assert ("| 69.50 |" in card) == (case == "the dense model beside this one")


STRANGE: dict[str, Any] = {
    "no JSON": "{", "a list": [RECORD], "a number": 3, "no file": {"format": "onnx"},
    "wrong types": {"format": 3, "file": "x", "parity": {"agreement": "all"}, "latency": {"latency_ms": "fast"}},
}  # fmt: skip


@pytest.mark.parametrize("case", STRANGE)
def test_strange_records_are_left_out(case: str, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    record = STRANGE[case]
    (tmp_path / "onnx" / "export.json").write_text(record if isinstance(record, str) else json.dumps(record))
    card = model_card(CONFIG, METRICS, "hf-hub:ann/small", export=read_export(tmp_path))
    assert "top-1 class" not in card and " ms at batch" not in card


def test_words_of_a_stranger_stay_on_their_line() -> None:
    record = {**RECORD, "file": "a\n# Title <script>", "precision": "|"}
    card = model_card(CONFIG, METRICS, "hf-hub:ann/small", export={"x": record})
    assert "\n# Title" not in card and "<script>" not in card


def longer_trained(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.get_parameter("fc.bias").add_(0.1)
    return model


OTHER_MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "other weights": longer_trained,
    "another model": lambda model: timm.create_model("test_vit", num_classes=3, img_size=32).eval(),
    "the merged model": lambda model: arp_hub.to_dense(model),
}


@pytest.mark.parametrize("case", [*OTHER_MODELS, "the same"])
def test_an_export_of_other_weights_is_neither_listed_nor_published(
    case: str, saved: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model = load_model(f"local-dir:{saved}")
    arp_hub.export(OTHER_MODELS.get(case, lambda same: same)(model), saved / "pt2", format="torch-export")
    listed = case == "the same"
    assert ("pt2/model.pt2" in (saved / "README.md").read_text()) == listed
    assert ("is of other weights than" in caplog.text) == (not listed)
    (scratch := tmp_path / "stage").mkdir()
    (upload,) = stage(saved, scratch, "ann/cats", "main", None, metrics=None, tag=None, earlier_card=lambda branch: "")
    assert ("pt2/model.pt2" in upload.files) == listed
    assert ("pt2/model.pt2" in upload.files["README.md"].read_text()) == listed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_export_is_of_the_weights_in_any_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = low_rank_model("test_resnet", {"layer1.0.conv1": "channel"}, num_classes=3).to(dtype)
    saved = arp_hub.save_pretrained(model, tmp_path / "out")
    arp_hub.export(saved, saved / "pt2", format="torch-export")
    assert "pt2/model.pt2" in (saved / "README.md").read_text()
