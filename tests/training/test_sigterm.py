"""SIGTERM at every place of a run, alone and to the whole process group."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from tiny_run import TINY
from torch.optim.optimizer import register_optimizer_step_post_hook

from arp_hub.training import TrainConfig, main, run
from arp_hub.training.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
)

pytestmark = pytest.mark.usefixtures("fast_writes")


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
next(batches), next(batches)  # one of each worker, which has started then
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
