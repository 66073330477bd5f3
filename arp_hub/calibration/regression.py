"""The least-squares problem that second moments of one layer's inputs pose.

For every group of the dense layer, with ``D = I kh kw``::

    target   T  (G * O, I, kh, kw)   the weight that reproduces the wished-for outputs best
    moment   C  (G, D, D)            second moment of the input patches, shrunk and positive definite
    minimise tr((T - W') C (T - W')^T)   over the weights W' that a scheme can represent
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Regression:
    """Find a weight near ``target`` in the metric of ``moment``.

    Attributes:
        target: ``(G * O, I, kh, kw)``.
        moment: ``(G, D, D)``.
        x_mean: Mean input patch, ``(G, D)``.
        y_mean: Mean wished-for output without bias, ``(G, O)``.
    """

    target: Tensor
    moment: Tensor
    x_mean: Tensor
    y_mean: Tensor

    def bias(self, weight: Tensor) -> Tensor:
        """The bias that makes the mean output right for ``weight``, ``(G * O,)``."""
        rows = weight.to(self.x_mean).reshape(*self.y_mean.shape, -1)
        return (self.y_mean - (rows @ self.x_mean[..., None])[..., 0]).flatten()
