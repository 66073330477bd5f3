"""NaN and infinite values: notice them without waiting for a GPU, and name the layer where they begin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.sharding import all_finite


def fetched(value: Tensor) -> Callable[[], float]:
    """Start copying a number to the CPU. Call the result for the number: it waits for the copy only."""
    if value.device.type != "cuda":
        return value.item
    here = torch.empty((), pin_memory=True).copy_(value.detach(), non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def number() -> float:
        copied.synchronize()
        return here.item()

    return number


@torch.no_grad()
def weights_not_finite(model: nn.Module) -> str:
    """A description of the first weight or statistic that is NaN or infinite; empty if all are finite.

    All processes call it together if the weights are sharded.
    """
    return _first(model.state_dict())


def _first(tensors: Mapping[str, Tensor]) -> str:
    named = [(name, value) for name, value in tensors.items() if value.is_floating_point()]
    if not named:
        return ""
    finite = all_finite([value for _, value in named])
    bad = [name for (name, _), good in zip(named, finite, strict=True) if not good]
    if not bad:
        return ""
    layer, _, tensor = bad[0].rpartition(".")
    return f"layer '{layer}' is the first with such values in its {tensor} ({len(bad)} of {len(named)} tensors)"


@torch.no_grad()
def first_not_finite(model: nn.Module, images: Tensor) -> str:
    """A description of the first layer whose output becomes NaN or infinite on a batch.

    It runs the batch again, which may change the statistics of BatchNorm: do not train the model afterwards.

    Args:
        model: The model that failed, unchanged since.
        images: The batch that it failed on.
    """
    if bad := _first(dict(model.named_parameters())):  # not the buffers: the failed pass has changed the statistics
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
        return f"layer '{found[0]}' is the first whose output is not finite, although its weights are"
    return "all weights and outputs are finite when the batch is run again"
