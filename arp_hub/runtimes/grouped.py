"""Grouped linear layers as convolutions, which every runtime quantises.

`GroupedLinear` multiplies blocks by one batched product. The quantiser of ONNX Runtime leaves batched products in
float32, and that of torchao convolutions of one dimension.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..layers.low_rank import GroupedLinear


class ConvolvedLinear(nn.Module):
    """A grouped linear layer as an ``nn.Conv2d`` of size 1 over the tokens."""

    def __init__(self, linear: GroupedLinear) -> None:
        super().__init__()
        inputs, outputs, bias = linear.in_features, linear.out_features, linear.bias
        self.conv = nn.Conv2d(inputs, outputs, 1, groups=linear.groups, bias=bias is not None)
        self.conv.load_state_dict(
            {"weight": linear.weight[..., None, None], **({} if bias is None else {"bias": bias})}
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to the last dimension of ``(N, ..., in_features)``."""
        tokens = x.reshape(x.shape[0], -1, x.shape[-1]).transpose(1, 2)
        return self.conv(tokens[..., None])[..., 0].transpose(1, 2).reshape(*x.shape[:-1], -1)


@torch.no_grad()
def with_convolutions(model: nn.Module) -> nn.Module:
    """A copy of a model whose grouped linear layers are convolutions: same outputs up to rounding."""
    found = copy.deepcopy(model)
    for module in list(found.modules()):
        for name, child in module.named_children():
            if isinstance(child, GroupedLinear):
                setattr(module, name, ConvolvedLinear(child))
    return found.requires_grad_(False).eval()
