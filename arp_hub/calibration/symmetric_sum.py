"""A running sum of symmetric products, in half of the memory and, of wide ones, half of the work."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 256
"""Rows of a block. Narrower blocks save little more, and their products are slower."""


class SymmetricSum:
    """The sum of ``X X^T`` over matrices ``X (G, D, n)``, of which only blocks up to the diagonal are held.

    The sum is in double precision: else the order of its terms, which the number of processes decides, would change a
    plan.

    Args:
        groups: ``G``.
        side: ``D``.
        device: Where the sum is held.

    Attributes:
        blocks: Rows of the sum, ``(G, rows, columns up to the end of its diagonal block)`` each.
    """

    def __init__(self, groups: int, side: int, device: torch.device) -> None:
        ends = [*range(_ROWS, side, _ROWS), side]
        self.blocks = [
            torch.zeros(groups, end - start, end, dtype=torch.float64, device=device)
            for start, end in zip([0, *ends], ends, strict=False)
        ]

    def add(self, columns: Tensor) -> Tensor:
        """Add ``X X^T``.

        Args:
            columns: ``X (G, D, n)``.

        Returns:
            The squared norm of the product, ``(G,)``.
        """
        squares = columns.new_zeros(len(columns))
        for block in self.blocks:
            rows, end = block.shape[1:]
            product = columns[:, end - rows : end] @ columns[:, :end].mT
            block += product
            left, diagonal = product.split([end - rows, rows], -1)
            squares += 2 * left.square().sum((1, 2)) + diagonal.square().sum((1, 2))
        return squares

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The whole sum ``(G, D, D)``."""
        side = self.blocks[-1].shape[-1]
        whole = self.blocks[0].new_empty(len(self.blocks[0]), side, side, dtype=dtype)
        for block in self.blocks:
            rows, end = block.shape[1:]
            whole[:, end - rows : end, :end] = block
            whole[:, : end - rows, end - rows : end] = block[..., : end - rows].mT
        return whole

    def to(self, device: torch.device) -> None:
        """Move the sum to a device."""
        self.blocks = [block.to(device) for block in self.blocks]
