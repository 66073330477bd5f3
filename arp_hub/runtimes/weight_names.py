"""Find the layers of a model in a graph whose converter gave new names to their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

Floats = NDArray[np.floating[Any]]


def nodes_of(model: nn.Module, layers: Iterable[str], products: Mapping[str, Floats]) -> list[str]:
    """The matrix products of a graph that belong to some layers, found by the values of their weights.

    A converter may transpose a weight, reshape it, and multiply each output channel by the scale of a BatchNorm. Layers
    with equal weights are all found. A layer that the graph lacks gives no product.

    Args:
        model: The model that the graph was made from.
        layers: Names of convolutions and linear layers.
        products: The weight of each convolution and matrix product of the graph, by the product's name.
    """
    wanted = [_directions(_rows(model.get_submodule(name))) for name in layers]
    found = []
    for product, array in products.items():
        for rows in wanted:
            forms = [array.reshape(len(rows), -1)] if array.size == rows.size else []
            if array.ndim == 2 and array.T.shape == rows.shape:
                forms.append(array.T)
            if any(_are_parallel(_directions(form), rows) for form in forms):
                found.append(product)
                break
    return found


def _rows(layer: nn.Module) -> Floats:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().flatten(1).numpy()


def _directions(rows: Floats) -> Floats:
    """Rows of length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-30)


def _are_parallel(one: Floats, other: Floats) -> bool:
    """Whether two sets of rows of length 1, or 0, agree up to signs."""
    cosines = np.abs((one * other).sum(1))
    lengths = np.minimum(np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1))
    return bool(np.allclose(cosines, lengths, atol=1e-4))
