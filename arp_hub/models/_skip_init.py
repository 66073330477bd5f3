"""Skip the random initialisation of weights that are loaded afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_FILLS = frozenset({Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, nn.init.kaiming_uniform_, nn.init.normal_})
"""Functions that fill a tensor at random. ``erfinv_`` is the slow part of a truncated normal."""


class SkipInit(TorchFunctionMode):
    """While this is active, parameters are not filled at random: they keep uninitialised memory.

    Use it only if all parameters are loaded afterwards. Buffers are filled as usual.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Skip random fills of parameters, and run every other function."""
        named = kwargs or {}
        if func in _FILLS:
            filled = args[0] if args else named.get("tensor")
            if isinstance(filled, nn.Parameter):
                return filled
        return func(*args, **named)
