"""The graph of a model, captured once by ``torch.export``: every file format is written from it."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from .._utils.torch_utils import ambient_modes_off
from ..errors import ArpHubError
from .grouped import with_convolutions

_ATTENTION = ("softmax", "scaled_dot_product_attention")
_LOGGERS = (
    "torch.onnx",
    "onnxscript",
    "onnx_ir",
    "torch.export",
    "torch.fx",
    "nncf",
    "torch.utils.cpp_extension",
    "root",
)
"""Loggers that report each step of an export as a warning."""


@dataclass(frozen=True)
class Captured:
    """A model and its graph.

    Attributes:
        model: A copy in float32, on the CPU, in evaluation mode.
        batch_size: Images of a forward pass, where the batch is not dynamic.
        input_size: ``(channels, height, width)`` of an image, or the shape of a single layer's input without the batch.
        dynamic_batch: Whether the graph takes any number of images.
        classes: Number of outputs for an image.
        outputs: Number of tensors that the graph returns.
    """

    model: nn.Module
    batch_size: int
    input_size: tuple[int, ...]
    dynamic_batch: bool = False
    classes: int = 0
    outputs: int = 1

    @classmethod
    def of(
        cls, model: nn.Module, input_size: tuple[int, ...], batch_size: int = 1, dynamic_batch: bool = False
    ) -> Captured:
        """Copy a model for its export.

        Raises:
            ArpHubError: If its output is not one tensor ``(N, classes)``.
        """
        with ambient_modes_off():
            plain = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
        found = cls(plain, batch_size, input_size, dynamic_batch)
        try:
            with torch.no_grad():
                output = plain(found.example())
        except (RuntimeError, ValueError, AssertionError) as error:  # models refuse sizes in many ways
            reason = str(error).partition("\n")[0]
            raise ArpHubError(f"the model cannot run on an input of size {input_size}: {reason}") from error
        if not isinstance(output, Tensor) or output.dim() != 2:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ArpHubError(f"export takes a model with one output (N, classes), this one gives {shape}")
        return replace(found, classes=output.shape[1])

    def example(self) -> Tensor:
        """Random images of the right shape."""
        # with a batch of one, torch.export would make the batch size a constant
        count = max(2, self.batch_size) if self.dynamic_batch else self.batch_size
        return torch.randn(count, *self.input_size, generator=torch.Generator().manual_seed(0))

    @cached_property
    def program(self) -> ExportedProgram:
        """The graph.

        Raises:
            ArpHubError: If ``torch.export`` cannot follow the model.
        """
        shapes = ({0: Dim("batch")},) if self.dynamic_batch else None
        try:
            with quiet(), ambient_modes_off(), torch.no_grad():
                program = torch.export.export(with_convolutions(self.model), (self.example(),), dynamic_shapes=shapes)
                return without_paths(program)
        except Exception as error:  # torch.export raises many kinds of errors
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            way = "leave out the dynamic batch" if self.dynamic_batch else "this architecture cannot be exported"
            raise ArpHubError(f"torch.export cannot follow the model: {reason:.300} ({way})") from error

    @cached_property
    def has_attention(self) -> bool:
        """Whether the graph holds attention."""
        names = [str(node.target) for node in self.program.graph.nodes if node.op == "call_function"]
        return any(kind in name for name in names for kind in _ATTENTION)


def without_paths(program: ExportedProgram) -> ExportedProgram:
    """Remove the stack traces from a graph: they name folders of this machine, and files would hold them."""
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings that exporters and quantisers give about their own steps."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
