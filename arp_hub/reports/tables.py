"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ..timing import Spread
from .benchmark import Benchmark
from .summary import PlanReport, SpectrumReport


def plan_table(report: PlanReport, title: str | None = None) -> Table:
    """The decomposed layers of a plan as a table, with the whole model in its last line."""
    table = _table(title, ("layer", "shape", "scheme"), ("groups", "rank", "params", "after", "kept", "MACs", "after"))
    for layer in report.layers:
        if layer.scheme is not None:
            _add(
                table,
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
    _add(table, "whole model", "", "", "", "", *sizes, *macs, style="bold")
    return table


def dense_table(report: PlanReport, title: str | None = None) -> Table:
    """The layers that stay dense, each with its reason."""
    table = _table(title, ("layer", "shape"), ("params",), ("stays dense because",))
    for layer in report.layers:
        if layer.scheme is None:
            _add(table, layer.name, layer.shape, _number(layer.params), layer.reason)
    return table


def spectrum_table(reports: Iterable[SpectrumReport], title: str | None = None) -> Table:
    """Spectra in figures as a table."""
    numbers = ("full rank", "90 %", "99 %", "stable", "rank", "violation")
    table = _table(title, ("layer", "shape"), numbers[:4], ("scheme",), numbers[4:])
    for layer in reports:
        scheme = layer.scheme or ""
        _add(
            table,
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


def comparison_table(rows: Mapping[str, Mapping[str, Any]], title: str | None = None) -> Table:
    """Figures side by side, such as accuracy and size before and after: one column for each key of ``rows``."""
    keys = list(dict.fromkeys(key for figures in rows.values() for key in figures))
    table = _table(title, ("",), tuple(rows))
    for key in keys:
        _add(table, key, *(_figure(figures.get(key)) for figures in rows.values()))
    return table


def latency_table(found: Iterable[Benchmark], title: str | None = None) -> Table:
    """Latency beside that of the dense form, one line a batch size: medians, quartiles in brackets."""
    columns = ("batch", "ms", "dense ms", "ratio", "images/s")
    table = _table(title, ("device", "numbers"), columns)
    for one in found:
        kind = one.workload.where + (", channels last" if one.workload.channels_last else "")
        threads = f", {one.threads} thread{'s' if one.threads > 1 else ''}" if one.device == "cpu" else ""
        _add(
            table,
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


def _table(title: str | None, *columns: tuple[str, ...]) -> Table:
    """An empty table; groups of columns alternate between text, set left, and numbers, set right."""
    table = Table(
        title=None if title is None else _cell(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for k, group in enumerate(columns):
        for name in group:
            table.add_column(_cell(name), justify="right" if k % 2 else "left", overflow="fold")
    return table


def printable(text: str) -> str:
    """The text with its control characters spelled out, so that a name cannot send commands to the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _cell(text: str) -> Text:
    """Text that rich shows as it is: brackets are not markup."""
    return Text(printable(text))


def _add(table: Table, *cells: str | None, style: str | None = None) -> None:
    table.add_row(*(_cell(cell or "") for cell in cells), style=style)


def _before_after(before: int, after: int) -> tuple[str, str, str]:
    return _number(before), _number(after), f"{after / max(1, before):.0%}"


def _number(value: int | None) -> str:
    """A count in four characters or so: 999, 12.3k, 4.56M, 7.89G."""
    if value is None:
        return "not called"
    if value < 1e4:
        return str(value)
    # what would round to 1000k is 1M
    factor, suffix = next(one for one in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= 0.9995 * one[0])
    return f"{value / factor:.3g}{suffix}"


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return _number(value) if isinstance(value, int) else f"{value:.2f}"
