"""Build a model without drawing random weights that are overwritten at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_FILLS = frozenset({Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, nn.init.kaiming_uniform_, nn.init.normal_})
"""What the initialisers of torch and timm draw with (``erfinv_`` is the slow part of a truncated normal), and those
initialisers that come here whole."""


class SkipInit(TorchFunctionMode):
    """While this is active, parameters keep whatever is in their memory where they would be filled at random.

    For models all of whose parameters are then loaded. Buffers are filled as ever.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Pass over random fills of parameters; do everything else."""
        named = kwargs or {}
        if func in _FILLS:
            filled = args[0] if args else named.get("tensor")
            if isinstance(filled, nn.Parameter):
                return filled
        return func(*args, **named)
