"""The layers that a pretrained_cfg names, and the factors that take their place.

timm expects the weights of ``pretrained_cfg["classifier"]`` and ``["first_conv"]`` in the state dict. The weight of a
low-rank layer is computed and not stored, so these entries name its factors.

timm's ``reset_classifier`` leaves the pretrained_cfg as it is. `decompose`, `to_dense`, saving and loading correct it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .low_rank import LowRankLayer

_FACTOR = re.compile(r"\.factors\.\d+$")
_KEYS = ("classifier", "first_conv")


def names_of(value: str | Iterable[str] | None) -> tuple[str, ...]:
    """The layers of an entry, which may be none, one or several; factors count as their layer."""
    names = (value,) if isinstance(value, str) else value or ()
    return tuple(dict.fromkeys(_FACTOR.sub("", name) for name in names))


def with_layer_names(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The cfg with the names of layers in place of their factors', as saved folders hold it."""
    return {key: _layers(value) if key in _KEYS else value for key, value in cfg.items()}


def name_factors(model: Any) -> None:
    """Let the pretrained_cfg of a model name the factors of its low-rank classifier and first convolution.

    A classifier is all of its factors; of a first convolution, only the first one reads the image.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if isinstance(cfg, Mapping):
        is_alias = getattr(model, "default_cfg", None) is cfg
        model.pretrained_cfg = {key: _factors(model, key, value) for key, value in cfg.items()}
        if is_alias:
            model.default_cfg = model.pretrained_cfg
    if isinstance(traits := getattr(model, "_traits", None), Mapping):
        model._traits = {key: _factors(model, key, value) for key, value in traits.items()}


def _layers(value: Any) -> Any:
    given = (value,) if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)) or not any(isinstance(one, str) and _FACTOR.search(one) for one in given):
        return value
    names = names_of(given)
    return names[0] if len(names) == 1 else names or value


def _factors(model: nn.Module, key: str, value: Any) -> Any:
    if key not in _KEYS or not value:
        return value
    modules = dict(model.named_modules(remove_duplicate=False))
    found: list[str] = []
    for name in names_of(value):
        layer = modules.get(name)
        count = len(layer.factors) if isinstance(layer, LowRankLayer) else 0
        chosen = range(min(count, 1) if key == "first_conv" else count)
        found += [f"{name}.factors.{number}" for number in chosen] or [name]
    return found[0] if len(found) == 1 else tuple(found)
