"""Error over rank of every scheme of a layer, from its weight or from its shape alone.

The relative error at rank ``r`` is ``||W - W_r||^2 / ||W||^2``, with ``W_r`` the nearest weight that the scheme can
represent. Curves are ``(n,)``: one value for each rank from 1 to ``n``, the last rank that makes the layer smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from torch import Tensor

from ..schemes import Scheme, relative_error
from ..schemes.linalg import tail_shares, unit
from ..schemes.shapes import LayerShape, degrees_of_freedom
from .costs import Floats, rank_at, useful_rank

TINY = 1e-9
"""The lowest relative error of a curve, below which logarithms and ratios are of rounding errors."""


@dataclass(frozen=True)
class Candidate:
    """One scheme for one layer with its error at every rank from 1 to ``len(errors)``.

    Attributes:
        scheme: The scheme, bound to the layer and its groups.
        errors: Relative error, falling with the rank.
    """

    scheme: Scheme
    errors: Floats


def candidate_schemes(
    shape: LayerShape, names: Sequence[str] | None, schemes: Mapping[str, type[Scheme]]
) -> list[Scheme]:
    """All schemes that apply to a layer and can make it smaller; the grouped ones with 2, 4 and 8 groups.

    Args:
        shape: The layer.
        names: Names of the schemes to choose from. By default all, but no grouped ones for linear layers and 1x1
            convolutions: their errors look smaller there, and the network's predictions are worse
            (docs/research/experiments.md).
        schemes: All schemes by name.
    """
    if names is None:
        names = [name for name, kind in schemes.items() if shape.taps > 1 or not kind.grouped]
    found = []
    for name in names:
        kind = schemes[name]
        for groups in (2, 4, 8) if kind.grouped else (1,):
            if kind.refusal(shape, groups) is None:
                scheme = kind(shape, groups)
                if scheme.params(1) < shape.params:
                    found.append(scheme)
    return found


def interpolate(ranks: Sequence[int], values: Sequence[float], last: int) -> Floats:
    """A falling curve through measured points, for every rank from 1 to ``last``: lines in log-log scale."""
    points = dict(sorted(zip(ranks, values, strict=True)))
    log_rank = np.log(list(points))
    log_value = np.log(np.maximum(np.minimum.accumulate(list(points.values())), TINY))
    query = np.log(np.arange(1, last + 1))
    curve = np.interp(query, log_rank, log_value)
    if len(points) > 1:
        slopes = np.minimum(np.diff(log_value) / np.diff(log_rank), 0)
        curve = np.where(query < log_rank[0], log_value[0] + slopes[0] * (query - log_rank[0]), curve)
        curve = np.where(query > log_rank[-1], log_value[-1] + slopes[-1] * (query - log_rank[-1]), curve)
    return cast(Floats, np.exp(np.minimum(curve, 0)))


def below(bound: Floats, rank: int, value: float) -> Floats:
    """A curve below an upper ``bound``, through one measured point.

    The ratio of curve and bound falls linearly from 1 at rank 0. The error of CP behaves so beside the error of the
    slices that it starts from, within a few per cent.
    """
    slope = (1 - min(value / max(bound[rank - 1], TINY), 1)) / rank
    share = np.maximum(1 - slope * np.arange(1, len(bound) + 1), 0.05)  # beyond it the line means nothing
    return cast(Floats, np.minimum.accumulate(bound * share))


def shape_candidates(schemes: Sequence[Scheme]) -> list[Candidate]:
    """Curves for a layer without weights: the share of its degrees of freedom that a rank gives up.

    That is the mean relative error if all weights of the layer's shape are equally likely.
    """
    return [Candidate(scheme, _shape_curve(scheme)) for scheme in schemes]


def _shape_curve(scheme: Scheme) -> Floats:
    freedom = [degrees_of_freedom(scheme.convs(rank)) for rank in range(1, useful_rank(scheme) + 1)]
    return np.clip(1 - np.array(freedom) / scheme.shape.params, 0.0, 1.0)


def weight_candidates(weight: Tensor, schemes: Sequence[Scheme]) -> list[Candidate]:
    """The error curves of a layer by its weight ``(G * O, I, kh, kw)``."""
    return [Candidate(scheme, _weight_curve(scheme, weight)) for scheme in schemes]


def _weight_curve(scheme: Scheme, weight: Tensor) -> Floats:
    last = useful_rank(scheme)
    weight = weight / unit(weight)
    spectrum = scheme.spectrum(weight)
    if spectrum is not None:
        return truncation_errors(spectrum)[:last]
    rank = rank_at(scheme, 0.4)
    known = scheme.cold_start(weight, rank)
    assert known is not None  # a scheme has a spectrum or a cold start
    start, bound = known[0], _floats(known[1])[:last]
    if not scheme.rough_sweeps:
        return bound
    found = scheme.nearest(weight, rank, scheme.basis(start), rough_sweeps(scheme, weight, rank))
    return below(bound, rank, float(relative_error(weight, scheme.compose(found))))


def truncation_errors(spectrum: Tensor) -> Floats:
    """The relative error of a truncation to rank 1, 2, .. of singular values ``(blocks, n)``."""
    return _floats(tail_shares(spectrum.double().square().sum(0)))


def _floats(errors: Tensor) -> Floats:
    return np.maximum(errors.double().cpu().numpy(), 0.0)


def rough_sweeps(scheme: Scheme, weight: Tensor, rank: int, macs: float = 5e8) -> int:
    """Sweeps after which a nearest point is good enough to plan by, bounded by multiply-accumulates."""
    return max(1, min(scheme.rough_sweeps, int(macs / (2 * rank * weight.numel()))))


def shortlist(weight: Tensor, schemes: Sequence[Scheme], keep: int) -> list[Scheme]:
    """The ``keep`` schemes with the lowest error of the weight, at one common share of the parameters."""

    def error(scheme: Scheme) -> float:
        return float(_weight_curve(scheme, weight)[rank_at(scheme, 0.3) - 1])

    return sorted(schemes, key=error)[:keep] if len(schemes) > keep else list(schemes)
