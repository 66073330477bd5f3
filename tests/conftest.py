"""What several test files need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with CIFAR-10 and trained checkpoints; tests that need it are skipped where it is missing."""
    folder = Path(os.environ.get("ARP_HUB_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir() or not (folder / "weights").is_dir():
        pytest.skip(f"no data and weights in '{folder}': set ARP_HUB_SHARED")
    return folder
