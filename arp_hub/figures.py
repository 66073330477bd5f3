"""Size and cost of a model and of its dense form, counted on both."""

from __future__ import annotations

from typing import Any

from torch import nn

from .decompose import to_dense
from .errors import ArpHubError
from .layers import count_params, low_rank_layers
from .tracing import InputSize, count_macs, meta_copy


def model_figures(model: nn.Module, input_size: InputSize) -> dict[str, Any]:
    """Parameters and MACs, with those of the dense form and the kept share if the model is decomposed.

    Args:
        model: A timm model, decomposed or dense; it is left as it is.
        input_size: ``(channels, height, width)`` of the image that MACs are counted for.

    Returns:
        ``params``, ``macs`` (absent where the model cannot be traced), ``input_size``, and for a decomposed model
        ``dense`` and ``kept``, each with ``params`` and ``macs``.
    """
    figures: dict[str, Any] = {**_count(model, input_size), "input_size": list(input_size)}
    if low_rank_layers(model):
        dense = _count(to_dense(meta_copy(model)), input_size)
        figures["dense"] = dense
        figures["kept"] = {key: round(figures[key] / dense[key], 4) for key in dense if key in figures}
    return figures


def _count(model: nn.Module, input_size: InputSize) -> dict[str, int]:
    try:
        return {"params": count_params(model), "macs": count_macs(model, input_size)}
    except ArpHubError:
        return {"params": count_params(model)}
