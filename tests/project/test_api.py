"""The public names and arguments. A change here is a change for users and belongs in the changelog."""

from __future__ import annotations

import inspect
import re
from importlib.metadata import version
from pathlib import Path

import pytest

import arp_hub
import arp_hub.training

ROOT = Path(__file__).parents[2]
SURFACE = {
    "AdaptiveRankPenalty": "model plan total_steps",
    "ArpHubError": "",
    "LayerPlan": "scheme rank groups",
    "RankPlan": "layers dense",
    "Refinement": "images held_out steps seconds before after",
    "Workload": "batch_size dtype channels_last",
    "benchmark": "model workload dense input_size compiled seconds",
    "compress": "model keep_params keep_macs keep_latency schemes exclude calibration effort refine minutes steps seed",
    "decompose": "model plan calibration factors",
    "download": "repo_id revision",
    "export": "model output format int8 images test_images test_labels opset dynamic_batch overwrite",
    "factor_names": "model pattern",
    "make_plan": "model keep_params keep_macs keep_latency workload schemes calibration",
    "models": "",
    "push_to_hub": "repo_id tag",
    "refine": "model dense images minutes steps batch_size seed state",
    "save_pretrained": "model folder metrics label_names overwrite",
    "to_dense": "model",
}
"""Every public name, and the arguments that users pass by name."""
TRAINING = [
    "ImageData",
    "Scores",
    "Split",
    "StreamedSplit",
    "TrainConfig",
    "calibration_images",
    "evaluate",
    "load_data",
    "main",
    "note_crop",
    "refinement_images",
    "run",
]


def test_the_public_names_are_these():
    assert sorted(SURFACE) == arp_hub.__all__ == sorted(arp_hub.__all__, key=str)
    assert arp_hub.training.__all__ == TRAINING
    assert [name for name in arp_hub.__all__ if not hasattr(arp_hub, name)] == []


@pytest.mark.parametrize("name", [name for name, arguments in SURFACE.items() if arguments])
def test_their_arguments_stay(name):
    assert set(SURFACE[name].split()) <= inspect.signature(getattr(arp_hub, name)).parameters.keys()


@pytest.mark.parametrize("name", [name for name in arp_hub.__all__ if name != "models"])
def test_they_are_documented(name):
    thing = getattr(arp_hub, name)
    assert inspect.getdoc(thing)
    if inspect.isfunction(thing):
        missing = [word for word in inspect.signature(thing).parameters if word not in inspect.getdoc(thing)]
        assert missing == [], f"{name} does not explain {missing}"


def test_version_and_changelog_agree():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.M)
    assert version("arp-hub") == arp_hub.__version__
    assert "## [Unreleased]" in changelog or arp_hub.__version__ in released
    assert not released or released[0] <= arp_hub.__version__
