"""Evaluation mode for a while; freed memory that goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def give_back_memory() -> None:
    """Return memory to the system that the C library keeps after it was freed, between pieces that are in use.

    Between two phases of work with large tensors of different lifetimes that is more than what is in use. Where the C
    library has no such call (glibc has ``malloc_trim``), nothing is done.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
