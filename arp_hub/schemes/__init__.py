"""Schemes write a weight as a chain of smaller convolutions. This package is maths only: costs, nearest points, fits.

Shapes used throughout, for a dense layer with ``G`` groups of its own (``G = 1`` for an ordinary layer)::

    weight   (G * O, I, kh, kw)     O and I are channels *per group*; a linear layer is kh = kw = 1
    moment   (G, I * kh * kw, I * kh * kw)     second moment of the layer's input patches, one matrix per group
    factors  a tuple of convolution weights, from the first convolution to the last

A new scheme is one subclass of `Scheme` and one entry of the table in `table.py`.
"""

from .base import Factors, Scheme, energy, relative_error
from .matrix import MatrixScheme
from .table import SCHEMES, make_scheme

__all__ = ["SCHEMES", "Factors", "MatrixScheme", "Scheme", "energy", "make_scheme", "relative_error"]
