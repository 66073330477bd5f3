"""``--print-config`` of a recipe writes a file that ``--config`` reads back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from arp_hub.training import TrainConfig
from arp_hub.training.command import parse_command

CASES = {
    "defaults": {"model": "cifar_resnet20", "keep_params": 0.35},
    "lists, tables and text": {
        "model": "test_vit", "keep_macs": 0.5, "model_kwargs": {"img_size": [32, 32], "act": "gelu: #1", "x": None},
        "schemes": ("cp", "channel"), "exclude": (), "data": "a folder/with: 'quotes' # and more", "lr": 1e-5,
        "image_key": "null", "label_key": "yes", "output": "1e3", "push_to_hub": "me/naïve", "dense_lr": 3e7,
        "dense_epochs": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_printed_settings_are_valid_input(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = parse_command("", CASES[case], ["--seed", "7"])
    with pytest.raises(SystemExit) as stop:
        parse_command("", CASES[case], ["--print-config", "--seed", "7"])
    text = capsys.readouterr().out
    assert not stop.value.code
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    assert parse_command("", {}, ["--config", str(tmp_path / "x.yaml")]) == config
    assert parse_command("", {"model": "other", "keep_macs": 0.1}, ["--config", str(tmp_path / "x.yaml")]) == config
    plain = " ".join(text.replace("\n# ", " ").split())
    for setting in dataclasses.fields(TrainConfig):
        assert f"\n{setting.name}:" in text
        assert setting.metadata["help"] in plain
    assert max(map(len, text.splitlines())) <= 100


def test_other_processes_print_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse_command("", CASES["defaults"], ["--print-config"])
    assert capsys.readouterr().out == ""


def test_a_bad_setting_is_refused_and_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="lr must be above 0"):
        parse_command("", CASES["defaults"], ["--print-config", "--lr", "0"])
    assert capsys.readouterr().out == ""
