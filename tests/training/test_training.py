import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from helpers import ON_TWO, both_ended_clean, search_path
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from arp_hub import decompose, make_plan, save_pretrained, to_dense
from arp_hub.errors import ArpHubError
from arp_hub.layers.model import count_params
from arp_hub.training import TrainConfig, evaluate, load_data, run
from arp_hub.training.checkpoint import Checkpoint, find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from arp_hub.training.loop import _Loop
from arp_hub.training.runlog import RunLog, read_log

RECIPES = Path(__file__).parents[2] / "recipes"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search_path(RECIPES.parent)}
TINY = {
    "model": "cifar_resnet20",
    "data": "digits",
    "keep_params": 0.5,
    "schemes": ("channel",),
    "calibration_images": 4,
    "dense_epochs": 1,
    "epochs": 1,
    "max_steps": 4,
    "batch_size": 16,
    "cpu": True,
    "tracker": "none",
}


def config(tmp_path, **changes):
    return TrainConfig(**{**TINY, "output": str(tmp_path / "out"), **changes})


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def largest_difference(a, b, read=weights):
    a, b = read(a), read(b)
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


def merged(folder):
    """The dense weights, because different factors can give the same weight."""
    return to_dense(timm.create_model(f"local-dir:{folder}", pretrained=True)).state_dict()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run through every phase."""
    folder = tmp_path_factory.mktemp("finished")
    settings = config(folder, finetune_epochs=1, val_fraction=0.1, distill=0.5, tracker="tensorboard", log_every=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARP_HUB_PICTURES", "1")
        return settings, run(settings)


def test_a_run_passes_through_every_phase(finished):
    settings, metrics = finished
    entries = read_log(settings.run_folder / "log.jsonl")
    assert [(entry["phase"], entry["step"]) for entry in entries] == [("dense", 4), ("compress", 4), ("finetune", 4)]
    assert all(0 <= entry["val"]["top1"] <= 100 and entry["val"]["images"] == 144 for entry in entries)
    violations = entries[1]["violations"]
    assert violations.keys() == metrics["plan"]["layers"].keys()
    assert max(violations.values()) < 5e-6  # measured after the last pull; alternating least squares rounds to 1e-6
    assert set(metrics["scores"]) == {"dense", "fit", "before_decomposition", "decomposed", "finetuned"}
    assert list((settings.run_folder / "tracker").glob("events*"))


@pytest.mark.parametrize("frozen", [True, False])
def test_statistics_of_batchnorm_stay_as_they_are_if_asked_to(tmp_path, frozen):
    settings = config(
        tmp_path, start_from="dense", ramp=0.5, freeze_norms=frozen, val_fraction=0.1, epochs=2, max_steps=6
    )
    run(settings)
    before, after = load_file(settings.run_folder / "dense.safetensors"), weights(settings.output)
    same = [torch.equal(before[name], after[name]) for name in before if "running" in name]
    assert all(same) if frozen else not any(same)


@pytest.fixture
def another_precision():
    """Accelerate keeps the precision of a process from one run to the next."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield "bf16"
    AcceleratorState._reset_state(reset_partial_state=True)


def test_every_phase_has_mixed_precision(tmp_path, monkeypatch, another_precision):
    """Accelerate marks a model that it has prepared, and would pass over it in the next phase."""
    seen, judged = [], []
    changes = {"finetune_epochs": 1, "val_fraction": 0.1, "log_every": 1}
    settings = config(tmp_path, **changes, mixed_precision=another_precision)
    begin = _Loop.run_to_end

    def watched(self):
        def watch(module, args):
            if module.training:
                seen.append((self.phase.name, torch.is_autocast_enabled("cpu")))
            else:  # held-out images, on the model as it will be saved
                judged.append(torch.is_autocast_enabled("cpu"))

        next(self.model.children()).register_forward_pre_hook(watch)  # inside of the forward that Accelerate replaces
        return begin(self)

    monkeypatch.setattr(_Loop, "run_to_end", watched)
    run(settings)
    assert {phase for phase, _ in seen} == {"dense", "compress", "finetune"} and all(on for _, on in seen)
    assert judged and not any(judged)


def test_trackers_get_steps_that_rise_throughout_a_run(tmp_path, monkeypatch):
    """Some trackers, such as wandb, drop what comes with a lower step than before."""
    steps = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: steps.append(step))
    run(config(tmp_path, finetune_epochs=1, max_steps=3, log_every=1, val_fraction=0.1))
    assert steps == sorted(steps) and set(steps) == set(range(1, 10))


def test_a_run_leaves_a_report(finished):
    settings, metrics = finished
    page = (settings.run_folder / "report.html").read_text(encoding="utf-8")
    shown = (f"{metrics['params']:,d}", f"{metrics['top1']:.2f}", "before decomposition", *metrics["plan"]["layers"])
    assert [words for words in shown if words not in page] == []
    charts = ("Loss", "Accuracy", "Learning rate", "Violations", "Ranks", "Spectra")
    assert [heading for heading in charts if f">{heading}<" not in page] == [] and page.count("<svg") == len(charts)


def test_decomposition_changes_nothing_after_the_hold(finished):
    scores = finished[1]["scores"]
    assert scores["decomposed"]["loss"] == pytest.approx(scores["before_decomposition"]["loss"], rel=1e-4)
    assert scores["decomposed"]["top1"] == scores["before_decomposition"]["top1"]


def test_the_saved_model_is_the_one_that_was_measured(finished):
    settings, metrics = finished
    model = timm.create_model(f"local-dir:{settings.output}", pretrained=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # the layout of the run, so that rounding is the same
    scores = evaluate(model, load_data("digits", model).test, max_images=4 * 32)
    assert scores["top1"] == metrics["top1"] == metrics["scores"]["finetuned"]["top1"]
    assert count_params(model) == metrics["params"] <= 0.5 * metrics["dense"]["params"]
    kept = json.loads((Path(settings.output) / "metrics.json").read_text())
    for key in ("top1", "seed", "hardware", "versions", "seconds", "scores"):
        assert kept[key] == json.loads(json.dumps(metrics[key]))
    assert metrics["config"] == settings.to_dict()
    assert kept["config"] == json.loads(json.dumps({**metrics["config"], "output": "out"}))  # no folder of this machine


def test_with_no_penalty_the_fit_is_fine_tuned_and_a_run_goes_on_from_there(tmp_path):
    metrics = run(config(tmp_path, epochs=0, finetune_epochs=1))
    assert set(metrics["scores"]) == {"dense", "fit", "finetuned"}
    assert metrics["top1"] == metrics["scores"]["finetuned"]["top1"]
    again = tmp_path / "again"
    settings = config(again, epochs=0, finetune_epochs=1)
    run(settings)
    (first, *_) = list_checkpoints(settings.run_folder / "checkpoints")
    assert load_checkpoint(first).phase == "finetune"
    run(config(again, epochs=0, finetune_epochs=1, resume=str(first), overwrite=True))
    assert largest_difference(tmp_path / "out", again / "out") == 0
    assert set(run(config(tmp_path / "fit", epochs=0))["scores"]) == {"dense", "fit"}


def test_another_model_can_be_the_teacher(finished, tmp_path):
    by_itself = config(tmp_path / "itself", distill=1.0)
    taught = config(tmp_path / "taught", distill=1.0, teacher=finished[0].output)
    assert run(by_itself)["scores"]["fit"] == run(taught)["scores"]["fit"]
    assert largest_difference(by_itself.output, taught.output) > 1e-4
    upside_down = timm.create_model("test_vit", num_classes=10)
    names = [str(number) for number in reversed(range(10))]
    save_pretrained(upside_down, tmp_path / "upside down", label_names=names)
    other = timm.create_model("test_resnet", num_classes=10)  # normalises otherwise
    plan = make_plan(other, keep_params=0.8, input_size=(3, 32, 32))
    save_pretrained(decompose(other, plan), tmp_path / "other")
    for teacher, words in [
        ("cifar_resnet56", "cannot load the teacher: .*'cifar_resnet56'.*teacher_checkpoint"),  # a name without weights
        (f"local-dir:{tmp_path / 'other'}", r"teacher .*mean \(0\.5, .*choose another teacher"),
        (f"local-dir:{tmp_path / 'upside down'}", "teacher '.*' does not fit the labels: .* in another order"),
    ]:
        with pytest.raises(ArpHubError, match=words):
            run(config(tmp_path / "bad", distill=1.0, teacher=teacher))
        assert not (tmp_path / "bad").exists()


def test_a_run_can_be_repeated_from_its_metrics(finished, tmp_path):
    settings, metrics = finished
    kept = json.loads((Path(settings.output) / "metrics.json").read_text())["config"]
    again = TrainConfig.from_layers(kept, {"output": str(tmp_path / "again"), "tracker": "none"})
    assert run(again)["scores"] == metrics["scores"]
    assert largest_difference(settings.output, again.output) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"start_from": "dense", "calibration_images": 0},
        {"mixup": 0.2, "cutmix": 1.0, "smoothing": 0.1, "optimizer": "adamw", "lr": 1e-3, "schedule": "multistep"},
        {"ema_decay": 0.5, "clip_grad": 1.0, "warmup_epochs": 0.01, "distill": 1.0},
        {"dense_epochs": 0, "ramp": 0.0, "keep_params": None, "keep_macs": 0.6, "exclude": ("conv1",)},
    ],
    ids=["dense start", "mixing and AdamW", "averaging and distillation", "hold only, MACs"],
)
def test_options(tmp_path, changes):
    settings = config(tmp_path, **changes)
    metrics = run(settings)
    assert metrics["scores"]["decomposed"]["loss"] == pytest.approx(
        metrics["scores"]["before_decomposition"]["loss"], rel=1e-3
    )
    assert all(torch.isfinite(tensor).all() for tensor in weights(settings.output).values())
    if "keep_macs" in changes:
        assert metrics["macs"] <= 0.6 * metrics["dense"]["macs"]


def test_accumulation_gives_the_same_weights(tmp_path):
    outputs = []
    for parts in (1, 4):
        output = str(tmp_path / f"parts{parts}")
        settings = config(
            tmp_path,
            model="test_vit",
            accumulation=parts,
            dense_epochs=0,
            start_from="dense",
            calibration_images=0,
            output=output,
        )
        run(settings)
        outputs.append(settings.output)
    assert largest_difference(*outputs, read=merged) < 1e-5


def test_bad_input_stops_a_run_before_any_training(tmp_path, shared):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    twenty, longer = (shared / "weights" / f"resnet{depth}_cifar10.safetensors" for depth in (20, 56))
    sample = str(shared / "data" / "imagenet-sample")
    for changes, words in [
        ({"output": str(taken)}, "holds 'thesis.txt'.*overwrite"),
        ({"checkpoint": str(tmp_path / "none.safetensors")}, "no checkpoint file"),
        ({"checkpoint": str(longer)}, "checkpoint.*does not fit.*layer1.3"),
        ({"data": "nothing"}, "unknown data 'nothing'"),
        ({"model": "cifar_resnet21"}, "unknown model 'cifar_resnet21'.*did you mean 'cifar_resnet"),
        ({"batch_size": 9, "accumulation": 2}, "batch_size=9.*multiple of 2"),
        ({"max_steps": 1}, "ramp=0.65 leaves no step"),
        ({"checkpoint": str(twenty), "data": sample, "dense_epochs": 0}, "1000 classes.*10: set dense_epochs"),
        (
            {"data": sample, "distill": 0.5, "teacher": "cifar_resnet20", "teacher_checkpoint": str(twenty)},
            "teacher 'cifar_resnet20' has 10 classes, data .* has 1000",
        ),
        ({"resume": str(tmp_path / "gone")}, "no checkpoint at resume="),
        ({"tracker": "paper"}, "unknown tracker 'paper'"),
        ({"keep_params": 0.001}, "keep_params"),
        ({"exclude": ("layer9",), "data": "nothing"}, "layer9"),  # before the data is read
    ]:
        settings = config(tmp_path, **changes)
        with pytest.raises(ArpHubError, match=words):
            run(settings)
        assert not (settings.run_folder / "checkpoints").exists(), changes
    assert (taken / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"dense_lr": 1e20},
            r"the loss is nan at step 2 of phase 'dense': layer '\S+' is the first whose output",
        ),
        (
            {"dense_lr": 3e38, "weight_decay": 100.0},
            r"weights are NaN or infinite at step 1 of phase 'dense': layer '\S+' is the first with such values in its",
        ),
    ],
    ids=["output", "weight"],
)
def test_a_diverging_run_names_step_layer_and_last_good_checkpoint(tmp_path, changes, words):
    settings = config(tmp_path, **changes, checkpoint_every=1, keep_checkpoints=9)
    with pytest.raises(ArpHubError, match=words + r".*The last good checkpoint is '.*/checkpoints/dense-0000000\d'"):
        run(settings)
    checkpoints = list_checkpoints(settings.run_folder / "checkpoints")
    assert checkpoints
    for checkpoint in checkpoints:
        assert all(tensor.isfinite().all() for tensor in load_checkpoint(checkpoint).state["model"].values())


def test_a_resumed_run_keeps_no_more_checkpoints_than_it_is_told(tmp_path):
    settings = config(tmp_path, checkpoint_every=1, keep_checkpoints=9)
    expected = run(settings)["scores"]
    folder = settings.run_folder / "checkpoints"
    before = list_checkpoints(folder)
    assert len(before) > 3
    assert run(config(tmp_path, checkpoint_every=1, keep_checkpoints=2, resume="auto"))["scores"] == expected
    assert list_checkpoints(folder) == before[-2:]


def test_a_run_under_way_is_not_overwritten(tmp_path):
    with pytest.raises(ArpHubError):
        run(config(tmp_path, lr=1e20))  # stops in the ramp
    assert list_checkpoints(config(tmp_path).run_folder / "checkpoints")
    with pytest.raises(ArpHubError, match="--resume auto.*--overwrite"):
        run(config(tmp_path))
    with pytest.raises(ArpHubError, match=r"other settings \(batch_size: 16 in the checkpoint, 8 now; lr: 1e\+20"):
        run(config(tmp_path, resume="auto", batch_size=8))
    assert run(config(tmp_path, overwrite=True))["scores"]["decomposed"]["images"] == 128


def arguments(settings):
    """Settings as options of a recipe."""
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def launch_two(recipe, output, *options, **settings):
    """Start a recipe on two processes as a user would."""
    command = [sys.executable, *ON_TWO, str(RECIPES / recipe), "--output", str(output), *options, *arguments(settings)]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def until(condition, seconds=120):
    """A function that waits for a condition, for `Client.run` to send its signal after."""

    def wait():
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    return wait


ON_GPU = ["--no-pretrained", "--tracker", "none", "--schemes", "channel"]
PLAIN = [*ON_GPU, "--cpu"]


def test_two_processes_and_one_end_in_the_same_weights(tmp_path, client):
    settings = {"model": "test_vit", "img_size": 64, "max_steps": 12, "batch_size": 16, "calibration_images": 8}
    settings |= {"reprob": 0.5, "aug_repeats": 2, "layer_decay": 0.9, "smoothing": 0.1, "torchcompile": "eager"}
    words = ("--output", tmp_path / "of1", *PLAIN, *arguments(settings))
    assert client.recipe("any_backbone.py", *words).code == 0
    words = ("--output", tmp_path / "of2", *PLAIN, *arguments(settings))
    assert [done.code for done in client.recipe_on_two("any_backbone.py", *words)] == [0, 0]
    for number in (1, 2):
        metrics = json.loads((tmp_path / f"of{number}" / "metrics.json").read_text())
        assert metrics["processes"] == number
        assert metrics["scores"]["decomposed"]["images"] == 360
    assert largest_difference(tmp_path / "of1", tmp_path / "of2", read=merged) < 1e-4


def test_a_failure_in_one_of_two_processes_ends_both_with_its_message(tmp_path):
    """Each image is read by one process only, and one image cannot be decoded."""
    for number in range(16):
        picture = tmp_path / "data" / "train" / f"class{number % 2}" / f"{number:02}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 100), (number, 0, 0)).save(picture)
    picture.write_bytes(picture.read_bytes()[:60])
    options = [*PLAIN, "--start-from", "dense", "--calibration-images", "0", "--dense-epochs", "1", "--workers", "0"]
    settings = {"model": "test_resnet", "data": tmp_path / "data", "batch_size": 8, "epochs": 2}
    child = launch_two("any_backbone.py", tmp_path / "out", *options, **settings)
    _, said = child.communicate(timeout=240)
    assert child.returncode not in (0, None)
    assert len(re.findall(r"^error: image 'train/class1/\d+\.png' cannot be decoded", said, re.M)) == 1, said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "name"), [("FSDP", "FSDP1"), ("DEEPSPEED", "DEEPSPEED"), ("MEGATRON_LM", "MEGATRON_LM")]
)
def test_other_ways_to_share_a_model_are_refused_before_any_work(tmp_path, monkeypatch, kind, name):
    """A machine that shares a model is stood in for: Accelerate asks for GPUs to do so."""
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType(kind)))
    with pytest.raises(ArpHubError, match=f"DDP or FSDP2, not with {name}: choose MULTI_GPU.*fsdp_version: 2"):
        run(config(tmp_path))
    assert not (tmp_path / "out-run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({}, "cuda_graphs needs one process on a CUDA GPU.*1 on cpu"), ({"accumulation": 2}, "accumulation=2 must be 1")],
)
def test_graphs_need_a_gpu_and_whole_batches(tmp_path, changes, message):
    with pytest.raises(ArpHubError, match=message):
        run(config(tmp_path, cuda_graphs=True, **changes))
    assert not (tmp_path / "out-run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_graphs_train_to_the_same_weights(tmp_path, precision):
    settings = LONG | {"max_steps": 12, "mixed_precision": precision, "distill": 0.5}
    for name, options in (("plain", []), ("recorded", ["--cuda-graphs"])):
        words = ("--output", tmp_path / name, *ON_GPU, *options, *arguments(settings))
        subprocess.run([sys.executable, RECIPES / "any_backbone.py", *words], env=ENVIRONMENT, check=True)
    before, after = (load_file(tmp_path / f"{name}-run" / "dense.safetensors") for name in ("plain", "recorded"))
    for name in before:  # some sums run in another order
        apart = (before[name].double() - after[name].double()).norm()
        assert apart < 0.02 * before[name].double().norm().clamp_min(1), name


LOOKING = """
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from arp_hub.training.graphs import recorded_training

class Looking(torch.nn.Conv2d):
    def forward(self, images):
        found = super().forward(images)
        return found if float(found.mean()) > 0 else -found

recorded_training(Looking(3, 4, 1).cuda(), torch.randn(2, 3, 8, 8, device="cuda"))
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_that_looks_at_values_cannot_be_recorded():
    done = subprocess.run([sys.executable, "-c", LOOKING], env=ENVIRONMENT, capture_output=True, text=True)
    assert "cuda_graphs: this model cannot be recorded" in done.stderr  # a new process: CUDA is unusable afterwards


def test_several_processes_need_cpu_said(tmp_path, client):
    if torch.cuda.is_available():
        pytest.skip("with GPUs the processes do find each other")
    for done in client.recipe_on_two("quickstart.py", "--tracker", "none", "--output", tmp_path / "out"):
        assert done.code == 2
        assert re.search("2 processes were launched.*--cpu", done.err), done.err


LONG = {"model": "cifar_resnet20", "dense_epochs": 1, "epochs": 1, "finetune_epochs": 1, "max_steps": 16,
        "batch_size": 8, "calibration_images": 4, "checkpoint_every": 2, "ema_decay": 0.9}  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, client):
    """A run through all phases without an interruption."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    done = client.recipe("any_backbone.py", "--output", folder, *PLAIN, *arguments(LONG))
    assert done.code == 0, done.err
    return folder


@pytest.mark.parametrize(
    "phase",
    ["compress", pytest.param("dense", marks=pytest.mark.slow), pytest.param("finetune", marks=pytest.mark.slow)],
)
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, client, uninterrupted, phase):
    words = ("--output", tmp_path / "out", *PLAIN, *arguments(LONG))
    checkpoints = tmp_path / "out-run" / "checkpoints"
    at = until(lambda: list(checkpoints.glob(f"{phase}-0000000[4-9]")))
    assert client.recipe("any_backbone.py", *words, interrupt=at, by=signal.SIGKILL).code == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    done = client.recipe("any_backbone.py", *words, "--resume")
    assert done.code == 0, done.err
    assert int(re.search(rf"resumed from .*{phase}-(\d+)", done.err)[1]) >= 4
    assert largest_difference(uninterrupted, tmp_path / "out") == 0
    logs = [read_log(folder.with_name("out-run") / "log.jsonl") for folder in (uninterrupted, tmp_path / "out")]
    assert [(entry["phase"], entry["step"]) for entry in logs[0]] == [(e["phase"], e["step"]) for e in logs[1]]


@pytest.mark.parametrize("number", [1, 2])
def test_sigterm_saves_and_ends_with_a_code_of_its_own(tmp_path, client, number):
    settings = {"model": "cifar_resnet20", "max_steps": 500, "batch_size": 8, "epochs": 500, "mixed_precision": "bf16",
                "checkpoint_every": 1}  # fmt: skip
    options = [*PLAIN, "--start-from", "dense", "--calibration-images", "0"]
    checkpoints = tmp_path / "out-run" / "checkpoints"
    under_way = until(lambda: list(checkpoints.glob("compress-*[1-9]*")))
    if number == 1:
        words = ("--output", tmp_path / "out", *options, *arguments(settings))
        done = client.recipe("any_backbone.py", *words, interrupt=under_way, by=signal.SIGTERM)
        assert done.code == 75
        said = done.err
    else:
        child = launch_two("any_backbone.py", tmp_path / "out", *options, **settings)
        under_way()
        child.send_signal(signal.SIGTERM)
        _, said = child.communicate(timeout=120)
        assert both_ended_clean(said), said
    assert "stopped by SIGTERM at step" in said
    assert "--resume auto" in said
    saved = load_checkpoint(find_checkpoint("auto", checkpoints))
    assert f"step {saved.step} of phase 'compress'" in said
    assert 0 < saved.step < 500


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, client):
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000,) * 2)"
    settings = {"model": "cifar_resnet20", "output": tmp_path / "out", "max_steps": 4, "batch_size": 8,
                "start_from": "dense", "calibration_images": 0, "checkpoint_every": 1}  # fmt: skip
    done = client.recipe("any_backbone.py", *PLAIN, *arguments(settings), before=full)
    assert done.code == 2
    assert re.search(r"error: cannot write a checkpoint in .*compress-00000000.*--resume auto", done.err), done.err
    assert load_checkpoint(find_checkpoint("auto", tmp_path / "out-run" / "checkpoints")).step == 0


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=10,
)


@given(tree=TREES)
def test_checkpoints_give_back_what_they_were_given(tmp_path_factory, tree):
    tensors = {"whole": torch.arange(6).view(2, 3), "turned": torch.rand(3, 2).t(), "scalar": torch.tensor(2.5)}
    tensors["shared"] = tensors["whole"][0]
    tensors["pixels last"] = torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    state = {"tree": tree, "tensors": tensors, "list": [tensors["scalar"], {3: torch.zeros(0)}]}
    folder = tmp_path_factory.mktemp("checkpoints")
    path = save_checkpoint(folder, Checkpoint("dense", 3, {"lr": 1}, {}, None, 1.5, state), keep=1)
    read = load_checkpoint(path)
    assert read.state["tree"] == tree
    for name, tensor in tensors.items():
        assert torch.equal(read.state["tensors"][name], tensor)
    # the memory layout decides the order of sums, and so the last bit of a resumed run
    assert read.state["tensors"]["pixels last"].stride() == tensors["pixels last"].stride()
    assert torch.equal(read.state["list"][1][3], torch.zeros(0))
    assert (read.phase, read.step, read.settings, read.seconds) == ("dense", 3, {"lr": 1}, 1.5)


def test_old_checkpoints_go_and_half_written_ones_do_not_count(tmp_path):
    for step in range(5):
        if step == 3:
            (tmp_path / ".dense-00000003.1.tmp").mkdir()  # as a killed run leaves it
            assert find_checkpoint("auto", tmp_path).name == "dense-00000002"
        save_checkpoint(tmp_path, Checkpoint("dense", step, {}, {}, None, 0.0, {"x": torch.zeros(2)}), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense-00000003", "dense-00000004"]
    assert find_checkpoint("auto", tmp_path / "nowhere") is None


def test_a_resumed_run_clears_away_what_a_killed_one_left(tmp_path):
    run(config(tmp_path))
    checkpoints = config(tmp_path).run_folder / "checkpoints"
    (checkpoints / ".compress-00000002.old.tmp").mkdir()  # of the last phase, which saves no checkpoint
    run(config(tmp_path, resume="auto", overwrite=True))
    assert not list(checkpoints.glob(".*"))


def test_checkpoints_are_ordered_by_phase_and_step_whatever_the_clock_says(tmp_path, monkeypatch):
    written = [("dense", 9), ("compress", 1), ("compress", 2), ("finetune", 1)]
    for age, (phase, step) in enumerate(written):
        monkeypatch.setattr(time, "time", lambda age=age: 1e9 - age)
        path = save_checkpoint(tmp_path, Checkpoint(phase, step, {}, {}, None, 0.0, {"x": torch.zeros(2)}), keep=9)
        os.utime(path / "state.json", (1e9 - age, 1e9 - age))
    (tmp_path / "notes-1").mkdir()
    (tmp_path / "notes-1" / "state.json").write_text("{}")
    (tmp_path / ".stray.tmp").write_text("half a file")
    names = [f"{phase}-{step:08d}" for phase, step in written]
    assert [path.name for path in list_checkpoints(tmp_path)] == names
    save_checkpoint(tmp_path, Checkpoint("finetune", 2, {}, {}, None, 0.0, {"x": torch.zeros(2)}), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["finetune-00000001", "finetune-00000002"]
    assert not (tmp_path / ".stray.tmp").exists()


RESUMED = {
    "model": "cifar_resnet20", "start_from": "dense", "calibration_images": 0, "finetune_epochs": 1, "max_steps": 3,
    "batch_size": 8, "checkpoint_every": 1, "keep_checkpoints": 99, "lr": 1e-3,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"optimizer": "lamb"}, marks=pytest.mark.slow),
        {"optimizer": "adan", "ema_decay": 0.9},
        pytest.param({"ema_decay": 0.9, "accumulation": 2}, marks=pytest.mark.slow),
    ],
    ids=["lamb", "adan and averaging", "averaging and accumulation"],
)
@pytest.mark.parametrize("pattern", ["compress-00000003", pytest.param("*", marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_from_every_checkpoint_the_end_is_the_same_to_the_bit(tmp_path, changes, pattern):
    settings = config(tmp_path, **RESUMED, **changes)
    scores = run(settings)["scores"]
    kept = tmp_path / "kept" / "checkpoints"
    kept.parent.mkdir()
    (settings.run_folder / "checkpoints").rename(kept)
    shutil.copy(settings.run_folder / "dense.safetensors", kept.parent)
    log = (settings.run_folder / "log.jsonl").read_text()
    before = weights(settings.output)
    checkpoints = [path for path in list_checkpoints(kept) if path.match(pattern)]
    assert pattern != "*" or {path.name for path in checkpoints} >= {
        "dense-00000003",
        "compress-00000003",
        "finetune-00000003",
    }
    assert checkpoints
    for checkpoint in checkpoints:
        (settings.run_folder / "log.jsonl").write_text(log)
        again = run(dataclasses.replace(settings, resume=str(checkpoint), overwrite=True))
        assert again["scores"] == scores, checkpoint
        after = weights(settings.output)
        assert all(torch.equal(before[name], after[name]) for name in before), checkpoint


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"[" * 100_000, b"[1]", b'{"phase": "dense", "step": "x"}', b"{"])
def test_a_damaged_log_is_one_line_and_a_resumed_run_drops_what_it_cannot_read(tmp_path, damage):
    settings = config(tmp_path, **RESUMED)
    if damage != b'{"phase": "dense", "step": "x"}':
        (tmp_path / "log.jsonl").write_bytes(damage)
        with pytest.raises(ArpHubError, match="cannot read the log .*line"):
            read_log(tmp_path / "log.jsonl")
    settings.run_folder.mkdir()
    path = settings.run_folder / "log.jsonl"
    path.write_bytes(b'{"phase": "dense", "step": 1}\n' + damage + b"\n")
    accelerator = SimpleNamespace(is_main_process=True, init_trackers=lambda *_, **__: None)
    RunLog(accelerator, settings, ("dense", 1))
    assert read_log(path) == [{"phase": "dense", "step": 1}]


@pytest.mark.parametrize("damage", ["cut tensors", "no tensors", "cut json", "nested json", "other json"])
def test_damaged_checkpoints_are_refused(tmp_path, damage):
    path = save_checkpoint(tmp_path, Checkpoint("dense", 1, {}, {}, None, 0.0, {"x": torch.zeros(200)}), keep=1)
    tensors, text = path / "state.safetensors", path / "state.json"
    if damage == "cut tensors":
        tensors.write_bytes(tensors.read_bytes()[:-9])
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "cut json":
        text.write_text(text.read_text()[:-9])
    elif damage == "nested json":
        text.write_text("[" * 100_000)
    else:
        meta = {"format_version": 1, "phase": "dense", "step": 1, "settings": {}, "scores": {}, "plan": None}
        text.write_text(json.dumps(meta | {"state": {"a": 1}}))
    (path / "SHA256SUMS").unlink()  # older checkpoints have no checksums
    with pytest.raises(ArpHubError, match="not a whole checkpoint"):
        load_checkpoint(path)
