"""Size and cost of a model and of its dense form, counted on both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from .decompose import to_dense
from .errors import ArpHubError
from .layers import count_params, low_rank_layers
from .plan import RankPlan
from .structure import plan_of
from .tracing import InputSize, count_macs, meta_copy


def model_figures(model: nn.Module, input_size: InputSize) -> dict[str, Any]:
    """Parameters and MACs, with those of the dense form and the kept share if the model is decomposed.

    Args:
        model: A timm model, decomposed or dense; it is left as it is.
        input_size: ``(channels, height, width)`` of the image that MACs are counted for.

    Returns:
        ``params``, ``bytes`` of all weights, ``macs`` (absent where the model cannot be traced), ``input_size``, and
        for a decomposed model ``dense`` and ``kept``, each with ``params``, ``bytes`` and ``macs``.
    """
    figures: dict[str, Any] = {**_count(model, input_size), "input_size": list(input_size)}
    if low_rank_layers(model):
        dense = _count(to_dense(meta_copy(model)), input_size)
        figures["dense"] = dense
        figures["kept"] = {key: round(figures[key] / dense[key], 4) for key in dense if key in figures}
    return figures


def layer_figures(model: nn.Module, input_size: InputSize, reasons: Mapping[str, str]) -> list[dict[str, Any]]:
    """What became of every layer of a decomposed model: scheme, rank, sizes, or the reason why it stays dense.

    Args:
        model: A decomposed model; it is left as it is.
        input_size: As for `model_figures`.
        reasons: Why layers stay dense, by name, as a plan gives them; the model itself does not know.

    Returns:
        Rows as `arp_hub.report.LayerReport` has them, in the order of the model; none if it cannot be traced.
    """
    from .report import plan_report  # late: tables for the terminal are nothing that every import should pay for

    plan = RankPlan(plan_of(model).layers, dict(reasons))
    try:
        return [asdict(row) for row in plan_report(to_dense(meta_copy(model)), plan, input_size).layers]
    except ArpHubError:
        return []


def _count(model: nn.Module, input_size: InputSize) -> dict[str, int]:
    size = {"params": count_params(model), "bytes": sum(tensor.nbytes for tensor in model.state_dict().values())}
    try:
        return {**size, "macs": count_macs(model, input_size)}
    except ArpHubError:
        return size
