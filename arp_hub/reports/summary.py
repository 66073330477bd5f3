"""What a plan or a model comes to, layer by layer and in all: parameters, multiply-accumulates, spectra."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, cast

from torch import nn

from ..decomposition import to_dense
from ..errors import ArpHubError
from ..layers.apply_plan import apply_plan, check_plan, plan_of
from ..layers.dense import refusal
from ..layers.low_rank import layer_shape
from ..layers.model import check_model, count_params, low_rank_layers, other_parameters, weight_layers
from ..layers.trace import InputSize, Trace, meta_copy, trace
from ..plan import RankPlan
from ..schemes.shapes import ConvSpec, LayerShape, Pair, chain_macs
from .spectra import Spectrum


def model_sizes(
    model: nn.Module, input_size: InputSize, reasons: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Parameters and MACs; for a decomposed model also its dense form, the kept share, and every layer.

    Args:
        model: A timm model, decomposed or dense; it is left as it is.
        input_size: ``(channels, height, width)`` of the image that MACs are counted for.
        reasons: Why layers stay dense, by name, as a plan gives them; the model itself does not know.

    Returns:
        ``params``, ``bytes`` of all weights, ``macs`` (absent where the model cannot be traced) and ``input_size``. A
        decomposed model adds ``dense`` and ``kept``, each with ``params``, ``bytes`` and ``macs``, and ``layers``: the
        fields of `LayerReport` for each layer, in the order of the model (none where the dense form cannot be traced).
    """
    figures: dict[str, Any] = {**_count(model, _traced(model, input_size)), "input_size": list(input_size)}
    if low_rank_layers(model):
        twin = to_dense(meta_copy(model))
        found = _traced(twin, input_size)
        figures["dense"] = dense = _count(twin, found)
        figures["kept"] = {key: round(figures[key] / dense[key], 4) for key in dense if key in figures}
        plan = RankPlan(plan_of(model).layers, dict(reasons))
        figures["layers"] = [asdict(row) for row in _layer_reports(twin, plan, found)] if found else []
    return figures


def _traced(model: nn.Module, input_size: InputSize) -> Trace | None:
    try:
        return trace(model, input_size)
    except ArpHubError:
        return None


def _count(model: nn.Module, found: Trace | None) -> dict[str, int]:
    size = {"params": count_params(model), "bytes": sum(tensor.nbytes for tensor in model.state_dict().values())}
    return {**size, "macs": found.macs} if found else size


@dataclass(frozen=True)
class LayerReport:
    """What a plan does to one layer, or to a parameter of the model itself. Biases are left out; MACs are of one image.

    Attributes:
        name: Dotted name.
        shape: The dense layer in words, such as ``64 -> 128, 3x3 /2``.
        scheme: The scheme, or None for a layer that stays dense.
        groups: Blocks that the scheme makes, or None.
        rank: Rank per block, or None.
        params: Weights before.
        params_after: Weights after.
        macs: Multiply-accumulates before, None if the model does not call the layer.
        macs_after: Multiply-accumulates after.
        reason: Why the layer stays dense, None if it does not.
    """

    name: str
    shape: str
    scheme: str | None
    groups: int | None
    rank: int | None
    params: int
    params_after: int
    macs: int | None
    macs_after: int | None
    reason: str | None


@dataclass(frozen=True)
class PlanReport:
    """What a plan does to a model; the totals are counted on the model, biases, norms and all the rest included."""

    layers: tuple[LayerReport, ...]
    params: int
    params_after: int
    macs: int
    macs_after: int

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def plan_report(model: nn.Module, plan: RankPlan, input_size: InputSize | None = None) -> PlanReport:
    """Work out what ``plan`` does to every layer of a dense ``model``, which is left as it is.

    Raises:
        ArpHubError: If the plan does not fit the model, or the model cannot run on the input size.
    """
    check_model(model)
    check_plan(model, plan)
    before = trace(model, input_size)
    after = trace(apply_plan(meta_copy(model), plan), input_size)
    layers = tuple(_layer_reports(model, plan, before))
    return PlanReport(layers, before.params, after.params, before.macs, after.macs)


def _layer_reports(model: nn.Module, plan: RankPlan, before: Trace) -> list[LayerReport]:
    """One row for each layer of a dense model, and for each parameter of the model itself."""
    schemes = check_plan(model, plan)
    layers = []
    for name, module in weight_layers(model):
        sizes = before.sizes.get(name)
        if name in schemes:
            entry, scheme = plan.layers[name], schemes[name]
            convs, shape = scheme.convs(entry.rank), scheme.shape
            layers.append(
                LayerReport(
                    name,
                    _describe(shape),
                    entry.scheme,
                    entry.groups,
                    entry.rank,
                    shape.params,
                    scheme.params(entry.rank),
                    _macs((shape.as_conv(),), sizes),
                    _macs(convs, sizes),
                    None,
                )
            )
        else:
            reason = plan.dense.get(name) or refusal(module) or "not decomposed"
            layers.append(_dense_report(name, module, reason, sizes))
    for name, parameter in other_parameters(model):
        reason = plan.dense.get(name, "no layer's weight")
        size, count = "x".join(map(str, parameter.shape)), parameter.numel()
        layers.append(LayerReport(name, size, None, None, None, count, count, None, None, reason))
    return layers


@dataclass(frozen=True)
class SpectrumReport:
    """One layer's spectrum in figures, ranks per block.

    Attributes:
        name: Dotted name.
        shape: The dense layer in words.
        full_rank: Rank that represents the layer exactly.
        rank_90: Rank that keeps 90 % of the energy.
        rank_99: Rank that keeps 99 % of the energy.
        stable_rank: Energy over the largest squared singular value.
        scheme: Scheme that the layer is decomposed by, or planned to be; None if dense.
        groups: Blocks of that scheme.
        rank: Its rank.
        violation: Relative squared distance from the planned rank, None without a plan.
    """

    name: str
    shape: str
    full_rank: int
    rank_90: int
    rank_99: int
    stable_rank: float
    scheme: str | None = None
    groups: int | None = None
    rank: int | None = None
    violation: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def spectrum_reports(
    model: nn.Module, spectra: Mapping[str, Spectrum], plan: RankPlan, violations: Mapping[str, float]
) -> list[SpectrumReport]:
    """Put spectra into figures.

    Args:
        model: The model that they are of.
        spectra: Spectra by layer.
        plan: A plan of the model, or the one that a decomposed model embodies; may be empty.
        violations: Violations by layer, where a plan is held against a dense model.
    """
    reports = []
    for name, spectrum in spectra.items():
        entry = plan.layers.get(name)
        reports.append(
            SpectrumReport(
                name,
                _describe(layer_shape(model.get_submodule(name))),
                spectrum.full_rank,
                spectrum.energy_rank(0.90),
                spectrum.energy_rank(0.99),
                spectrum.stable_rank,
                entry.scheme if entry else None,
                entry.groups if entry else None,
                entry.rank if entry else None,
                violations.get(name),
            )
        )
    return reports


def _dense_report(name: str, module: nn.Module, reason: str, sizes: tuple[Pair, ...] | None) -> LayerReport:
    params = sum(p.numel() for n, p in module.named_parameters(recurse=False) if n.startswith("weight"))
    shape, macs = type(module).__name__, None
    if isinstance(module, nn.Linear | nn.Conv2d):
        conv = _dense_shape(module)
        shape, macs = _describe(conv), _macs((conv.as_conv(),), sizes)
    return LayerReport(name, shape, None, None, None, params, params, macs, macs, reason)


def _dense_shape(module: nn.Linear | nn.Conv2d) -> LayerShape:
    if refusal(module) is None:
        return layer_shape(module)
    if isinstance(module, nn.Linear):
        return LayerShape(module.out_features, module.in_features, kind="linear")
    return LayerShape(
        module.out_channels,
        module.in_channels,
        cast(Pair, module.kernel_size),
        cast(Pair, module.stride),
        (0, 0) if isinstance(module.padding, str) else cast(Pair, module.padding),
        cast(Pair, module.dilation),
        module.groups,
    )


def _describe(shape: LayerShape) -> str:
    text = f"{shape.in_channels} -> {shape.out_channels}"
    if shape.kind == "linear":
        return text
    text += f", {shape.kernel_size[0]}x{shape.kernel_size[1]}"
    if shape.stride != (1, 1):
        text += f" /{shape.stride[0]}" if shape.stride[0] == shape.stride[1] else f" /{shape.stride}"
    return text + (f", {shape.groups} groups" if shape.groups > 1 else "")


def _macs(convs: Iterable[ConvSpec], sizes: tuple[Pair, ...] | None) -> int | None:
    chain = tuple(convs)
    return None if sizes is None else sum(chain_macs(chain, size) for size in sizes)
