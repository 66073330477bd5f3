"""The base of all schemes: blocks, costs, and the fit in the metric of a second moment.

Every scheme writes the rows of a weight as ``W = L D``. The design ``D (features, I kh kw)`` depends on all factors but
the last, and the last factor is ``L``. `Scheme.fit` minimises ``tr((T - L D) C (T - L D)^T)`` for a target ``T`` and a
second moment ``C``. For a given ``D``, the best ``L = T C D^T (D C D^T)^-1`` has a closed form. So only the other
factors are searched for (variable projection; Golub and Pereyra 1973).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ArpHubError
from .lbfgs import minimise
from .linalg import solve_spd
from .shapes import ConvSpec, LayerShape, chain_params

Factors = tuple[Tensor, ...]
"""Convolution weights, from the first convolution to the last."""


class Scheme(ABC):
    """A way to factorise one layer, bound to the layer's shape and to a number of groups.

    Args:
        shape: Shape of the dense layer.
        groups: Number of blocks that the scheme makes of each of the layer's own groups.

    Raises:
        ArpHubError: If the scheme does not apply to the shape.
    """

    name: ClassVar[str]
    grouped: ClassVar[bool] = False
    """Whether ``groups`` may exceed 1."""
    rough_sweeps: ClassVar[int] = 12
    """Sweeps of `nearest` after which its error is accurate enough for planning. 0: the cold start's error is."""

    def __init__(self, shape: LayerShape, groups: int = 1) -> None:
        if reason := self.refusal(shape, groups):
            raise ArpHubError(f"scheme '{self.name}' with groups={groups} does not fit this layer: {reason}")
        self.shape = shape
        self.groups = groups

    @classmethod
    def refusal(cls, shape: LayerShape, groups: int = 1) -> str | None:
        """Why the scheme cannot be used on ``shape``, or None if it can."""
        if groups < 1:
            return f"groups must be at least 1, got {groups}"
        if groups > 1 and not cls.grouped:
            return f"'{cls.name}' makes no groups, use groups=1"
        return None

    @property
    @abstractmethod
    def max_rank(self) -> int:
        """The smallest rank at which every weight of this shape is represented exactly."""

    @abstractmethod
    def convs(self, rank: int) -> tuple[ConvSpec, ...]:
        """The chain of convolutions at ``rank``, first to last."""

    @abstractmethod
    def design(self, factors: Sequence[Tensor]) -> Tensor:
        """The design ``D``: the features that the last factor combines, ``(blocks, features, I * kh * kw)``.

        It is differentiable.

        Args:
            factors: All factors but the last one.
        """

    @abstractmethod
    def nearest(
        self, weight: Tensor, rank: int, start: Sequence[Tensor] | None = None, sweeps: int | None = None
    ) -> Factors:
        """Factors of the point of the scheme's set that is nearest to a weight, exactly or approximately.

        Args:
            weight: Dense weight ``(G * O, I, kh, kw)``.
            rank: Rank of every block.
            start: `basis` of factors of this rank, for a warm start. Without it, the matrix schemes are exact, and the
                others start from `cold_start`.
            sweeps: Iterations; by default one with a ``start``, and enough to converge without.
        """

    @abstractmethod
    def basis(self, factors: Sequence[Tensor]) -> Factors:
        """The smaller part of factors, which `nearest` starts from. The rest follows from the weight.

        Blocks are the first dimension. So the bases of equal layers, concatenated, are the basis of one grouped layer.
        """

    def fit_start(self, weight: Tensor, rank: int, sweeps: int | None = None) -> Factors:
        """Factors for `fit` to start from: those of `nearest`, or zeros of the right shape for a closed-form fit."""
        return self.nearest(weight, rank, sweeps=sweeps)

    def spectrum(self, weight: Tensor, moment: Tensor | None = None) -> Tensor | None:
        """Singular values of every block, ``(blocks, n)``, where the nearest point is a truncated SVD, else None.

        Args:
            weight: Dense weight ``(G * O, I, kh, kw)``.
            moment: Second moment of the input patches; with it, the values are those in its metric.
        """
        return None

    def cold_start(self, weight: Tensor, rank: int) -> tuple[Factors, Tensor] | None:
        """Factors to start from, and the relative squared error of such a start at rank 1, 2, .. up to full rank.

        `nearest` improves on it. None for the matrix schemes, which need no start: their errors follow from `spectrum`.

        Args:
            weight: Dense weight ``(G * O, I, kh, kw)``.
            rank: Rank of the factors.
        """
        return None

    @property
    def blocks(self) -> int:
        """Number of independent row blocks of the weight: the dense layer's own groups, or more."""
        return self.shape.groups

    def params(self, rank: int) -> int:
        """Weights of the chain at ``rank``, without the bias, which is the dense layer's own."""
        return chain_params(self.convs(rank))

    def design_moment(self, design: Tensor, moment: Tensor) -> Tensor:
        """The product of a design with the second moment of the patches, ``(blocks, features, I * kh * kw)``.

        A scheme with structural zeros in its design skips them.

        Args:
            design: The result of `design`.
            moment: One matrix for every group of the dense layer, ``(G, I * kh * kw, I * kh * kw)``.
        """
        rows = design.reshape(self.shape.groups, -1, design.shape[-1])  # blocks of a group share its moment
        return (rows @ moment).reshape(design.shape)

    def compose(self, factors: Sequence[Tensor]) -> Tensor:
        """The dense weight ``(G * O, I, kh, kw)`` of the factors."""
        shape = self.shape
        design = self.design(factors[:-1])
        last = factors[-1].reshape(self.blocks, -1, design.shape[1])
        return (last @ design).reshape(shape.out_channels, shape.group_in, *shape.kernel_size)

    def fit(
        self, target: Tensor, moment: Tensor, start: Sequence[Tensor], iterations: int = 100, layers: int = 1
    ) -> Factors:
        """Minimise ``tr((target - W) moment (target - W)^T)`` over the factors of ``W``, from ``start``.

        The last factor is eliminated in closed form; L-BFGS searches over the others.

        Args:
            target: Dense weight to approximate, ``(G * O, I, kh, kw)``.
            moment: Second moment of the input patches, ``(G, I * kh * kw, I * kh * kw)``, positive definite.
            start: Factors to start from, the result of `fit_start`.
            iterations: L-BFGS iterations at most.
            layers: Number of layers in this one if it is `stacked`. Each has a search of its own, in common calls.

        Raises:
            torch.linalg.LinAlgError: If numbers are too large, too small or not finite.
        """
        problem = _Projected(self, target, moment, layers)
        search = _search_one if layers == 1 and not target.is_cuda else _search_many
        rest = search(problem, start[:-1], iterations)
        last = problem.last(self.design(rest)).reshape(start[-1].shape)
        if not torch.isfinite(last).all():
            raise torch.linalg.LinAlgError("the equations of its last factor have no solution")
        return self.balance((*rest, last))

    def stacked(self, layers: int) -> Scheme:
        """This scheme for that many layers of its shape, one below the other: the groups of one layer."""
        shape = self.shape
        outputs, inputs, groups = (layers * n for n in (shape.out_channels, shape.in_channels, shape.groups))
        stacked = dataclasses.replace(shape, out_channels=outputs, in_channels=inputs, groups=groups)
        return type(self)(stacked, self.groups)

    def balance(self, factors: Factors) -> Factors:
        """Scale all factors to a common norm, so that casts to half precision do not overflow. The weight stays."""
        norms = [factor.norm().clamp_min(torch.finfo(factor.dtype).tiny) for factor in factors]
        even = torch.stack(norms).log().mean().exp()
        return tuple(factor * (even / norm) for factor, norm in zip(factors, norms, strict=True))

    def _rows(self, weight: Tensor) -> Tensor:
        """The weight's row blocks, ``(blocks, rows, I * kh * kw)``."""
        return weight.reshape(self.blocks, -1, self.shape.group_in * self.shape.taps)


class _Projected:
    """The least-squares problem of `Scheme.fit` with the last factor eliminated, or a stack of such problems."""

    def __init__(self, scheme: Scheme, target: Tensor, moment: Tensor, layers: int) -> None:
        rows = target.reshape(len(moment), -1, moment.shape[-1])
        self.scheme, self.moment, self.layers = scheme, moment, layers
        self.target_moment = scheme._rows(rows @ moment)
        self.energy = self._sums(self.target_moment * scheme._rows(target)).clamp_min(torch.finfo(target.dtype).tiny)

    def _sums(self, rows: Tensor) -> Tensor:
        """Sums over the blocks ``(blocks, ..)`` of each layer, ``(layers,)``."""
        return rows.sum()[None] if self.layers == 1 else rows.reshape(self.layers, -1).sum(1)

    def _solve(self, design: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        design_moment = self.scheme.design_moment(design, self.moment)
        cross, gram = design @ self.target_moment.mT, design_moment @ design.mT
        if self.layers > 1 or gram.is_cuda:
            gram = gram.double()  # not asked whether it can be solved: the search rejects what is NaN
        last = solve_spd(gram, cross).mT
        return last, design_moment, cross

    def last(self, design: Tensor) -> Tensor:
        """The best last factor for ``design``."""
        return self._solve(design)[0]

    def evaluate(self, rest: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The relative error of each layer, ``(layers,)``, and its gradients for the factors but the last."""
        leaves = [factor.detach().requires_grad_() for factor in rest]
        with torch.enable_grad():
            design = self.scheme.design(leaves)
        with torch.no_grad():
            last, design_moment, cross = self._solve(design)
            # By the envelope theorem, the gradient is that at a fixed last factor.
            scale = (-2 / self.energy).repeat_interleave(len(last) // self.layers)[:, None, None]
            gradient = scale * (last.mT @ (self.target_moment - last @ design_moment))
            return 1 - self._sums(last.mT * cross) / self.energy, torch.autograd.grad(design, leaves, gradient)


def _search_one(problem: _Projected, start: Sequence[Tensor], iterations: int) -> list[Tensor]:
    rest = [factor.detach().clone(memory_format=torch.contiguous_format) for factor in start]
    optimizer = torch.optim.LBFGS(
        rest,
        max_iter=iterations,
        max_eval=2 * iterations,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        (value,), gradients = problem.evaluate(rest)
        for factor, gradient in zip(rest, gradients, strict=True):
            factor.grad = gradient.contiguous()
        return value

    optimizer.step(closure)
    return rest


def _search_many(problem: _Projected, start: Sequence[Tensor], iterations: int) -> list[Tensor]:
    shapes, sizes = [factor.shape for factor in start], [factor.numel() // problem.layers for factor in start]

    def joined(factors: Sequence[Tensor]) -> Tensor:
        return torch.cat([factor.reshape(problem.layers, -1) for factor in factors], dim=1)

    def parts(points: Tensor) -> list[Tensor]:
        return [part.reshape(shape) for part, shape in zip(points.split(sizes, dim=1), shapes, strict=True)]

    def evaluate(points: Tensor) -> tuple[Tensor, Tensor]:
        values, gradients = problem.evaluate(parts(points))
        return values, joined(gradients)

    return parts(minimise(evaluate, joined(start), iterations))


def relative_error(weight: Tensor, approximation: Tensor, moment: Tensor | None = None) -> Tensor:
    """Squared distance over squared norm, in the weight metric or in that of ``moment``; 0 for two zero weights."""
    return energy(weight - approximation, moment) / energy(weight, moment).clamp_min(torch.finfo(weight.dtype).tiny)


def energy(weight: Tensor, moment: Tensor | None = None) -> Tensor:
    """``tr(W W^T)``, or ``tr(W moment W^T)``: the mean squared norm of the layer's outputs."""
    if moment is None:
        return weight.square().sum()
    rows = weight.reshape(moment.shape[0], -1, moment.shape[1])
    return ((rows @ moment) * rows).sum()
