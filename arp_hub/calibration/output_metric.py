"""The norm of errors of a layer's output that says what they do to the network's predictions.

With ``g (O,)`` the gradient at one position of the output (see `arp_hub.calibration.gradients`), errors ``e`` there
change the predictions by about::

    KL(p || p')  ~  1/2 sum over positions of  e^T F e,    F = mean of g g^T    (G, O, O)

``F`` is the layer's block of the Fisher matrix (Martens and Grosse 2015), shrunk like the moments of inputs (see
`arp_hub.calibration.moments`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class OutputMetric:
    """A norm of errors ``e (O,)`` of a layer's outputs, ``e^T F e``, group by group.

    Attributes:
        moment: ``F (G, O, O)``, positive definite.
    """

    moment: Tensor

    @cached_property
    def root(self) -> Tensor:
        """``S (G, O, O)``, upper triangular, with ``S^T S = F``."""
        return torch.linalg.cholesky(self.moment).mT

    def in_blocks(self, blocks: int) -> OutputMetric:
        """The same metric without what joins ``blocks`` equal parts of the outputs, each of consecutive channels."""
        parts = blocks // len(self.moment)
        if parts == 1:
            return self
        split = self.moment.unflatten(2, (parts, -1)).unflatten(1, (parts, -1))  # (G, parts, o, parts, o)
        return OutputMetric(split.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1))

    def apply(self, weight: Tensor) -> Tensor:
        """``S W`` of a weight ``(G * O, ..)``, whose plain norm is the metric of ``W``."""
        return (self.root @ self._rows(weight)).reshape(weight.shape)

    def undo(self, weight: Tensor) -> Tensor:
        """``S^-1 W`` of a weight ``(G * O, ..)``."""
        return torch.linalg.solve_triangular(self.root, self._rows(weight), upper=True).reshape(weight.shape)

    def _rows(self, weight: Tensor) -> Tensor:
        return weight.reshape(len(self.moment), self.moment.shape[-1], -1)
