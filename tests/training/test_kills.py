"""SIGKILL at any moment loses nothing: runs killed at chosen file-system events, and at random moments."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import search_path
from killing import VARIANTS

KILLING = Path(__file__).parents[1] / "killing.py"
FILES = {"README.md", "config.json", "metrics.json", "model.safetensors"}


def killing(folder: Path, *words: object) -> list[Any]:
    """What `killing.py` reports, one JSON value a line."""
    command = [sys.executable, KILLING, folder, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search_path(KILLING.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: dict[str, Any]) -> None:
    assert found["resumed"] == 0, found
    assert found["same_weights"] and found["same_log"], found
    assert found["unfinished"] == [], found
    assert found["checkpoints"] == 2, found


def check_events(folder: Path, events: list[int]) -> None:
    for found in killing(folder, "kill", *events):
        check(found)
        assert found["killed"], found
        assert not found["left"] or set(found["left"]) >= FILES, found


def test_a_run_killed_at_an_event_resumes_to_the_same_weights(tmp_path):
    (events,) = killing(tmp_path, "count")
    assert events > 50
    dice = random.Random(events)
    early, middle, late = (
        dice.randint(*part) for part in ((2, events // 2), (events // 2, events - 12), (events - 12, events))
    )
    check_events(tmp_path, [early, middle, late])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_killed_at_every_single_event_resumes_to_the_same_weights(tmp_path):
    (events,) = killing(tmp_path, "count")
    check_events(tmp_path, list(range(1, events + 1)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_kills_at_random_moments(tmp_path, variant):
    found = killing(tmp_path, "random", 20, 0, variant)
    assert sum(run["kills"] for run in found) == 20
    for run in found:
        check(run)
