"""Figures of a run: curves over its epochs, violations, and ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from .plots import (
    COLOURS,
    FLOOR,
    MUTED,
    STRONG,
    blues,
    colour_scale,
    legend,
    name_rows,
    new_figure,
    number,
    short,
    style,
)


def curves_figure(curves: Mapping[str, Mapping[int, Any]], label: str, *, from_lowest: bool = False) -> Any:
    """Draw one value over the epochs of a run, with one curve for each name.

    Args:
        curves: Value by epoch, by name. A value that is not a finite number leaves a gap.
        label: Label of the vertical axis.
        from_lowest: Start the axis at the lowest value.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    figure = new_figure(width=5.2, height=3)
    axes = figure.subplots()
    for (name, points), colour in zip(curves.items(), itertools.cycle(COLOURS), strict=False):
        values = list(map(number, points.values()))
        # A point on the edge of the axes is drawn whole.
        axes.plot(list(points), values, color=colour, marker=".", markersize=7, label=name, clip_on=False, zorder=3)
    axes.set(xlabel="epoch", ylabel=label)
    _whole_epochs(axes, [epoch for points in curves.values() for epoch in points])
    axes.ticklabel_format(axis="y", useOffset=False)
    finite = [value for points in curves.values() for value in map(number, points.values()) if math.isfinite(value)]
    if from_lowest and finite and min(finite) < max(finite):
        axes.set_ylim(bottom=min(finite))
    legend(axes)
    style(axes)
    return figure


def violations_figure(violations: Mapping[str, Mapping[int, Any]]) -> Any:
    """Draw the violation of every layer at every epoch as a heatmap on a log scale; zero is blank.

    Args:
        violations: Violation by epoch, by layer.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    from matplotlib.colors import LogNorm

    epochs = [epoch for values in violations.values() for epoch in values]
    first, last = min(epochs), max(epochs)
    rows = [[number(values.get(epoch)) for epoch in range(first, last + 1)] for values in violations.values()]
    cells = [[min(max(value, FLOOR), 1.0) if value > 0 else math.nan for value in row] for row in rows]
    figure = new_figure(width=5.2, height=1.3 + 0.2 * len(rows))
    axes = figure.subplots()
    extent = (first - 0.5, last + 0.5, len(rows) - 0.5, -0.5)
    image = axes.imshow(
        cells, cmap=blues(), norm=LogNorm(FLOOR, 1), extent=extent, aspect="auto", interpolation="nearest"
    )
    axes.set_xlabel("epoch")
    _whole_epochs(axes, epochs)
    label = f"violation, log scale; the palest is {FLOOR:.0e} or less".replace("e-0", "e-")
    colour_scale(figure, image, axes, label, location="top", aspect=40, pad=0.02)
    style(axes)
    name_rows(axes, list(violations))
    return figure


def rank_bars_figure(layers: Mapping[str, tuple[Any, str]]) -> Any:
    """Draw the rank of every decomposed layer as a bar, with a text beside it.

    Args:
        layers: Rank of one group, and the text, by layer.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    ranks, texts = [number(rank) for rank, _ in layers.values()], [short(text) for _, text in layers.values()]
    largest = max([1.0, *(rank for rank in ranks if rank > 0)])
    figure = new_figure(width=5.2, height=0.7 + 0.2 * len(ranks))
    axes = figure.subplots()
    bars = axes.barh(range(len(ranks)), ranks, height=0.75, color=STRONG)
    axes.bar_label(bars, texts, padding=4, fontsize=9, color=MUTED, parse_math=False)
    axes.set(xlabel="rank (of one group, where a layer has groups)", xlim=(0, largest), ylim=(len(ranks) - 0.5, -0.5))
    style(axes)
    name_rows(axes, list(layers))
    return figure


def _whole_epochs(axes: Any, epochs: list[int]) -> None:
    """Ticks at whole epochs only, also where there is one epoch."""
    from matplotlib.ticker import MaxNLocator

    if epochs:
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
