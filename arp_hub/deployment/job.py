"""Write a model in one format and precision, check the file, and time it beside the dense model."""

from __future__ import annotations

import copy
import logging
import math
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
from .int8_errors import int8_divergences
from .latency import FileLatency, time_files
from .parity import TOLERANCE, Check, Parity

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """A file and how it compares with PyTorch.

    Attributes:
        file: The file.
        size: Its bytes, with those of a file of weights beside it.
        parity: Its outputs beside those of the model in PyTorch.
        run: Runs it.
        in_float: Names of low-rank layers that int8 leaves in float32.
    """

    file: Path
    size: int
    parity: Parity
    run: Run
    in_float: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        kept = {"layers_in_float": list(self.in_float)} if self.in_float else {}
        return {"size_bytes": self.size, "parity": self.parity.to_dict(), **kept}


@dataclass(frozen=True)
class Job:
    """How files are written.

    Attributes:
        runtime: Runtime of the format.
        calibration: Calibration images in batches for int8; None for float32.
        opset: Version of the ONNX operators; None for the exporter's own.
        balance: Whether factors are balanced, on a copy, before they are quantised.
        most_divergence: Harm that int8 may do to one low-rank layer alone, see `int8_divergences`. Layers that suffer
            more stay in float32.
    """

    runtime: Runtime
    calibration: Batches | None = None
    opset: int | None = None
    balance: bool = True
    most_divergence: float = 0.05

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
        in_float: tuple[str, ...] = ()
        if self.calibration is None:
            self.runtime.write(captured, path, self.opset)
        else:
            in_float = self._write_int8(captured, path, self.calibration)
        size = sum(part.stat().st_size for part in folder.glob(f"{path.stem}.*"))
        run = self.runtime.load(path)
        parity = check.parity(run)
        if not math.isfinite(parity.divergence):
            raise ArpHubError(
                f"outputs in {self.runtime.title}, {self.precision}, are NaN or infinite: check the model's outputs on "
                "these images, or try another format"
            )
        if self.calibration is None and not parity.relative_error <= TOLERANCE:
            raise ArpHubError(
                f"outputs in {self.runtime.title} differ from PyTorch by {parity.relative_error:.2g} of the largest "
                f"output, at most {TOLERANCE:g} is accepted: try another format or another opset"
            )
        return Exported(path, size, parity, run, in_float)

    def _write_int8(self, captured: Captured, path: Path, calibration: Batches) -> tuple[str, ...]:
        """Write an int8 file, and return the low-rank layers that stay in float32.

        They do so with all of their factors, because what passes between two of them is then not rounded either.
        """
        in_float: tuple[str, ...] = ()
        factors: list[str] = []
        if layers := low_rank_layers(captured.model):
            if self.balance:
                captured = replace(captured, model=balance_factors(copy.deepcopy(captured.model), calibration))
            if self.most_divergence < math.inf:
                harm = int8_divergences(captured.model, torch.cat(list(calibration)), captured.classes)
                in_float = tuple(name for name in layers if harm.get(name, 0.0) > self.most_divergence)
            factors = [f"{name}.factors.{number}" for name in in_float for number in range(len(layers[name].factors))]
        try:
            self.runtime.write_int8(captured, path, calibration, self.opset, factors)
        except (ArpHubError, OSError):
            raise
        except Exception as error:  # quantisers raise many kinds of errors
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ArpHubError(f"{self.runtime.title} cannot quantise the model: {reason:.300}") from error
        return in_float

    def compare(
        self, exported: Exported, captured: Captured, check: Check, seconds: float
    ) -> tuple[FileLatency | None, Exported | None]:
        """Time a file; if the model has low-rank layers, in turns with its dense form, written in the same way.

        Returns:
            The latency, None if ``seconds`` is 0; and the dense file, which is deleted, None if the model is dense or
            its dense form cannot be written, such as one of more than 2 GiB in ONNX.
        """
        count = captured.batch_size
        images = check.images[torch.arange(count) % len(check.images)].contiguous()
        runs, dense = {"model": exported.run}, None
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps loaded files
            if low_rank_layers(captured.model):
                merged = replace(captured, model=to_dense(copy.deepcopy(captured.model)))
                try:
                    dense = self.write(merged, Path(folder), check)
                    runs["dense"] = dense.run
                except ArpHubError as error:  # the file of the compressed model is whole
                    _logger.warning("the comparison with the dense form is left out: %s", error)
            return time_files(runs, images, seconds) if seconds else None, dense
