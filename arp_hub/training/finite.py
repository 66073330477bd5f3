"""Find the layer in which values first become NaN or infinite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def weights_not_finite(model: nn.Module) -> str:
    """The first weight or statistic that is NaN or infinite, in words; empty if all are finite."""
    return _first(model.state_dict())


def _first(tensors: Mapping[str, Tensor]) -> str:
    named = [(name, value) for name, value in tensors.items() if value.is_floating_point()]
    if not named:
        return ""
    finite = torch.stack([value.isfinite().all() for _, value in named]).tolist()
    bad = [name for (name, _), good in zip(named, finite, strict=True) if not good]
    if not bad:
        return ""
    layer, _, tensor = bad[0].rpartition(".")
    return f"layer '{layer}' is the first with such values in its {tensor} ({len(bad)} of {len(named)} tensors)"


@torch.no_grad()
def first_not_finite(model: nn.Module, images: Tensor) -> str:
    """The first layer whose output becomes NaN or infinite on a batch, in words.

    Runs the batch once more, which may change the statistics of BatchNorm: for a model that is given up.

    Args:
        model: The model, as it was when it failed.
        images: The batch that it failed on.
    """
    if bad := _first(dict(model.named_parameters())):  # the failed pass has spoilt the statistics already
        return bad
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        return hook

    handles = [
        module.register_forward_hook(look(name))
        for name, module in model.named_modules()
        if name and not any(module.children())
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"layer '{found[0]}' is the first whose output is not finite, with finite weights"
    return "all weights and outputs are finite now"
