"""What a runtime can do: say what it needs, write a file, quantise it with its own tools, and run it."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArpHubError
from .capture import Captured

Run = Callable[[Tensor], Tensor]
"""Runs one batch of images through a loaded file."""
Batches = Sequence[Tensor]
"""Images in batches that a graph takes."""
INPUT, OUTPUT = "images", "logits"
"""Names of input and output in every format that has names."""


class Runtime(ABC):
    """A file format and the runtime that runs it.

    Attributes:
        name: Name of the format.
        title: Name of the runtime, for messages.
        file: Name of the file that is written; other files may lie beside it.
        packages: What it needs to be installed, as names of modules.
        int8_packages: What int8 needs besides.
        extra: The extra of arp-hub that installs them.
    """

    name: str
    title: str
    file: str
    packages: tuple[str, ...] = ()
    int8_packages: tuple[str, ...] = ()
    extra: str = "export"

    def require(self, int8: bool) -> None:
        """Check that the packages are installed.

        Raises:
            ArpHubError: With the command that installs them.
        """
        needed = self.packages + (self.int8_packages if int8 else ())
        if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
            raise ArpHubError(
                f"{self.title}{' in int8' if int8 else ''} needs {', '.join(missing)}: "
                f'pip install "arp-hub[{self.extra}]"'
            )

    def versions(self, int8: bool) -> dict[str, str]:
        """Versions of its packages."""
        found = {}
        for name in self.packages + (self.int8_packages if int8 else ()):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
        return found

    @abstractmethod
    def write(self, captured: Captured, path: Path, opset: int | None = None) -> None:
        """Write a model in float32.

        Args:
            captured: The model.
            path: The file.
            opset: Version of the operators, for ONNX.
        """

    @abstractmethod
    def write_int8(
        self, captured: Captured, path: Path, images: Batches, opset: int | None = None, in_float: Collection[str] = ()
    ) -> None:
        """Write a model with weights and activations in int8, by the quantiser of the runtime.

        Args:
            captured: The model.
            path: The file.
            images: Calibration images in batches that the graph takes.
            opset: Version of the operators, for ONNX.
            in_float: Names of layers that stay in float32.
        """

    @abstractmethod
    def load(self, path: Path, output: int | None = None) -> Run:
        """Load a file on the CPU, with as many threads as torch uses.

        Args:
            path: The file.
            output: Index of the output to compute alone, by the part of the graph that it needs; None for all of it.
        """


def run_all(run: Run, images: Tensor, batch_size: int) -> Tensor:
    """The outputs on all images, in batches of one size; the last batch is filled up with copies of its last image."""
    outputs = []
    for batch in images.split(batch_size):
        missing = batch_size - len(batch)
        full = torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])]) if missing else batch
        outputs.append(run(full.contiguous())[: len(batch)])
    return torch.cat(outputs)


def int8_saturates() -> bool:
    """Whether int8 kernels may add pairs of products in 16 bits here, where they overflow: on x86 CPUs without VNNI.

    Seven bits for weights or activations avoid that. The quantisers have an option for it: ``reduce_range`` in ONNX
    Runtime and torchao, ``overflow_fix`` in NNCF.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: capability == "AVX512")  # missing in torch 2.4
    return capability.startswith("AVX") and not vnni()
