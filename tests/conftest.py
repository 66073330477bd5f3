"""Fixtures and settings that several test files share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from hub_client import Client
from hub_server import HubServer
from hypothesis import settings
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for child processes, of which several run side by side
os.environ["ARP_HUB_PICTURES"] = "0"  # pictures take half of the time of a save: tests that look at them ask for them
LONGEST = (
    "test_training.py",
    "test_backbones.py",
    "test_recipes.py",
    "test_golden.py",
    "test_latency.py",
    "test_cli.py",
    "test_publish.py",
    "test_decompose.py",
    "test_save.py",
    "test_docs.py",
    "test_make_plan.py",
    "test_lowrank_entrypoint.py",
    "test_kills.py",
    "test_hostile.py",
    "test_readme.py",
    "test_data.py",
    "test_strangers.py",
    "test_publish_failures.py",
)
"""The slowest files, in the order in which they start, so that all processes end at about the same time."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Run a single file in this process, where `print` and a debugger work; several files side by side."""
    return 0 if len(config.args) == 1 and ".py" in config.args[0] else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest files first; the order within a file stays."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Exempt what is imported from garbage collection, which every run triggers and which walks all objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the pictures of cards and reports, in child processes too."""
    monkeypatch.setenv("ARP_HUB_PICTURES", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with CIFAR-10 and trained checkpoints; tests that need it are skipped where it is missing."""
    folder = Path(os.environ.get("ARP_HUB_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir() or not (folder / "weights").is_dir():
        pytest.skip(f"no data and weights in '{folder}': set ARP_HUB_SHARED")
    return folder


@pytest.fixture(scope="session")
def cifar_test(shared: Path) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The first ``count`` CIFAR-10 test images, normalised as the shared checkpoints expect, and their labels."""
    return lambda count: _cifar(shared, "test", count)


@pytest.fixture(scope="session")
def cifar_train(shared: Path) -> Callable[[int], Tensor]:
    """The first ``count`` CIFAR-10 training images, normalised in the same way."""
    return lambda count: _cifar(shared, "train", count)[0]


def _cifar(shared: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    files = str(shared / f"data/cifar10/{split}-*.parquet")
    rows = load_dataset("parquet", data_files=files, split=f"train[:{count}]")
    pixels = torch.stack([pil_to_tensor(image.convert("RGB")) for image in rows["img"]])
    return (pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1), torch.tensor(rows["label"])


@pytest.fixture(scope="session")
def hub() -> Iterator[HubServer]:
    """A Hub on loopback. Tests start with repositories of their own."""
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def client(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Processes with the real client, which know that Hub alone. One start, which takes seconds, serves all files."""
    started = Client(tmp_path_factory.mktemp("home"), hub.endpoint)
    yield started
    started.close()
