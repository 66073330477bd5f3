"""What a command reads is never replaced by what it writes, whatever --overwrite says."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

import arp_hub
from arp_hub import ArpHubError
from arp_hub.training import TrainConfig
from arp_hub.training import run as train
from arp_hub_cli.app import app

MODEL = "--model test_resnet --no-pretrained --input-size 3 32 32 --num-classes 2"
SAVED = "--model local-dir:{tmp}/work/saved"
CASES = {
    "data": f"compress {MODEL} --data {{tmp}}/work/images --output {{tmp}}/work/images",
    "data in a folder below": f"compress {MODEL} --data {{tmp}}/work/images --output {{tmp}}/work",
    "data of a pattern": f"compress {MODEL} --data {{tmp}}/work/images/*.tar --output {{tmp}}/work",
    "a split of the data": f"compress {MODEL} --data {{tmp}}/work/images --output {{tmp}}/work/images/train",
    "a class of the data": f"compress {MODEL} --data {{tmp}}/work/images --output {{tmp}}/work/images/train/a",
    "data in the home folder": f"compress {MODEL} --data=~/work/images --output {{tmp}}/work",
    "output in the home folder": f"compress {MODEL} --data {{tmp}}/work/images --output=~/work",
    "data with a configuration": f"compress {MODEL} --data {{tmp}}/work/images:plain --output {{tmp}}/work/images",
    "data of a prefix": f"compress {MODEL} --data wds:{{tmp}}/work/images --output {{tmp}}/work/images",
    "data of two patterns": f"compress {MODEL} --data a-*.tar::{{tmp}}/work/images/*.tar --output {{tmp}}/work",
    "data behind a link": f"compress {MODEL} --data {{tmp}}/link --output {{tmp}}/work",
    "a checkpoint": f"compress {MODEL} --checkpoint {{tmp}}/work/w.safetensors --output {{tmp}}/work",
    "a plan": f"compress {MODEL} --plan {{tmp}}/work/plan.json --output {{tmp}}/work",
    "a saved model": f"compress {SAVED} --output {{tmp}}/work/saved",
    "a file of weights by a plan": f"plan {MODEL} --checkpoint {{tmp}}/work/w.safetensors "
    "--output {tmp}/work/w.safetensors",
    "data by an export": "export local-dir:{tmp}/work/saved --data {tmp}/work/images --output {tmp}/work/images "
    "--format onnx",
    "a checkpoint by an export": "export test_resnet --num-classes 2 --checkpoint {tmp}/work/w.safetensors "
    "--output {tmp}/work --format onnx",
}
RUNS = {
    "data": ({"data": "work/images"}, "work"),
    "a split of the data": ({"data": "work/images"}, "work/images/val"),
    "data in the home folder": ({"data": "~/work/images"}, "work"),
    "a checkpoint": ({"data": "digits", "checkpoint": "work/w.safetensors"}, "work"),
    "a checkpoint of the teacher": ({"data": "digits", "teacher_checkpoint": "work/w.safetensors"}, "work"),
    "data beside the run's checkpoints": ({"data": "out-run/images"}, "out"),
}


@pytest.fixture
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images, weights, a plan and a saved model. It is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in ("work/images", "out-run/images"):
        for split in ("train", "val"):
            for name in "ab":
                (tmp_path / place / split / name).mkdir(parents=True)
                Image.new("RGB", (16, 16)).save(tmp_path / place / split / name / "1.png")
    (tmp_path / "link").symlink_to(tmp_path / "work" / "images")
    model = timm.create_model("test_resnet", num_classes=2)
    plan = arp_hub.make_plan(model, keep_params=0.5, schemes=["channel"], input_size=(3, 32, 32))
    plan.save(tmp_path / "work" / "plan.json")
    save_file(model.state_dict(), tmp_path / "work" / "w.safetensors")
    arp_hub.save_pretrained(model, tmp_path / "work" / "saved")
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES)
def test_a_command_refuses_an_output_that_holds_its_input(
    case: str, tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(tmp)
    words = CASES[case].format(tmp=tmp).split()
    budget = [] if words[0] == "export" or "--plan" in words else ["--keep-params", "0.5"]
    with pytest.raises(SystemExit) as stop:
        app([*words, *budget, "--overwrite"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2
    assert "choose another" in said and str(tmp / "work") in said, said
    assert files(tmp) == before


@pytest.mark.parametrize("case", RUNS)
def test_a_recipe_refuses_an_output_that_holds_its_input(case: str, tmp: Path) -> None:
    given, output = RUNS[case]
    paths = {name: value if value == "digits" or "~" in value else str(tmp / value) for name, value in given.items()}
    before = files(tmp)
    settings = {"model": "test_resnet", "pretrained": False, "cpu": True, "tracker": "none", "keep_params": 0.5}
    teacher = {"teacher": "test_resnet", "distill": 0.5} if "teacher_checkpoint" in given else {}
    with pytest.raises(ArpHubError, match="would be replaced, but it holds what --.* reads: choose another output"):
        train(TrainConfig(**settings, **teacher, **paths, output=str(tmp / output), overwrite=True))
    assert files(tmp).items() >= before.items()


def test_what_only_looks_like_an_input_does_not_matter(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model name is no path, even where a folder has the same name."""
    monkeypatch.chdir(tmp)
    (tmp / "work" / "saved").rename("test_resnet")
    with pytest.raises(SystemExit) as stop:
        app(["compress", *MODEL.split(), "--keep-params", "0.6", "--schemes", "channel", "--output", "test_resnet",
             "--overwrite"])  # fmt: skip
    assert not stop.value.code
