"""Learning rates that fall from the last layer to the first, the same before and after decomposition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from timm.models import group_parameters
from timm.optim import auto_group_layers, param_groups_layer_decay
from torch import nn

from ..layers.model import low_rank_layers


def layer_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """The parameter groups of timm for layer decay. A factor is in the group of the dense weight that it replaces.

    Args:
        model: A dense or decomposed model.
        weight_decay: Weight decay of all parameters with two or more dimensions.
        layer_decay: Factor of the learning rate from each layer to the one before it.
    """
    view = cast(nn.Module, _DenseView(model))
    groups = param_groups_layer_decay(
        view, weight_decay, getattr(model, "no_weight_decay", set)(), layer_decay=layer_decay
    )
    return cast("list[dict[str, Any]]", groups)


class _DenseView:
    """A model's parameters under the names that they have in the dense model.

    timm's matchers know only those names. Factors of one layer share a name, which timm's grouping allows.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = list(low_rank_layers(model))
        self.parameters = [(_dense_name(name, layers), weight) for name, weight in model.named_parameters()]
        self.pretrained_cfg = getattr(model, "pretrained_cfg", None) or {}
        matcher = getattr(model, "group_matcher", None)
        if matcher:
            numbers = group_parameters(cast(nn.Module, self), matcher(coarse=False), reverse=True)
        else:
            numbers = auto_group_layers(_Unique(self))
        self.numbers = cast("dict[str, int]", numbers)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters by their dense names."""
        return iter(self.parameters)

    def group_matcher(self, coarse: bool = False) -> Any:
        """The number of a parameter's layer, by name."""
        return self.numbers.__getitem__


class _Unique:
    """A view with one parameter for each name, because `auto_group_layers` counts parameters."""

    def __init__(self, view: _DenseView) -> None:
        self.pretrained_cfg, self.parameters = view.pretrained_cfg, dict(view.parameters)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each name once, in the order of the model."""
        return iter(self.parameters.items())


def _dense_name(name: str, layers: list[str]) -> str:
    """The name that a parameter has in the dense model."""
    for layer in layers:
        if name.startswith(f"{layer}."):
            return f"{layer}.{name.rpartition('.')[2]}"
    return name
