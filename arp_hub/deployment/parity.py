"""How far the outputs of an exported file lie from those of the model in PyTorch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtimes.capture import Captured
from ..runtimes.runtime import Run, run_all

TOLERANCE = 1e-4
"""Largest error of a float32 file, relative to the largest output: more than ten times the rounding errors in
benchmarks/results/deployment.json."""


@dataclass(frozen=True)
class Parity:
    """The outputs of a file beside those of the model in PyTorch, in float32.

    Attributes:
        images: Number of images.
        source: Which images they are: ``test``, ``calibration`` or ``random``.
        relative_error: Largest difference of an output, over the largest output.
        agreement: Share of the images with the same top-1 class, in per cent.
        divergence: Mean Kullback-Leibler divergence of the predicted classes from those of the model, in nats.
        top1: Accuracy of the file in per cent, if there are labels.
        torch_top1: That of the model in PyTorch.
    """

    images: int
    source: str
    relative_error: float
    agreement: float
    divergence: float
    top1: float | None = None
    torch_top1: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, rounded; accuracies only if they are known."""
        return {
            key: float(f"{value:.4g}") if isinstance(value, float) else value
            for key, value in asdict(self).items()
            if value is not None
        }


@dataclass(frozen=True)
class Check:
    """What files are checked on.

    Attributes:
        images: The images ``(N, C, H, W)``.
        source: Which images they are.
        expected: The outputs of the model in PyTorch.
        labels: Classes of the images, if they are known.
        batch_size: Images of a forward pass of the file.
    """

    images: Tensor
    source: str
    expected: Tensor
    labels: Tensor | None
    batch_size: int

    @classmethod
    @torch.no_grad()
    def of(cls, captured: Captured, source: str, images: Tensor, labels: Tensor | None) -> Check:
        """Run the model in PyTorch on the images."""
        expected = torch.cat([captured.model(batch) for batch in images.split(32)])
        return cls(images, source, expected, labels, captured.batch_size)

    def parity(self, run: Run) -> Parity:
        """Compare a file with the model."""
        found, expected = run_all(run, self.images, self.batch_size), self.expected
        top = found.argmax(1)
        divergence = F.kl_div(found.log_softmax(1), expected.log_softmax(1), reduction="batchmean", log_target=True)
        return Parity(
            len(found),
            self.source,
            float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)),
            _percent(top == expected.argmax(1)),
            float(divergence.clamp(min=0)),
            None if self.labels is None else _percent(top == self.labels),
            None if self.labels is None else _percent(expected.argmax(1) == self.labels),
        )


def _percent(hits: Tensor) -> float:
    return 100 * float(hits.double().mean())
