"""Linear and multilinear algebra on batches of small matrices and three-way tensors."""

from __future__ import annotations

import torch
from torch import Tensor

_RIDGE = 1e-9
"""Tikhonov term of every normal equation, relative to the mean of its diagonal."""
_DEPENDENT = 1e-12
"""Squared length of what is left of a column of norm 1 without the others, below which it counts as one of them."""
_ROWS = 128
"""Rows of a Gram matrix that are made at a time."""


def leading_vectors(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors, from the Gram matrix (whose side is a channel count, so it is small)."""
    return torch.linalg.eigh(_lower_gram(matrix)).eigenvectors[..., -rank:]


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values, descending, from the smaller Gram matrix: many times as fast as an SVD of a layer's fold.

    Values below the square root of the precision, relative to the largest, are lost; an energy does not miss them.
    """
    short = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    return torch.linalg.eigvalsh(_lower_gram(short)).clamp_min(0).sqrt().flip(-1)


def _lower_gram(matrix: Tensor) -> Tensor:
    """``matrix @ matrix.mT`` up to its diagonal, which is all that ``eigh`` reads: of a large one half the work."""
    size = matrix.shape[-2]
    gram = matrix.new_zeros(*matrix.shape[:-1], size)
    for start in range(0, size, _ROWS):
        end = min(start + _ROWS, size)
        gram[..., start:end, :end] = matrix[..., start:end, :] @ matrix[..., :end, :].mT
    return gram


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest matrices of a rank as ``left (.., m, r) @ right (.., r, n)``, from the smaller Gram matrix.

    One side is orthonormal and the other is ``matrix`` projected on it, so that full rank is exact.
    """
    if matrix.shape[-2] <= matrix.shape[-1]:
        left = leading_vectors(matrix, rank)
        return left, left.mT @ matrix
    right = leading_vectors(matrix.mT, rank)
    return matrix @ right, right.mT


def orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the span of the columns ``(.., m, r)``, by Cholesky QR (Stathopoulos and Wu 2002).

    In double precision, because the Gram matrix squares the condition number. Nothing in it waits for a GPU, or goes
    on column by column there. Where columns (nearly) depend on others, theirs are short.
    """
    columns = matrix.double()
    columns = columns / columns.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    gram = columns.mT @ columns
    gram.diagonal(dim1=-2, dim2=-1).add_(_DEPENDENT)
    upper = torch.linalg.cholesky_ex(gram, upper=True).L
    return torch.linalg.solve_triangular(upper, columns, upper=True, left=False).to(matrix.dtype)


def solve_spd(gram: Tensor, right: Tensor) -> Tensor:
    """Solve ``gram x = right`` for a symmetric positive semi-definite ``gram``, with a tiny ridge.

    In higher precision than ``right``, a Gram matrix factorises with the ridge in any case: nobody looks whether it
    did, for which a GPU would have to be waited for.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    floor = torch.finfo(right.dtype).eps * 100
    ridge = diagonal.mean(dim=-1, keepdim=True).clamp_min(torch.finfo(right.dtype).tiny) * max(_RIDGE, floor)
    damped = gram + torch.diag_embed(ridge.expand_as(diagonal))
    factor, info = torch.linalg.cholesky_ex(damped)
    if gram.dtype != right.dtype:
        half = torch.linalg.solve_triangular(factor, right.to(gram.dtype), upper=False)
        return torch.linalg.solve_triangular(factor.mT, half, upper=True).to(right.dtype)
    if info.any():  # numerically rank-deficient: damp until it factorises
        factor = torch.linalg.cholesky(damped + torch.diag_embed((ridge * 1e4).expand_as(diagonal)))
    return torch.cholesky_solve(right, factor)


def slice_triplets(tensor: Tensor, rank: int) -> tuple[list[Tensor], Tensor]:
    """CP components that start a fit: the largest singular triplets of the slices of the rotated tensor.

    The shortest mode is rotated to its principal axes; each slice along it is then a matrix, and its singular triplets
    are CP components. They are orthogonal to each other, and all of them together exact.

    Args:
        tensor: ``(G, O, I, S)``.
        rank: How many components to give.

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
    """Share of the energy that is lost after the first 1, 2, .. of these, none after all of them."""
    tails = energies.flip(0).cumsum(0).flip(0)
    return torch.cat([tails[1:], tails.new_zeros(1)]) / tails[0].clamp_min(torch.finfo(tails.dtype).tiny)


def als(tensor: Tensor, outputs: Tensor, taps: Tensor, sweeps: int) -> list[Tensor]:
    """Alternating least squares over the three modes ``(G, r, n)`` of ``tensor (G, O, I, S)``; the error never rises.

    It starts from two of them, because the first update is that of the third, and makes at least one sweep.

    Each sweep starts from an extrapolation of the last two results, as in Nesterov's method, and one that makes the
    error larger is undone and starts the extrapolation anew (Mitchell, Ye and De Sterck 2020). That takes about half
    the sweeps of plain alternation.
    """
    modes, error = _als_sweep(tensor, outputs, taps)
    earlier, age = (outputs, taps), 2
    for _ in range(sweeps - 1):
        ahead, latest = (age - 1) / (age + 2), (modes[0], modes[2])
        start = [mode + ahead * (mode - old) for mode, old in zip(latest, earlier, strict=True)]
        found, found_error = _als_sweep(tensor, *start)
        earlier = latest
        if age > 1 and found_error > error:
            age = 1
        else:
            modes, error, age = found, found_error, age + 1
    return modes


def _als_sweep(tensor: Tensor, outputs: Tensor, taps: Tensor) -> tuple[list[Tensor], Tensor]:
    """One sweep, and its squared error up to the squared norm of the tensor.

    The first two updates share the product of the tensor with the mode that neither changes. No intermediate is larger
    than the components' own kernels, ``(G, r, I, S)``.
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
    error = (outputs * (gram.to(outputs.dtype) @ outputs - 2 * products)).sum(dtype=torch.float64)
    return even_norms([outputs, inputs, taps]), error


def _mode_gram(mode: Tensor) -> Tensor:
    """Products of the vectors of one mode, ``(G, r, r)``, on a GPU in double precision: see `solve_spd`."""
    wide = mode.double() if mode.is_cuda else mode
    return wide @ wide.mT


def even_norms(modes: list[Tensor]) -> list[Tensor]:
    """Scale each component's vectors to one common norm, keeping their product."""
    norms = [mode.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(mode.dtype).tiny ** 0.25) for mode in modes]
    even = torch.stack(norms).log().mean(dim=0).exp()
    return [mode * (even / norm) for mode, norm in zip(modes, norms, strict=True)]
