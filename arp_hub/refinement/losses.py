"""What a refinement minimises: errors of blocks, and the divergence of the predictions.

With ``y (.., C)`` the output of a block of the dense model on an image, and ``y'`` that of the decomposed model's block
on its own input, the error of a block is::

    mean over channels c of  E (y_c - y'_c)^2 / Var(y_c)

The divergence is ``KL(softmax(z) || softmax(z'))`` of logits ``z``, in nats, the mean over images. For a network
without classes it is ``||z - z'||^2 / ||z - mean(z)||^2`` of its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..calibration.gradients import classifies


def divergence(model: nn.Module, exact: Any, found: Any, images: int) -> Tensor:
    """The divergence of a model's output from that of the dense model, a scalar.

    Args:
        model: Either model; it says how many classes there are.
        exact: Output of the dense model.
        found: Output of the decomposed model.
        images: Number of images.
    """
    if classifies(model, exact, images):
        wanted, given = exact.float().log_softmax(-1), found.float().log_softmax(-1)
        return (wanted.exp() * (wanted - given)).sum(-1).mean()
    pairs = list(zip(_tensors(exact), _tensors(found), strict=True))
    return torch.stack([_error(one, other, tuple(range(one.dim()))) for one, other in pairs]).mean()


def block_error(exact: Tensor, found: Tensor, channel: int) -> Tensor:
    """The error of a block's output, each channel over its variance.

    Args:
        exact: Output of the dense block.
        found: Output of the decomposed block.
        channel: The dimension of the channels.
    """
    channel %= exact.dim()
    if exact.numel() == exact.shape[channel]:  # the pooled features of one image: nothing says how much they vary
        return exact.new_zeros(())
    return _error(exact, found, tuple(place for place in range(exact.dim()) if place != channel))


def _error(exact: Tensor, found: Tensor, over: tuple[int, ...]) -> Tensor:
    exact, found = exact.float(), found.float()
    variance = exact.var(over, correction=0)
    # channels that hardly vary among these images would drown all others
    return ((exact - found).square().mean(over) / (variance + 1e-2 * variance.mean() + 1e-12)).mean()


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


class BlockTargets:
    """Compares the blocks of a decomposed model with those of the dense model, image by image.

    Args:
        dense: The dense model.
        student: The decomposed model.
        blocks: Names of consecutive blocks, which both models have.
    """

    def __init__(self, dense: nn.Module, student: nn.Module, blocks: Sequence[str]) -> None:
        self._dense, self._student, self._blocks = dense, student, blocks
        self._last = getattr(dense, "output_fmt", "NCHW") == "NHWC"
        self._targets: dict[str, Tensor] = {}

    @contextmanager
    def remembered(self) -> Iterator[None]:
        """Remember what the dense model's blocks give during the block."""
        with self._hooked(self._dense, self._remember):
            yield

    @contextmanager
    def compared(self, learn: Callable[[Tensor], None]) -> Iterator[None]:
        """Give ``learn`` the error of each block of the decomposed model as it runs.

        A block's output is cut off from the graph behind it, so that only this block learns from its error, and its
        activations are free as soon as ``learn`` has propagated it back.
        """
        try:
            with self._hooked(self._student, partial(self._compare, learn)):
                yield
        finally:
            self._targets.clear()

    @contextmanager
    def _hooked(self, model: nn.Module, hook: Callable[..., Tensor | None]) -> Iterator[None]:
        with ExitStack() as stack:
            for name in self._blocks:
                stack.callback(model.get_submodule(name).register_forward_hook(partial(hook, name)).remove)
            yield

    def _remember(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._targets[name] = output.clone()  # a module behind it may change it in place

    def _compare(
        self, learn: Callable[[Tensor], None], name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor:
        target = self._targets.pop(name)
        learn(block_error(target, output, -1 if target.dim() < 4 or self._last else 1))
        return output.detach()
