"""SIGKILL loses nothing: runs are killed at chosen file-system events and at random moments."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hub_client import Client
from killing import VARIANTS

KILLING = Path(__file__).parents[1] / "killing.py"
FILES = {"README.md", "config.json", "metrics.json", "model.safetensors"}


def killing(client: Client, folder: Path, *words: object) -> list[Any]:
    """What `killing.py` reports, one JSON value a line."""
    done = client.program(KILLING, folder, *words)
    assert done.code == 0, done.err[-3000:]
    return [json.loads(line) for line in done.out.splitlines()]


def check(found: dict[str, Any]) -> None:
    assert found["resumed"] == 0, found
    assert found["same_weights"] and found["same_log"], found
    assert found["unfinished"] == [], found
    assert found["checkpoints"] == 2, found


def check_events(client: Client, folder: Path, events: list[int]) -> None:
    for found in killing(client, folder, "kill", *events):
        check(found)
        assert found["killed"], found
        assert not found["left"] or set(found["left"]) >= FILES, found


def test_a_run_killed_at_an_event_resumes_to_the_same_weights(client, tmp_path):
    (events,) = killing(client, tmp_path, "count")
    assert events > 50
    dice = random.Random(events)
    early, middle, late = (
        dice.randint(*part) for part in ((2, events // 2), (events // 2, events - 12), (events - 12, events))
    )
    check_events(client, tmp_path, [early, middle, late])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_killed_at_every_single_event_resumes_to_the_same_weights(client, tmp_path):
    (events,) = killing(client, tmp_path, "count")
    check_events(client, tmp_path, list(range(1, events + 1)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_kills_at_random_moments(client, tmp_path, variant):
    found = killing(client, tmp_path, "random", 20, 0, variant)
    assert sum(run["kills"] for run in found) == 20
    for run in found:
        check(run)
