"""What a layer costs, dense and at every rank of a scheme, in parameters or multiply-accumulates.

A cost curve is ``(1 + n,)``: the dense layer first, then rank 1 to ``n``, the last rank that makes the layer smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..schemes import Scheme
from ..schemes.shapes import LayerShape, Pair, chain_macs

Floats = NDArray[np.float64]


def useful_rank(scheme: Scheme) -> int:
    """The largest rank at which the chain is smaller than the dense layer."""
    return _last_rank(scheme, scheme.max_rank, scheme.shape.params - 1)


def rank_at(scheme: Scheme, share: float) -> int:
    """The largest rank whose chain holds at most ``share`` of the dense weights, at least 1."""
    return _last_rank(scheme, useful_rank(scheme), share * scheme.shape.params)


def _last_rank(scheme: Scheme, high: int, most: float) -> int:
    low = 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if scheme.params(middle) <= most else (low, middle - 1)
    return low


class CountedCosts:
    """Parameters or multiply-accumulates of layers. Layers of one shape share a curve: large models have many of them.

    Args:
        cost: "params" or "macs".
        sizes: Input maps of every layer, one for each call.
    """

    def __init__(self, cost: str, sizes: Mapping[str, Sequence[Pair]]) -> None:
        self._cost, self._sizes = cost, sizes
        self._known: dict[tuple[LayerShape, str, int, tuple[Pair, ...]], Floats] = {}

    def __call__(self, name: str, scheme: Scheme) -> Floats:
        """What a layer costs dense, and at rank 1, 2, .. of a scheme, up to the last useful one."""
        sizes = tuple(self._sizes[name]) if self._cost == "macs" else ()
        key = (scheme.shape, scheme.name, scheme.groups, sizes)
        if key not in self._known:
            self._known[key] = self._counted(scheme, sizes)
        return self._known[key]

    def _counted(self, scheme: Scheme, sizes: Sequence[Pair]) -> Floats:
        ranks = range(1, useful_rank(scheme) + 1)
        if self._cost == "params":
            return np.array([scheme.shape.params, *map(scheme.params, ranks)], dtype=np.float64)
        chains = [(scheme.shape.as_conv(),), *map(scheme.convs, ranks)]
        return np.array([sum(chain_macs(chain, size) for size in sizes) for chain in chains], dtype=np.float64)
