"""Messages of the library name options on the command line, arguments in Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

import arp_hub
from arp_hub_cli.app import app
from arp_hub_cli.wording import in_options

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
WORDS = {
    "a share": ("keep_params=0.2 cannot be met", "--keep-params 0.2 cannot be met"),
    "a share at the end": ("raise keep_macs=0.2.", "raise --keep-macs 0.2."),
    "a name": ("a smaller rank_multiple", "a smaller --rank-multiple"),
    "a name in backticks": ("give `data` too", "give --data too"),
    "a flag": ("replace it with overwrite=True", "replace it with --overwrite"),
    "a tuple": ("pass input_size=(channels, height, width)", "pass --input-size channels height width"),
    "text": ("no column label_key='fine label'", "no column --label-key 'fine label'"),
    "an option of another name": ("calibration_copies must be 0 or more", "--calibration-copies must be 0 or more"),
    "another name": ("calibration=images", "--data images"),
    "an ordinary word": ("the seed of the data, the plan", "the seed of the data, the plan"),
    "words of the user": (
        "--num-classes 7 and --model-kwargs num_classes=10 differ",
        "--num-classes 7 and --model-kwargs num_classes=10 differ",
    ),
    "an argument of the model": ("build it with in_chans=3", "build it with --model-kwargs in_chans=3"),
    "a quoted name": ("tensor 'batch_size' is missing", "tensor 'batch_size' is missing"),
    "a path": ("cannot read runs/keep_params/x", "cannot read runs/keep_params/x"),
    "another library": (
        "keep_params=0.2: ValueError: rank_multiple is odd",
        "--keep-params 0.2: ValueError: rank_multiple is odd",
    ),
    "an option already": ("--keep-params must lie", "--keep-params must lie"),
}


@pytest.mark.parametrize("case", WORDS)
def test_names_of_arguments_become_options(case: str) -> None:
    message, expected = WORDS[case]
    assert in_options(message, COMMANDS["compress"].params) == expected


def test_options_that_a_command_lacks_are_not_named() -> None:
    assert in_options("give keep_params=0.5", COMMANDS["bench"].params) == "give keep_params=0.5"
    assert in_options("give keep_params=0.5", []) == "give keep_params=0.5"


SMALL = "--model test_resnet --no-pretrained --input-size 3 32 32"
REACHED = {
    "a budget of parameters": (
        f"plan {SMALL} --keep-params 0.001 --output {{tmp}}/plan.json",
        ["--keep-params 0.001 cannot be met", "a smaller --rank-multiple"],
    ),
    "a budget of MACs": (
        f"compress {SMALL} --keep-macs 0.001 --output {{tmp}}/out",
        ["--keep-macs 0.001 cannot be met"],
    ),
    "a folder that is full": (
        f"compress {SMALL} --keep-params 0.5 --output {{tmp}}",
        ["replace all of it with --overwrite"],
    ),
    "a column of digits": (
        f"evaluate {SMALL} --data digits --label-key fine",
        ["leave out --image-key and --label-key"],
    ),
    "an image column that is not there": (
        f"inspect {SMALL} --data {{tmp}}/folders --image-key img",
        ["has no column --image-key 'img'"],
    ),
    "a model of one channel": (
        "evaluate --model test_resnet --no-pretrained --model-kwargs in_chans=1 --data digits",
        ["images of 1 channels", "--model-kwargs in_chans=3"],
    ),
    "a layer to exclude": (f"plan {SMALL} --keep-params 0.5 --exclude nosuch", ["--exclude 'nosuch' matches no layer"]),
    "a batch size": ("bench --model test_resnet --no-pretrained --batch-size 0", ["--batch-size must be at least 1"]),
    "a token": ("push {tmp}/saved USER/NAME --no-dense", ["--token"]),
}


@pytest.mark.parametrize("case", REACHED)
def test_errors_speak_the_language_of_the_command_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line, expected = REACHED[case]
    save_file({"x": torch.zeros(1)}, tmp_path / "thesis.safetensors")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None, raising=False)
    for split in ("train", "test"):
        (tmp_path / "folders" / split / "a").mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "folders" / split / "a" / "1.png")
    if "saved" in line:
        arp_hub.save_pretrained(timm.create_model("test_resnet", num_classes=2), tmp_path / "saved")
    with pytest.raises(SystemExit) as stop:
        app(line.format(tmp=tmp_path).split())
    out, err = capsys.readouterr()
    said = err.strip().splitlines()[-1]
    assert (stop.value.code, out) == (2, "") and said.startswith("error: ")
    assert [words for words in expected if words not in said] == [], said
    assert [name for name in ("keep_", "_key", "overwrite=", "rank_multiple", "token=") if name in said] == []
