"""The divergence of a network's output with some of its layers replaced, on a few images.

For a classifier with logits ``z`` dense and ``z'`` with replaced layers, it is the mean over images of the
Kullback-Leibler divergence ``KL(softmax(z) || softmax(z'))``, in nats; for other networks ``||z - z'||^2 / ||z||^2``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..calibration.batchnorm import STATISTICS_PIXELS, InputStatistics, following, norms_with_statistics, observed
from ..calibration.images import Images, Place, batches
from ..calibration.output_metric import classifies
from ..effort import Effort

Substitute = Callable[[Tensor], Tensor]
"""A function that computes a layer's output from its input, in the layer's place."""


class OutputProbe:
    """Measures divergences of a network's output, without gradients.

    Args:
        model: The dense network, in evaluation mode for as long as this is used.
        images: Calibration images; the first few are used.
        work: Multiply-accumulates of one image through the network, for all layers that are to be replaced.
        effort: Bounds on the images and on the work. At least 4 images are used.

    Attributes:
        norms: The BatchNorms of the model that use stored statistics.
    """

    def __init__(self, model: nn.Module, images: Images, work: float, effort: Effort) -> None:
        self._model = model
        count = int(min(effort.sensitivity_images, max(4, effort.sensitivity_macs / max(work, 1.0))))
        self._batches = list(batches(images, Place.of(model, images), pixels=STATISTICS_PIXELS, most=count))
        self._originals = {norm: copy.deepcopy(norm) for norm in norms_with_statistics(model).values()}
        self.norms = frozenset(self._originals)
        self._statistics = [{norm: InputStatistics() for norm in self.norms} for _ in self._batches]
        self._outputs = []
        for batch, statistics in zip(self._batches, self._statistics, strict=True):
            with observed(statistics):
                self._outputs.append(self._run(batch))

    def divergence(
        self, substitutes: Mapping[nn.Module, Substitute], adapting: Collection[nn.Module] = frozenset()
    ) -> float:
        """The divergence of the output with ``substitutes`` in the place of layers.

        Args:
            substitutes: The functions by the layers that they replace.
            adapting: BatchNorms whose statistics follow their input, as those behind dense layers do once the model is
                decomposed.
        """

        def replace(substitute: Substitute, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return substitute(args[0])

        with ExitStack() as stack:
            for layer, new in substitutes.items():
                stack.callback(layer.register_forward_hook(partial(replace, new)).remove)
            stack.callback(self._reset_norms)
            found = []
            for batch, statistics in zip(self._batches, self._statistics, strict=True):
                followers = [
                    (norm, original, statistics[norm], InputStatistics())
                    for norm, original in self._originals.items()
                    if norm in adapting
                ]
                with following(followers, substitutes):
                    found.append(self._run(batch))
        if all(
            classifies(self._model, out, len(batch)) for out, batch in zip(self._outputs, self._batches, strict=True)
        ):
            return _divergence(torch.cat(self._outputs), torch.cat(found))
        error = sum(float((one - exact).square().sum()) for one, exact in zip(found, self._outputs, strict=True))
        return error / max(sum(float(exact.square().sum()) for exact in self._outputs), torch.finfo(torch.float32).tiny)

    def _reset_norms(self) -> None:
        for norm, original in self._originals.items():
            norm.load_state_dict(original.state_dict())

    @torch.no_grad()
    def _run(self, batch: Tensor) -> Tensor:
        """The output in double precision; several tensors are flattened into one."""
        leaves = [leaf for leaf in tree_leaves(self._model(batch)) if isinstance(leaf, Tensor)]
        return leaves[0].double() if len(leaves) == 1 else torch.cat([leaf.flatten().double() for leaf in leaves])


def _divergence(exact: Tensor, found: Tensor) -> float:
    """Mean Kullback-Leibler divergence of the predictions by logits ``found`` from those by ``exact``."""
    exact, found = exact.log_softmax(-1), found.log_softmax(-1)
    return float((exact.exp() * (exact - found)).sum(-1).mean())
