"""Check an optimiser's state from a checkpoint before it is used: otherwise the first step fails with torch's words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.trace import meta_copy
from .checkpoint import Checkpoint, damaged

_KINDS = ((int, float, Tensor), (str,), (list, tuple), (dict,))
"""Types of values that may take each other's place."""


def check_optimizer_state(
    start: Checkpoint, model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    """Compare the optimiser's state in a checkpoint with the one that a new optimiser makes in its first step.

    That step runs on the meta device, where it takes no memory. An optimiser that cannot step there is checked less.

    Args:
        start: The checkpoint.
        model: The model that the optimiser trains.
        make: Makes the optimiser of a model.

    Raises:
        DamagedCheckpoint: Naming the value that is missing, or is of another type or shape.
    """
    twin = meta_copy(model)
    optimizer = make(twin)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in twin.named_parameters()}
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    groups = optimizer.state_dict()["param_groups"]
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # it reads a number of a meta tensor
        optimizer.step()
    for number, state in start.state["optimizer"].items():
        if not 0 <= number < len(parameters):
            raise damaged(start.path, f"it holds a state for parameter {number} of {len(parameters)}")
        parameter = parameters[number]
        if what := _differs(optimizer.state[parameter], state):
            raise damaged(start.path, f"the optimiser's state of '{names[id(parameter)]}' {what}")
    _check_groups(start, groups)


def _check_groups(start: Checkpoint, groups: Sequence[Mapping[str, Any]]) -> None:
    saved = start.state.get("groups")
    if saved is None:
        return
    if len(saved) != len(groups):
        raise damaged(start.path, f"it holds {len(saved)} groups of parameters, and the optimiser has {len(groups)}")
    for group, values in zip(groups, saved, strict=True):
        for name, value in values.items():
            if _kind(value) is not None and _kind(group.get(name)) not in (None, _kind(value)):
                raise damaged(start.path, f"'{name}' of a group of parameters is of type {type(value).__name__}")


def _differs(made: Mapping[str, Any], saved: Mapping[str, Any]) -> str | None:
    """How a saved state differs from the one that an optimiser makes. A saved state may hold more values."""
    for key, wanted in made.items():
        if key not in saved:
            return f"lacks '{key}'"
        value = saved[key]
        if _kind(wanted) is not None and _kind(value) not in (None, _kind(wanted)):
            return f"has '{key}' of type {type(value).__name__}"
        if isinstance(wanted, Tensor) and wanted.dim() and getattr(value, "shape", None) != wanted.shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else value
            return f"has '{key}' of shape {found}, and the optimiser needs {tuple(wanted.shape)}"
    return None


def _kind(value: Any) -> int | None:
    """The number of the kind that a value belongs to; None for values that may be anything."""
    return next((number for number, types in enumerate(_KINDS) if isinstance(value, types)), None)
