"""L-BFGS for many problems of one size at once, each with a history, a step length and an end of its own.

Masks stand in the place of branches, so that a GPU gets as few launches for many problems as for one, and is seldom
waited for. Directions follow from the compact form of the inverse Hessian (Byrd, Nocedal and Schnabel 1994). Bisection
finds step lengths that meet the weak Wolfe conditions (Lewis and Overton 2013).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def minimise(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    iterations: int,
    history: int = 20,
    tolerance: float = 1e-9,
) -> Tensor:
    """Minimise smooth functions, one for each row of ``start``.

    But for rounding, what is found for one problem does not depend on those beside it.

    Args:
        function: Takes points ``(k, n)``; returns their values ``(k,)``, of size 1 or so, and gradients ``(k, n)``.
        start: Points to start from, ``(k, n)``.
        iterations: Steps of each problem at most. There are at most twice as many evaluations, and 20 more.
        history: Number of steps that a direction is made from.
        tolerance: Gradients, and changes of the value, below which a problem is solved.

    Returns:
        The best points found, ``(k, n)``.
    """
    point = start
    value, gradient = function(point)
    curvature, steps = _Curvature(point, history), torch.zeros_like(value)
    direction, moving = -gradient, gradient.abs().amax(1) > tolerance
    # the length to try next, and lengths known to be too short and too long
    length = (1 / gradient.abs().sum(1)).clamp_max(1)
    short, long = torch.zeros_like(length), torch.full_like(length, math.inf)
    for evaluation in range(2 * iterations + 20):
        if evaluation % 8 == 0 and not moving.any():  # seldom asked: the answer of a GPU has to be waited for
            break
        slope = (direction * gradient).sum(1)
        # problems that have ended stay where they are: their lengths and directions mean nothing
        trial = torch.where(moving[:, None], point + length[:, None] * direction, point)
        trial_value, trial_gradient = function(trial)
        too_long = ~(trial_value <= value + 1e-4 * length * slope)  # also where the value is not a number
        too_short = ~too_long & ((trial_gradient * direction).sum(1) < 0.9 * slope)
        taken = moving & ~too_long & ~too_short
        curvature.add(taken, trial - point, trial_gradient - gradient)
        fall = torch.where(taken, value - trial_value, math.inf)
        value = torch.where(taken, trial_value, value)
        point = torch.where(taken[:, None], trial, point)
        gradient = torch.where(taken[:, None], trial_gradient, gradient)
        direction = torch.where(taken[:, None], curvature.direction(gradient), direction)
        short = torch.where(too_short, length, short).masked_fill(taken, 0)
        long = torch.where(too_long, length, long).masked_fill(taken, math.inf)
        length = torch.where(long.isfinite(), (short + long) / 2, 2 * length).masked_fill(taken, 1)
        steps = steps + taken
        room = torch.where(long.isfinite(), long - short, length)  # a search without any comes to an end
        moving &= (fall > tolerance) & (gradient.abs().amax(1) > tolerance) & (steps < iterations)
        moving &= -room * (direction * gradient).sum(1) > tolerance
    return point


class _Curvature:
    """The last steps of every problem with the changes of its gradient: an estimate of its inverse Hessian.

    Args:
        points: ``(k, n)``.
        size: Number of steps to remember.
    """

    def __init__(self, points: Tensor, size: int) -> None:
        self._pairs = points.new_zeros(len(points), size, 2, points.shape[1])  # the oldest first; zeros: none yet

    def add(self, taken: Tensor, step: Tensor, change: Tensor) -> None:
        """Remember the steps of the problems that have ``taken (k,)`` one, and forget their oldest."""
        taken = taken & ((step * change).sum(1) > 0)  # rounding can hide that the curvature is positive
        newer = torch.cat([self._pairs[:, 1:], torch.stack([step, change], 1)[:, None]], dim=1)
        self._pairs = torch.where(taken[:, None, None, None], newer, self._pairs)

    def direction(self, gradient: Tensor) -> Tensor:
        """``-H g (k, n)``, with the inverse Hessian ``H`` and a gradient ``g``.

        With steps ``S``, changes ``Y``, the upper triangle ``R`` of ``S^T Y``, its diagonal ``D``, and a scale ``c`` by
        the last pair::

            H g = c g + S v - c Y u,    u = R^-1 S^T g,    v = R^-T ((D + c Y^T Y) u - c Y^T g)
        """
        pairs = self._pairs.flatten(1, 2)
        steps, changes = self._pairs.unbind(2)
        along = (pairs @ gradient[..., None]).double().unflatten(1, (-1, 2))
        root, squares = (steps @ changes.mT).double().triu(), (changes @ changes.mT).double()
        diagonal = root.diagonal(dim1=1, dim2=2)
        root = root + torch.diag_embed((diagonal == 0).double())  # no pair
        newest = squares[:, -1:, -1:]
        scale = torch.where(newest > 0, diagonal[:, -1:, None] / newest, 1.0)
        u = torch.linalg.solve_triangular(root, along[:, :, 0], upper=True)
        right = diagonal[..., None] * u + scale * (squares @ u - along[:, :, 1])
        v = torch.linalg.solve_triangular(root.mT, right, upper=False)
        shares = torch.cat([v, -scale * u], dim=2).flatten(1).to(gradient.dtype)
        return -scale[:, 0].to(gradient.dtype) * gradient - (shares[:, None] @ pairs)[:, 0]
