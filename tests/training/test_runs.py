"""A run's folder: damaged checkpoints, two runs at once, files of others, disks that refuse, SIGTERM."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from arp_hub.errors import ArpHubError
from arp_hub.training import TrainConfig, main, run
from arp_hub.training.checkpoint import (
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    save_checkpoint,
)
from arp_hub.training.runlog import read_log

TINY = {
    "model": "test_vit", "data": "digits", "keep_params": 0.5, "schemes": ("channel",), "start_from": "dense",
    "calibration_images": 0, "dense_epochs": 1, "epochs": 1, "max_steps": 2, "ramp": 0.5, "batch_size": 8,
    "checkpoint_every": 1, "keep_checkpoints": 9, "lr": 1e-3, "cpu": True, "tracker": "none",
}  # fmt: skip
STATE, TENSORS, SUMS = "state.json", "state.safetensors", "SHA256SUMS"


@pytest.fixture(scope="module", autouse=True)
def faster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARP_HUB_PICTURES", "0")
        patch.setattr("os.fsync", lambda handle: None)  # saves the time that a disk takes
        yield


def config(folder, **changes):
    return TrainConfig(**{**TINY, "output": str(folder / "out"), **changes})


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of three steps."""
    state = {"model": {"w": torch.arange(200.0)}}
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "checkpoints", Checkpoint("dense", step, {"lr": 1}, {}, None, 1.5, state), keep=3)
    return list_checkpoints(tmp_path / "checkpoints")


def flipped(path, at):
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1
    path.write_bytes(data)


DAMAGES = {
    **{f"bit of {name} at {at}": (name, lambda path, at=at: flipped(path, at))
       for name in (STATE, TENSORS, SUMS) for at in (0, 70, -1)},
    **{f"{name} cut": (name, lambda path: path.write_bytes(path.read_bytes()[:-9])) for name in (STATE, TENSORS, SUMS)},
    **{f"{name} empty": (name, lambda path: path.write_bytes(b"")) for name in (STATE, TENSORS, SUMS)},
    **{f"{name} missing": (name, Path.unlink) for name in (STATE, TENSORS)},
    "a pipe": (STATE, lambda path: (path.unlink(), os.mkfifo(path))),
}  # fmt: skip
"""Ways to damage a checkpoint: the file, and what is done to it."""


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_newest_whole_one(saved, caplog, damage):
    name, harm = DAMAGES[damage]
    harm(saved[-1] / name)
    with pytest.raises(ArpHubError, match=f"dense-00000003' is not a whole checkpoint: .*{name}.*--overwrite"):
        load_checkpoint(saved[-1])
    with pytest.raises(ArpHubError, match="not a whole checkpoint"):
        load_checkpoint(find_checkpoint(str(saved[-1]), saved[-1].parent))
    folder = saved[-1].parent
    for resume in ("auto", str(folder.parent)):
        caplog.clear()
        assert find_checkpoint(resume, folder) == saved[1]
        (line,) = caplog.messages
        assert str(saved[-1]) in line and str(saved[1]) in line
    assert newest_whole(folder) == (saved[1], [saved[2]])


def test_if_all_checkpoints_are_damaged_nothing_is_resumed_and_nothing_deleted(tmp_path):
    settings = config(tmp_path)
    folder = settings.run_folder / "checkpoints"
    save_checkpoint(folder, Checkpoint("dense", 1, {}, {}, None, 0.0, {"x": torch.zeros(2)}), keep=1)
    flipped(folder / "dense-00000001" / TENSORS, -1)
    with pytest.raises(ArpHubError, match="no checkpoint in .* is whole, damaged: .*dense-00000001.*--overwrite"):
        run(config(tmp_path, resume="auto"))
    assert (folder / "dense-00000001" / TENSORS).exists()


OLD = {
    "whole": (STATE, lambda text: text, None),
    "binary": (STATE, lambda text: b"\xff\xfe\x00" + text, "not a whole"),
    "nested": (STATE, lambda text: b"[" * 20_000 + b"]" * 20_000, "not a whole"),
    "nested state": (STATE, lambda text: text.replace(b'"scores": {}', b'"scores": ' + b"[" * 20_000), "not a whole"),
    "a list": (STATE, lambda text: b"[1, 2]", "not a whole"),
    "no phase": (STATE, lambda text: text.replace(b'"phase": "dense"', b'"phase": "x"'), "not a whole.*phase 'x'"),
    "phase is a list": (STATE, lambda text: text.replace(b'"phase": "dense"', b'"phase": []'), "phase is of type list"),
    "step": (STATE, lambda text: text.replace(b'"step": 3', b'"step": -3'), "not a whole.*step -3"),
    "settings": (STATE, lambda text: text.replace(b'"settings": {"lr": 1}', b'"settings": 7'), "settings is of type"),
    "version": (STATE, lambda text: text.replace(b'n": 1,', b'n": "one",'), "not a whole"),
    "too large": (STATE, lambda text: text + b" " * 2**26, "67,108,864 are allowed"),
    "short": (TENSORS, lambda data: data[:-9], "not a whole"),
}
"""Contents of checkpoints without checksums, and what is said about them."""


@pytest.mark.parametrize("case", OLD)
def test_a_checkpoint_without_checksums_is_read_if_it_is_whole(saved, case):
    name, change, words = OLD[case]
    (saved[-1] / SUMS).unlink()
    (saved[-1] / name).write_bytes(change((saved[-1] / name).read_bytes()))
    if words is None:
        assert load_checkpoint(saved[-1]).step == 3
        assert find_checkpoint("auto", saved[-1].parent) == saved[-1]
    else:
        with pytest.raises(ArpHubError, match=words):
            load_checkpoint(saved[-1])
        assert find_checkpoint("auto", saved[-1].parent) == saved[1]


def test_a_checkpoint_of_a_newer_format_is_refused_and_not_taken_for_damaged(saved):
    meta = json.loads((saved[-1] / STATE).read_text())
    (saved[-1] / STATE).write_text(json.dumps({**meta, "format_version": 99}))
    sums = [f"{hashlib.sha256((saved[-1] / name).read_bytes()).hexdigest()}  {name}\n" for name in (STATE, TENSORS)]
    (saved[-1] / SUMS).write_text("".join(sums))
    assert find_checkpoint("auto", saved[0].parent) == saved[-1]
    with pytest.raises(ArpHubError, match="format_version 99.*upgrade"):
        load_checkpoint(saved[-1])


def test_checksums_are_those_of_sha256sum(saved):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum")
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=saved[0], check=True)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that stops in its compress phase, because a weight becomes NaN at the first step."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(ArpHubError, match="last good checkpoint is '.*compress-00000000'"):
        run(config(folder, dense_lr=1e-3, lr=3e38))
    return folder


def edited(*keys, drop=False, value=None):
    """A change of `state.json`: one entry is dropped or has another value. Keys of the tree are those of the state."""

    def change(found):
        place = found
        for key in keys[:-1]:
            place = dict(place["__dict__"])[key] if "__dict__" in place else place[key]
        if "__dict__" in place:
            pairs = [[key, value if key == keys[-1] else item] for key, item in place["__dict__"]]
            place["__dict__"] = [pair for pair in pairs if pair[0] != keys[-1] or not drop]
        elif drop:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value

    return change


LACKING = {
    **{f"no {key}": edited(key, drop=True)
       for key in ("format_version", "phase", "step", "settings", "scores", "plan", "state")},
    **{f"no {key} in the state": edited("state", key, drop=True) for key in ("model", "optimizer", "penalty")},
    **{f"{key} is a number": edited(key, value=5) for key in ("phase", "settings", "scores", "plan", "state")},
    **{f"{key} in the state is a number": edited("state", key, value=5)
       for key in ("model", "optimizer", "groups", "penalty", "ema", "scaler", "totals")},
    **{f"{key} in the state is a list": edited("state", key, value=[1])
       for key in ("model", "optimizer", "groups", "penalty", "ema", "scaler", "totals")},
    "another step than its name": edited("step", value=1),
    "a step of text": edited("step", value="3"),
    "endless seconds": edited("seconds", value=float("inf")),
    "scores without the dense model's": edited("scores", value={}),
    "scores of the dense model are a number": edited("scores", "dense", value=5),
    "a tensor that the file lacks": edited("state", "model", "head.bias", value={"__tensor__": "x"}),
    "no tensor of the model": edited("state", "model", "head.bias", drop=True),
    "a tensor of another shape": edited("state", "model", "head.bias", value={"__tensor__": "/model/head.weight"}),
    "a number for a tensor": edited("state", "model", "head.bias", value=5),
    "no steps of the penalty": edited("state", "penalty", "step_count", drop=True),
    "steps of the penalty are text": edited("state", "penalty", "total_steps", value="2"),
    "other steps of the penalty": edited("state", "penalty", "total_steps", value=7),
    "no layers of the penalty": edited("state", "penalty", "layers", drop=True),
    "an optimizer with names": edited("state", "optimizer", value={"__dict__": [["a", {"__dict__": []}]]}),
}  # fmt: skip


@pytest.mark.parametrize("case", LACKING)
def test_a_checkpoint_that_lacks_an_entry_is_refused_before_training(stopped, tmp_path, case):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "out-run" / "checkpoints" / "compress-00000000"
    (path / SUMS).unlink()
    found = json.loads((path / STATE).read_text())
    LACKING[case](found)
    (path / STATE).write_text(json.dumps(found))
    with pytest.raises(ArpHubError) as raised:
        run(config(tmp_path, dense_lr=1e-3, lr=3e38, resume=str(path)))
    assert "NaN" not in str(raised.value) and len(str(raised.value)) < 900


MOMENTS = {
    "a moment of another shape": edited(
        "state", "optimizer", 0, "momentum_buffer", value={"__tensor__": "/model/head.weight"}
    ),
    "a number for a moment": edited("state", "optimizer", 0, "momentum_buffer", value=0.5),
    "no moment": edited("state", "optimizer", 0, "momentum_buffer", drop=True),
    "a state of too many parameters": edited("state", "optimizer", value={"__dict__": [[999, {"__dict__": []}]]}),
    "no groups": edited("state", "groups", value=[]),
    "a rate of text": edited("state", "groups", value=[{"__dict__": [["lr", "high"]]}] * 2),
}


@pytest.mark.parametrize("case", MOMENTS)
def test_a_state_of_the_optimizer_that_does_not_fit_is_refused_before_training(stopped, tmp_path, case):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "out-run" / "checkpoints" / "dense-00000001"
    (path / SUMS).unlink()
    found = json.loads((path / STATE).read_text())
    MOMENTS[case](found)
    (path / STATE).write_text(json.dumps(found))
    with pytest.raises(ArpHubError, match="dense-00000001' is not a whole checkpoint: .*--overwrite"):
        run(config(tmp_path, dense_lr=1e-3, lr=3e38, resume=str(path)))


def test_a_checkpoint_without_checksums_goes_on_where_it_is_whole(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "out-run" / "checkpoints" / "compress-00000000"
    (path / SUMS).unlink()
    with pytest.raises(ArpHubError, match="NaN or infinite"):
        run(config(tmp_path, dense_lr=1e-3, lr=3e38, resume=str(path)))


def test_a_damaged_checkpoint_is_never_the_last_good_one(stopped, tmp_path):
    """The newest checkpoint is damaged behind the run's back, before the step that makes a weight NaN."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "out-run" / "checkpoints"

    def damage(*_):
        if (folder / "compress-00000000").exists():
            flipped(folder / "compress-00000000" / TENSORS, -1)

    hook = register_optimizer_step_pre_hook(damage)
    try:
        with pytest.raises(ArpHubError, match="last good checkpoint is '.*dense-00000002'"):
            run(config(tmp_path, dense_lr=1e-3, lr=3e38, resume=str(folder / "dense-00000001")))
    finally:
        hook.remove()


HOLD = """
import sys, time
from pathlib import Path
from arp_hub._utils.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_on_one_output_is_refused_until_the_first_has_ended_or_crashed(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    lock = tmp_path / "out-run" / "run.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        before = sorted(path.name for path in (tmp_path / "out-run").iterdir())
        for changes in ({}, {"resume": "auto"}, {"overwrite": True}):
            with pytest.raises(ArpHubError, match=rf"another run writes in .*\(process {holder.pid} on .*choose ano"):
                run(config(tmp_path, **changes))
        assert sorted(path.name for path in (tmp_path / "out-run").iterdir()) == before
    finally:
        holder.kill()
        holder.wait()
    assert f"process {holder.pid}" in lock.read_text()  # the file stays, the lock does not
    with pytest.raises(ArpHubError, match="holds an unfinished run.*--resume auto"):
        run(config(tmp_path))


FOREIGN = {
    "a file": ("thesis.txt", "holds 'thesis.txt', which no run wrote"),
    "a folder": ("photos/1.jpg", "holds 'photos', which no run wrote"),
    "a log": ("log.jsonl", "holds 'log.jsonl', which no run wrote"),
    "an empty folder of checkpoints": ("checkpoints/mine.txt", "holds 'checkpoints', which no run wrote"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_files_of_others_in_the_run_folder_stay(tmp_path, case):
    name, words = FOREIGN[case]
    place = tmp_path / "out-run" / name
    place.parent.mkdir(parents=True)
    place.write_text("mine")
    for changes in ({}, {"resume": "auto"}):
        with pytest.raises(ArpHubError, match=words + ".*--overwrite"):
            run(config(tmp_path, data="nothing", **changes))
    assert place.read_text() == "mine"
    with pytest.raises(ArpHubError, match="unknown data"):
        run(config(tmp_path, data="nothing", overwrite=True))


def test_files_of_others_beside_a_lock_stay_unless_the_folder_is_overwritten(tmp_path):
    folder = tmp_path / "out-run"
    for name in ("run.lock", "thesis.txt", "photos/1.jpg", "log.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    run(config(tmp_path, dense_epochs=0, max_steps=1, ramp=0))
    assert (folder / "thesis.txt").exists() and (folder / "photos" / "1.jpg").exists()
    assert all("phase" in entry for entry in read_log(folder / "log.jsonl"))
    run(config(tmp_path, dense_epochs=0, max_steps=1, ramp=0, overwrite=True))
    assert not (folder / "thesis.txt").exists() and not (folder / "photos").exists()


def test_a_run_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out-run").write_text("mine")
    for changes in ({}, {"overwrite": True}):
        with pytest.raises(ArpHubError, match="'.*out-run' is a file.*choose another output"):
            run(config(tmp_path, **changes))


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(ArpHubError, match="unknown data"):
        run(config(tmp_path, data="nothing"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("name", ["run.lock", "config.yaml", "state.json", "dense.safetensors", "log.jsonl"])
def test_a_disk_that_refuses_is_one_sentence(stopped, tmp_path, monkeypatch, name, code):
    """Tests may run as root, for whom no file is read-only, so that opening fails by itself."""
    if name == "log.jsonl":
        shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)  # only a resumed run cuts its log
    original = os.open, Path.open, Path.replace

    def refusing(real):
        def call(path, *arguments, **options):
            if name in str(path).replace("/.", "/") and "out-run" in str(path):
                raise OSError(code, os.strerror(code), str(path))
            return real(path, *arguments, **options)

        return call

    monkeypatch.setattr(os, "open", refusing(original[0]))
    monkeypatch.setattr(Path, "open", refusing(original[1]))
    monkeypatch.setattr(Path, "replace", refusing(original[2]))
    resume = {"resume": "auto"} if name == "log.jsonl" else {}
    with pytest.raises(ArpHubError, match=f"cannot write.*out-run.*{os.strerror(code)}.*--resume auto"):
        run(config(tmp_path, dense_lr=1e-3, lr=3e38, **resume))
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_output_below_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArpHubError, match="cannot write in '.*out-run'"):
        run(config(tmp_path / "file"))


STRAYS = [".log.jsonl.0a1b2c3d.tmp", ".config.yaml.tmp", "checkpoints/.dense-00000001.1.tmp", "checkpoints/.x.old.tmp"]


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_unfinished_files_are_harmless_and_go(stopped, tmp_path, kind):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    for name in STRAYS:
        stray = tmp_path / "out-run" / name
        if kind == "folder":
            stray.mkdir()
            (stray / STATE).write_text("{")
        elif kind == "link":
            stray.symlink_to(tmp_path / "mine")
        else:
            stray.write_text("half")
    with pytest.raises(ArpHubError, match="NaN or infinite at step 1 of phase 'compress'"):
        run(config(tmp_path, dense_lr=1e-3, lr=3e38, resume="auto"))
    assert not list((tmp_path / "out-run").rglob("*.tmp"))
    assert (tmp_path / "mine" / "file").read_text() == "mine"


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"[" * 20_000 + b"]" * 20_000, b" " * (2**26 + 1), b"7"])
def test_a_log_that_is_none_is_one_sentence(tmp_path, damage):
    (tmp_path / "log.jsonl").write_bytes(damage)
    with pytest.raises(ArpHubError, match="cannot read the log '.*log.jsonl'"):
        read_log(tmp_path / "log.jsonl")


def terminate(*processes):
    for process in processes:
        os.kill(process, signal.SIGTERM)


@pytest.fixture
def recipe(monkeypatch, capsys):
    """Runs settings as a recipe does, in this process; gives its exit code and what it said last."""

    def start(settings):
        words = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if name != "schemes"]
        monkeypatch.setattr(sys, "argv", ["recipe.py", "--cpu", *(word for word in words if "cpu=" not in word)])
        with pytest.raises(SystemExit) as ended:
            main("A recipe.", schemes=("channel",))
        return ended.value.code, capsys.readouterr().err.strip().splitlines()

    return start


PLACES = {
    "loading data": "arp_hub.training.inputs.load_data",
    "planning": "arp_hub.training.trainer.make_plan",
    "fitting": "arp_hub.training.trainer.calibration_images",
    "evaluating": "arp_hub.training.trainer.evaluate",
    "saving a checkpoint": "arp_hub.training.checkpoint.save_file",
    "saving the model": "arp_hub.hub.save.save_file",
    "the report": "arp_hub.training.results.write_report",
}


@pytest.mark.parametrize("place", PLACES)
def test_sigterm_outside_the_loop_is_one_line_and_nothing_half_written(tmp_path, monkeypatch, recipe, place):
    module, _, name = PLACES[place].rpartition(".")
    original = getattr(sys.modules[module], name)

    def told(*arguments, **options):
        terminate(os.getpid(), os.getpid())  # torchrun and a scheduler may both send it
        return original(*arguments, **options)

    monkeypatch.setattr(PLACES[place], told)
    changes = {"start_from": "fit", "calibration_images": 4} if place == "fitting" else {}
    settings = {**TINY, "output": tmp_path / "out", "dense_epochs": 0, **changes}
    code, said = recipe(settings)
    assert code == 75
    assert said[-1] == "stopped by SIGTERM: continue from the last checkpoint with --resume auto"
    assert not any("Traceback" in line or "rror" in line for line in said)
    assert not list(tmp_path.rglob("*.tmp"))
    assert (tmp_path / "out").exists() == (place == "the report")
    for path in list_checkpoints(tmp_path / "out-run" / "checkpoints"):
        load_checkpoint(path)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    monkeypatch.setenv("ARP_HUB_PICTURES", "0")
    run(TrainConfig(**{**settings, "output": str(tmp_path / "out"), "resume": "auto", "overwrite": True}))


def test_sigterm_to_the_whole_group_with_loader_workers_saves_the_state(tmp_path, monkeypatch, recipe):
    for number in range(16):
        picture = tmp_path / "data" / "train" / f"class{number % 2}" / f"{number:02}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 100), (number, 0, 0)).save(picture)
    steps, workers = [], []

    def told(*_):
        steps.append(1)
        if len(steps) == 2:
            workers.extend(child.pid for child in multiprocessing.active_children())
            group = map(str, (*workers, os.getpid(), *workers))
            subprocess.run(["kill", "-TERM", *group], check=True)  # not from this process: workers obey their parent
            time.sleep(0.2)  # for the signals to arrive
            assert len(multiprocessing.active_children()) == len(workers)

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    settings = {**TINY, "output": tmp_path / "out", "model": "test_resnet", "data": tmp_path / "data", "workers": 2,
                "batch_size": 4, "max_steps": 4, "checkpoint_every": 0}  # fmt: skip
    began = time.monotonic()
    hook = register_optimizer_step_post_hook(told)
    try:
        code, said = recipe(settings)
    finally:
        hook.remove()
    assert len(workers) == 2
    assert code == 75
    assert said[-1] == "stopped by SIGTERM at step 2 of phase 'dense', which is saved: continue with --resume auto"
    assert not any("Traceback" in line for line in said)
    assert load_checkpoint(find_checkpoint("auto", tmp_path / "out-run" / "checkpoints")).step == 2
    assert time.monotonic() - began < 30
    gc.collect()  # the traceback of the interrupted run holds its loader
    assert not multiprocessing.active_children()


WORKERS = """
import multiprocessing, os, time, torch
from torch.utils.data import DataLoader
from arp_hub.training.preemption import outlast_sigterm
batches = iter(DataLoader(torch.arange(10_000), num_workers=2, worker_init_fn=outlast_sigterm))
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_loader_workers_end_with_a_killed_parent():
    parent = subprocess.Popen([sys.executable, "-c", WORKERS], stdout=subprocess.PIPE, text=True)
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 2
    terminate(*workers)
    time.sleep(1)
    assert all(Path(f"/proc/{worker}").exists() for worker in workers)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while any("Z" not in text.split(")")[1] for text in map(_stat, workers) if text):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _stat(process):
    try:
        return Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
