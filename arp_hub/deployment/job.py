"""Write a model in one format and precision, check the file, and time it beside the dense model."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..decomposition import to_dense
from ..errors import ArpHubError
from ..layers.model import low_rank_layers
from ..runtimes.capture import Captured
from ..runtimes.runtime import Batches, Run, Runtime
from .balance import balance_factors
from .latency import FileLatency, time_files
from .parity import TOLERANCE, Check, Parity


@dataclass(frozen=True)
class Exported:
    """A file and how it compares with PyTorch.

    Attributes:
        file: The file.
        size: Its bytes, with those of a file of weights beside it.
        parity: Its outputs beside those of the model in PyTorch.
        run: Runs it.
    """

    file: Path
    size: int
    parity: Parity
    run: Run

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"size_bytes": self.size, "parity": self.parity.to_dict()}


@dataclass(frozen=True)
class Job:
    """How files are written.

    Attributes:
        runtime: Runtime of the format.
        calibration: Calibration images in batches for int8; None for float32.
        opset: Version of the ONNX operators; None for the exporter's own.
        balance: Whether factors are balanced, on a copy, before they are quantised.
    """

    runtime: Runtime
    calibration: Batches | None = None
    opset: int | None = None
    balance: bool = True

    @property
    def precision(self) -> str:
        """``int8`` or ``float32``."""
        return "float32" if self.calibration is None else "int8"

    def write(self, captured: Captured, folder: Path, check: Check) -> Exported:
        """Write a model to a folder, load the file and check it.

        Raises:
            ArpHubError: If the model cannot be written, or a float32 file differs from PyTorch.
        """
        path = folder / self.runtime.file
        if self.calibration is None:
            self.runtime.write(captured, path, self.opset)
        else:
            model = captured.model
            if self.balance and low_rank_layers(model):
                model = balance_factors(copy.deepcopy(model), self.calibration)
            self.runtime.write_int8(replace(captured, model=model), path, self.calibration, self.opset)
        size = sum(part.stat().st_size for part in folder.glob(f"{path.stem}.*"))
        run = self.runtime.load(path)
        parity = check.parity(run)
        if self.calibration is None and not parity.relative_error <= TOLERANCE:
            raise ArpHubError(
                f"outputs in {self.runtime.title} differ from PyTorch by {parity.relative_error:.2g} of the largest "
                f"output, at most {TOLERANCE:g} is accepted: try another format or another opset"
            )
        return Exported(path, size, parity, run)

    def compare(
        self, exported: Exported, captured: Captured, check: Check, seconds: float
    ) -> tuple[FileLatency | None, Exported | None]:
        """Time a file; if the model has low-rank layers, in turns with its dense form, written in the same way.

        Returns:
            The latency, None if ``seconds`` is 0; and the dense file, which is deleted, None if the model is dense.
        """
        count = captured.batch_size
        images = check.images[torch.arange(count) % len(check.images)].contiguous()
        runs, dense = {"model": exported.run}, None
        with tempfile.TemporaryDirectory() as folder:
            if low_rank_layers(captured.model):
                merged = replace(captured, model=to_dense(copy.deepcopy(captured.model)))
                dense = self.write(merged, Path(folder), check)
                runs["dense"] = dense.run
            return time_files(runs, images, seconds) if seconds else None, dense
