"""Kill runs with SIGKILL at chosen events in their folder. A program of its own, so that it can fork children.

An event is an operation on a file under the run's parent folder: opening, renaming, making, removing. A run has about a
hundred. A kill before the n-th event shows what a crash leaves behind at that moment.

    python killing.py FOLDER count            how many events an undisturbed run has; it ends in FOLDER/whole
    python killing.py FOLDER kill 3 17 90     for each: a run killed there, then resumed to its end in FOLDER/N
    python killing.py FOLDER random 20 0 ema  20 kills at random moments of longer runs, by seed 0 and a setting below
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from arp_hub.training import TrainConfig, run
from arp_hub.training.runlog import read_log

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
SETTINGS = {
    "model": "cifar_resnet20",
    "data": "digits",
    "keep_params": 0.5,
    "schemes": ("channel",),
    "start_from": "dense",
    "calibration_images": 0,
    "dense_epochs": 1,
    "epochs": 1,
    "finetune_epochs": 1,
    "max_steps": 3,
    "batch_size": 8,
    "checkpoint_every": 1,
    "optimizer": "adamw",
    "lr": 1e-3,
    "cpu": True,
    "tracker": "none",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "fit": {"start_from": "fit", "calibration_images": 8},
    "ema": {"ema_decay": 0.9},
    "processes": {},
    "lamb": {"optimizer": "lamb"},
}
"""Settings that random kills are tried in; ``processes`` has two."""


def forked(work: Callable[[], None]) -> int:
    """Run a call in a child; returns its exit code, as `os.waitstatus_to_exitcode` does."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            logging.exception("child failed: %s", error)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def watch(folder: Path, at: int | None, told: Path | None = None) -> None:
    """Count this process's events in a folder; kill the process before event number ``at``."""
    seen = [0]
    mark = str(folder)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in EVENTS and any(mark in str(argument) for argument in arguments[:2]):
            seen[0] += 1
            if seen[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            if told is not None:
                os.write(counter, b".")

    counter = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if told is not None else -1
    sys.addaudithook(hook)


def go(output: Path, at: int | None = None, told: Path | None = None) -> None:
    """One run, counted or killed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    watch(output.parent, at, told)
    finish(output)


def finish(output: Path, **changes: Any) -> None:
    """Resume a run and finish it."""
    run(TrainConfig(**{**SETTINGS, **changes}, output=str(output), resume="auto"))


def look(output: Path, whole: Path) -> dict[str, Any]:
    """Compare the folders of a killed and resumed run with those of an undisturbed one."""
    folder, checkpoints = output.parent, output.with_name("out-run") / "checkpoints"
    logs = [read_log(place.with_name("out-run") / "log.jsonl") for place in (output, whole)]
    return {
        "checkpoints": len(list(checkpoints.glob("[!.]*"))),
        "unfinished": [path.name for path in (*folder.iterdir(), *checkpoints.iterdir()) if path.suffix == ".tmp"],
        "same_weights": (output / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes(),
        "same_log": len({json.dumps([[entry["phase"], entry["step"], entry["loss"]] for entry in log]) for log in logs})
        == 1,
    }


def killed_at(folder: Path, event: int) -> dict[str, Any]:
    """Kill a run at an event, then resume it to its end."""
    output = folder / str(event) / "out"
    code = forked(lambda: go(output, event))
    left = sorted(path.name for path in output.iterdir()) if output.exists() else []
    resumed = forked(lambda: finish(output))
    whole = folder / "whole" / "out"
    return {"event": event, "killed": code == -signal.SIGKILL, "left": left, "resumed": resumed, **look(output, whole)}


def started(output: Path, processes: int, **changes: Any) -> list[int]:
    """Start a run in forked processes; their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            try:
                if processes > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
                finish(output, **changes)
                os._exit(0)
            except BaseException as error:
                logging.exception("child failed: %s", error)
                os._exit(1)
        children.append(child)
    return children


def ended(children: list[int]) -> list[int]:
    """Wait for processes; their exit codes."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def killed_at_random(folder: Path, kills: int, seed: int, variant: str) -> Iterator[dict[str, Any]]:
    """Kill runs at random moments, again and again, until ``kills`` have hit; each run resumes from its checkpoint."""
    changes = {"max_steps": 12, "checkpoint_every": 2, **VARIANTS[variant]}
    processes = 2 if variant == "processes" else 1
    dice, done = random.Random(seed), 0
    whole = folder / "undisturbed" / "out"
    began = time.monotonic()
    if any(ended(started(whole, processes, **changes))):
        sys.exit("the undisturbed run failed")
    longest = time.monotonic() - began
    for number in itertools.count():
        output, hits = folder / f"run{number}" / "out", 0
        while done < kills:
            children = started(output, processes, **changes)
            time.sleep(dice.uniform(0, longest))
            for child in children:
                os.kill(child, signal.SIGKILL)
            if not any(ended(children)):
                break
            done, hits = done + 1, hits + 1
        resumed = max(ended(started(output, processes, **changes)))
        yield {"run": number, "kills": hits, "resumed": resumed, **look(output, whole)}
        if done == kills:
            return


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, mode, *numbers = sys.argv[1:]
    home = Path(place)
    if mode == "count":
        if failed := forked(lambda: go(home / "whole" / "out", told=home / "events")):
            sys.exit(failed)
        print((home / "events").stat().st_size)
    elif mode == "kill":
        for number in numbers:
            print(json.dumps(killed_at(home, int(number))), flush=True)
    else:
        for found in killed_at_random(home, int(numbers[0]), int(numbers[1]), numbers[2]):
            print(json.dumps(found), flush=True)
