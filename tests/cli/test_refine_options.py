"""Refinement on the command line and in a run."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from arp_hub import RankPlan, decompose, make_plan
from arp_hub.refinement import Refinement
from arp_hub.refinement.steps import Steps
from arp_hub.training import TrainConfig, load_data
from arp_hub.training import run as train
from arp_hub_cli.app import app
from arp_hub_cli.inputs import RefineChoice
from arp_hub_cli.outcome import refinement_effect

COMPRESS = (
    "compress --model cifar_resnet20 --no-pretrained --keep-params 0.5 --schemes channel --effort fast --max-images 32"
).split()


def call(*words: Any) -> int:
    with pytest.raises(SystemExit) as stop:
        app([str(word) for word in words])
    return int(stop.value.code or 0)


def test_compress_refines_and_says_so(tmp_path, capsys):
    out, words = tmp_path / "out", ["--data", "digits", "--calibration-images", 64, "--refine-images", 60]
    assert call(*COMPRESS, *words, "--refine-steps", 12, "--output", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)["refinement"]
    assert (found["images"], found["held_out"], found["steps"]) == (54, 6, 12)
    assert found["after"] <= found["before"]
    assert json.loads((out / "metrics.json").read_text())["refinement"] == found
    assert "The fit was refined on 54 unlabelled images" in (out / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no state is left


REFUSED = {
    "no data": (["--refine"], "--refine needs unlabelled images: give --data"),
    "no data for minutes": (["--refine-minutes", "1"], "--refine-minutes needs unlabelled images: give --data"),
    "two bounds": (["--data", "digits", "--refine-minutes", 1, "--refine-steps", 5], "give one of them"),
    "no time": (["--data", "digits", "--refine-minutes", 0], "--refine-minutes must be a number above 0, got 0"),
    "no end": (["--data", "digits", "--refine-minutes", "inf"], "--refine-minutes must be a number above 0, got inf"),
    "few training images": (["--data", "{few}", "--refine"], "refinement needs at least 20 images, the training split"),
    "no step": (["--data", "digits", "--refine-steps", 0], "--refine-steps must be at least 1, got 0"),
    "images alone": (["--data", "digits", "--refine-images", 40], "--refine-images 40 has no effect without --refine"),
    "few images": (["--data", "digits", "--refine", "--refine-images", 19], "--refine-images must be at least 20"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_are_one_line_before_any_work(case, tmp_path, capsys, monkeypatch):
    options, message = REFUSED[case]
    few = tmp_path / "few"
    for number in range(6):
        (few / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(few / "ab"[number % 2] / f"{number}.png")
    monkeypatch.setattr("arp_hub.planning.make_plan.make_plan", None)
    words = [str(option).format(few=few) for option in options]
    assert call(*COMPRESS, *words, "--output", tmp_path / "out") == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["few"]


@pytest.mark.parametrize(("method", "time"), [("divergence", 1), ("step", 40)], ids=["before a state", "with a state"])
def test_ctrl_c_says_how_to_go_on(method, time, tmp_path, capsys, monkeypatch):
    original, calls = getattr(Steps, method), 0

    def interrupted(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == time:
            raise KeyboardInterrupt
        return original(self, *arguments)

    out, state = tmp_path / "out", tmp_path / "out-refinement.safetensors"
    words = [*COMPRESS, "--data", "digits", "--calibration-images", 64, "--refine-images", 60, "--refine-steps", 80]
    monkeypatch.setattr(Steps, method, interrupted)
    assert call(*words, "--output", out) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert state.exists() is (method == "step")
    resumes = f"interrupted. The same command resumes the refinement from '{state}'"
    assert last == (resumes if state.exists() else "interrupted")
    monkeypatch.undo()
    if state.exists():
        age(state, 5000)
    assert call(*words, "--output", out) == 0 and not state.exists()
    title = next(line for line in capsys.readouterr().out.splitlines() if "refined without labels" in line)
    seconds = int(title.split()[-2])
    assert seconds > 5000 if method == "step" else seconds < 5000


def test_a_finished_refinement_is_kept_until_the_model_is_saved(tmp_path, capsys, monkeypatch):
    out, state = tmp_path / "out", tmp_path / "out-refinement.safetensors"
    words = [*COMPRESS, "--data", "digits", "--calibration-images", 64, "--refine-images", 60, "--output", out]

    def interrupted(*arguments, **others):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("arp_hub.hub.save.save_pretrained", interrupted)
        assert call(*words, "--refine-steps", 12) == 130
    assert state.exists() and not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr("arp_hub.planning.make_plan.make_plan", None)
        assert call(*words, "--refine-steps", 13) == 2  # before any work
    assert "is of a refinement with steps=12, not 13: delete it" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(Steps, "step", None)  # there is none left to make
        assert call(*words, "--refine-steps", 12) == 0
    assert out.exists() and not state.exists()


def test_a_plan_by_timings_is_kept_for_the_command_that_resumes(tmp_path, monkeypatch):
    """Timings would make another plan, which the state does not fit."""
    step, calls = Steps.step, 0

    def interrupted(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        step(self, *arguments)

    monkeypatch.setattr(Steps, "step", interrupted)
    dense = timm.create_model("cifar_resnet20", num_classes=10).eval()
    plan, file = make_plan(dense, keep_params=0.5, schemes=["channel"]), tmp_path / "out-refinement-plan.json"
    model, data = decompose(copy.deepcopy(dense), plan), load_data("digits", dense)
    with pytest.raises(
        KeyboardInterrupt, match=f"resumes the refinement from .*, with --plan {file} in place of --keep-latency"
    ):
        RefineChoice(True, None, 40, 40).run(model, dense, data, tmp_path / "out", 0, 0, timed=plan)
    assert RankPlan.load(file) == plan and (tmp_path / "out-refinement.safetensors").exists()


def age(state: Path, seconds: float) -> None:
    """Make a state one of a refinement that has worked for some time."""
    with safe_open(state, "pt") as file:
        text, tensors = json.loads(file.metadata()["refinement"]), {name: file.get_tensor(name) for name in file.keys()}
    text["progress"]["seconds"] = seconds
    save_file(tensors, state, metadata={"refinement": json.dumps(text)})


@pytest.mark.parametrize("after", [0.1, 0.25], ids=["better", "no better"])
def test_compress_says_what_refinement_did(after):
    text = refinement_effect(Refinement(900, 100, 50, 60.0, 0.25, after))
    assert "0.25 nats on 100 held-out images" in text or "0.25 -> 0.1 nats on 100 held-out images" in text
    assert ("did not lower" in text) is (after == 0.25)


@pytest.mark.parametrize(
    "bound",
    [{"refine_minutes": 1, "max_steps": 4}, {"refine_steps": 4, "max_steps": 9}, {"refine_steps": 9, "max_steps": 4}],
    ids=str,
)
def test_a_run_refines_its_fit(tmp_path, bound):
    config = TrainConfig(
        model="cifar_resnet20", data="digits", keep_params=0.5, schemes=("channel",), effort="fast",
        epochs=0, refine_images=40, batch_size=8, cpu=True, tracker="none", output=str(tmp_path / "out"), **bound,
    )  # fmt: skip
    metrics = train(config)
    assert metrics["refinement"]["steps"] == 4 and metrics["top1"] == metrics["scores"]["refined"]["top1"]
    assert "refined without labels" in (tmp_path / "out" / "README.md").read_text()
    assert not (Path(config.run_folder) / "refinement.safetensors").exists()


def test_a_resumed_run_still_says_how_its_fit_was_refined(tmp_path):
    settings = {
        "model": "cifar_resnet20", "data": "digits", "keep_params": 0.5, "schemes": ("channel",), "effort": "fast",
        "max_steps": 4, "epochs": 1, "refine_minutes": 1, "refine_images": 40, "batch_size": 8, "cpu": True,
        "tracker": "none", "checkpoint_every": 1, "keep_checkpoints": 99, "output": str(tmp_path / "out"),
    }  # fmt: skip
    whole = train(TrainConfig(**settings))
    checkpoint = sorted((tmp_path / "out-run" / "checkpoints").iterdir())[0]
    shutil.rmtree(tmp_path / "out")
    resumed = train(TrainConfig(**settings, resume=str(checkpoint)))
    assert resumed["refinement"] == whole["refinement"] and resumed["top1"] == whole["top1"]
    assert "The fit was refined on 36 unlabelled images" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_without_a_fit_refines_nothing(tmp_path):
    with pytest.raises(ValueError, match="start_from='dense' makes none: set refine_minutes=0"):
        TrainConfig(model="cifar_resnet20", keep_params=0.5, start_from="dense", refine_minutes=1)
