"""A peer: plain activation-aware SVD, the few lines that are commonly written by hand.

A weight ``W`` (out x inputs; the patches of a k x k convolution are its inputs) keeps the part of ``W L`` with the
largest singular values, where ``L L^T`` is the second moment of the dense network's inputs, uncentred:

    W L = U S V^T,    W' = U_r U_r^T W,    r (out + inputs) parameters in place of out * inputs

Nothing is fitted to the inputs that the compressed network has, no bias follows, and all layers have one form.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from arp_hub.layers.model import count_params

RANK_RULES = ("share", "inside", "energy", "threshold")
"""How ranks are chosen: each layer keeps the same share of its parameters; all but the first and the last layer do;
ranks go where the energy per parameter is highest; or each layer keeps the same share of its energy, and stays dense
where that saves no parameters."""
BATCH = 32
"""Images in a forward pass."""
RIDGE = 1e-6
"""Added to the diagonal of a second moment, as a share of its mean, so that a Cholesky factor exists."""


@dataclass(frozen=True)
class Projected:
    """A model whose weights are projected to low rank, and what its factors would have and save."""

    model: nn.Module
    params: int
    saved_macs: int


@dataclass(frozen=True)
class _Layer:
    """A layer's weight as a matrix, its left singular vectors under the moment, their energies, and its positions."""

    weight: Tensor
    vectors: Tensor
    energies: Tensor
    positions: int

    @property
    def cost(self) -> int:
        """Parameters of one rank."""
        return sum(self.weight.shape)

    def params(self, rank: int) -> int:
        """Parameters at a rank: those of the dense layer, if factors would have as many."""
        return min(rank * self.cost, self.weight.numel())


def activation_svd(model: nn.Module, keep: float, images: Tensor, rule: str) -> Projected:
    """A copy of a model whose weights are projected to low rank.

    Args:
        model: Dense model in evaluation mode.
        keep: Share of the parameters to keep.
        images: Unlabelled calibration images.
        rule: One of `RANK_RULES`.
    """
    layers = _layers(model, images)
    budget = keep * count_params(model) - (count_params(model) - sum(a.weight.numel() for a in layers.values()))
    rules = {"share": _share_ranks, "inside": _inside_ranks, "energy": _energy_ranks, "threshold": _threshold_ranks}
    ranks = rules[rule](layers, budget)
    small = copy.deepcopy(model)
    for name, layer in layers.items():
        if layer.params(ranks[name]) < layer.weight.numel():
            kept = layer.vectors[:, : ranks[name]]
            weight = cast(Tensor, small.get_submodule(name).weight)
            weight.data = (kept @ (kept.T @ layer.weight)).to(weight.dtype).reshape(weight.shape)
    saved = {name: layer.weight.numel() - layer.params(ranks[name]) for name, layer in layers.items()}
    saved_macs = sum(saved[name] * layer.positions for name, layer in layers.items())
    return Projected(small, count_params(model) - sum(saved.values()), saved_macs)


def _share_ranks(layers: Mapping[str, _Layer], budget: float) -> dict[str, int]:
    return _largest(lambda share, layer: max(1, int(share * layer.weight.numel() / layer.cost)), layers, budget)


def _inside_ranks(layers: Mapping[str, _Layer], budget: float) -> dict[str, int]:
    first, *inside, last = layers
    whole = {name: min(layers[name].weight.shape) for name in (first, last)}
    left = budget - sum(layers[name].weight.numel() for name in whole)
    return _share_ranks({name: layers[name] for name in inside}, left) | whole


def _threshold_ranks(layers: Mapping[str, _Layer], budget: float) -> dict[str, int]:
    return _largest(lambda share, layer: 1 + int((layer.energies.cumsum(0) < share).sum()), layers, budget)


def _largest(rank: Callable[[float, _Layer], int], layers: Mapping[str, _Layer], budget: float) -> dict[str, int]:
    """The ranks of the largest share that fits the budget, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(40):
        share = (low + high) / 2
        fits = sum(layer.params(rank(share, layer)) for layer in layers.values()) <= budget
        low, high = (share, high) if fits else (low, share)
    return {name: rank(low, layer) for name, layer in layers.items()}


def _energy_ranks(layers: Mapping[str, _Layer], budget: float) -> dict[str, int]:
    gains = sorted(
        ((float(energy) / layer.cost, name) for name, layer in layers.items() for energy in layer.energies[1:]),
        reverse=True,
    )
    ranks, spent = dict.fromkeys(layers, 1), sum(layer.params(1) for layer in layers.values())
    for _, name in gains:
        layer = layers[name]
        spent += layer.params(ranks[name] + 1) - layer.params(ranks[name])
        if spent > budget:
            break
        ranks[name] += 1
    return ranks


@torch.inference_mode()
def _layers(model: nn.Module, images: Tensor) -> dict[str, _Layer]:
    """Every linear layer and ungrouped convolution, with what the second moment of its inputs says of its weight."""
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }
    moments: dict[str, Tensor] = {}
    positions = dict.fromkeys(modules, 0)

    def add(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = _rows(module, inputs[0]).double()  # in float32 a sum may have negative eigenvalues beyond the ridge
        moments[name] = moments.get(name, torch.zeros(())) + rows.T @ rows
        positions[name] += len(rows)

    handles = [module.register_forward_pre_hook(partial(add, name)) for name, module in modules.items()]
    for batch in images.split(BATCH):
        model(batch)
    for handle in handles:
        handle.remove()
    return {
        name: _layer(modules[name].weight, moment, positions[name] // len(images)) for name, moment in moments.items()
    }


def _layer(weight: Tensor, moment: Tensor, positions: int) -> _Layer:
    matrix = weight.detach().double().flatten(1)
    ridge = RIDGE * moment.diagonal().mean().clamp_min(1e-12)
    root = torch.linalg.cholesky(moment + ridge * torch.eye(len(moment), dtype=moment.dtype))
    vectors, values, _ = torch.linalg.svd(matrix @ root, full_matrices=False)
    return _Layer(matrix, vectors, values.square() / values.square().sum(), positions)


def _rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """The inputs of a layer as rows: tokens of a linear layer, patches of a convolution."""
    if isinstance(module, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    assert isinstance(module, nn.Conv2d)
    if isinstance(module.padding, str) or any(module.padding):
        pad = module._reversed_padding_repeated_twice
        inputs = functional.pad(inputs, pad)
    if module.kernel_size == (1, 1):
        inputs = inputs[..., :: module.stride[0], :: module.stride[1]]
        return inputs.movedim(1, -1).reshape(-1, inputs.shape[1])
    patches = functional.unfold(inputs, module.kernel_size, module.dilation, stride=module.stride)
    return patches.movedim(1, -1).reshape(-1, patches.shape[1])
