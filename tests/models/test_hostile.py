"""Hostile folders are refused with one clear error, quickly and in little memory."""

from __future__ import annotations

import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any

import hostile
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arp_hub import ArpHubError
from arp_hub.hub.load import read_weights
from arp_hub.models._untrusted import check_args, check_cfg, read_config, read_header

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcomes(client, tmp_path_factory) -> dict[str, Any]:
    """Every hostile folder, loaded in one process."""
    done = client.program(Path(hostile.__file__), tmp_path_factory.mktemp("hostile"))
    assert done.code == 0, done.err[-2000:]
    return {found["case"]: found for found in map(json.loads, done.out.splitlines())}


def test_a_good_folder_loads(outcomes):
    assert outcomes["a good folder"]["error"] is None


@pytest.mark.parametrize("case", [*hostile.CONFIGS, *hostile.FILES])
def test_a_hostile_folder_is_refused_at_once(outcomes, case):
    found = outcomes[case]
    assert found["error"] == "ArpHubError", found
    assert 10 < len(found["message"]) < 1500
    assert found["seconds"] < 1, found
    assert found["memory"] < 150, found
    assert not found["opened"]


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".tar", ".safetensors"])
def test_a_pickle_is_refused_as_a_checkpoint(tmp_path, suffix):
    path, opened = tmp_path / f"weights{suffix}", tmp_path / "opened"
    for content in ({"state_dict": {"x": Bomb(opened)}}, Bomb(opened)):
        torch.save(content, path)
        with pytest.raises(ArpHubError, match=r"more than tensors|not a whole"):
            read_weights(path)
        assert not opened.exists()


def test_no_code_reads_a_pickle():
    """Nothing in the library or the recipes imports a pickle reader or turns the guard off."""
    forbidden = re.compile(
        r"\b(import|from) +(c?pickle|dill|joblib|cloudpickle|shelve|marshal)\b|pickle\.loads?\(|weights_only *= *False"
        r"|allow_pickle *= *True|trust_remote_code *= *True|yaml\.(unsafe_|full_)?load\(|(?<!\.)\beval\(|\bexec\("
        r"|pd\.read_pickle|torch\.hub\.load|load_state\(|save_state\("
    )
    files = [path for part in ("arp_hub", "recipes") for path in (ROOT / part).rglob("*.py")]
    assert len(files) > 40
    lines = [(path.name, line.strip()) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(name, line) for name, line in lines if forbidden.search(line)] == []
    loads = [(name, line) for name, line in lines if "torch.load(" in line]
    assert loads
    assert [found for found in loads if "weights_only=True" not in found[1]] == []


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
NAMES = [
    "num_classes",
    "input_size",
    "mean",
    "crop_pct",
    "crop_mode",
    "classifier",
    "label_names",
    "layers",
    "cache_dir",
    "depth",
]


@pytest.mark.parametrize(
    ("entry", "good", "bad"),
    [
        ("crop_pct", [0, 0.875, 1.15, None], [0.001, -1, 3, "1", True, math.nan, math.inf]),
        ("test_crop_pct", [0.95], [1e-4]),
        ("interpolation", ["bicubic", "random", ""], ["foo", 3, ["bicubic"]]),
        ("crop_mode", ["center", "squash", "border", ""], ["all", 1, {}]),
        ("mean", [[0.5], [0.5, 0.5, 0.5]], [[0.5, 0.5], [], 0.5, [0.5, 0.5, math.nan]]),
        ("std", [[0.2], [0.2, 0.2, 0.2]], [[0.2, 0.2], [0.0, 0.0, 0.0], [0.2, 0.2, -0.2]]),
    ],
)
def test_entries_of_the_transform_are_checked(entry, good, bad):
    for value in good:
        check_cfg({"input_size": [3, 32, 32], entry: value}, "here")
    for value in bad:
        with pytest.raises(ArpHubError, match=f"the config of 'here': {entry} must be "):
            check_cfg({"input_size": [3, 32, 32], entry: value}, "here")


def test_published_configs_pass():
    for name in timm.list_pretrained():
        check_cfg(timm.get_pretrained_cfg(name).to_dict(), name)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(NAMES), trees) | trees)
def test_any_config_is_read_or_refused(tmp_path_factory, tree):
    file = tmp_path_factory.mktemp("config") / "config.json"
    file.write_text(json.dumps({"architecture": "arp_lowrank", "model_args": tree, "pretrained_cfg": tree}))
    with contextlib.suppress(ArpHubError):
        found = read_config(file)
        check_cfg(found["pretrained_cfg"], "here")
        args = check_args(found["model_args"], "here")
        assert not args.keys() & {"cache_dir"}


@settings(max_examples=300)
@given(st.binary(max_size=200) | st.binary(max_size=100).map(lambda data: len(data).to_bytes(8, "little") + data))
def test_any_file_of_weights_is_read_or_refused(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    file.write_bytes(data)
    with contextlib.suppress(ArpHubError):
        assert sum(map(len, read_header(file).values())) <= len(data)
