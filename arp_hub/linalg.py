"""Linear and multilinear algebra on batches of small matrices and three-way tensors."""

from __future__ import annotations

import torch
from torch import Tensor

_RIDGE = 1e-9
"""Tikhonov term of every normal equation, relative to the mean of its diagonal."""


def leading_vectors(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors, from the Gram matrix (whose side is a channel count, so it is small)."""
    return torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[..., -rank:]


def solve_spd(gram: Tensor, right: Tensor) -> Tensor:
    """Solve ``gram x = right`` for a symmetric positive semi-definite ``gram``, with a tiny ridge."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    floor = torch.finfo(gram.dtype).eps * 100
    ridge = diagonal.mean(dim=-1, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny) * max(_RIDGE, floor)
    damped = gram + torch.diag_embed(ridge.expand_as(diagonal))
    factor, info = torch.linalg.cholesky_ex(damped)
    if info.any():  # numerically rank-deficient: damp until it factorises
        factor = torch.linalg.cholesky(damped + torch.diag_embed((ridge * 1e4).expand_as(diagonal)))
    return torch.cholesky_solve(right, factor)


def slice_start(tensor: Tensor, rank: int) -> list[Tensor]:
    """A deterministic start for CP: the r largest singular triplets of the slices of the rotated tensor.

    The shortest mode is rotated to its principal axes; each slice along it is then a matrix, and its singular triplets
    are CP components. At full rank this is exact already.
    """
    short = min((3, 2, 1), key=lambda mode: tensor.shape[mode])
    others = [mode for mode in (1, 2, 3) if mode != short]
    turned = tensor.permute(0, *others, short)
    axes = torch.linalg.svd(turned.flatten(1, 2), full_matrices=False).Vh  # (G, axis, n)
    slices = torch.einsum("gabs,gts->gtab", turned, axes)
    left, values, right = torch.linalg.svd(slices, full_matrices=False)
    order = values.flatten(1).argsort(dim=1, descending=True, stable=True)[:, :rank]
    root = values.flatten(1).gather(1, order).clamp_min(torch.finfo(tensor.dtype).tiny).pow(1 / 3)[..., None]

    def pick(vectors: Tensor) -> Tensor:
        return vectors.gather(1, order[..., None].expand(-1, -1, vectors.shape[-1])) * root

    found = {
        others[0]: pick(left.mT.flatten(1, 2)),
        others[1]: pick(right.flatten(1, 2)),
        short: pick(axes.repeat_interleave(values.shape[-1], dim=1)),
    }
    return [found[mode] for mode in (1, 2, 3)]


def als_sweep(tensor: Tensor, modes: list[Tensor]) -> list[Tensor]:
    """One sweep of alternating least squares over the three modes ``(G, r, n)`` of ``tensor (G, O, I, S)``."""
    modes = list(modes)
    equations = ("gois,gri,grs->gro", "gois,gro,grs->gri", "gois,gro,gri->grs")
    for k, equation in enumerate(equations):
        first, second = (modes[j] for j in range(3) if j != k)
        gram = (first @ first.mT) * (second @ second.mT)
        modes[k] = solve_spd(gram, torch.einsum(equation, tensor, first, second))
    return even_norms(modes)


def even_norms(modes: list[Tensor]) -> list[Tensor]:
    """Scale each component's vectors to one common norm, keeping their product."""
    norms = [mode.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(mode.dtype).tiny ** 0.25) for mode in modes]
    even = torch.stack(norms).log().mean(dim=0).exp()
    return [mode * (even / norm) for mode, norm in zip(modes, norms, strict=True)]
