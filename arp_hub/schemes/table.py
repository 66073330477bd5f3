"""The table of all schemes. A new scheme is one subclass of `Scheme` and one entry here."""

from ..errors import ArpHubError
from .base import Scheme
from .matrix import Channel, GroupIn, GroupOut, Spatial
from .shapes import LayerShape
from .tensor import Cp, Tucker2

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
