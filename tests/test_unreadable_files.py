"""Files and paths that a user or a stranger gives: each is read, or refused with one ``ArpHubError``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import arp_hub
from arp_hub.hub.card import keep_by_hand
from arp_hub.hub.load import load_model
from arp_hub.hub.save import check_folder, save_pretrained
from arp_hub.hub.staging import _read_metrics
from arp_hub.planning.latency_table import LatencyTable
from arp_hub.reports.plots import save_figure
from arp_hub.reports.run_page import write_report
from arp_hub.timing import Workload
from arp_hub.training import TrainConfig, load_data
from arp_hub.training.config import read_config
from arp_hub.training.runlog import read_log

# What each reader reads, and how it is called. All take a folder with a saved model and with the file of the case.
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a folder to replace": ("config.json", check_folder),
    "a saved model": ("config.json", lambda folder: load_model(f"local-dir:{folder}")),
    "a folder to push": ("config.json", lambda folder: arp_hub.push_to_hub(folder, "a/b", token="x")),
    "a plan": ("plan.json", lambda folder: arp_hub.RankPlan.load(folder / "plan.json")),
    "metrics for a report": ("metrics.json", write_report),
    "metrics to push": ("metrics.json", _read_metrics),
    "a log": ("log.jsonl", lambda folder: read_log(folder / "log.jsonl")),
    "settings": ("run.yaml", lambda folder: read_config(folder / "run.yaml")),
    "weights": ("w.safetensors", lambda folder: load_model("cifar_resnet20", folder / "w.safetensors")),
    "pickled weights": ("w.pth", lambda folder: load_model("cifar_resnet20", folder / "w.pth")),
}
CONTENTS: dict[str, bytes | Callable[[Path], Any]] = {
    "nested lists": b"[" * 100_000 + b"]" * 100_000,
    "nested objects": b'{"arp_hub":' * 100_000 + b"1" + b"}" * 100_000,
    "binary": b"\xff\xfe\x00\x01",
    "zeros": bytes(100),
    "cut short": b'{"arp_hub": {"ver',
    "a number of 10,000 digits": b'{"arp_hub": ' + b"9" * 10_000 + b"}",
    "a text": b'"arp_hub"',
    "a list": b'["arp_hub", 1]',
    "a number": b"5",
    "too large": lambda path: os.truncate(path, 2**27),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing")),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARP_HUB_PICTURES", "0")
        return save_pretrained(timm.create_model("test_vit"), tmp_path_factory.mktemp("saved") / "out")


def put(saved: Path, folder: Path, name: str, content: bytes | Callable[[Path], Any]) -> Path:
    """A copy of a saved model in which one file is replaced."""
    shutil.copytree(saved, folder)
    (folder / name).write_bytes(b"" if callable(content) else content)
    if callable(content):
        content(folder / name)
    return folder


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("reader", READERS)
def test_no_content_of_a_file_is_read_without_a_check(saved: Path, tmp_path: Path, reader: str, content: str) -> None:
    name, read = READERS[reader]
    folder = put(saved, tmp_path / "out", name, CONTENTS[content])
    with pytest.raises(arp_hub.ArpHubError) as raised:
        read(folder)
    assert 20 < len(str(raised.value)) < 2_000 and "ArpHubError" not in str(raised.value)
    assert (tmp_path / "out").is_dir() and not (folder / "report.html").exists()


@pytest.mark.parametrize("content", CONTENTS)
def test_a_cache_of_timings_survives_any_content(saved: Path, tmp_path: Path, content: str) -> None:
    folder = put(saved, tmp_path / "out", "latency.json", CONTENTS[content])
    assert LatencyTable(Workload(), torch.device("cpu"), folder / "latency.json")._known == {}


PATHS: dict[str, Any] = {
    "too long": "x" * 300,
    "far too long": "a/" * 3_000,
    "a null byte": "a\0b",
    "half a surrogate": "\ud800/x",
    "below a file": "file/x",
    "a number": 5,
    "bytes": b"x",
}
TAKE_PATHS: dict[str, Callable[[Any], Any]] = {
    "folder of a model": lambda path: load_model(f"local-dir:{path}"),
    "model": load_model,
    "checkpoint": lambda path: load_model("cifar_resnet20", path),
    "plan": arp_hub.RankPlan.load,
    "plan to write": lambda path: arp_hub.RankPlan().save(path),
    "report": write_report,
    "settings": read_config,
    "folder to save in": lambda path: save_pretrained(timm.create_model("test_vit"), path),
    "folder for later": check_folder,
    "folder to push": lambda path: arp_hub.push_to_hub(path, "a/b", token="x"),
    "picture": lambda path: save_figure(None, path),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("taker", TAKE_PATHS)
def test_a_path_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taker: str, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(arp_hub.ArpHubError):
        TAKE_PATHS[taker](PATHS[path])
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", [None, 5, b"a/b", "", "a b", "a/b/c", "-", "a/" + "b" * 200])
def test_a_name_that_the_hub_cannot_have_is_refused(name: Any) -> None:
    model = timm.create_model("test_vit")
    for call in (arp_hub.download, lambda name: arp_hub.push_to_hub(model, name, token="x")):
        with pytest.raises(arp_hub.ArpHubError):
            call(name)


@pytest.mark.parametrize("classes", [-3, 2**20 + 1, pytest.param(10**5_000, id="5,001 digits"), 2.0, "ten", True, [10]])
def test_a_number_of_classes_that_no_saved_model_may_have_is_refused(classes: Any) -> None:
    with pytest.raises(arp_hub.ArpHubError, match="num_classes must be a whole number from 0 to"):
        load_model("test_vit", num_classes=classes)


@pytest.mark.parametrize("source", [None, 5, b"digits", ["digits"]])
def test_data_are_named_by_text(source: Any) -> None:
    with pytest.raises(arp_hub.ArpHubError, match="data must be named by text"):
        load_data(source, timm.create_model("test_vit"))


YAML = {
    "a date that is none": "lr: 2024-13-45",
    "a bool that is none": "lr: !!bool maybe",
    "a number that is none": "lr: !!int ''",
    "a float that is none": "lr: !!float x",
    "a time that is none": "lr: !!timestamp x",
    "an unknown tag": "lr: !!python/object/apply:os.system [touch x]",
    "a long number": "epochs: " + "9" * 10_000,
    "nested": "[" * 10_000,
    "an unknown alias": "lr: *x",
    "a key of lists": "? [1]\n: 2",
}


@pytest.mark.parametrize("case", YAML)
def test_settings_and_heads_of_cards_survive_any_yaml(tmp_path: Path, case: str) -> None:
    (tmp_path / "run.yaml").write_text(YAML[case])
    with pytest.raises(arp_hub.ArpHubError, match="cannot read the config"):
        read_config(tmp_path / "run.yaml")
    card = "---\nlicense: mit\n---\n\n# Model\n"
    assert keep_by_hand(card, f"---\n{YAML[case]}\n---\n\n# Model\n") == card


def test_nested_arguments_of_a_model_are_refused() -> None:
    nested: list[Any] = []
    for _ in range(5_000):
        nested = [nested]
    with pytest.raises(arp_hub.ArpHubError, match="cannot be kept with the model"):
        TrainConfig(model="resnet18", model_kwargs={"x": nested})


def test_what_a_read_only_place_refuses_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "log.jsonl").write_text('{"phase": "dense", "loss": 1, "top1": 2, "lr": 3}')
    monkeypatch.setenv("ARP_HUB_PICTURES", "0")
    monkeypatch.setattr(os, "fsync", refuse)
    for write, name in (
        (lambda path: arp_hub.RankPlan().save(path), "plan.json"),
        (lambda path: write_report(path.parent), "report.html"),
    ):
        with pytest.raises(arp_hub.ArpHubError, match=f"cannot write .*{name}.*Permission denied"):
            write(tmp_path / name)
        assert not (tmp_path / name).exists()
