"""Truncated SVDs, bases, normal equations and alternating least squares, on batches of matrices and tensors.

- `truncated`, `leading_vectors`, `singular_values`: the SVD of ``M (.., m, n)`` from the eigenvalues of the smaller of
  ``M M^T`` and ``M^T M``.
- `orthonormal`: a basis of the columns of a matrix, by Cholesky QR.
- `solve_spd`: ``x = (G + ridge)^-1 b`` for a Gram matrix ``G``.
- `slice_triplets`, `als`: minimise ``sum (T[o, i, s] - sum_r A[r, o] B[r, i] C[r, s])^2`` over ``A``, ``B`` and ``C``,
  for a batch of tensors ``T (G, O, I, S)`` (canonical polyadic decomposition; Kolda and Bader 2009).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import ArpHubError

_WIDE = 1024
"""Columns of a weight whose products take a CPU longer than their launches a GPU: 2 MFLOP for each row."""


@contextmanager
def factorising(layer: str) -> Iterator[None]:
    """Name the layer whose numbers cannot be factorised inside the block.

    Raises:
        ArpHubError: In place of torch's ``LinAlgError``.
    """
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise ArpHubError(
            f"layer '{layer}' cannot be factorised, because its weights or inputs are too large or too small: scale "
            f"them, or leave the layer out of the plan with exclude (torch says: {error})"
        ) from error


def solving_device(weight: Tensor, layers: int = 1) -> torch.device:
    """Where the factors of a weight ``(O, I, kh, kw)`` are computed: on a CPU, but for wide weights on a GPU.

    A fit makes some 50,000 calls and reads 7,000 numbers back (docs/research/speed.md). Of small matrices, a CPU makes
    a call in 6 to 10 microseconds; a GPU takes as long to launch it, and waits for every number.

    Args:
        weight: The weight.
        layers: Number of like layers that the calls are for.
    """
    return weight.device if layers * weight[0].numel() >= _WIDE else torch.device("cpu")


def stack_size(weight: Tensor) -> int:
    """How many layers with weights like this one are best fitted together: many narrow ones on a GPU, else one.

    A GPU then has fewer launches. On a CPU it saves nothing (docs/research/experiments.md). A million weights bound the
    memory of a stack.
    """
    return max(1, 2**20 // weight.numel()) if weight.is_cuda and weight[0].numel() < _WIDE else 1


def unit(weight: Tensor) -> float:
    """A power of two to divide a weight by, so that its squares and their squares fit in single precision.

    It is 1 for weights whose largest is between 2^-8 and 2^8, whose results therefore stay the same bit for bit.
    """
    largest = float(weight.abs().max())
    if not 0 < largest < math.inf:
        return 1.0
    steps = round(math.log2(largest) / 16)
    return 2.0 ** (16 * min(7, max(-7, steps)))  # 2^112, because 2^128 is no number of single precision


def leading_vectors(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors ``(.., m, rank)``: eigenvectors of the Gram matrix ``M M^T``."""
    return torch.linalg.eigh(_lower_gram(matrix)).eigenvectors[..., -rank:]


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values, descending, as roots of the smaller Gram matrix's eigenvalues, which is faster than an SVD.

    Values below the square root of the machine precision, relative to the largest, are inaccurate. Sums of squares
    hardly depend on them.
    """
    short = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    return torch.linalg.eigvalsh(_lower_gram(short)).clamp_min(0).sqrt().flip(-1)


def _lower_gram(matrix: Tensor, rows: int = 128) -> Tensor:
    """The lower triangle of ``M M^T``, which is all that ``eigh`` reads, in blocks of rows: half the work."""
    size = matrix.shape[-2]
    gram = matrix.new_zeros(*matrix.shape[:-1], size)
    for start in range(0, size, rows):
        end = min(start + rows, size)
        gram[..., start:end, :end] = matrix[..., start:end, :] @ matrix[..., :end, :].mT
    return gram


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest matrices of a rank, as ``left (.., m, r) @ right (.., r, n)`` (Eckart and Young 1936).

    One side is orthonormal, and the other is ``matrix`` projected on it. So full rank is exact up to rounding.
    """
    if matrix.shape[-2] <= matrix.shape[-1]:
        left = leading_vectors(matrix, rank)
        return left, left.mT @ matrix
    right = leading_vectors(matrix.mT, rank)
    return matrix @ right, right.mT


def orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the span of the columns ``(.., m, r)``, by Cholesky QR (Stathopoulos and Wu 2002).

    It works in double precision, because the Gram matrix squares the condition number. It needs no synchronisation
    with a GPU. The vectors of columns that depend on others are shorter than 1.
    """
    columns = matrix.double()
    columns = columns / columns.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    gram = columns.mT @ columns
    gram.diagonal(dim1=-2, dim2=-1).add_(1e-12)  # keeps dependent columns, of norm 1, factorisable in float64
    upper = torch.linalg.cholesky_ex(gram, upper=True).L
    return torch.linalg.solve_triangular(upper, columns, upper=True, left=False).to(matrix.dtype)


def solve_spd(gram: Tensor, right: Tensor) -> Tensor:
    """Solve ``gram x = right`` for a symmetric positive semi-definite ``gram``, with a ridge on its diagonal.

    The ridge is 1e-9 of the diagonal's mean, or 100 times the rounding error of ``right`` where that is more. A Gram
    matrix in higher precision than ``right`` factorises with it. Its success is not asked for, which would synchronise
    the GPU: the solution is NaN if it fails.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    share = max(1e-9, 100 * torch.finfo(right.dtype).eps)
    # at least the smallest normal number: some processors take smaller ones for zero
    ridge = (diagonal.mean(dim=-1, keepdim=True) * share).clamp_min(torch.finfo(right.dtype).tiny)
    damped = gram + torch.diag_embed(ridge.expand_as(diagonal))
    factor, info = torch.linalg.cholesky_ex(damped)
    if gram.dtype != right.dtype:
        half = torch.linalg.solve_triangular(factor, right.to(gram.dtype), upper=False)
        solution = torch.linalg.solve_triangular(factor.mT, half, upper=True).to(right.dtype)
        return solution.masked_fill(info[..., None, None] > 0, math.nan)
    if info.any():  # numerically rank-deficient: a larger ridge
        ridge = torch.where(info[..., None] > 0, ridge * 1e4, 0.0)
        factor = torch.linalg.cholesky(damped + torch.diag_embed(ridge.expand_as(diagonal)))
    return torch.cholesky_solve(right, factor)


def slice_triplets(tensor: Tensor, rank: int) -> tuple[list[Tensor], Tensor]:
    """CP components to start a fit from: the largest singular triplets of the slices of the rotated tensor.

    The shortest mode is rotated to its principal axes. Each slice along it is a matrix, whose singular triplets are CP
    components. All components are orthogonal to each other, and together they are exact.

    Args:
        tensor: ``(G, O, I, S)``.
        rank: Number of components.

    Returns:
        The three modes, each ``(G, rank, n)``, and the energies of all components, ``(G, components)``, descending.
    """
    short = min((3, 2, 1), key=lambda mode: tensor.shape[mode])
    others = [mode for mode in (1, 2, 3) if mode != short]
    turned = tensor.permute(0, *others, short)
    axes = leading_vectors(turned.flatten(1, 2).mT, tensor.shape[short]).mT
    slices = torch.einsum("gabs,gts->gtab", turned, axes)
    left, right = truncated(slices, min(slices.shape[-2:]))
    energies = (left.norm(dim=-2) * right.norm(dim=-1)).square()
    sorted_energies, order = energies.flatten(1).sort(dim=1, descending=True, stable=True)

    def largest(vectors: Tensor) -> Tensor:
        return vectors.gather(1, order[:, :rank, None].expand(-1, -1, vectors.shape[-1]))

    found = {
        others[0]: largest(left.mT.flatten(1, 2)),
        others[1]: largest(right.flatten(1, 2)),
        short: largest(axes.repeat_interleave(energies.shape[-1], dim=1)),
    }
    return even_norms([found[mode] for mode in (1, 2, 3)]), sorted_energies


def tail_shares(energies: Tensor) -> Tensor:
    """The share of the total energy outside the first 1, 2, .. entries; 0 at the last."""
    tails = energies.flip(0).cumsum(0).flip(0)
    return torch.cat([tails[1:], tails.new_zeros(1)]) / tails[0].clamp_min(torch.finfo(tails.dtype).tiny)


def als(tensor: Tensor, outputs: Tensor, taps: Tensor, sweeps: int) -> list[Tensor]:
    """Alternating least squares over the three modes ``(G, r, n)`` of ``tensor (G, O, I, S)``. The error never rises.

    Two modes are enough to start, because the first update computes the third. At least one sweep is made.

    Each sweep starts from an extrapolation of the last two results, as in Nesterov's method. A sweep that raises the
    error of a tensor is rejected for it and restarts its extrapolation (Mitchell, Ye and De Sterck 2020). This needs
    about half the sweeps of plain alternation.
    """
    modes, error = _als_sweep(tensor, outputs, taps)
    earlier, age = (outputs, taps), torch.full_like(error, 2)
    for _ in range(sweeps - 1):
        ahead, latest = ((age - 1) / (age + 2))[:, None, None].to(tensor.dtype), (modes[0], modes[2])
        start = [mode + ahead * (mode - old) for mode, old in zip(latest, earlier, strict=True)]
        found, found_error = _als_sweep(tensor, *start)
        earlier, rejected = latest, (age > 1) & (found_error > error)
        modes = [torch.where(rejected[:, None, None], old, new) for old, new in zip(modes, found, strict=True)]
        error, age = torch.where(rejected, error, found_error), torch.where(rejected, 1, age + 1)
    return modes


def _als_sweep(tensor: Tensor, outputs: Tensor, taps: Tensor) -> tuple[list[Tensor], Tensor]:
    """One sweep, and its squared errors ``(G,)`` less the squared norms of the tensors.

    The first two updates share the product of the tensor with the mode that neither changes. No intermediate is larger
    than ``(G, r, I, S)``.
    """
    shared = torch.einsum("gois,gro->gris", tensor, outputs)
    outputs_gram = _mode_gram(outputs)
    inputs = solve_spd(outputs_gram * _mode_gram(taps), torch.einsum("gris,grs->gri", shared, taps))
    inputs_gram = _mode_gram(inputs)
    taps = solve_spd(outputs_gram * inputs_gram, torch.einsum("gris,gri->grs", shared, inputs))
    del shared
    kernels = (inputs[..., None] * taps[..., None, :]).flatten(2)
    gram, products = inputs_gram * _mode_gram(taps), kernels @ tensor.flatten(2).mT
    outputs = solve_spd(gram, products)
    error = (outputs * (gram.to(outputs.dtype) @ outputs - 2 * products)).sum((1, 2), dtype=torch.float64)
    return even_norms([outputs, inputs, taps]), error


def _mode_gram(mode: Tensor) -> Tensor:
    """Products of the vectors of one mode, ``(G, r, r)``; on a GPU in double precision, for `solve_spd`."""
    wide = mode.double() if mode.is_cuda else mode
    return wide @ wide.mT


def even_norms(modes: list[Tensor]) -> list[Tensor]:
    """Scale the vectors of each component to a common norm. Their product does not change."""
    norms = [mode.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(mode.dtype).tiny ** 0.25) for mode in modes]
    even = torch.stack(norms).log().mean(dim=0).exp()
    return [mode * (even / norm) for mode, norm in zip(modes, norms, strict=True)]
