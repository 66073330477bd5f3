"""The charts docs/img/accuracy*.png, which `accuracy.py table` draws from results/accuracy.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

NETWORKS = {
    "resnet20": "ResNet-20\nCIFAR-10",
    "resnet56": "ResNet-56\nCIFAR-10",
    "lite0": "EfficientNet-Lite0\nImageNet",
}
METHODS = {
    "svd": ("plain SVD", "#7a7a72"),
    "weights": ("weights alone", "#e08a1e"),
    "fit": ("fit on images", "#2a78d6"),
    "train": ("penalty training", "#1d7a46"),
}
"""Name and colour of every method, by the first part of its rows' names; `train` is for all training."""
OURS = ("fit", "train")
"""Methods drawn with a bold line."""
LOWEST, HIGHEST = -16.0, 2.0
"""Points of top-1 that the axis spans. Lower results are marked at its bottom with their number."""
TIMED = {
    "resnet20": ("ResNet-20, CIFAR-10", "#2a78d6"),
    "vit": ("ViT-S/14, CIFAR-10", "#8a4fbf"),
    "lite0": ("EfficientNet-Lite0, ImageNet", "#1d7a46"),
    "mobilenetv2": ("MobileNetV2, ImageNet", "#e08a1e"),
}
"""Name and colour of the networks in the chart over time."""
_INK, _MUTED, _GRID, _SURFACE = "#0b0b0b", "#52514e", "#e1e0d9", "#fcfcfb"

Results = Mapping[str, Mapping[str, Any]]


def write_chart(results: Results, path: Path) -> None:
    """Draw the chart: the difference of top-1 to the dense model over the parameters kept, one panel a network."""
    path.parent.mkdir(exist_ok=True)
    chart(results).savefig(path, dpi=200)


def chart(results: Results) -> Figure:
    """The figure. All panels have the same scale on both axes: an inch is as many points and per cent everywhere."""
    points = {network: _points(results, network) for network in NETWORKS}
    points = {network: found for network, found in points.items() if found}
    spans = {network: _span(found) for network, found in points.items()}
    figure = Figure(figsize=(5.2, 3.9), layout="constrained", facecolor=_SURFACE)
    widths = [high - low for low, high in spans.values()]
    panels = figure.subplots(1, len(points), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axes, (network, found) in zip(panels, points.items(), strict=True):
        _panel(axes, found, spans[network], NETWORKS[network])
    _name_lines(panels[0], next(iter(points.values())))
    _write(panels[-1], "dense model", (panels[-1].get_xlim()[1], 0.0), (-2, 2), "right", "bottom", _INK)
    panels[0].set_ylabel("top-1 against the dense model, points", fontsize=9.5, color=_MUTED)
    figure.supxlabel("parameters kept, %", fontsize=9.5, color=_MUTED)
    return figure


def write_time_chart(results: Results, path: Path) -> None:
    """Draw the chart of top-1 over CPU time: the fit, then the fit refined for more and more minutes."""
    path.parent.mkdir(exist_ok=True)
    time_chart(results).savefig(path, dpi=200)


def time_chart(results: Results) -> Figure:
    """The figure: one line a network, from its fit to its longest refinement."""
    figure = Figure(figsize=(5.2, 3.6), layout="constrained", facecolor=_SURFACE)
    axes = figure.subplots()
    for network, keep in timed_networks(results).items():
        (name, colour), pairs = TIMED[network], _over_time(results, network, keep)
        label = f"{name}, {100 * keep:.0f} % kept"
        axes.plot(*zip(*pairs, strict=True), color=colour, linewidth=1.8, marker="o", markersize=3.5, label=label)
    axes.axhline(0, color=_INK, linewidth=0.8)
    _plain(axes)
    axes.legend(loc="upper left", frameon=False, fontsize=8.5, labelcolor="linecolor", borderaxespad=1.2)
    axes.set_xlim(left=0)
    axes.set_ylabel("top-1 against the dense model, points", fontsize=9.5, color=_MUTED)
    axes.set_xlabel("minutes of one CPU thread: plan, fit, refinement", fontsize=9.5, color=_MUTED)
    return figure


def timed_networks(results: Results) -> dict[str, float]:
    """The networks that were refined for several times, each with the share of parameters that it keeps."""
    return {row["network"]: row["keep"] for name, row in results.items() if name.startswith("refine-")}


def _over_time(results: Results, network: str, keep: float) -> list[tuple[float, float]]:
    """Minutes of planning, fitting and refining, and points of top-1 gained."""
    pairs = []
    for name, row in results.items():
        kind = name.split("/")[0]
        if (row["network"], row["keep"]) == (network, keep) and (
            kind in ("fit", "refine") or kind.startswith("refine-")
        ):
            seconds = row["seconds_plan"] + row["seconds_decompose"] + row.get("refinement", {}).get("seconds", 0.0)
            pairs.append((seconds / 60, row["top1"] - row["dense"]["top1"]))
    return sorted(pairs)


def _points(results: Results, network: str) -> dict[str, list[tuple[float, float]]]:
    """Per cent of the parameters kept and points of top-1 gained, of every method that the network has rows of."""
    found: dict[str, list[tuple[float, float]]] = {}
    for method in METHODS:
        rows = [row for name, row in results.items() if _shows(method, name, row) and row["network"] == network]
        pairs = [(100 * row["params"] / row["dense"]["params"], row["top1"] - row["dense"]["top1"]) for row in rows]
        if pairs:
            found[method] = sorted(pairs, reverse=True)
    return found


def _shows(method: str, name: str, row: Mapping[str, Any]) -> bool:
    """Whether a row belongs to a method. Of all trainings, it is the one whose model is stored."""
    return "model_folder" in row if method == "train" else name.split("/")[0] == method


def _span(points: Mapping[str, list[tuple[float, float]]]) -> tuple[float, float]:
    """The shares of parameters that a panel shows, with room for names at the right."""
    kept = [x for pairs in points.values() for x, _ in pairs]
    return min(kept) - 10, max(kept) + 6


def _panel(axes: Axes, points: Mapping[str, list[tuple[float, float]]], span: tuple[float, float], title: str) -> None:
    for method, pairs in points.items():
        width = 2.2 if method in OURS else 1.4
        colour = METHODS[method][1]
        axes.plot(*zip(*pairs, strict=True), color=colour, linewidth=width, marker="o", markersize=3.5)
    axes.axhline(0, color=_INK, linewidth=0.8)
    axes.set(xlim=span[::-1], ylim=(LOWEST, HIGHEST))
    axes.set_title(title, loc="left", fontsize=9.5, color=_INK)
    _plain(axes)
    axes.yaxis.set_major_locator(MultipleLocator(2))
    axes.xaxis.set_major_locator(MultipleLocator(10))
    _name_results_below(axes, points)


def _plain(axes: Axes) -> None:
    """A grid without a frame, and points with their sign."""
    axes.set_facecolor(_SURFACE)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=_MUTED, labelsize=9, length=0)
    axes.yaxis.set_major_formatter(lambda value, _: _points_of(value))


def _name_lines(axes: Axes, points: Mapping[str, list[tuple[float, float]]]) -> None:
    """Write the name of each method beside its line. The best one is above the dense model's, where no line is."""
    for method, pairs in points.items():
        name, colour = METHODS[method]
        name = "\n".join(name.rsplit(" ", 1))
        inside = [pair for pair in pairs if pair[1] > LOWEST]
        if method == list(points)[-1]:
            best = max(0.0, *(y for _, y in pairs))
            _write(axes, METHODS[method][0], (axes.get_xlim()[1], best), (-2, 2), "right", "bottom", colour)
        elif len(inside) == len(pairs):  # the end of the line is in the picture
            _write(axes, name, pairs[-1], (0, -5), "center", "top", colour)
        elif inside:
            _write(axes, name, _crossing(pairs, LOWEST / 2), (-5, 0), "right", "center", colour)


def _name_results_below(axes: Axes, points: Mapping[str, list[tuple[float, float]]]) -> None:
    """Write the results of methods that are all below the axis, in the corner where no line is."""
    leaving = [_crossing(pairs, LOWEST)[0] for pairs in points.values() if pairs[0][1] > LOWEST > pairs[-1][1]]
    left, right = axes.get_xlim()
    low = not leaving or max(leaving) < (left + right) / 2
    texts = []
    for method, pairs in points.items():
        if max(y for _, y in pairs) <= LOWEST:
            ends = " to ".join(_points_of(round(y)) for y in (pairs[0][1], pairs[-1][1]))
            texts.append((f"{METHODS[method][0]}:\n{ends} \N{DOWNWARDS ARROW}", METHODS[method][1]))
    for line, (text, colour) in enumerate(texts):
        if low:
            _write(axes, text, (left, LOWEST), (3, 3 + 26 * line), "left", "bottom", colour)
        else:
            _write(axes, text, (right, 0.0), (-2, -4 - 26 * line), "right", "top", colour)


def _crossing(pairs: Sequence[tuple[float, float]], height: float) -> tuple[float, float]:
    """Where a falling line crosses a height."""
    for (x, y), (right, below) in pairwise(pairs):
        if y >= height >= below:
            return x + (right - x) * (y - height) / (y - below), height
    return pairs[-1]


def _write(
    axes: Axes,
    text: str,
    place: tuple[float, float],
    offset: tuple[float, float],
    across: Literal["left", "center", "right"],
    along: Literal["top", "center", "bottom"],
    colour: str,
) -> None:
    """Write a text at a place of the data, moved by an offset in points."""
    axes.annotate(
        text, place, offset, textcoords="offset points", ha=across, va=along, color=colour, fontsize=9, linespacing=1.0
    )


def _points_of(value: float) -> str:
    """Points with their sign: +2, 0, \N{MINUS SIGN}16."""
    return f"{value:+g}".replace("-", "\N{MINUS SIGN}") if value else "0"
