"""CUDA graphs: record the kernels of a pass once, then replay them.

They speed up small networks on a GPU, where launching kernels takes longer than running them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import ArpHubError

Forward = Callable[[Tensor], Tensor]


def recorded_training(model: nn.Module, images: Tensor) -> Forward:
    """A model's forward pass as a graph, its backward pass as another; parameters are read and trained in place.

    Args:
        model: The model in training mode, on a GPU. It is not changed and can still be called directly.
        images: A batch of the shape of all later ones.

    Raises:
        ArpHubError: If the model cannot be recorded, for example because its forward pass reads values on the CPU.
    """
    buffers = [buffer.clone() for buffer in model.buffers()]
    try:
        forward = torch.cuda.make_graphed_callables(_Apart(model), (images,), num_warmup_iters=3)
    except RuntimeError as error:
        raise _refusal(error) from error
    for buffer, before in zip(
        model.buffers(), buffers, strict=True
    ):  # undo what the warm-up did to BatchNorm statistics
        buffer.copy_(before)
    return cast(Forward, forward)


@torch.no_grad()
def recorded_inference(forward: Forward, images: Tensor) -> Forward:
    """A pass without gradients as a graph. Every call overwrites the result of the previous one.

    Args:
        forward: The pass.
        images: A batch of the shape of all later ones.

    Raises:
        ArpHubError: If it cannot be recorded.
    """
    given, graph, stream = images.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):  # a warm-up, in which libraries choose their kernels
                forward(given)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            found = forward(given)
    except RuntimeError as error:
        raise _refusal(error) from error

    def replay(images: Tensor) -> Tensor:
        given.copy_(images)
        graph.replay()
        return found

    return replay


class _Apart(nn.Module):
    """A wrapper around the model, so that recording replaces the wrapper's forward only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def _refusal(error: RuntimeError) -> ArpHubError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ArpHubError(f"cuda_graphs: this model cannot be recorded ({reason}): leave cuda_graphs out")
