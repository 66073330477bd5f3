import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers import ON_TWO, both_ended_clean, search_path
from PIL import Image

import arp_hub
from arp_hub.layers.model import count_params, low_rank_layers

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.name for path in RECIPES.glob("*.py"))
TRIAL = ["--cpu", "--max-steps", "2", "--ramp", "0.5", "--batch-size", "8", "--tracker", "none", "--dense-epochs", "1"]
WEIGHTS_ONLY = ["--start-from", "dense", "--calibration-images", "0", "--schemes", "channel"]


@pytest.fixture
def recipe(monkeypatch, capsys):
    """Runs a recipe in this process, which is faster than a new one; returns its output."""

    def run(name, *options):
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        runpy.run_path(str(RECIPES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def launch(name, *options, processes=1, timeout=240):
    """Run a recipe as a user would; returns its standard output."""
    start = ON_TWO if processes == 2 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search_path(RECIPES.parent)}
    command = [sys.executable, *start, str(RECIPES / name), *map(str, options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    assert processes == 1 or both_ended_clean(done.stderr), done.stderr
    return done.stdout


def test_all_recipes_of_the_readme_are_there():
    assert NAMES == ["any_backbone.py", "cifar_resnet110.py", "cifar_resnet20.py", "cifar_resnet56.py",
                     "cifar_vgg16.py", "custom_loop.py", "quickstart.py", "resnet50.py", "vit.py"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_the_recipe_does(recipe, capsys, name):
    with pytest.raises(SystemExit) as ended:
        recipe(name, "--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "usage:" in shown
    for option in ("--data", "--output", "--cpu", "--keep-params"):
        assert option in shown
    first = (RECIPES / name).read_text().splitlines()[0].strip('"')
    assert first in shown


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("quickstart.py", ["--calibration-images", "8", "--schemes", "channel"]),
        ("cifar_resnet20.py", ["--data", "digits", *WEIGHTS_ONLY]),
        ("cifar_resnet110.py", ["--data", "digits", *WEIGHTS_ONLY]),
        ("cifar_vgg16.py", ["--data", "digits", *WEIGHTS_ONLY]),
        ("any_backbone.py", ["--data", "digits", "--model", "test_convnext", "--no-pretrained", *WEIGHTS_ONLY]),
    ],
)
def test_a_trial_run_saves_a_model_that_loads(recipe, tmp_path, name, options):
    output = tmp_path / "out"
    said = recipe(name, *TRIAL, *options, "--output", output)
    model = timm.create_model(f"local-dir:{output}", pretrained=True)
    metrics = json.loads((output / "metrics.json").read_text())
    assert low_rank_layers(model).keys() == metrics["plan"]["layers"].keys()
    assert count_params(model) == metrics["params"] <= metrics["config"]["keep_params"] * metrics["dense"]["params"]
    assert metrics["command"].startswith(f"{name} --cpu --max-steps 2")
    if name == "quickstart.py":
        assert f"-> {count_params(model):,}" in said


def test_the_large_image_path_goes_through_every_phase(recipe, tmp_path, shared, caplog):
    output = tmp_path / "out"
    data = shared / "data" / "imagenet-sample"
    options = ["--model", "test_resnet", "--data", data, "--finetune-epochs", "1", "--calibration-images", "8"]
    recipe("resnet50.py", *TRIAL, *options, "--schemes", "channel", "--output", output)
    assert "one usable split, 'validation'" in caplog.text
    metrics = json.loads((output / "metrics.json").read_text())
    assert set(metrics["scores"]) == {"dense", "fit", "before_decomposition", "decomposed", "finetuned"}
    assert metrics["images"] == 64
    model = timm.create_model(f"local-dir:{output}", pretrained=True)
    assert model(torch.zeros(1, 3, 160, 160)).shape == (1, 1000)
    assert model.pretrained_cfg["label_names"][0] == "n01440764_tench"


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_custom_loop(recipe, tmp_path, processes):
    output = tmp_path / "out"
    options = ["--max-steps", "40", "--batch-size", "16", "--cpu", "--output", output]
    said = recipe("custom_loop.py", *options) if processes == 1 else launch("custom_loop.py", *options, processes=2)
    before, after = (float(number) for number in said.split("decomposition ")[1].split(", after "))
    assert before == after > 30  # chance gives 10
    assert low_rank_layers(timm.create_model(f"local-dir:{output}", pretrained=True))


def test_custom_loop_is_short():
    body = (RECIPES / "custom_loop.py").read_text().split("args = ")[1]
    assert len(body.splitlines()) <= 60


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--keep-parms", "0.5"], "unknown option '--keep-parms': did you mean '--keep-params'?"),
        (["--keep-params", "1.5"], "keep_params must be above 0 and below 1, got 1.5"),
        (["--checkpoint", "nowhere.pth"], "no checkpoint file at 'nowhere.pth'"),
        (["--data", "nowhere"], "unknown data 'nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_code_2(recipe, capsys, tmp_path, options, words):
    with pytest.raises(SystemExit) as ended:
        recipe("quickstart.py", "--cpu", *options, "--output", tmp_path / "out")
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert words in said


def test_files_of_others_stay(recipe, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit):
        recipe("quickstart.py", "--cpu", "--output", tmp_path / "out")
    assert "holds 'thesis.txt'" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("case", "words"), [("classes", "does not fit data .*: the model has 10 classes"), ("folder", "holds 'thesis.txt'")]
)
def test_custom_loop_checks_before_it_trains(recipe, capsys, tmp_path, monkeypatch, case, words):
    data = "digits"
    if case == "classes":
        data = tmp_path / "data"
        for name in "abc":
            (data / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (32, 32), (number, 0, 0)).save(data / name / f"{number}.png")
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")
    monkeypatch.setattr(arp_hub, "make_plan", lambda *args, **kwargs: pytest.fail("it has begun"))
    with pytest.raises((SystemExit, arp_hub.ArpHubError)) as ended:
        recipe("custom_loop.py", "--cpu", "--data", data, "--output", tmp_path / "out")
    assert re.search(words, f"{ended.value} {capsys.readouterr().err}")


def test_a_saved_config_runs_again(recipe, tmp_path):
    recipe("quickstart.py", *TRIAL, *WEIGHTS_ONLY, "--output", tmp_path / "out")
    recipe("any_backbone.py", "--config", tmp_path / "out-run" / "config.yaml", "--output", tmp_path / "again")
    first, again = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("out", "again"))
    assert first["scores"] == again["scores"]


CONFIGS = RECIPES / "configs"


@pytest.mark.parametrize(("name", "file"), [("resnet50.py", "rsb_a2.yaml"), ("vit.py", "deit3.yaml")])
def test_configs_of_papers_are_read_and_overridden(recipe, capsys, name, file):
    written = yaml.safe_load((CONFIGS / file).read_text())
    with pytest.raises(SystemExit) as ended:
        recipe(name, "--config", CONFIGS / file, "--weight-decay", "0.5", "--print-config")
    assert not ended.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    assert {key: printed[key] for key in written} == {**written, "weight_decay": 0.5}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # ResNet-50 on one thread
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("name", "file", "options"),
    [
        ("resnet50.py", "rsb_a2.yaml", []),
        ("vit.py", "deit3.yaml", ["--no-pretrained", "--model", "deit3_small_patch16_224", "--img-size", "64"]),
    ],
)
def test_configs_of_papers_run(tmp_path, shared, name, file, options, processes):
    output = tmp_path / "out"
    data = shared / "data" / "imagenet-sample"
    start = ON_TWO if processes == 2 else ["-m", "accelerate.commands.launch"]
    command = [sys.executable, *start, RECIPES / name, "--config", CONFIGS / file, "--max-steps", "3", "--data", data]
    command += [*options, "--output", output, "--tracker", "none", *(["--cpu"] if processes == 2 else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search_path(RECIPES.parent)}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["processes"] == processes
    assert metrics["params"] <= metrics["config"]["keep_params"] * metrics["dense"]["params"]
    model = timm.create_model(f"local-dir:{output}", pretrained=True)
    assert low_rank_layers(model).keys() == metrics["plan"]["layers"].keys()


@pytest.mark.slow
def test_quickstart_keeps_its_promise(tmp_path):
    output = tmp_path / "out"
    launch("quickstart.py", "--output", output, timeout=900)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["params"] <= 0.35 * metrics["dense"]["params"]
    assert metrics["dense"]["top1"] >= 97
    assert metrics["top1"] >= metrics["dense"]["top1"] - 0.5
    assert arp_hub.__version__ == metrics["versions"]["arp-hub"]
