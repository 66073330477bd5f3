"""How much a layer matters: the error at the network's own output when that layer alone is decomposed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .calibration import Images, batches, fast_layout

_IMAGES, _LEAST_IMAGES, _WORK = 64, 8, 2e12
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
        """What the network's output loses with ``substitute`` in the place of ``layer``.

        The divergence of the predictions for a classifier, else the relative squared error of all outputs.
        """

        def replace(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return substitute(args[0])

        hook = layer.register_forward_hook(replace)
        try:
            found = [self._run(batch) for batch in self._batches]
        finally:
            hook.remove()
        outputs, exact = torch.cat(found), torch.cat(self._outputs)
        return _divergence(outputs, exact) if self._is_classifier(exact) else _relative_error(outputs, exact)

    @torch.no_grad()
    def _run(self, batch: Tensor) -> Tensor:
        """The output for one batch: a table as it is, anything else in a row."""
        outputs = [leaf.double() for leaf in tree_leaves(self._model(batch)) if isinstance(leaf, Tensor)]
        if len(outputs) == 1 and outputs[0].dim() == 2:
            return outputs[0]
        return torch.cat([output.flatten() for output in outputs])

    def _is_classifier(self, output: Tensor) -> bool:
        """Whether an output holds logits, not pooled features, which timm's models give with ``num_classes=0``."""
        return output.dim() == 2 and output.shape[1] > 1 and getattr(self._model, "num_classes", None) != 0


def _divergence(found: Tensor, exact: Tensor) -> float:
    """Mean Kullback-Leibler divergence of the predictions from the exact ones, in nats."""
    found, exact = found.log_softmax(-1), exact.log_softmax(-1)
    return float((exact.exp() * (exact - found)).sum(-1).mean())


def _relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).square().sum() / exact.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
