"""Singular values of the layers' folds: how far each layer is from low rank already, and from the rank of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.images import Images
from ..calibration.passes import all_moments
from ..effort import Effort
from ..errors import ArpHubError
from ..layers.apply_plan import check_plan
from ..layers.dense import refusal
from ..layers.low_rank import LowRankLayer, effective_weight, layer_shape
from ..layers.model import layers_called, weight_layers
from ..plan import RankPlan
from ..schemes import SCHEMES, MatrixScheme, Scheme, make_scheme, relative_error
from ..schemes.linalg import singular_values, tail_shares

MATRIX_SCHEMES = tuple(name for name, scheme in SCHEMES.items() if issubclass(scheme, MatrixScheme))
"""The schemes whose blocks are matrices, and so have singular values."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one layer's blocks.

    Attributes:
        values: Singular values ``(blocks, n)``, descending in each block. Every block of a plan has the same rank, so a
            rank here is a rank per block.
    """

    values: Tensor

    @property
    def full_rank(self) -> int:
        """The rank per block that represents the layer exactly."""
        return self.values.shape[1]

    def tail(self) -> Tensor:
        """Share of the energy that truncation to rank 0, 1, .., n loses, ``(n + 1,)``, from 1 down to 0.

        The entry at r is the layer's relative violation of the constraint "rank at most r".
        """
        energy = self.values.double().square().sum(0)
        return tail_shares(torch.cat([energy.new_zeros(1), energy]))  # the zero stands for rank 0

    def energy_rank(self, share: float) -> int:
        """The smallest rank that keeps ``share`` of the energy.

        Raises:
            ArpHubError: If the share is not above 0 and at most 1.

        Example:
            >>> Spectrum(torch.tensor([[3.0, 1.0, 0.0]])).energy_rank(0.9)
            1
        """
        if not 0 < share <= 1:
            raise ArpHubError(f"an energy share is above 0 and at most 1, got {share}")
        slack = 1e-12  # so that a sum in floating point does not ask for a rank of pure rounding error
        return int((self.tail() > 1 - share + slack).sum())

    @property
    def stable_rank(self) -> float:
        """Energy over the largest squared singular value, the mean over blocks (Rudelson and Vershynin 2007)."""
        energy = self.values.double().square()
        return float((energy.sum(1) / energy.amax(1).clamp_min(torch.finfo(energy.dtype).tiny)).mean())


def decomposable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that are or could be decomposed, by dotted name, in the order of the model's modules."""
    layers = {name: module for name, module in weight_layers(model) if refusal(module) is None}
    layers.update({name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)})
    order = [name for name, _ in model.named_modules()]
    return {name: layers[name] for name in order if name in layers}


@torch.no_grad()
def spectrum(module: nn.Module, scheme: Scheme | None = None) -> Spectrum:
    """Singular values of one layer, dense or decomposed (then those of the merged weight).

    Args:
        module: The layer.
        scheme: A matrix scheme bound to the layer's shape; by default ``channel``.

    Raises:
        ArpHubError: If the layer cannot be decomposed, or the scheme has no singular values.
    """
    scheme = scheme or make_scheme("channel", layer_shape(module))
    if not isinstance(scheme, MatrixScheme):
        raise ArpHubError(f"scheme '{scheme.name}' has no singular values: choose one of {', '.join(MATRIX_SCHEMES)}")
    return Spectrum(singular_values(scheme.fold(effective_weight(module).double())).float())


@torch.no_grad()
def decays(model: nn.Module, plan: RankPlan, points: int = 33) -> dict[str, dict[str, Any]]:
    """How fast the singular values of every planned layer fall, each in its own scheme, as ``metrics.json`` keeps them.

    Args:
        model: The dense model.
        plan: Its plan. Only the scheme and groups of every layer count, not the rank.
        points: Numbers a layer, at even steps from rank 1 to the full rank.

    Returns:
        By layer, the ``full_rank`` of its scheme per block, and ``values``: singular values over the largest.

    Raises:
        ArpHubError: If the plan does not fit the model.

    Example:
        >>> spectra = decays(model, plan)  # doctest: +SKIP
    """
    found = {}
    for name, scheme in check_plan(model, plan).items():
        energies = rank_energies(effective_weight(model.get_submodule(name)).double(), scheme)
        values = (energies / energies.max().clamp_min(torch.finfo(energies.dtype).tiny)).sqrt()
        places = torch.linspace(0, len(values) - 1, min(points, len(values))).round().long()
        rounded = [float(f"{value:.3g}") for value in values[places.to(values.device)].tolist()]
        found[name] = {"full_rank": len(values), "values": rounded}
    return found


def rank_energies(weight: Tensor, scheme: Scheme) -> Tensor:
    """The energy that rank 1, 2, .. of a scheme adds to the approximation of a weight, up to the full rank.

    For the matrix schemes these are the squared singular values of the matrix that the scheme truncates, summed over
    its blocks. For ``cp`` they are those of the kernel's slices, and for ``tucker2`` those of its two channel modes:
    what both schemes truncate before their first sweep.

    Args:
        weight: Dense weight ``(G * O, I, kh, kw)``.
        scheme: A scheme bound to its shape.
    """
    values = scheme.spectrum(weight)
    if values is not None:
        return values.square().sum(0)
    start = scheme.cold_start(weight, 1)
    assert start is not None  # a scheme without a spectrum has a cold start
    errors = start[1]
    return -torch.cat([errors.new_ones(1), errors]).diff().clamp_max(0)


@torch.no_grad()
def output_spectra(model: nn.Module, layers: Mapping[str, nn.Module], images: Images) -> dict[str, Spectrum]:
    """Singular values of layers' ``channel`` folds in the metric of their inputs: they weigh the layers' *outputs*.

    With C the second moment of the input patches, these are the singular values of ``W C^(1/2)``.

    Args:
        model: The model that holds the layers, in evaluation mode.
        layers: Layers by dotted name; those that the model never calls are left out of the result.
        images: Normalised calibration images.
    """
    found = {}
    for chunk in _chunks(layers):
        with layers_called(model):
            seen = all_moments(model, chunk, images, Effort().positions_macs)
        for name, moments in seen.items():
            weight = effective_weight(chunk[name]).double()
            root = torch.linalg.cholesky(moments.regression(weight).moment)
            rows = weight.reshape(root.shape[0], -1, root.shape[1])
            found[name] = Spectrum(torch.linalg.svdvals(rows @ root).float())
    return {name: found[name] for name in layers if name in found}


def _chunks(layers: Mapping[str, nn.Module], most: int = 2**30) -> Iterator[dict[str, nn.Module]]:
    """Layers in groups whose moments take ``most`` bytes; a pass over the images serves one group."""
    chunk: dict[str, nn.Module] = {}
    used = 0
    for name, layer in layers.items():
        shape = layer_shape(layer)
        columns = shape.group_in * shape.taps
        size = 16 * shape.groups * columns * (columns + shape.group_out)  # two halves of float64
        if chunk and used + size > most:
            yield chunk
            chunk, used = {}, 0
        chunk[name] = layer
        used += size
    if chunk:
        yield chunk


@torch.no_grad()
def violation(module: nn.Module, scheme: Scheme, rank: int) -> float:
    """Relative squared distance of a layer's weight to the set that a scheme represents at ``rank``, between 0 and 1.

    Args:
        module: A dense layer.
        scheme: A scheme bound to its shape, as `check_plan` gives them.
        rank: Rank per block.
    """
    weight = effective_weight(module).float()
    return float(relative_error(weight, scheme.compose(scheme.nearest(weight, rank))))
