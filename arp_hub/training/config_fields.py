"""One setting of a run: its declaration as a dataclass field, and the check of its type and limits."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._utils.parse import shown
from ..errors import ArpHubError
from ..models.arguments import plain_arguments, read_arguments

GROUPS = ("model and data", "budget", "phases", "optimisation", "augmentation", "loss and averaging", "run")
"""Headings of the settings, in the order of ``--help``."""


def setting(group: str, default: Any, help: str, **limits: Any) -> Any:
    """A field with its heading, its help, and its limits.

    Args:
        group: One of `GROUPS`.
        default: The default value.
        help: What the setting does.
        **limits: ``low``, ``high``, ``above``, ``below`` or ``choices``. ``bare`` is the value of an option that stands
            without one. ``needs`` lists settings without any of which this one has no effect.
    """
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **limits})


def nearest(name: str, known: list[str]) -> str:
    """The end of an error message: the known name most similar to ``name``, or where to find all names."""
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return f": did you mean '{near[0]}'?" if near else " (--help lists all settings)"


def checked(field: dataclasses.Field[Any], hints: Mapping[str, Any], value: Any) -> Any:
    """A value converted to the type of its setting, within its limits. The command line and YAML may give text.

    Args:
        field: The setting.
        hints: The types of all settings, by name.
        value: The value.

    Raises:
        ArpHubError: If the value is of another type, or not allowed.
    """
    value = _parsed(field.name, *_kind(hints[field.name]), value)
    _check_limits(field, value)
    return value


def without_effect(values: Mapping[str, Any], fields: tuple[dataclasses.Field[Any], ...]) -> dict[str, tuple[str, ...]]:
    """Settings that are not at their default, and whose needs are all off: their needs, by name."""
    found = {}
    for field in fields:
        needs = field.metadata.get("needs", ())
        if needs and values[field.name] != field.default and not any(values[name] for name in needs):
            found[field.name] = needs
    return found


def check_needs(values: Mapping[str, Any], fields: tuple[dataclasses.Field[Any], ...]) -> None:
    """Refuse a setting that has no effect because the settings that it needs are off.

    Raises:
        ArpHubError: Naming both.
    """
    for name, needs in without_effect(values, fields).items():
        off = " and ".join(f"{need}={values[need]}" for need in needs)
        raise ArpHubError(
            f"{name}={values[name]} has no effect with {off}: set {' or '.join(needs)}, or leave {name} out"
        )


def _parsed(name: str, kind: Any, optional: bool, value: Any) -> Any:
    if value is None and optional:
        return None
    if kind is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items):
            return tuple(part.strip() for item in items for part in item.split(",") if part.strip())
    elif kind is dict:
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return plain_arguments(value, name)
        if isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value):
            return read_arguments(value, name)
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is str:
        if isinstance(value, (str, Path)):
            return str(value)
    elif not isinstance(value, bool):
        try:
            number = kind(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is not None and (isinstance(value, str) or number == value):
            return number
    names = {
        tuple: "a list of words",
        dict: "a table of NAME: VALUE",
        bool: "true or false",
        str: "text",
        int: "a whole number",
        float: "a number",
    }
    raise ArpHubError(f"{name} must be {names[kind]}, got {shown(value)}")


def _kind(hint: Any) -> tuple[Any, bool]:
    """The plain type of an annotation, and whether None is allowed."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
        return typing.get_origin(hint) or hint, True
    return typing.get_origin(hint) or hint, False


def _check_limits(field: dataclasses.Field[Any], value: Any) -> None:
    limits = field.metadata
    if choices := limits.get("choices"):
        for item in value if isinstance(value, tuple) else (value,):
            if item not in choices:
                raise ArpHubError(f"{field.name}: unknown value '{item}': choose from {', '.join(choices)}")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    tests = {
        "low": ("at least", value >= limits.get("low", value)),
        "above": ("above", value > limits.get("above", -math.inf)),
        "high": ("at most", value <= limits.get("high", value)),
        "below": ("below", value < limits.get("below", math.inf)),
    }
    if not math.isfinite(value) or not all(holds for _, holds in tests.values()):
        allowed = " and ".join(f"{words} {limits[name]}" for name, (words, _) in tests.items() if name in limits)
        raise ArpHubError(f"{field.name} must be {allowed or 'finite'}, got {value}")
