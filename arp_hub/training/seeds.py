"""Seeds keyed by their purpose: the same numbers for any number of processes."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def keyed_seed(*key: int | str) -> int:
    """A seed of 63 bits that depends on every part of ``key``, the same on every machine."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def keyed_generator(*key: int | str) -> torch.Generator:
    """A generator on the CPU, seeded by `keyed_seed`."""
    return torch.Generator().manual_seed(keyed_seed(*key))


def seed_everything(*key: int | str) -> None:
    """Seed the global generators of Python, NumPy and torch (on all devices) by `keyed_seed`."""
    seed = keyed_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_cpu(seed: int) -> None:
    """Seed the global CPU generators, which image transforms use."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global CPU generators inside the block, then restore them."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    seed_cpu(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
