"""The names of a model's classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def label_names(model: nn.Module) -> tuple[str, ...]:
    """Names of a model's classes, in order; empty unless its pretrained_cfg has one for each class.

    timm notes them there, as a list or by the number of the class.
    """
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    found, classes = cfg.get("label_names"), getattr(model, "num_classes", None)
    if isinstance(found, Mapping):
        by_number = {str(number): name for number, name in found.items()}
        found = [by_number[number] for number in map(str, range(len(found))) if number in by_number]
    if not isinstance(found, (list, tuple)) or len(found) != classes:  # those of an earlier classifier
        return ()
    return tuple(map(str, found))
