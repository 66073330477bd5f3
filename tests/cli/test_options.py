"""Options that every command with a model takes: the model's arguments, input size and device; and progress."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

import arp_hub
from arp_hub.hub.load import load_model
from arp_hub.models.arguments import read_arguments
from arp_hub.training import TrainConfig, run
from arp_hub.training.command import parse_command
from arp_hub_cli.app import app
from arp_hub_cli.command import repeated
from arp_hub_cli.wording import MANY_WORDS

COMMANDS = {
    "plan": "plan --keep-params 0.9 --output {tmp}/plan.json",
    "compress": "compress --keep-params 0.9 --output {tmp}/out",
    "evaluate": "evaluate --data digits --max-images 8",
    "bench": "bench --batch-size 1 --seconds 0.1",
    "inspect": "inspect",
}
WRITING = ("plan", "compress", "export")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ARP_HUB_PICTURES", "0")

    def run_it(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            app([str(word) for word in words])
        return (int(stop.value.code or 0), *capsys.readouterr())

    return run_it


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_arguments_of_the_model(call: Any, tmp_path: Path, command: str) -> None:
    words = [*COMMANDS[command].format(tmp=tmp_path).split()]
    if command in ("plan", "compress"):
        words += ["--schemes", "channel", "--exclude", "patch_embed.proj,blocks.[0-4].*"]
    model = "--model test_vit --no-pretrained --model-kwargs img_size=32 num_classes=10 --json".split()
    code, out, err = call(*words, *model)
    assert code == 0, err
    assert json.loads(out)
    if command == "compress":
        saved = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
        assert saved.pretrained_cfg["input_size"] == (3, 32, 32) and saved.num_classes == 10
        assert saved(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
        assert json.loads((tmp_path / "out/config.json").read_text())["model_args"]["img_size"] in (32, [32, 32])
        code, out, err = call("evaluate", "--model", f"local-dir:{tmp_path / 'out'}", "--data", "digits", "--json")
        assert code == 0, err


WITH_A_FOLDER = {
    **{name: line.replace("digits", "photos") + " --model {name}" for name, line in COMMANDS.items()},
    "predict": "predict {name} photos",
    "export": "export {name} --format torch-export --seconds 0 --output {tmp}/file",
}


@pytest.mark.parametrize("command", WITH_A_FOLDER)
def test_a_saved_folder_needs_no_prefix_and_a_timm_name_keeps_its_meaning(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("saved", "test_resnet"):
        arp_hub.save_pretrained(timm.create_model("test_resnet", num_classes=3), folder)
    for number in range(6):
        place = tmp_path / "photos" / str(number % 3)
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(place / f"{number}.png")

    def said(name: str, *words: str) -> str:
        code, _, err = call(*WITH_A_FOLDER[command].format(name=name, tmp=tmp_path).split(), *words)
        assert code == 0, err
        return err

    again = ["--overwrite"] if command in WRITING else []
    assert "are random" not in said("saved/")
    assert "are random" not in said("local-dir:test_resnet", *again)
    own = ["--no-pretrained", "--num-classes", "3", *again]
    assert "the weights of 'test_resnet' are random" in said("test_resnet", *own)


ABOUT_IMAGES = {
    "plan": ("--image-key x", "--label-key x", "--streaming", "--calibration-images 8", "--workers 1"),
    "compress": ("--calibration-copies 1", "--max-images 8", "--streaming", "--calibration-images 8"),
    "inspect": ("--image-key x", "--label-key x", "--streaming", "--workers 1"),
    "export": ("--image-key x", "--label-key x", "--streaming", "--workers 1"),
}


@pytest.mark.parametrize(("command", "options"), [(k, one) for k, every in ABOUT_IMAGES.items() for one in every])
def test_options_about_images_are_refused_without_images(call: Any, tmp_path: Path, command: str, options: str) -> None:
    words = COMMANDS.get(command, "export --format torch-export --output {tmp}/file").format(tmp=tmp_path).split()
    name = ["test_resnet"] if command == "export" else ["--model", "test_resnet"]
    code, out, err = call(*words, *name, "--no-pretrained", *options.split())
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert f"{options.split()[0]} is about images, and there are none: give --data" in err
    assert list(tmp_path.iterdir()) == []


def test_few_images_are_warned_of(call: Any, tmp_path: Path) -> None:
    words = (
        "--model test_resnet --no-pretrained --keep-params 0.9 --schemes channel --effort fast --data digits".split()
    )
    for count, warned in ((8, True), (32, False)):
        code, _, err = call("plan", *words, "--calibration-images", count, "--output", tmp_path / f"{count}.json")
        assert code == 0, err
        assert ("warning: calibration images: 8 in all" in err) == warned


@pytest.mark.parametrize("form", [["--output=~/a.json"], ["--output", "~/a.json"]])
def test_the_home_folder_is_that_of_the_user(call: Any, tmp_path: Path, form: list[str], monkeypatch: Any) -> None:
    """Shells leave ``~`` as it is behind an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, err = call("plan", "--model", "test_resnet", "--no-pretrained", "--keep-params", "0.9", *form)
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


REFUSED = {
    "an argument that the model lacks": ("--model-kwargs magic=1", "'test_resnet' takes no argument 'magic'"),
    "an argument without a value": ("--model-kwargs magic", "--model-kwargs takes NAME=VALUE"),
    "an argument given twice": ("--model-kwargs drop_rate=0 drop_rate=1", "names 'drop_rate' twice"),
    "an argument of loading": ("--model-kwargs checkpoint_path=x", "must not hold 'checkpoint_path'"),
    "an overlay": ("--model-kwargs pretrained_cfg_overlay={}", "must not hold 'pretrained_cfg_overlay'"),
    "a huge argument": ("--model-kwargs in_chans=10000000", "in_chans"),
    "two numbers of classes": ("--num-classes 7 --model-kwargs num_classes=10", "num_classes=10 differ"),
    "classes below zero": ("--num-classes -3", "Invalid value for '--num-classes'"),
    "classes beyond any model": ("--num-classes 5000000", "Invalid value for '--num-classes'"),
    "classes below zero by argument": ("--model-kwargs num_classes=-3", "--num-classes must be a whole number from 0"),
    "an input of one channel": ("--input-size 1 32 32", "--input-size 1 32 32: 'test_resnet' takes images of 3"),
    "an input of no height": ("--input-size 3 0 32", "got 3 0 32"),
    "channels that contradict": ("--input-size 3 32 32 --model-kwargs in_chans=1", "takes images of 1 channels"),
    "a device of no machine": ("--device gpu", "--device gpu: choose one of cpu"),
    "a device number": ("--device 7", "--device 7: choose one of cpu"),
    "an accelerator that is not here": ("--device xpu", "--device xpu: choose one of cpu"),
    "a device of shapes": ("--device meta", "--device meta holds no weights"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_of_the_model_are_one_line(call: Any, tmp_path: Path, command: str, case: str) -> None:
    options, message = REFUSED[case]
    if command == "plan" and case == "a device of shapes":
        options, message = "--device meta --checkpoint x.safetensors", "--device meta holds no weights"
    words = [*COMMANDS[command].format(tmp=tmp_path).split(), "--model", "test_resnet", *options.split()]
    weights = [] if "--checkpoint" in options else ["--no-pretrained"]
    code, out, err = call(*words, *weights)
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert message in err
    assert list(tmp_path.iterdir()) == []


NUMBERS = {
    "--seed": ("-1", "99999999999999999999999", "x"),
    "--calibration-images": ("0", "-5"),
    "--calibration-copies": ("-1",),
    "--workers": ("-1",),
    "--rank-multiple": ("0",),
    "--schemes": ("", ",", "cp,x"),
    "--keep-params": ("nan", "0", "1", "-1"),
}


@pytest.mark.parametrize("command", ["plan", "compress"])
@pytest.mark.parametrize(("option", "value"), [(option, value) for option in NUMBERS for value in NUMBERS[option]])
def test_numbers_out_of_range_are_one_line_before_any_work(
    call: Any, tmp_path: Path, command: str, option: str, value: str
) -> None:
    words = [
        word for word in COMMANDS[command].format(tmp=tmp_path).split() if option != "--keep-params" or "0.9" != word
    ]
    words = [word for word in words if word != option]
    code, out, err = call(*words, option, value, "--model", "nosuch", "--data", "nosuch")
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert option.strip("-").rstrip("s") in err and "nosuch" not in err


EARLY = {
    "a layer": (
        "--model test_resnet --no-pretrained --exclude x",
        "--exclude 'x' matches no layer of this ResNet: give",
    ),
    "a misspelt layer": ("--model test_resnet --no-pretrained --exclude layer1.0.conv", "(did you mean 'layer1.0.conv"),
    "a pattern": ("--model test_resnet --no-pretrained --exclude conv1.0,x.*", "--exclude 'x.*' matches no layer"),
    "a block": ("--model test_resnet --no-pretrained --exclude layer1", "(did you mean 'layer1.*'?)"),
    "a small model": ("--model {tmp}/small", "is decomposed already"),
}


@pytest.mark.parametrize("command", ["plan", "compress"])
@pytest.mark.parametrize("case", EARLY)
def test_what_cannot_be_planned_is_refused_before_data_is_read(
    call: Any, tmp_path: Path, command: str, case: str
) -> None:
    options, message = EARLY[case]
    model = timm.create_model("test_resnet", num_classes=10)
    arp_hub.decompose(model, arp_hub.make_plan(model, keep_params=0.5, schemes=["channel"]))
    arp_hub.save_pretrained(model, tmp_path / "small")
    words = [*COMMANDS[command].split(), *options.split(), "--data", "nosuch"]
    code, out, err = call(*(word.format(tmp=tmp_path) for word in words))
    assert (code, out) == (2, "") and message in err and "nosuch" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("command", WITH_A_FOLDER)
def test_ctrl_c_is_one_line(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "1.png")
    monkeypatch.setattr(timm, "create_model", interrupt)
    words = WITH_A_FOLDER[command].format(name="test_resnet", tmp=tmp_path).split()
    assert call(*words, "--no-pretrained") == (130, "", "interrupted\n")


def test_a_place_below_a_file_is_refused_before_any_work(call: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    code, out, err = call(
        "compress", "--model", "nosuch", "--keep-params", "0.5", "--output", tmp_path / "file" / "out"
    )
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert "nothing can be written in" in err


@pytest.mark.parametrize(("name", "fixed"), [("test_resnet", False), ("vit_tiny_patch16_224", True)])
def test_a_saved_model_tells_the_input_sizes_that_it_takes(call: Any, tmp_path: Path, name: str, fixed: bool) -> None:
    arguments = {"img_size": 32, "depth": 1} if fixed else {}
    folder = arp_hub.save_pretrained(timm.create_model(name, num_classes=10, **arguments), tmp_path / "out")
    saved = ["inspect", "--model", f"local-dir:{folder}"]
    code, _, err = call(*saved, "--input-size", 1, 32, 32)
    assert code == 2 and "takes images of 3 channels" in err and len(err.splitlines()) == 1
    code, _, err = call(*saved, "--input-size", 3, 48, 48)
    assert code == (2 if fixed else 0)
    if fixed:
        assert "takes images of 32 x 32 pixels" in err and "img_size=48" in err and len(err.splitlines()) == 1
        assert call(*saved, "--model-kwargs", "img_size=48")[0] == 0


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("test_vit", {"img_size": 96}, (3, 96, 96)),
        ("test_vit", {"img_size": [96, 64]}, (3, 96, 64)),
        ("test_vit", {"img_size": 96, "dynamic_img_size": True}, (3, 96, 96)),
        ("test_resnet", {"in_chans": 1}, (1, 160, 160)),
        ("vit_small_patch14_dinov2", {"img_size": 112, "depth": 1}, (3, 112, 112)),
    ],
)
def test_the_data_config_follows_the_arguments(name: str, arguments: Any, size: tuple[int, ...]) -> None:
    model = load_model(name, pretrained=False, **arguments)
    assert timm.data.resolve_model_data_config(model)["input_size"] == size
    assert model.default_cfg is model.pretrained_cfg


def test_arguments_are_words_as_in_scripts_of_timm() -> None:
    words = ["img_size=112", "pad_type=same", "bn_eps=1e-3", "window_size=(7,7)", "x=None", "y=True", "z=a=b"]
    assert read_arguments(words) == {
        **{"img_size": 112, "pad_type": "same", "bn_eps": 1e-3, "window_size": [7, 7], "y": True, "z": "a=b"}
    }
    with pytest.raises(arp_hub.ArpHubError, match="cannot be kept with the model"):
        read_arguments(["x={1,2}"])
    line = "plan --model-kwargs a=1 b=2 --model x --model-kwargs=c=3 d=4".split()
    assert repeated(MANY_WORDS, line)[:6] == ["plan", MANY_WORDS, "a=1", MANY_WORDS, "b=2", "--model"]


def test_a_recipe_takes_arguments_of_the_model(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("model: test_vit\nmodel_kwargs:\n  img_size: 32\n  class_token: true\n")
    base = {"keep_params": 0.5, "data": "digits"}
    config = parse_command("", base, ["--config", str(file)])
    assert config.model_kwargs == {"img_size": 32, "class_token": True}
    config.save(tmp_path / "y.yaml")
    assert parse_command("", {}, ["--config", str(tmp_path / "y.yaml")]) == config
    words = ["--model", "test_vit", "--model-kwargs", "img_size=32", "drop_rate=0.1", "--max-steps", "1"]
    given = parse_command("", base, words)
    assert given.model_kwargs == {"img_size": 32, "drop_rate": 0.1} and given.max_steps == 1
    for bad in ({"pretrained": True}, {"cache_dir": "x"}, 3, ["img_size"]):
        with pytest.raises(arp_hub.ArpHubError, match="model_kwargs"):
            TrainConfig(model="test_vit", keep_params=0.5, model_kwargs=bad)


def test_a_run_trains_and_saves_the_model_with_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARP_HUB_PICTURES", "0")
    out = tmp_path / "out"
    run(
        TrainConfig(
            model="test_vit",
            model_kwargs={"img_size": 32},
            keep_params=0.9,
            schemes=("channel",),
            exclude=("patch_embed.proj", "blocks.[0-4].*"),
            effort="fast",
            calibration_images=8,
            calibration_copies=0,
            epochs=1,
            max_steps=4,
            tracker="none",
            cpu=True,
            output=str(out),
        )
    )
    saved = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert saved.pretrained_cfg["input_size"] == (3, 32, 32) and saved.num_classes == 10


LINE = re.compile(r"(?P<stage>[a-z ]+): ((?P<total>\d+) in )?\d+\.\d s")


def test_in_a_file_each_stage_is_one_line(call: Any, tmp_path: Path) -> None:
    words = "compress --model cifar_resnet20 --no-pretrained --data digits --exclude conv1,layer1.*,layer2.*".split()
    more = ["--keep-params", "0.6", "--schemes", "channel", "--calibration-images", "8", "--effort", "fast"]
    with (tmp_path / "err").open("w") as file, contextlib.redirect_stderr(file):
        code, out, _ = call(*words, *more, "--max-images", 32, "--output", tmp_path / "out", "--json")
    assert code == 0 and json.loads(out)["images"] == 32
    said = (tmp_path / "err").read_text()
    assert "\r" not in said
    found = [match for line in said.splitlines() if (match := LINE.fullmatch(line))]
    stages = [match["stage"] for match in found]
    assert stages == [
        *("open the data", "read calibration images", "measure accuracy", "measure layers", "measure sensitivities"),
        *("decompose", "measure accuracy", "save"),
    ]
    totals = {match["stage"]: int(match["total"]) for match in found if match["total"]}
    layers = len(arp_hub.RankPlan.from_dict(json.loads((tmp_path / "out/metrics.json").read_text())["plan"]).layers)
    assert totals["decompose"] == layers <= totals["measure layers"]


def test_in_a_terminal_bars_count_to_a_total(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    model = timm.create_model("cifar_resnet20")
    images = torch.randn(8, 3, 32, 32)
    options = {"keep_params": 0.6, "schemes": ["channel"], "exclude": ["conv1", "layer[12].*"]}
    plan = arp_hub.make_plan(model, **options, calibration=images, effort="fast", progress=True)
    arp_hub.decompose(model, plan, images, effort="fast", progress=True)
    said = capsys.readouterr().err
    for title in ("measure layers", "decompose"):
        found = re.findall(rf"{title}:\s+\d+%\|.*?\| (\d+)/(\d+)", said)
        assert found and {total for _, total in found} == {found[-1][1]} and int(found[-1][1]) > 3, title
    arp_hub.make_plan(timm.create_model("cifar_resnet20"), **options)
    assert capsys.readouterr().err == ""
