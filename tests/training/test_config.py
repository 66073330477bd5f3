import dataclasses
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from torch.distributed.run import get_args_parser

from arp_hub.errors import ArpHubError
from arp_hub.training import TrainConfig, inputs, run
from arp_hub.training.command import parse_command
from arp_hub.training.config import read_config
from arp_hub.training.config_fields import GROUPS
from arp_hub.training.data.tables import numbered
from arp_hub.training.machine import make_accelerator
from arp_hub.training.optimizer import make_schedule

ROOT = Path(__file__).parents[2]
BASE = {"model": "cifar_resnet20", "keep_params": 0.5}


def test_every_setting_is_documented_under_a_heading():
    for setting in dataclasses.fields(TrainConfig):
        assert setting.metadata["group"] in GROUPS
        assert len(setting.metadata["help"]) > 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep_params": 0}, ["keep_params", "above 0", "0"]),
        ({"keep_params": 1.5}, ["keep_params", "below 1", "1.5"]),
        ({"keep_params": "half"}, ["keep_params", "a number", "'half'"]),
        ({"keep_params": float("nan")}, ["keep_params", "nan"]),
        ({"keep_macs": 0.5}, ["keep_params or keep_macs", "both"]),
        ({"keep_params": None}, ["keep_params or keep_macs", "none"]),
        ({"model": ""}, ["model is not set"]),
        ({"epochs": -1}, ["epochs", "at least 0"]),
        ({"epochs": 2.5}, ["epochs", "whole number", "2.5"]),
        ({"epochs": True}, ["epochs", "whole number"]),
        ({"ramp": 1.0}, ["ramp", "below 1"]),
        ({"lr": -0.1}, ["lr", "above 0"]),
        ({"lr": float("inf")}, ["lr", "inf"]),
        ({"momentum": 1}, ["momentum", "below 1"]),
        ({"distill": 2}, ["distill", "at most 1"]),
        ({"teacher": "resnet50"}, ["teacher='resnet50'", "distill=0", "set distill"]),
        ({"teacher_checkpoint": "a.safetensors"}, ["teacher_checkpoint='a.safetensors'", "set teacher"]),
        ({"batch_size": 0}, ["batch_size", "at least 1"]),
        ({"start_from": "middle"}, ["start_from", "'middle'", "fit, dense"]),
        ({"schemes": ["cp", "svd"]}, ["schemes", "'svd'", "tucker2"]),
        ({"schemes": 3}, ["schemes", "list of words"]),
        ({"mixed_precision": "fp8"}, ["mixed_precision", "bf16"]),
        ({"overwrite": "yes"}, ["overwrite", "true or false"]),
        ({"optimizer": "sgdd"}, ["optimizer", "'sgdd'", "'sgd'"]),
        ({"val_fraction": 1}, ["val_fraction", "below 1"]),
        ({"calibration_images": 0}, ["calibration_images", "start_from='dense'"]),
        ({"bce_target_thresh": 0.2}, ["bce_target_thresh=0.2", "bce_loss=False", "set bce_loss"]),
        ({"recount": 2}, ["recount=2", "reprob=0.0", "set reprob"]),
        ({"remode": "noise"}, ["remode", "'noise'", "const, rand, pixel"]),
        ({"reprob": 1.5}, ["reprob", "at most 1"]),
        ({"mixup_off_epoch": 2}, ["mixup_off_epoch=2", "mixup=0.0 and cutmix=0.0", "set mixup or cutmix"]),
        ({"mixup_prob": -1}, ["mixup_prob", "at least 0"]),
        ({"clip_mode": "agc"}, ["clip_mode=agc", "clip_grad=0.0"]),
        ({"model_ema_warmup": True}, ["model_ema_warmup=True", "ema_decay=0.0"]),
        ({"warmup_lr": 1e-6}, ["warmup_lr=1e-06", "warmup_epochs=0.0"]),
        ({"refine_images": 50}, ["refine_images=50", "refine_minutes=0.0 and refine_steps=0", "set refine_minutes or"]),
        ({"refine_minutes": 1, "refine_steps": 9}, ["refine_minutes=1 and refine_steps=9", "set one"]),
        ({"refine_steps": 9, "start_from": "dense"}, ["refine_steps=9", "start_from='dense'", "set refine_steps=0"]),
        ({"temperature": 2}, ["temperature=2.0", "distill=0.0", "set distill"]),
        ({"dense_lr": 0.1}, ["dense_lr=0.1", "dense_epochs=0", "set dense_epochs"]),
        ({"finetune_lr": 0.1}, ["finetune_lr=0.1", "finetune_epochs=0", "set finetune_epochs"]),
        ({"hub_private": True}, ["hub_private=True", "push_to_hub", "set push_to_hub"]),
        (
            {"calibration_copies": 2, "calibration_images": 0, "start_from": "dense"},
            ["calibration_copies=2", "calibration_images=0", "leave calibration_copies out"],
        ),
        ({"layer_decay": 0}, ["layer_decay", "above 0"]),
        ({"min_lr": 1.0}, ["min_lr=1.0", "above lr=0.05"]),
        ({"min_lr": 0.01, "finetune_epochs": 1}, ["min_lr=0.01", "above finetune_lr=0.005"]),
        ({"min_lr": 1e-6, "schedule": "step"}, ["min_lr=1e-06", "schedule=step", "cosine"]),
        ({"opt_kwargs": 3}, ["opt_kwargs", "NAME: VALUE"]),
        ({"aug_repeats": 200}, ["aug_repeats=200", "batch_size=128"]),
        ({"torchcompile": "inductor", "cuda_graphs": True}, ["cuda_graphs", "torchcompile=inductor"]),
        ({"drop_path": 0.1, "model_kwargs": {"drop_path_rate": 0.2}}, ["drop_path=0.1", "drop_path_rate", "give one"]),
        ({"train_img_size": 0}, ["train_img_size", "at least 1"]),
        ({"epochs": 0, "start_from": "dense"}, ["epochs=0", "start_from", "'fit'"]),
    ],
)
def test_bad_values_name_the_setting_and_the_way_out(changes, words):
    with pytest.raises(ArpHubError) as caught:
        TrainConfig(**(BASE | changes))
    for word in words:
        assert word in str(caught.value)


def test_the_home_folder_is_that_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = TrainConfig(**BASE, output="~/runs/a", checkpoint="~/w.safetensors", resume="auto")
    assert (config.output, config.checkpoint) == (f"{tmp_path}/runs/a", f"{tmp_path}/w.safetensors")


@pytest.mark.parametrize(
    "given",
    [{"pretrained": True}, {"checkpoint": "w.safetensors"}, {"model": "hf-hub:me/r20"}, {"model": "local-dir:x"}],
)
def test_trained_weights_replace_the_dense_training_of_a_recipe(given):
    recipe = {**BASE, "dense_epochs": 200, "dense_lr": 0.1}
    assert TrainConfig.from_layers(recipe, given).dense_epochs == 0
    assert TrainConfig.from_layers(recipe, {**given, "dense_epochs": 3}).dense_epochs == 3
    assert TrainConfig.from_layers(recipe, {"model": "resnet18"}).dense_epochs == 200


@pytest.mark.parametrize(
    ("schedule", "half", "last"), [("poly", 0.536, 0.016), ("cosine", 0.5, 0.000247), ("step", 0.1, 0.001)]
)
def test_schedules_end_low(schedule, half, last):
    config = TrainConfig(**BASE, schedule=schedule)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    steps = make_schedule(optimizer, config, 100, 10)
    found = {}
    for step in (50, 99):
        steps.step_update(step)
        found[step] = optimizer.param_groups[0]["lr"]
    assert found == pytest.approx({50: half, 99: last}, rel=0.03)


def test_a_warm_up_does_not_begin_above_the_rate_that_it_leads_to():
    config = TrainConfig(**BASE, warmup_epochs=2, warmup_lr=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.005)
    schedule = make_schedule(optimizer, config, 100, 10)
    rates = []
    for step in range(20):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert max(rates) <= 0.005


@pytest.mark.parametrize(("configured", "chosen"), [("bf16", "no"), ("fp16", "no"), ("no", "no"), ("bf16", "bf16")])
def test_a_precision_that_accelerate_is_configured_for_is_not_ignored(monkeypatch, configured, chosen):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", configured)
    config = TrainConfig(**BASE, mixed_precision=chosen, cpu=True, tracker="none")
    AcceleratorState._reset_state(reset_partial_state=True)
    if configured != "no" and chosen == "no":
        with pytest.raises(ArpHubError, match=f"mixed_precision={configured}, and the run for no: set mixed_precision"):
            make_accelerator(config)
    else:
        assert make_accelerator(config).mixed_precision == chosen
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("names", [("1", "01", "2"), ("2", "01", "1"), ("01", "2", "1")])
def test_names_that_are_one_number_have_one_order(names):
    assert list(numbered(dict.fromkeys(names))) == ["01", "1", "2"]
    assert list(numbered(["10", "9", "100"])) == ["9", "10", "100"]


def test_settings_survive_yaml(tmp_path):
    config = TrainConfig(**BASE, schemes=("cp", "channel"), lr=1e-3, exclude=("fc",), cpu=True)
    config.save(tmp_path / "config.yaml")
    assert TrainConfig.from_layers(read_config(tmp_path / "config.yaml")) == config


def test_launchers_do_not_take_our_options_for_theirs():
    # argparse of the launcher also reads options of the script, and refuses a prefix of two of its own.
    theirs = [name for action in get_args_parser()._actions for name in action.option_strings]
    for setting in dataclasses.fields(TrainConfig):
        ours = f"--{setting.name.replace('_', '-')}"
        assert sum(name.startswith(ours) for name in theirs) <= 1, ours


RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py") if path.stem != "custom_loop")
GIVEN = {
    "trained weights": ["--checkpoint", "w.safetensors"],
    "weights of timm": ["--pretrained"],
    "no dense training": ["--dense-epochs", "0"],
    "no distillation": ["--distill", "0"],
    "no fine-tuning": ["--finetune-epochs", "0"],
    "no warm-up": ["--warmup-epochs", "0"],
    "no clipping": ["--clip-grad", "0"],
    "no mixing": ["--mixup", "0", "--cutmix", "0"],
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("recipe", [*RECIPES, "rsb_a2", "deit3"])
def test_what_is_switched_off_takes_what_needs_it_along(recipe, given, monkeypatch, capsys):
    """A recipe's or a file's own rate of dense training is no error where weights are given."""
    file = ROOT / "recipes" / "configs" / f"{recipe}.yaml"
    words = ["--config", str(file)] if file.exists() else []
    words += ["--model", "resnet18"] if recipe in ("any_backbone", "rsb_a2", "deit3") else []
    name = "any_backbone" if file.exists() else recipe
    monkeypatch.setattr("sys.argv", [name, *words, *GIVEN[given], "--print-config"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "recipes" / f"{name}.py"), run_name="__main__")
    assert ended.value.code in (0, None)
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["dense_epochs"] or settings["dense_lr"] is None


def test_what_is_set_beside_it_is_refused_still(tmp_path):
    with pytest.raises(ArpHubError, match="dense_lr=0.1 has no effect with dense_epochs=0"):
        parse_command("", {**BASE, "dense_epochs": 90}, ["--pretrained", "--dense-lr", "0.1"])
    (tmp_path / "my.yaml").write_text("hub_private: true\n")
    with pytest.raises(ArpHubError, match="hub_private=True has no effect with push_to_hub="):
        parse_command("", BASE, ["--config", str(tmp_path / "my.yaml")])


def test_what_is_switched_off_and_on_again_keeps_what_needs_it(tmp_path):
    recipe = {**BASE, "dense_epochs": 90, "dense_lr": 0.3, "distill": 0.9, "temperature": 2.0}
    (tmp_path / "my.yaml").write_text("pretrained: true\ndistill: 0\n")
    config = parse_command("", recipe, ["--config", str(tmp_path / "my.yaml"), "--dense-epochs", "5", "--distill", "1"])
    assert (config.dense_epochs, config.dense_lr, config.temperature) == (5, 0.3, 2.0)
    config = parse_command("", recipe, ["--config", str(tmp_path / "my.yaml")])
    assert (config.dense_epochs, config.dense_lr, config.temperature) == (0, None, 4.0)


def test_later_layers_win_and_budgets_replace_each_other(tmp_path):
    (tmp_path / "my.yaml").write_text("keep_macs: 0.4\nlr: 1e-3\nepochs: 7\n")  # YAML reads 1e-3 as text
    config = parse_command(
        "",
        {**BASE, "epochs": 30},
        ["--config", str(tmp_path / "my.yaml"), "--lr", "0.02", "--schemes", "cp", "channel"],
    )
    assert (config.keep_params, config.keep_macs) == (None, 0.4)
    assert (config.lr, config.epochs, config.schemes) == (0.02, 7, ("cp", "channel"))


@pytest.mark.parametrize(
    ("words", "schemes", "exclude"),
    [
        (["--schemes", "cp", "channel"], ("cp", "channel"), None),
        (["--schemes", "cp,channel", "--exclude", "conv1, fc"], ("cp", "channel"), ("conv1", "fc")),
        (["--exclude", "conv1,layer1.*", "fc"], None, ("conv1", "layer1.*", "fc")),
        (["--exclude", ""], None, ()),
    ],
)
def test_lists_are_separated_by_spaces_or_commas(words, schemes, exclude):
    config = parse_command("", BASE, words)
    assert config.exclude == exclude
    assert config.schemes == (schemes or TrainConfig(**BASE).schemes)


@pytest.mark.parametrize(
    ("arguments", "dense_epochs"),
    [
        ([], 90),
        (["--checkpoint", "w.safetensors"], 0),
        (["--pretrained"], 0),
        (["--pretrained", "--dense-epochs", "5"], 5),
    ],
)
def test_given_weights_make_dense_training_unnecessary(arguments, dense_epochs):
    assert parse_command("", {**BASE, "dense_epochs": 90}, arguments).dense_epochs == dense_epochs


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("epoks: 3", ["'epoks'", "'epochs'", "bad.yaml"]),
        ("- lr", ["list"]),
        ("lr: [1", ["cannot read", "bad.yaml", "line 1"]),
        ("epochs: 3\nlr: a: b", ["cannot read", "line 2: mapping values are not allowed here"]),
        ("!!python/object/apply:os.system ['true']", ["cannot read"]),
    ],
)
def test_bad_config_files(tmp_path, content, words):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ArpHubError) as caught:
        parse_command("", BASE, ["--config", str(path)])
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_unknown_option_names_the_nearest():
    with pytest.raises(ArpHubError, match="--keep-params"):
        parse_command("", BASE, ["--keep-parms", "0.3"])
    with pytest.raises(ArpHubError, match="no config 'no-such-file.yaml': --print-config"):
        parse_command("", BASE, ["--config", "no-such-file.yaml"])


def test_resume_without_a_path_means_the_newest():
    assert parse_command("", BASE, ["--resume"]).resume == "auto"
    assert parse_command("", BASE, ["--resume", "runs/x"]).resume == "runs/x"
    assert parse_command("", BASE, ["--torchcompile"]).torchcompile == "inductor"
    assert parse_command("", BASE, ["--torchcompile", "eager"]).torchcompile == "eager"


def test_help_shows_defaults_of_the_recipe(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    with pytest.raises(SystemExit):
        parse_command("What it does.", {**BASE, "epochs": 17}, ["--help"])
    shown = capsys.readouterr().out
    assert "What it does." in shown
    assert "default: 17" in shown
    assert "torch.distributed.run --nproc_per_node 2 recipe.py --cpu" in shown
    for group in GROUPS:
        assert f"{group}:" in shown


@pytest.mark.parametrize("mixing", [{"mixup": 0.2}, {"cutmix": 1.0}])
@pytest.mark.parametrize("parts", [{"batch_size": 9}, {"batch_size": 6, "accumulation": 2}])
def test_mixing_needs_pairs(mixing, parts):
    with pytest.raises(ArpHubError, match="odd number: choose a multiple"):
        TrainConfig(model="resnet18", keep_params=0.5, **mixing, **parts)


@pytest.mark.parametrize("size", [0, 32], ids=["its own size", "a size that is no argument of the model"])
def test_weights_that_cannot_be_had_name_the_ways_without_them(size, tmp_path, monkeypatch):
    load = inputs.load_model

    def offline(name, checkpoint, **arguments):
        if "img_size" in arguments:  # refused before any download
            return load(name, checkpoint, **{**arguments, "pretrained": False})
        raise ArpHubError("cannot load it") from OSError("the network is gone")

    monkeypatch.setattr(inputs, "load_model", offline)
    given = {"model": "resnet18", "data": "digits", "keep_params": 0.5, "pretrained": True, "img_size": size or None}
    with pytest.raises(ArpHubError, match="cannot load it; or give a checkpoint, or pretrained=False"):
        run(TrainConfig(**given, output=str(tmp_path / "out")))
