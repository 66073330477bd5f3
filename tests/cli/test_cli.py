"""The command line, run on a small network trained on digits, and on CIFAR-10 where it is available."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow.parquet as pq
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from arp_hub import decompose, make_plan, save_pretrained
from arp_hub.layers.apply_plan import plan_of
from arp_hub.layers.model import count_params
from arp_hub.plan import LayerPlan, RankPlan
from arp_hub.training import load_data
from arp_hub_cli.app import app

SIZE = ("--input-size", "3", "32", "32")


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def run(capsys):
    """Runs ``arp-hub`` in this process."""

    def call(*words) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            app([str(word) for word in words])
        out, err = capsys.readouterr()
        return Result(stop.value.code or 0, out, err)

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[str, ...]:
    """Options for a small ResNet, trained on digits for a few seconds."""
    torch.manual_seed(0)
    overlay = {"input_size": (3, 32, 32)}
    model = timm.create_model("test_resnet", num_classes=10, pretrained_cfg_overlay=overlay)
    train = load_data("digits", model).train
    images = torch.cat(list(train.images.evaluation(train.indices, 256, torch.device("cpu"), 0)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(6):
        for chosen in torch.randperm(len(images)).split(64):
            F.cross_entropy(model(images[chosen]), train.labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
    path = tmp_path_factory.mktemp("trained") / "digits.safetensors"
    save_file(model.state_dict(), path)
    return ("--model", "test_resnet", "--num-classes", "10", "--checkpoint", str(path), *SIZE)


def test_plan_prints_the_table_and_writes_the_file(run, trained, tmp_path):
    path = tmp_path / "plan.json"
    result = run("plan", *trained, "--keep-params", 0.5, "--output", path)
    assert result.code == 0, result.err
    plan = RankPlan.load(path)
    assert all(name in result.out for name in (*plan.layers, *plan.dense))
    again = run("plan", *trained, "--keep-params", 0.5, "--output", path, "--json")
    assert again.code == 0
    assert RankPlan.from_dict(again.json["plan"]) == plan
    assert 0.49 <= again.json["params_after"] / again.json["params"] <= 0.5


@pytest.mark.parametrize("budget", ["params", "macs"])
def test_compress_keeps_what_it_was_told(run, trained, tmp_path, budget):
    out = tmp_path / "out"
    result = run("compress", *trained, f"--keep-{budget}", 0.6, "--schemes", "channel", "--output", out, "--json")
    assert result.code == 0, result.err
    kept = result.json[budget] / result.json["dense"][budget]
    assert 0.59 <= kept <= 0.6
    assert "top1" not in result.json
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert plan_of(model).layers
    assert count_params(model) == result.json["params"]


def test_compress_with_data_measures_before_and_after_and_evaluate_agrees(run, trained, tmp_path):
    out = tmp_path / "out"
    words = ("--data", "digits", "--keep-params", 0.6, "--schemes", "channel", "--calibration-images", 128)
    result = run("compress", *trained, *words, "--output", out, "--json")
    assert result.code == 0, result.err
    dense, low = result.json["dense"], result.json
    assert dense["top1"] > 90
    assert low["top1"] > dense["top1"] - 5
    assert low["images"] == dense["images"] == 360
    found = run("evaluate", "--model", f"local-dir:{out}", "--data", "digits", "--json")
    assert found.code == 0, found.err
    for key in ("top1", "top5", "images", "params", "macs"):
        assert found.json[key] == low[key], key
    assert found.json["loss"] == pytest.approx(low["loss"], rel=1e-5)
    assert run("evaluate", *trained, "--data", "digits", "--json").json["top1"] == dense["top1"]
    kept = json.loads((out / "metrics.json").read_text())
    assert (kept["top1"], kept["dense"]["top1"], kept["trained"]) == (low["top1"], dense["top1"], False)


def test_compress_calibrates_on_data_of_other_classes(run, tmp_path):
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "seven.safetensors")
    network = ("--model", "test_resnet", "--num-classes", 7, "--checkpoint", tmp_path / "seven.safetensors", *SIZE)
    words = ("--data", "digits", "--keep-params", 0.8, "--schemes", "channel", "--calibration-images", 16)
    result = run("compress", *network, *words, "--output", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert "accuracy is not measured: the model has 7 classes" in result.err
    assert result.json["calibration_images"] == 16
    assert "top1" not in result.json


def test_compress_by_a_plan_gives_that_plan(run, trained, tmp_path):
    path, out = tmp_path / "plan.json", tmp_path / "out"
    words = ("--keep-params", 0.7, "--schemes", "channel,cp", "--exclude", "conv1.0", "--output", path)
    assert run("plan", *trained, *words).code == 0
    plan = RankPlan.load(path)
    assert {layer.scheme for layer in plan.layers.values()} <= {"channel", "cp"}
    assert "conv1.0" not in plan.layers
    assert run("compress", *trained, "--plan", path, "--output", out).code == 0
    assert plan_of(timm.create_model(f"local-dir:{out}", pretrained=True)).layers == plan.layers


def test_rank_multiple_holds(run, trained, tmp_path):
    path = tmp_path / "plan.json"
    assert (
        run("plan", *trained, "--keep-params", 0.7, "--rank-multiple", 4, "--schemes", "channel", "--output", path).code
        == 0
    )
    assert all(layer.rank % 4 == 0 for layer in RankPlan.load(path).layers.values())


def test_inspect_shows_every_layer_and_draws(run, trained, tmp_path):
    plan, picture = tmp_path / "plan.json", tmp_path / "spectra.png"
    RankPlan({"layer2.0.conv1": LayerPlan("cp", 12), "layer3.0.conv1": LayerPlan("channel", 8)}).save(plan)
    result = run("inspect", *trained, "--plan", plan, "--plot", picture, "--json")
    assert result.code == 0, result.err
    layers = {layer["name"]: layer for layer in result.json["layers"]}
    assert layers["layer2.0.conv1"]["scheme"] == "cp"
    assert 0 < layers["layer2.0.conv1"]["violation"] < 1
    assert layers["conv1.0"]["violation"] is None
    assert all(1 <= x["rank_90"] <= x["rank_99"] <= x["full_rank"] for x in layers.values())
    assert picture.read_bytes().startswith(b"\x89PNG")
    by_output = run("inspect", *trained, "--data", "digits", "--calibration-images", 32, "--json").json
    assert by_output["metric"] == "outputs"
    assert sum(x["rank_90"] for x in by_output["layers"]) < sum(x["rank_90"] for x in layers.values())
    assert all(name in run("inspect", *trained).out for name in layers)


def test_inspect_shows_the_ranks_of_a_decomposed_model(run, trained, tmp_path):
    out = tmp_path / "out"
    assert run("compress", *trained, "--keep-params", 0.5, "--schemes", "channel", "--output", out).code == 0
    layers = run("inspect", "--model", f"local-dir:{out}", "--json").json["layers"]
    planned = [layer for layer in layers if layer["scheme"]]
    assert planned
    assert all(layer["rank_99"] <= layer["rank"] for layer in planned)


def test_overwrite(run, trained, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    words = ("compress", *trained, "--keep-params", 0.5, "--schemes", "channel", "--output", out)
    refused = run(*words)
    assert refused.code == 2
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    assert run(*words, "--overwrite").code == 0
    again = run(*words)  # the card may hold notes by hand
    assert again.code == 2 and "already holds a model" in again.err


FINE = "--model test_resnet --input-size 3 32 32 --num-classes 10 --checkpoint {checkpoint}"
SEVEN = "--model test_resnet --input-size 3 32 32 --num-classes 7 --checkpoint {tmp}/seven.safetensors"
HALF = f"compress {FINE} --keep-params 0.5 --output {{tmp}}/out"
BAD_INPUTS = {
    "unknown tag": (
        "plan --model test_resnet.r160_in1 --keep-params 0.5",
        "no weights with the tag 'r160_in1': choose",
    ),
    "unknown tag and size": (
        "plan --model test_resnet.x --keep-params 0.5 --input-size 3 64 64",
        "with the tag 'x': ch",
    ),
    "unknown model": ("compress --model resnet_5O --keep-params 0.5 --output {tmp}/out", "resnet_5O"),
    "no such saved model": ("evaluate --model local-dir:{tmp}/nix --data digits", "nix': no such folder"),
    "a folder of another kind": ("evaluate --model local-dir:{tmp}/empty --data digits", "has no config.json"),
    "missing checkpoint": ("inspect --model test_resnet --checkpoint {tmp}/nix.pt", "nix.pt"),
    "checkpoint of another shape": ("inspect --model test_resnet --checkpoint {tmp}/wrong.safetensors", "fc.weight"),
    "checkpoint that is none": (
        "inspect --model test_resnet --checkpoint {tmp}/notes.txt",
        "is no whole file of weights",
    ),
    "unknown data": (f"{HALF} --data digitz", "digitz"),
    "folder without images": (f"{HALF} --data {{tmp}}/empty", "no images"),
    "unknown split": (f"evaluate {FINE} --data digits --split dev", "'dev'"),
    "other classes than the data": (f"evaluate {SEVEN} --data digits", "7 classes"),
    "no calibration images": (
        f"{HALF} --data digits --calibration-images 0",
        "Invalid value for '--calibration-images'",
    ),
    "keep_params of 0": (f"compress {FINE} --keep-params 0 --output {{tmp}}/out", "got 0"),
    "keep_params of 1.5": (f"compress {FINE} --keep-params 1.5 --output {{tmp}}/out", "got 1.5"),
    "keep_macs of nan": (f"plan {FINE} --keep-macs nan --output {{tmp}}/plan.json", "got nan"),
    "keep_params out of reach": (f"compress {FINE} --keep-params 0.001 --output {{tmp}}/out", "0.001"),
    "both budgets": (f"{HALF} --keep-macs 0.5", "exactly one of"),
    "no budget": (f"compress {FINE} --output {{tmp}}/out", "exactly one of"),
    "a budget and a plan": (f"{HALF} --plan {{tmp}}/other.json", "exactly one of"),
    "a plan and schemes": (
        f"compress {FINE} --plan {{tmp}}/other.json --schemes cp --output {{tmp}}/out",
        "cannot change a given --plan",
    ),
    "plan of another model": (f"compress {FINE} --plan {{tmp}}/other.json --output {{tmp}}/out", "blocks.0.attn.qkv"),
    "plan that is none": (f"compress {FINE} --plan {{tmp}}/notes.txt --output {{tmp}}/out", "not valid JSON"),
    "missing plan": (f"inspect {FINE} --plan {{tmp}}/nix.json", "nix.json"),
    "folder that holds something else": (f"compress {FINE} --keep-params 0.5 --output {{tmp}}/full", "full"),
    "plan file that holds something else": (f"plan {FINE} --keep-params 0.5 --output {{tmp}}/notes.txt", "notes.txt"),
    "plan file in no folder": (f"plan {FINE} --keep-params 0.5 --output {{tmp}}/nix/plan.json", "no folder"),
    "unknown scheme": (f"{HALF} --schemes cp,svd", "svd"),
    "rank multiple of 0": (f"{HALF} --rank-multiple 0", "--rank-multiple must"),
    "excluded layer that is not there": (f"{HALF} --exclude layer9.conv", "layer9.conv"),
    "picture of no kind": (f"inspect {FINE} --plot {{tmp}}/spectra.txt", "spectra.txt"),
    "unknown device": (f"inspect {FINE} --device toaster", "toaster"),
    "input size of 0": (
        "plan --model cifar_resnet20 --keep-params 0.5 --input-size 3 0 32",
        "got 3 0 32",
    ),
    "unknown device of torch's": (f"{HALF} --device gpu", "--device gpu"),
    "meta for compress": ("compress --model test_resnet --device meta --keep-params 0.5 --output {tmp}/out", "meta"),
    "meta for evaluate": ("evaluate --model test_resnet --device meta --data digits", "--device meta"),
    "meta for bench": ("bench --model test_resnet --device meta", "--device meta"),
    "meta for inspect": ("inspect --model test_resnet --device meta", "--device meta"),
    "meta for a plan with data": ("plan --model test_resnet --device meta --keep-params 0.5 --data digits", "meta"),
    "meta with weights": ("plan --model test_resnet --device meta --keep-params 0.5 --pretrained", "--pretrained"),
    "both kinds of weights": (f"{HALF} --pretrained", "both name weights"),
    "weights that timm lacks": ("inspect --model cifar_resnet20 --pretrained", "timm has no weights"),
    "share in the option's words": (f"plan {FINE} --keep-params 2 --output {{tmp}}/plan.json", "--keep-params must"),
    "unknown dtype": ("bench --model cifar_resnet20 --dtype int8", "unknown --dtype 'int8'"),
    "batch size of 0": ("bench --model cifar_resnet20 --batch-size 0", "--batch-size must be at least 1"),
    "unknown option": ("compress --keep-everything", "--keep-everything"),
    "option that is no number": (
        f"compress {FINE} --keep-params 50% --output {{tmp}}/out",
        "value for '--keep-params': '50%' is no number, such as 0.5",
    ),
    "option that is no whole number": (f"{HALF} --calibration-images 1.5", "'1.5' is no whole number"),
    "one side of an input size": (f"plan {FINE} --input-size 224", "requires 3 arguments. --help names them"),
    "checkpoint of other classes": (
        "inspect --model test_resnet --checkpoint {tmp}/seven.safetensors",
        "for its classes, give --num-classes 7",
    ),
    "checkpoint that is empty": ("inspect --model test_resnet --checkpoint {tmp}/empty.pth", "empty.pth' is empty"),
    "checkpoint of a whole model": (
        "inspect --model test_resnet --checkpoint {tmp}/whole.pth",
        "holds more than tensors, such as a whole model, or is damaged: save model.state_dict()",
    ),
    "text in place of safetensors": ("inspect --model test_resnet --checkpoint {tmp}/notes.safetensors", "save or"),
    "a folder without a model": ("evaluate --model {tmp}/full --data digits", "{tmp}/full': the folder has no config"),
    "an image folder to export": ("export {tmp}/full", "{tmp}/full': the folder has no config.json"),
    "a small model without its prefix": (
        "plan --model {tmp}/small --keep-params 0.5 --output {tmp}/plan.json",
        "is decomposed already: give the dense one",
    ),
    "a model that is small already": (
        "compress --model local-dir:{tmp}/small --keep-params 0.5 --output {tmp}/out",
        "is decomposed already: give the dense one",
    ),
    "unknown command": ("squeeze", "'squeeze'. arp-hub --help lists the commands"),
    "no model": ("compress --keep-params 0.5 --output {tmp}/out", "'--model'. Example: arp-hub compress --model"),
    "a model in place of an option": ("compress resnet18", "'--model'. Example: arp-hub compress --model"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Files that a command must refuse."""
    tmp = tmp_path_factory.mktemp("bad")
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp / "seven.safetensors")
    save_file({"fc.weight": torch.zeros(10, 3)}, tmp / "wrong.safetensors")
    RankPlan({"blocks.0.attn.qkv": LayerPlan("channel", 4)}).save(tmp / "other.json")
    small = timm.create_model("test_resnet", num_classes=10)
    torch.save(small, tmp / "whole.pth")
    decompose(small, make_plan(small, keep_params=0.5, schemes=["channel"]))
    save_pretrained(small, tmp / "small")
    for name in ("notes.txt", "notes.safetensors"):
        (tmp / name).write_text("not a plan")
    (tmp / "empty.pth").touch()
    (tmp / "empty").mkdir()
    (tmp / "full").mkdir()
    (tmp / "full" / "thesis.txt").write_text("years of work")
    return tmp


@pytest.mark.parametrize(("line", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_exits_2_with_one_line_and_writes_nothing(run, trained, folder, monkeypatch, line, message):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    result = run(*line.format(tmp=folder, checkpoint=trained[5]).split())
    assert result.code == 2, result
    assert result.out == ""
    lines = [line for line in result.err.strip().splitlines() if not re.fullmatch(r"[a-z ]+: .*\d+\.\d s", line)]
    assert len(lines) == 1, result.err  # beside the lines of the stages that ended before the error
    assert message.replace("{tmp}", str(folder)) in lines[0]
    assert sorted(folder.rglob("*")) == before


@pytest.fixture
def val(tmp_path) -> Path:
    """A folder whose only split is called ``val``, with images of two classes."""
    for name, colour in (("cat", "red"), ("dog", "blue")):
        (tmp_path / "pets/val" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (32, 32), colour).save(tmp_path / "pets/val" / name / f"{number}.png")
    return tmp_path / "pets"


ONE_SPLIT = {
    "plan": ("plan --keep-params 0.9 --schemes channel --output {tmp}/plan.json --calibration-copies 0", 2, False),
    "inspect": ("inspect", 2, False),
    "compress": ("compress --keep-params 0.9 --schemes channel --output {tmp}/out --calibration-copies 0", 2, True),
    "compress, other classes": ("compress --keep-params 0.9 --schemes channel --output {tmp}/out", 7, False),
    "evaluate": ("evaluate", 2, True),
    "export": ("export test_resnet --format torch-export --seconds 0 --output {tmp}/file", 2, True),
    "export, other classes": ("export test_resnet --format torch-export --seconds 0 --output {tmp}/file", 7, False),
}
"""Commands, the classes of their model, and whether they measure accuracy on data of two classes."""


@pytest.mark.parametrize(("line", "classes", "measured"), ONE_SPLIT.values(), ids=ONE_SPLIT)
def test_images_shared_by_training_and_testing_are_told_where_accuracy_is_measured(
    run, val, tmp_path, caplog, line, classes, measured
):
    words = ["--no-pretrained", "--num-classes", classes, "--data", val, *SIZE]
    model = [] if line.startswith("export") else ["--model", "test_resnet"]
    result = run(*line.format(tmp=tmp_path).split(), *model, *words)
    assert result.code == 0, result.err
    told = [message for message in caplog.messages if "one usable split, 'validation'" in message]
    assert len(told) == measured


@pytest.mark.parametrize(("data", "words", "name"), [
    ("pets", [], "validation"),
    ("digits", [], "test"),
    ("digits", ["--split", "train"], "train"),
    ("odd", ["--split", "holdout"], "holdout"),
])  # fmt: skip
def test_evaluate_names_the_split_as_the_data_does(run, val, tmp_path, data, words, name):
    if data == "odd":
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
        files = sorted(map(str, val.rglob("*.png")))
        rows = {"image": files, "label": [int("dog" in file) for file in files]}
        for split in ("train", "holdout"):
            table = datasets.Dataset.from_dict(rows, features=features)
            table.to_parquet(tmp_path / "odd" / f"{split}-00000-of-00001.parquet")
        data = tmp_path / "odd"
    model = ("--model", "test_resnet", "--no-pretrained", "--num-classes", 10 if data == "digits" else 2, *SIZE)
    measure = ("evaluate", *model, "--data", val if data == "pets" else data, "--max-images", 8, *words)
    result = run(*measure)
    assert result.code == 0, result.err
    assert f"split {name}" in " ".join(result.out.split())  # a long path wraps the title
    assert run(*measure, "--json").json["split"] == name


def test_evaluate_needs_labels_of_its_own_split_alone(run, val):
    (val / "train").mkdir()
    for number in range(4):
        shutil.copy(val / "val" / "cat" / f"{number}.png", val / "train")
    model = ("--model", "test_resnet", "--no-pretrained", "--num-classes", 2, *SIZE)
    result = run("evaluate", *model, "--data", val, "--json")
    assert result.code == 0, result.err
    assert result.json["split"] == "validation"
    result = run("evaluate", *model, "--data", val, "--split", "train")
    assert result.code == 2 and "the images of split 'train' have no labels" in result.err


def test_a_card_counts_the_images_that_the_effort_used(run, trained, tmp_path):
    words = ("--data", "digits", "--max-images", 32, "--keep-params", 0.5, "--schemes", "channel", "--effort", "fast")
    found = run("compress", *trained, *words, "--output", tmp_path / "out", "--json").json
    assert (found["calibration_images"], found["calibration_copies"]) == (128, 0)
    assert "on 128 unlabelled images" in (tmp_path / "out" / "README.md").read_text()


RANDOM = {
    "plan": ("plan --keep-params 0.5 --output {tmp}/plan.json", True),
    "compress": ("compress --keep-params 0.5 --output {tmp}/out", True),
    "evaluate": ("evaluate --data digits --max-images 8", True),
    "bench": ("bench --batch-size 1 --seconds 0.1", True),
    "inspect": ("inspect", True),
    "inspect a checkpoint": ("inspect --checkpoint {checkpoint}", False),
}


@pytest.mark.parametrize(("line", "random"), RANDOM.values(), ids=RANDOM)
def test_random_weights_are_reported(run, trained, tmp_path, line, random):
    model = "--model test_resnet --input-size 3 32 32 --num-classes 10 --json" + " --no-pretrained" * random
    result = run(*line.format(tmp=tmp_path, checkpoint=trained[5]).split(), *model.split())
    assert result.code == 0, result.err
    assert ("warning: the weights of 'test_resnet' are random" in result.err) is random
    assert result.json["random_weights"] is random


@pytest.mark.parametrize(("classes", "random"), [(3, False), (5, True)])
def test_a_random_classifier_is_reported(run, tmp_path, classes, random):
    model = timm.create_model("test_resnet", num_classes=3)
    folder = save_pretrained(model, tmp_path / "saved")
    choice = ("--model", f"local-dir:{folder}", "--num-classes", classes, *SIZE)
    result = run("compress", *choice, "--keep-params", 0.5, "--output", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    warning = f"the classifier is random, because the weights of 'local-dir:{folder}' have 3 classes, not 5"
    assert (warning in result.err) is random
    assert result.json["random_classifier"] is random and not result.json["random_weights"]
    assert ("Its classifier has random weights" in (tmp_path / "out/README.md").read_text()) is random


def test_help_tells_the_exit_codes(run):
    result = run("--help")
    assert result.code == 0
    assert "2 bad input" in " ".join(result.out.split())


def test_installed_command_keeps_stdout_for_json(trained):
    command = Path(sys.executable).with_name("arp-hub")
    done = subprocess.run(
        [command, "evaluate", *trained, "--data", "digits", "--max-images", "64", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert json.loads(done.stdout)["images"] == 64


def test_cifar(run, shared, tmp_path):
    rows = pq.ParquetFile(next((shared / "data/cifar10").glob("test-*")))
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for part, name in enumerate(("train", "test")):
        pq.write_table(rows.read_row_group(part), data / f"{name}-00000-of-00001.parquet")
    checkpoint = shared / "weights/resnet20_cifar10.safetensors"
    network = ("--model", "cifar_resnet20", "--checkpoint", checkpoint)
    words = ("--data", data, "--keep-params", 0.7, "--schemes", "channel", "--calibration-images", 64)
    result = run("compress", *network, *words, "--max-images", 256, "--output", out, "--json")
    assert result.code == 0, result.err
    assert result.json["images"] == 256
    assert result.json["dense"]["top1"] > 88
    assert result.json["top1"] > result.json["dense"]["top1"] - 4
    assert json.loads((out / "config.json").read_text())["label_names"][:2] == ["airplane", "automobile"]
