"""What a plan or a model comes to, layer by layer: as plain data, and as tables for the terminal."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from rich import box
from rich.table import Table
from torch import nn

from .bench import Benchmark
from .dense import refusal
from .layers import layer_shape, other_parameters, weight_layers
from .plan import RankPlan
from .shapes import ConvSpec, LayerShape, Pair, chain_macs
from .spectra import Spectrum
from .structure import apply_plan, check_plan
from .timing import Spread
from .tracing import InputSize, trace


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
    schemes = check_plan(model, plan)
    before = trace(model, input_size)
    smaller = apply_plan(copy.deepcopy(model).to("meta"), plan)
    after = trace(smaller, input_size)
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
            reason = plan.dense.get(name) or refusal(module) or "the plan does not name it"
            layers.append(_dense_report(name, module, reason, sizes))
    for name, parameter in other_parameters(model):
        reason = plan.dense.get(name, "no layer's weight")
        size, count = "x".join(map(str, parameter.shape)), parameter.numel()
        layers.append(LayerReport(name, size, None, None, None, count, count, None, None, reason))
    return PlanReport(tuple(layers), before.params, after.params, before.macs, after.macs)


def plan_table(report: PlanReport, title: str | None = None) -> Table:
    """The decomposed layers of a plan as a table, with the whole model in its last line."""
    table = _table(title, ("layer", "shape", "scheme"), ("groups", "rank", "params", "after", "kept", "MACs", "after"))
    for layer in report.layers:
        if layer.scheme is not None:
            table.add_row(
                layer.name,
                layer.shape,
                layer.scheme,
                str(layer.groups),
                str(layer.rank),
                *_before_after(layer.params, layer.params_after),
                _number(layer.macs),
                _number(layer.macs_after),
            )
    table.add_section()
    sizes = _before_after(report.params, report.params_after)
    macs = (_number(report.macs), _number(report.macs_after))
    table.add_row("whole model", "", "", "", "", *sizes, *macs, style="bold")
    return table


def dense_table(report: PlanReport, title: str | None = None) -> Table:
    """The layers that stay dense, each with its reason."""
    table = _table(title, ("layer", "shape"), ("params",), ("stays dense because",))
    for layer in report.layers:
        if layer.scheme is None:
            table.add_row(layer.name, layer.shape, _number(layer.params), layer.reason)
    return table


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


def spectrum_table(reports: Iterable[SpectrumReport], title: str | None = None) -> Table:
    """Spectra in figures as a table."""
    numbers = ("full rank", "90 %", "99 %", "stable", "rank", "violation")
    table = _table(title, ("layer", "shape"), numbers[:4], ("scheme",), numbers[4:])
    for layer in reports:
        scheme = layer.scheme or ""
        table.add_row(
            layer.name,
            layer.shape,
            str(layer.full_rank),
            str(layer.rank_90),
            str(layer.rank_99),
            f"{layer.stable_rank:.1f}",
            f"{scheme} x{layer.groups}" if layer.groups and layer.groups > 1 else scheme,
            "" if layer.rank is None else str(layer.rank),
            "" if layer.violation is None else f"{layer.violation:.2e}",
        )
    return table


def figures_table(rows: Mapping[str, Mapping[str, Any]], title: str | None = None) -> Table:
    """Figures side by side, such as accuracy and size before and after: one column for each key of ``rows``."""
    keys = list(dict.fromkeys(key for figures in rows.values() for key in figures))
    table = _table(title, ("",), tuple(rows))
    for key in keys:
        table.add_row(key, *(_figure(figures.get(key)) for figures in rows.values()))
    return table


def latency_table(found: Iterable[Benchmark], title: str | None = None) -> Table:
    """Latency beside that of the dense form, one line a batch size: medians, quartiles in brackets."""
    columns = ("batch", "ms", "dense ms", "ratio", "images/s")
    table = _table(title, ("device", "numbers"), columns)
    for one in found:
        kind = one.workload.dtype + (", channels last" if one.workload.channels_last else "")
        threads = f", {one.threads} threads" if one.device == "cpu" else ""
        table.add_row(
            one.device + threads + (", compiled" if one.compiled else ""),
            kind,
            str(one.workload.batch_size),
            _spread(one.latency.scaled(1e3)),
            _spread(one.dense and one.dense.scaled(1e3)),
            _spread(one.ratio),
            f"{one.throughput:.1f}",
        )
    return table


def _spread(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.3g} ({spread.low:.3g} - {spread.high:.3g})"


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


def _table(title: str | None, *columns: tuple[str, ...]) -> Table:
    """An empty table; groups of columns alternate between text, set left, and numbers, set right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for k, group in enumerate(columns):
        for name in group:
            table.add_column(name, justify="right" if k % 2 else "left", overflow="fold")
    return table


def _before_after(before: int, after: int) -> tuple[str, str, str]:
    return _number(before), _number(after), f"{after / max(1, before):.0%}"


def _number(value: int | None) -> str:
    """A count in four characters or so: 999, 12.3k, 4.56M, 7.89G."""
    if value is None:
        return "not called"
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= factor:
            return f"{value / (1e3 if suffix == 'k' else factor):.3g}{suffix}"
    return str(value)


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return _number(value) if isinstance(value, int) else f"{value:.2f}"
