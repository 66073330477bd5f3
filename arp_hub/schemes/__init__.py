"""How a weight is written as a chain of smaller convolutions: costs, nearest points and fits. Maths only, no models.

Shapes used throughout, for a dense layer with ``G`` groups of its own (``G = 1`` for an ordinary layer)::

    weight   (G * O, I, kh, kw)     O and I are channels *per group*; a linear layer is kh = kw = 1
    moment   (G, I * kh * kw, I * kh * kw)     second moment of the layer's input patches, one matrix per group
    factors  a tuple of convolution weights in the order in which the input meets them

A new scheme is one subclass of `Scheme` and one entry of `SCHEMES`.
"""

from ..errors import ArpHubError
from .base import Factors, Scheme, energy, relative_error
from .matrix import Channel, GroupIn, GroupOut, MatrixScheme, Spatial
from .shapes import LayerShape
from .tensor import Cp, Tucker2

__all__ = ["SCHEMES", "Factors", "MatrixScheme", "Scheme", "energy", "make_scheme", "relative_error"]

SCHEMES: dict[str, type[Scheme]] = {
    scheme.name: scheme for scheme in (Channel, Spatial, GroupIn, GroupOut, Cp, Tucker2)
}
"""All schemes by name."""


def make_scheme(name: str, shape: LayerShape, groups: int = 1) -> Scheme:
    """The scheme ``name`` for a layer.

    Raises:
        ArpHubError: If there is no such scheme, or it does not apply to the layer.

    Example:
        >>> make_scheme("cp", LayerShape(64, 64, (3, 3), padding=(1, 1))).params(rank=40)
        5480
    """
    if name not in SCHEMES:
        raise ArpHubError(f"unknown scheme '{name}': choose one of {', '.join(SCHEMES)}")
    return SCHEMES[name](shape, groups)
