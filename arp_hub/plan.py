"""The plan: scheme, rank and groups of every layer to decompose, as plain JSON.

A plan file looks like this::

    {"format_version": 1,
     "layers": {"layer1.0.conv1": {"scheme": "cp", "rank": 16, "groups": 1}},
     "dense": {"conv1": "first convolution"},
     "model": {"architecture": "resnet18", "shapes": {"layer1.0.conv1": "64x64x3x3"}}}

``dense`` gives the reason for every layer that stays dense. ``model`` is optional: with it, the plan is refused for
another model. An unknown key is ignored with a warning. If the file lists that key in ``requires``, the file is
refused, and the message says how to upgrade.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ._utils.files import read_text, write_atomically
from ._utils.parse import parse_json, shown
from .errors import ArpHubError, checked_path
from .schemes import SCHEMES

FORMAT_VERSION = 1
"""The newest plan format that this version reads, and the one that it writes."""

BETTER_DENSE = "the budget is better spent with this layer dense"
"""The reason for a layer that could be decomposed, but whose parameters are worth more than those of other layers."""

_UPGRADE = "upgrade with `pip install --upgrade arp-hub`"
_MOST_LAYERS = 20_000
"""Layers of a plan at most, because plans of strangers are read. The largest timm model has about a thousand."""
_PLAN_KEYS = frozenset({"format_version", "layers", "dense", "model", "requires"})
_MODEL_KEYS = frozenset({"architecture", "shapes"})
_LAYER_KEYS = frozenset({"scheme", "rank", "groups"})


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is decomposed.

    Attributes:
        scheme: Name of a scheme, one of `arp_hub.schemes.SCHEMES`.
        rank: Rank of every block, at least 1.
        groups: Number of blocks that the scheme makes, 1 except for ``group_in`` and ``group_out``.

    Raises:
        ArpHubError: If a value is out of range for any layer. `decompose` checks whether it fits the model's layer.
    """

    scheme: str
    rank: int
    groups: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.scheme, str) or self.scheme not in SCHEMES:
            raise ArpHubError(f"unknown scheme {shown(self.scheme)}: choose one of {', '.join(SCHEMES)}")
        for name, value in (("rank", self.rank), ("groups", self.groups)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArpHubError(f"{name} must be a whole number of at least 1, got {shown(value)}")
        if self.groups > 1 and not SCHEMES[self.scheme].grouped:
            grouped = ", ".join(name for name, scheme in SCHEMES.items() if scheme.grouped)
            raise ArpHubError(f"scheme '{self.scheme}' makes no groups, got groups={self.groups}: use {grouped}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"scheme": self.scheme, "rank": self.rank, "groups": self.groups}


@dataclass(frozen=True)
class PlannedModel:
    """The model that a plan was made for.

    Attributes:
        architecture: Its timm name without a tag, or its class and number of layers where timm did not create it.
        shapes: The shapes of the planned layers' weights by dotted name, such as ``"64x64x3x3"``.
    """

    architecture: str
    shapes: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"architecture": self.architecture, "shapes": dict(self.shapes)}


@dataclass(frozen=True)
class RankPlan:
    """Scheme, rank and groups of every layer of one model that is to be decomposed.

    Two plans are equal if their layers and reasons are, whatever model they note.

    Attributes:
        layers: The decomposed layers by dotted name.
        dense: The layers that stay dense, each with its reason.
        model: The model that the plan was made for. `decompose` refuses another one. None fits any model.

    Example:
        >>> plan = RankPlan({"layer1.0.conv1": LayerPlan("cp", rank=16)})
        >>> RankPlan.from_json(plan.to_json()) == plan
        True
    """

    layers: Mapping[str, LayerPlan] = field(default_factory=dict)
    dense: Mapping[str, str] = field(default_factory=dict)
    model: PlannedModel | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))
        object.__setattr__(self, "dense", MappingProxyType(dict(self.dense)))
        for name, layer in self.layers.items():
            if not isinstance(layer, LayerPlan):
                raise ArpHubError(
                    f"layer '{name}' of a plan must be a LayerPlan, got {shown(layer)}: RankPlan.from_dict reads the "
                    "JSON form"
                )

    def __hash__(self) -> int:
        return hash((frozenset(self.layers.items()), frozenset(self.dense.items())))

    def __reduce__(self) -> tuple[Any, ...]:  # a mapping proxy can be neither pickled nor copied
        return RankPlan, (dict(self.layers), dict(self.dense), self.model)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "format_version": FORMAT_VERSION,
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
            "dense": dict(self.dense),
            **({} if self.model is None else {"model": self.model.to_dict()}),
        }

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically.

        Raises:
            ArpHubError: If it cannot be written there.
        """
        path = checked_path(path, "path")
        try:
            write_atomically(path, self.to_json() + "\n")
        except (OSError, ValueError) as error:
            raise ArpHubError(f"cannot write the plan '{path}': {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RankPlan:
        """Read a plan file.

        Raises:
            ArpHubError: If there is no such file, or it does not hold a plan.
        """
        path = checked_path(path, "path")
        try:
            text = read_text(path, 2**24)
        except (OSError, ValueError) as error:
            raise ArpHubError(f"cannot read the plan '{path}': {error}") from error
        try:
            return cls.from_json(text)
        except ArpHubError as error:
            raise ArpHubError(f"cannot read the plan '{path}': {error}") from error

    @classmethod
    def from_json(cls, text: str) -> RankPlan:
        """Parse a plan from JSON text; raises as `from_dict` does."""
        try:
            data = parse_json(text)
        except ValueError as error:  # also for numbers of thousands of digits
            raise ArpHubError(f"the plan is not valid JSON: {error}") from error
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Any) -> RankPlan:
        """Build a plan from its JSON form.

        Raises:
            ArpHubError: If a key is missing, of the wrong type, or required by the file and unknown here.
        """
        if not isinstance(data, Mapping):
            raise ArpHubError(f"a plan is a JSON object, got {shown(data)}")
        if "format_version" not in data:
            raise ArpHubError("it holds no plan, because it has no format_version: `arp-hub plan` writes plans")
        version = data["format_version"]
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise ArpHubError(f"the plan's format_version must be a whole number from 1, got {shown(version)}")
        if version > FORMAT_VERSION:
            raise ArpHubError(
                f"the plan has format_version {version}, this arp_hub reads up to {FORMAT_VERSION}: {_UPGRADE}"
            )
        requires = data.get("requires", [])
        if not isinstance(requires, list) or not all(isinstance(key, str) for key in requires):
            raise ArpHubError(f"the plan's 'requires' must be a list of key names, got {shown(requires)}")
        layers, dense = data.get("layers"), data.get("dense", {})
        if not isinstance(layers, Mapping):
            raise ArpHubError(f"the plan's 'layers' must be an object of layer plans, got {shown(layers)}")
        if not isinstance(dense, Mapping) or not all(isinstance(reason, str) for reason in dense.values()):
            raise ArpHubError(f"the plan's 'dense' must be an object of reasons, got {shown(dense)}")
        if len(layers) + len(dense) > _MOST_LAYERS:
            raise ArpHubError(f"the plan names {len(layers) + len(dense)} layers, more than the {_MOST_LAYERS} allowed")
        _check_keys(data, _PLAN_KEYS, requires, "the plan")
        model = None if data.get("model") is None else _model_from_dict(data["model"], requires)
        return cls({name: _layer_from_dict(name, value, requires) for name, value in layers.items()}, dense, model)


def _layer_from_dict(name: str, data: Any, requires: list[str]) -> LayerPlan:
    if not isinstance(data, Mapping):
        raise ArpHubError(f"layer {shown(name)}: its plan must be an object, got {shown(data)}")
    _check_keys(data, _LAYER_KEYS, requires, f"layer {shown(name)}")
    if missing := {"scheme", "rank"} - data.keys():
        raise ArpHubError(f"layer {shown(name)}: its plan lacks {', '.join(sorted(missing))}")
    try:
        return LayerPlan(data["scheme"], data["rank"], data.get("groups", 1))
    except ArpHubError as error:
        raise ArpHubError(f"layer {shown(name)}: {error}") from None


def _model_from_dict(data: Any, requires: list[str]) -> PlannedModel:
    if not isinstance(data, Mapping):
        raise ArpHubError(f"the plan's 'model' must be an object, got {shown(data)}")
    _check_keys(data, _MODEL_KEYS, requires, "the plan's 'model'")
    architecture, shapes = data.get("architecture"), data.get("shapes", {})
    if not isinstance(architecture, str):
        raise ArpHubError(f"the plan's 'model' must name its architecture, got {shown(architecture)}")
    if not isinstance(shapes, Mapping) or not all(isinstance(shape, str) for shape in shapes.values()):
        raise ArpHubError(f"the plan's 'model' must hold the shapes of layers as texts by name, got {shown(shapes)}")
    if len(shapes) > _MOST_LAYERS:
        raise ArpHubError(f"the plan's 'model' holds {len(shapes)} shapes, more than the {_MOST_LAYERS} allowed")
    return PlannedModel(architecture, dict(shapes))


def _check_keys(data: Mapping[str, Any], known: frozenset[str], requires: list[str], owner: str) -> None:
    unknown = [key for key in data if key not in known]
    if needed := [key for key in unknown if key in requires]:
        raise ArpHubError(f"{owner} requires {shown(needed)}, which this arp_hub does not know: {_UPGRADE}")
    if unknown:
        warnings.warn(
            f"{owner} holds {shown(unknown)}, which this arp_hub does not know and ignores; to use it, {_UPGRADE}",
            stacklevel=4,
        )
