"""Figures of a model: ranks, spectra, and the violations during its training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ArpHubError
from .plots import (
    COLOURS,
    FLOOR,
    INK,
    MID,
    MUTED,
    PALE,
    STRONG,
    blues,
    colour_scale,
    legend,
    name_columns,
    name_rows,
    new_figure,
    number,
    short,
    style,
)
from .spectra import Spectrum

_SMALLEST = 1e-3
"""Singular values below this share of the largest are drawn at this value: they hold a millionth of its energy."""
_TALLEST = 12
"""Height in inches of a picture with one row a layer. With 60 layers or fewer, every row has the height of a text."""
_SENSES = {"cp": "kernel slices", "tucker2": "channel modes"}
"""What a scheme without a matrix truncates first. All others truncate a matrix."""


def spectra_figure(
    spectra: Mapping[str, Spectrum], ranks: Mapping[str, int] | None = None, title: str = "Singular values"
) -> Any:
    """Draw the spectra by depth, log scale, and below them the ranks of every layer.

    Args:
        spectra: Spectra by layer, first layer first, all of one fold.
        ranks: Ranks to mark, of the scheme of that fold.
        title: Title of the figure.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ArpHubError: If there is nothing to draw, or matplotlib is missing.
    """
    if not spectra:
        raise ArpHubError("there are no spectra to draw: the model has no layer that can be decomposed")
    figure = new_figure(width=10 + max(0, len(spectra) - 60) * 0.08)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK)
    decay, bars = figure.subplots(2, 1)
    colours = _depths(len(spectra))
    for depth, spectrum in enumerate(spectra.values(), start=1):
        values = spectrum.values.double()
        mean = (values / values[:, :1].clamp_min(1e-30)).mean(0).tolist()
        x = [k / max(1, len(mean) - 1) for k in range(len(mean))]
        decay.plot(x, [max(value, FLOOR) for value in mean], color=colours.to_rgba(depth), linewidth=1.2)
    decay.set(yscale="log", xlim=(0, 1), xlabel="index / full rank", ylabel="singular value / largest")
    style(decay, "Decay of each layer's singular values")
    _depth_scale(figure, decay, colours)
    _draw_ranks(bars, spectra, ranks or {})
    return figure


def ranks_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Draw the rank, and the parameters before and after, of every decomposed layer, one row a layer.

    Args:
        rows: The decomposed ones of a model's layers, as ``metrics.json`` lists them under ``layers``.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    height = min(0.2, _TALLEST / len(rows))
    size = min(8.0, 60 * height)
    figure = new_figure(width=6.4, height=0.9 + height * len(rows))
    ranks, sizes = figure.subplots(1, 2, sharey=True)
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    for scheme, colour in zip(schemes, itertools.cycle(COLOURS), strict=False):
        mine = [(k, row["rank"], row["groups"]) for k, row in enumerate(rows) if row["scheme"] == scheme]
        bars = ranks.barh([k for k, *_ in mine], [rank for _, rank, _ in mine], 0.75, color=colour, label=short(scheme))
        texts = [f"{rank} x {groups}" if groups > 1 else str(rank) for _, rank, groups in mine]
        ranks.bar_label(bars, texts, padding=2, fontsize=size, color=MUTED)
    for key, colour, label in (("params", PALE, "dense"), ("params_after", STRONG, "compressed")):
        sizes.barh(range(len(rows)), [row[key] for row in rows], 0.75, color=colour, label=label)
    sizes.xaxis.set_major_formatter(lambda value, _: _count(value))
    ranks.margins(x=0.2)  # room for the numbers
    for axes, label in (
        (ranks, "rank, x groups where there are any" if _grouped(rows) else "rank"),
        (sizes, "weights"),
    ):
        axes.set(xlabel=label, ylim=(len(rows) - 0.5, -0.5))
        legend(axes, columns=3)
        style(axes)
        axes.tick_params(labelsize=8)
        name_rows(axes, [row["name"] for row in rows], size)
        axes.grid(axis="x", color="#e1e0d9", linewidth=0.6)
    return figure


def decays_figure(spectra: Mapping[str, Mapping[str, Any]], cuts: Mapping[str, tuple[str, Any]]) -> Any:
    """Draw the singular values of every layer in its own scheme, and where the plan cuts them.

    Args:
        spectra: Spectra by layer, as `decays` gives them of the dense model.
        cuts: Scheme, and rank of one group, by layer.

    Returns:
        A ``matplotlib.figure.Figure`` with one panel for each scheme.
    """
    shown = [name for name in spectra if name in cuts] or list(spectra)
    colours = _depths(len(shown))
    schemes = list(dict.fromkeys(cuts.get(name, ("",))[0] for name in shown))
    columns = min(2, len(schemes))
    lines = math.ceil(len(schemes) / columns)
    figure = new_figure(width=6.4, height=0.6 + 2.8 * lines)
    panels = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for axes, scheme in zip(panels, schemes, strict=False):
        for depth, name in enumerate(shown, start=1):
            of, rank = cuts.get(name, ("", math.nan))
            if of == scheme:
                _draw_cut(axes, spectra[name], number(rank), colours.to_rgba(depth))
        axes.set(yscale="log", xlim=(0, 1.01), ylim=(_SMALLEST * 0.8, 1.5), xlabel="rank / full rank")
        axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))  # longer labels touch those of the next panel
        style(axes, f"{scheme}: {_SENSES[scheme]}" if scheme in _SENSES else scheme)
    for axes in panels[len(schemes) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel("singular value / largest")
    _depth_scale(figure, panels, colours)
    return figure


def violation_figure(history: Sequence[Mapping[str, Any]]) -> Any:
    """Draw the violation of the rank constraints over training: every layer faintly, their mean boldly.

    Args:
        history: Epochs with ``step``, ``stage``, ``violation`` and ``violations``, as ``metrics.json`` lists them.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    figure = new_figure(width=6.4, height=3.4)
    axes = figure.subplots()
    steps = [entry["step"] for entry in history]
    for name in history[0].get("violations", {}):
        values = [max(entry["violations"][name], FLOOR) for entry in history]
        axes.plot(steps, values, color=MID, linewidth=0.7, alpha=0.7)
    means = [max(entry["violation"], FLOOR) for entry in history]
    axes.plot(steps, means, color=STRONG, linewidth=2, marker="o", markersize=4, label="mean over layers")
    if hold := next((entry["step"] for entry in history if entry.get("stage") == "hold"), None):
        axes.axvline(hold, color=MUTED, linewidth=1, linestyle=":", label="hold: low rank after every pull")
    axes.set(yscale="log", xlabel="optimiser step", ylabel="relative violation")
    legend(axes)
    style(axes)
    return figure


def moved(history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether violations changed in training by more than rounding: only then `violation_figure` shows something."""
    means = [entry["violation"] for entry in history]
    return len(means) > 1 and max(means) > max(10 * FLOOR, 2 * min(means))


def _draw_cut(axes: Any, spectrum: Mapping[str, Any], rank: float, colour: Any) -> None:
    """One layer's singular values: the kept ones in colour, those that the plan cuts in grey, a dot at the rank."""
    values = [max(value, _SMALLEST) if value == value else value for value in map(number, spectrum["values"])]
    full, last = spectrum["full_rank"], max(1, len(values) - 1)
    ranks = [1 + k * (full - 1) / last for k in range(len(values))]
    kept = [(x / full, y) for x, y in zip(ranks, values, strict=True) if not x > rank]
    if kept and math.isfinite(rank) and len(kept) < len(values):
        before, after = kept[-1][1], values[len(kept)]
        part = (rank - ranks[len(kept) - 1]) / (ranks[len(kept)] - ranks[len(kept) - 1])
        cut = (rank / full, before ** (1 - part) * after**part)  # the axis is logarithmic
        rest = [cut, *((x / full, y) for x, y in zip(ranks[len(kept) :], values[len(kept) :], strict=True))]
        kept.append(cut)
        axes.plot(*zip(*rest, strict=True), color=PALE, linewidth=0.8, zorder=1)
        axes.plot(*cut, marker="o", markersize=3.5, color=colour, zorder=3)
    if kept:
        axes.plot(*zip(*kept, strict=True), color=colour, linewidth=1.1, zorder=2)


def _depths(count: int) -> Any:
    """Colours of ``count`` layers by depth, the first layer palest."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(1, max(2, count)), blues())


def _depth_scale(figure: Any, axes: Any, colours: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(integer=True, min_n_ticks=1)
    colour_scale(figure, colours, axes, "layer, first to last", pad=0.01, ticks=ticks)


def _draw_ranks(axes: Any, spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> None:
    names = list(spectra)
    positions = range(len(names))
    heights = (
        ("full rank", PALE, [1.0] * len(names)),
        ("99 % of the energy", MID, [s.energy_rank(0.99) / s.full_rank for s in spectra.values()]),
        ("90 % of the energy", STRONG, [s.energy_rank(0.90) / s.full_rank for s in spectra.values()]),
    )
    for label, colour, values in heights:
        axes.bar(positions, values, width=0.8, color=colour, label=label)
    marked = [(k, ranks[name] / spectra[name].full_rank) for k, name in enumerate(names) if name in ranks]
    if marked:
        x, y = zip(*marked, strict=True)
        axes.scatter(x, y, marker="_", s=max(12, 4000 / len(names)), linewidth=2, color=INK, label="rank chosen")
    axes.set(ylabel="rank / full rank", xlim=(-0.6, len(names) - 0.4))
    name_columns(axes, names)
    legend(axes)
    style(axes, "Ranks of each layer")


def _grouped(rows: Sequence[Mapping[str, Any]]) -> bool:
    return any(row["groups"] > 1 for row in rows)


def _count(value: float) -> str:
    """A number of weights on an axis: 500, 20k, 1.5M."""
    for factor, unit in ((1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"
