"""Checkpoints on disk: damaged ones, ones without checksums, entries that are missing or of another kind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_run import STATE, SUMS, TENSORS, config
from torch.optim.optimizer import register_optimizer_step_pre_hook

from arp_hub.errors import ArpHubError
from arp_hub.training import run
from arp_hub.training.checkpoint import (
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    save_checkpoint,
)

pytestmark = pytest.mark.usefixtures("fast_writes")


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


def altered(stopped, folder, name, change):
    """A checkpoint without checksums in a copy of a stopped run, whose state is changed."""
    shutil.copytree(stopped, folder, dirs_exist_ok=True)
    path = folder / "out-run" / "checkpoints" / name
    (path / SUMS).unlink()
    found = json.loads((path / STATE).read_text())
    change(found)
    (path / STATE).write_text(json.dumps(found))
    return path


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
    path = altered(stopped, tmp_path, "compress-00000000", LACKING[case])
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
    path = altered(stopped, tmp_path, "dense-00000001", MOMENTS[case])
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
