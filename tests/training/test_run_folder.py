"""A run's folder: two runs at once, files of others, disks that refuse, unfinished files."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from several_processes import by_processes
from tiny_run import STATE, config

from arp_hub import save_pretrained
from arp_hub.errors import ArpHubError
from arp_hub.hub.load import load_model
from arp_hub.models.label_names import label_names
from arp_hub.training import run
from arp_hub.training.inputs import load_data_and_model
from arp_hub.training.run_folder import RunFolder
from arp_hub.training.runlog import read_log

pytestmark = pytest.mark.usefixtures("fast_writes")


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


def test_a_checkpoint_of_another_output_brings_its_dense_model(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    checkpoint, dense = (tmp_path / "out-run" / name for name in ("checkpoints/compress-00000000", "dense.safetensors"))
    again = {"dense_lr": 1e-3, "lr": 3e38, "resume": str(checkpoint)}
    with pytest.raises(ArpHubError, match="NaN or infinite at step 1 of phase 'compress'"):
        run(config(tmp_path / "new", **again))
    assert (tmp_path / "new/out-run/dense.safetensors").read_bytes() == dense.read_bytes()
    dense.unlink()
    with pytest.raises(ArpHubError, match="compress-00000000' needs the dense model of its run, and '.*' is missing"):
        run(config(tmp_path / "other", **again))


def test_a_run_from_the_checkpoint_of_another_output_takes_its_history_along(tmp_path):
    settings = config(tmp_path, finetune_epochs=1)
    history = run(settings)["history"]
    checkpoint = settings.run_folder / "checkpoints" / "finetune-00000001"
    resumed = run(config(tmp_path / "new", finetune_epochs=1, resume=str(checkpoint)))["history"]
    assert resumed == history and len(history) == 1


def test_a_run_whose_classes_have_got_other_numbers_does_not_resume(tmp_path):
    for number in range(24):
        name = "ab"[number % 2]
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (10 * number, 0, 0)).save(tmp_path / "data" / name / f"{number}.png")
    changes = {"data": str(tmp_path / "data"), "model_kwargs": {"num_classes": 2}}
    run(config(tmp_path, **changes))
    (tmp_path / "data" / "a").rename(tmp_path / "data" / "c")
    with pytest.raises(ArpHubError, match="cannot resume from .* with other settings .*digest of classes and labels"):
        run(config(tmp_path, **changes, resume="auto"))


def test_a_model_that_is_trained_anew_gets_the_classes_of_the_data(tmp_path):
    """Its own classes may have other numbers, which count where it is not trained."""
    model = timm.create_model("test_vit", num_classes=10)
    save_pretrained(model, tmp_path / "saved", label_names=[str(number) for number in reversed(range(10))])
    changes = {"model": f"local-dir:{tmp_path / 'saved'}"}
    with pytest.raises(ArpHubError, match="model '.*' does not fit the labels of data 'digits': .* in another order"):
        run(config(tmp_path, **changes, dense_epochs=0))
    assert not (tmp_path / "out-run").exists()
    run(config(tmp_path, **changes))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == list("0123456789")


def test_classes_without_names_replace_those_of_the_classifier_before(tmp_path):
    model = load_model("cifar_resnet20", pretrained=False, pretrained_cfg_overlay={"input_size": (3, 8, 8)})
    save_pretrained(model, tmp_path / "saved", label_names=[f"bird {number}" for number in range(10)])
    rows = [Image.new("L", (8, 8), 25 * number) for number in range(10)]
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    for name in ("train", "test"):
        table = datasets.Dataset.from_dict({"image": rows, "label": list(range(10))}, features=features)
        table.to_parquet(tmp_path / "data" / f"{name}.parquet")
    own = {"model": f"local-dir:{tmp_path / 'saved'}", "data": str(tmp_path / "data"), "label_key": "label"}
    _, trained = load_data_and_model(config(tmp_path, **own, dense_epochs=1))
    assert label_names(trained) == ()
    save_pretrained(trained, tmp_path / "again")
    assert "bird" not in (tmp_path / "again" / "config.json").read_text()


@pytest.mark.parametrize(("steps", "kept"), [(5, True), (6, False)])
def test_an_unfinished_refinement_stays_for_the_same_settings_alone(steps, kept, tmp_path):
    settings = config(tmp_path, refine_steps=5, start_from="fit", calibration_images=8, dense_epochs=0)
    state = settings.run_folder / "refinement.safetensors"
    settings.run_folder.mkdir(parents=True)
    settings.save(settings.run_folder / "config.yaml")
    state.write_bytes(b"unfinished")
    again = dataclasses.replace(settings, refine_steps=steps, resume="auto", log_every=1)
    RunFolder(again, Accelerator(cpu=True)).begin(again, None)
    assert state.exists() is kept


def test_a_checkpoint_of_another_output_does_not_replace_an_unfinished_run(stopped, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(stopped, tmp_path / name)
    mine = tmp_path / "two" / "out-run"
    (mine / "dense.safetensors").write_bytes(b"of this run")
    (mine / "log.jsonl").write_text('{"phase": "dense", "step": 1, "violation": 9.0}\n')
    before = {path.relative_to(mine) for path in mine.rglob("*")}
    again = {"dense_lr": 1e-3, "lr": 3e38, "resume": str(tmp_path / "one/out-run/checkpoints/compress-00000000")}
    with pytest.raises(ArpHubError, match="two/out-run' holds an unfinished run, and resume='.*one/.*--overwrite"):
        run(config(tmp_path / "two", **again))
    assert {path.relative_to(mine) for path in mine.rglob("*")} == before
    with pytest.raises(ArpHubError, match="NaN or infinite at step 1 of phase 'compress'"):
        run(config(tmp_path / "two", **again, overwrite=True))
    dense = (tmp_path / "one/out-run/dense.safetensors").read_bytes()
    assert (mine / "dense.safetensors").read_bytes() == dense and not list((mine / "checkpoints").glob("dense-*"))
    assert "9.0" not in (mine / "log.jsonl").read_text()


def test_a_network_with_standardised_weights_resumes(tmp_path):
    """The fit makes plain convolutions of weight-standardised ones, before the penalty."""
    changes = {"model": "test_nfnet", "start_from": "fit", "calibration_images": 8, "ramp": 0.0, "lr": 1e-4}
    settings = config(tmp_path, **changes)
    run(settings)
    whole = load_file(tmp_path / "out/model.safetensors")
    checkpoint = settings.run_folder / "checkpoints" / "compress-00000001"
    run(config(tmp_path, **changes, resume=str(checkpoint), overwrite=True))
    again = load_file(tmp_path / "out/model.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_checkpoint_of_other_classes_gets_a_new_classifier(tmp_path):
    torch.manual_seed(7)
    model = timm.create_model("test_vit", num_classes=3)
    save_file(model.state_dict(), tmp_path / "three.safetensors")
    given = {"checkpoint": str(tmp_path / "three.safetensors"), "model_kwargs": {"num_classes": 3}}
    with pytest.raises(ArpHubError, match="data 'digits' has 10 classes, .* has 3: set dense_epochs to train a new"):
        run(config(tmp_path, **given, dense_epochs=0))
    settings = config(tmp_path, **given, dense_lr=1e-9)
    run(settings)
    dense = load_file(settings.run_folder / "dense.safetensors")
    assert dense["head.weight"].shape[0] == 10
    same = {name for name, tensor in model.state_dict().items() if name in dense and tensor.shape == dense[name].shape}
    assert same == dense.keys() - {"head.weight", "head.bias"}
    assert all((dense[name] - model.state_dict()[name]).abs().max() < 1e-4 for name in same)


def test_a_finished_run_that_is_resumed_keeps_what_the_owner_added(tmp_path, monkeypatch):
    run(config(tmp_path))
    card, picture = tmp_path / "out/README.md", tmp_path / "out/mine.png"
    card.write_text(card.read_text().replace("<!-- /owner -->", "Made for cats.\n<!-- /owner -->"))
    picture.write_bytes(b"a cat")
    check = RunFolder.check

    def others_write(self, start):
        check(self, start)
        (tmp_path / "out/notes.txt").write_text("mine")

    monkeypatch.setattr(RunFolder, "check", others_write)  # while the run is under way
    run(config(tmp_path, resume="auto"))
    assert "Made for cats." in card.read_text() and picture.exists()
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_a_checkpoint_that_was_moved_inside_its_run_is_not_deleted(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "out-run"
    (folder / "checkpoints").rename(folder / "old")
    with pytest.raises(ArpHubError, match="--resume"):
        run(config(tmp_path, dense_lr=1e-3, lr=3e38, resume=str(folder / "old" / "compress-00000000")))
    assert (folder / "dense.safetensors").exists() and (folder / "old" / "compress-00000000").exists()


def resumed_on_a_machine(tmp_path: Path, port: int, rank: int, world: int, folder: Path) -> str:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with pytest.raises(ArpHubError) as raised:
        run(config(tmp_path / f"machine{rank}", resume="auto"))
    return str(raised.value)


def test_machines_without_a_shared_disk_do_not_resume(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "machine0")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for message in by_processes(functools.partial(resumed_on_a_machine, tmp_path, port), 2, tmp_path / "answers"):
        assert "process 0 finds compress-00000000" in message and "process 1 finds no checkpoint" in message
        assert message.endswith("put the output on a disk that all machines share")


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
