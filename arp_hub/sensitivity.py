"""How much a layer matters: the error at the network's own output when that layer alone is decomposed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .calibration import Images, batches, fast_layout

_IMAGES, _LEAST_IMAGES, _WORK = 64, 4, 2e12
"""Images that are looked at, at most and at least, and the multiply-accumulates that bound them. A few do, since layers
differ a hundredfold."""


class OutputProbe:
    """Errors at the output of a network with one layer replaced at a time. Nothing is back-propagated.

    Args:
        model: The dense network, in evaluation mode for as long as this is used.
        images: Calibration images; the first few are used.
        work: Multiply-accumulates of one image through the network, for all layers that are to be replaced.
    """

    def __init__(self, model: nn.Module, images: Images, work: float) -> None:
        self._model = model
        count = int(min(_IMAGES, max(_LEAST_IMAGES, _WORK / max(work, 1.0))))
        device, layout = next(model.parameters()).device, fast_layout(model, images)
        self._batches: list[Tensor] = []
        for batch in batches(images, device, layout):
            self._batches.append(batch[:count])
            count -= len(batch)
            if count <= 0:
                break
        self._outputs = [self._run(batch) for batch in self._batches]

    def error(self, layer: nn.Module, substitute: Callable[[Tensor], Tensor]) -> float:
        """Relative squared error of the network's output with ``substitute`` in the place of ``layer``."""

        def replace(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return substitute(args[0])

        hook = layer.register_forward_hook(replace)
        try:
            pairs = [(self._run(batch), exact) for batch, exact in zip(self._batches, self._outputs, strict=True)]
        finally:
            hook.remove()
        error = sum(float((found - exact).square().sum()) for found, exact in pairs)
        return error / max(sum(float(exact.square().sum()) for exact in self._outputs), torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def _run(self, batch: Tensor) -> Tensor:
        outputs = [leaf for leaf in tree_leaves(self._model(batch)) if isinstance(leaf, Tensor)]
        return torch.cat([output.flatten().double() for output in outputs])
