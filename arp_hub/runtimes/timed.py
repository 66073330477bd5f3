"""Forward passes to time, in the runtime and at the precision of a workload."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..timing import Workload, forward_call
from .capture import Captured
from .formats import TIMED
from .runtime import Run

Call = Callable[[], Any]
"""Runs one forward pass."""


def check_installed(workload: Workload) -> None:
    """Check that the packages of the workload's runtime are installed.

    Raises:
        ArpHubError: With the command that installs them.
    """
    if not workload.in_torch:
        TIMED[workload.runtime].require(workload.precision == "int8")


def runtime_versions(workload: Workload) -> dict[str, str]:
    """Versions of the packages of the workload's runtime; empty for PyTorch."""
    return {} if workload.in_torch else TIMED[workload.runtime].versions(workload.precision == "int8")


def model_call(model: nn.Module, images: Tensor, workload: Workload, compiled: bool = False) -> Call:
    """A function that runs one forward pass of a copy of the model.

    Args:
        model: The model.
        images: The images of a forward pass.
        workload: Where it runs, and at which precision.
        compiled: Whether PyTorch compiles the model.

    Raises:
        ArpHubError: If the model cannot be exported to the runtime.
    """
    if workload.in_torch:
        return forward_call(model, images, workload, compiled)
    captured = Captured.of(model, tuple(images.shape[1:]), len(images))
    return partial(_loaded(captured, images, workload)[0], images)


def layer_calls(forms: Mapping[str, nn.Module], x: Tensor, workload: Workload) -> dict[str, Call]:
    """Functions that run single layers, each by itself.

    Other runtimes than PyTorch get all layers in one file, which is then split: each export takes seconds.

    Args:
        forms: Layers by name, which all take the same input.
        x: Their input.
        workload: Where they run, and at which precision.
    """
    if workload.in_torch:
        return {name: forward_call(layer, x, workload) for name, layer in forms.items()}
    together = _SideBySide(forms.values()).eval().requires_grad_(False)
    captured = Captured(together, len(x), tuple(x.shape[1:]), outputs=len(forms))
    return {name: partial(run, x) for name, run in zip(forms, _loaded(captured, x, workload), strict=True)}


class _SideBySide(nn.Module):
    """Layers that each get the same input."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


@torch.no_grad()
def _loaded(captured: Captured, images: Tensor, workload: Workload) -> list[Run]:
    """The graph in the runtime of the workload: one function for each of its outputs."""
    runtime = TIMED[workload.runtime]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps loaded files
        path = Path(folder) / runtime.file
        if workload.precision == "int8":
            runtime.write_int8(captured, path, [images])
        else:
            runtime.write(captured, path)
        if captured.outputs == 1:
            return [runtime.load(path)]
        return [runtime.load(path, output) for output in range(captured.outputs)]
