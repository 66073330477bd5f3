"""Figures of a model and of a run: spectra, ranks, violations, curves. Needs the extra ``plots``."""

from __future__ import annotations

import importlib.util
import io
import itertools
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.dom import minidom

from .._utils.files import atomic_path
from ..errors import ArpHubError, checked_path
from .spectra import Spectrum

_SURFACE, _INK, _MUTED, _GRID = "#fcfcfb", "#0b0b0b", "#52514e", "#e1e0d9"
_FULL, _HIGH, _LOW, _PLANNED = "#e1e0d9", "#86b6ef", "#2a78d6", "#0b0b0b"
_COLOURS = ("#2a78d6", "#e08a1e", "#3f9c6b", "#a05cc0", "#c94f4f", "#7a7a72")
"""Colours of the schemes, and of the curves, in the order in which they appear."""
_FLOOR = 1e-7
"""Relative singular values and violations below this are drawn at this value: they are rounding error in float32."""


def spectra_figure(
    spectra: Mapping[str, Spectrum], ranks: Mapping[str, int] | None = None, title: str = "Singular values"
) -> Any:
    """Draw the spectra by depth, log scale, and below them the ranks of every layer.

    Args:
        spectra: Spectra by layer, first layer first, all of one fold.
        ranks: Ranks to mark, of a plan or of a decomposed model, each of its own scheme: one of ``cp`` may exceed
            the full rank of the fold that is drawn.
        title: Title of the figure.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ArpHubError: If there is nothing to draw, or matplotlib is missing.
    """
    if not spectra:
        raise ArpHubError("there are no spectra to draw: the model has no layer that can be decomposed")
    figure = _figure(width=10 + max(0, len(spectra) - 60) * 0.08)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, color=_INK)
    decay, bars = figure.subplots(2, 1)
    _draw_decay(figure, decay, spectra)
    _draw_ranks(bars, spectra, ranks or {})
    return figure


def ranks_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Draw the rank and the parameters, before and after, of every decomposed layer.

    Args:
        rows: The decomposed ones of a model's layers, as ``metrics.json`` lists them under ``layers``.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    figure = _figure(width=10, height=6)
    ranks, sizes = figure.subplots(2, 1, sharex=True)
    names, positions = [row["name"] for row in rows], range(len(rows))
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    for scheme, colour in zip(schemes, itertools.cycle(_COLOURS), strict=False):
        mine = [(k, row["rank"] * row["groups"]) for k, row in enumerate(rows) if row["scheme"] == scheme]
        x, y = zip(*mine, strict=True)
        ranks.bar(x, y, width=0.8, color=colour, label=scheme)
    ranks.set(ylabel="rank, all groups")
    ranks.set_title("Rank of each decomposed layer", loc="left", fontsize=10, color=_MUTED)
    before, after = ([row[key] for row in rows] for key in ("params", "params_after"))
    sizes.bar(positions, before, width=0.8, color=_FULL, label="dense")
    sizes.bar(positions, after, width=0.8, color=_LOW, label="decomposed")
    sizes.set(ylabel="parameters", xlim=(-0.6, max(len(rows), 12) - 0.4))
    sizes.yaxis.set_major_formatter("{x:,.0f}")
    _name_columns(sizes, names)
    sizes.set_title("Its parameters", loc="left", fontsize=10, color=_MUTED)
    for axes in (ranks, sizes):
        axes.legend(fontsize=8, frameon=False, ncols=6, loc="lower right", bbox_to_anchor=(1, 1))
        _style(axes)
    return figure


def decays_figure(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]) -> Any:
    """Draw the decay of every layer's singular values in the dense model and in the decomposed one, side by side.

    Args:
        before: As `arp_hub.spectra.decays` gives them of the dense model.
        after: The same of the decomposed one.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    figure = _figure(width=10, height=4)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title, falls in zip(panels, ("dense", "decomposed"), (before, after), strict=True):
        _draw_falls(axes, falls)
        axes.set_title(f"Singular values, {title}", loc="left", fontsize=10, color=_MUTED)
    panels[0].set_ylabel("singular value / largest")
    _depth_bar(figure, panels[1], *_depths(len(before)))
    return figure


def violation_figure(history: Sequence[Mapping[str, Any]]) -> Any:
    """Draw the violation of the rank constraints over training: every layer faintly, their mean boldly.

    Args:
        history: Epochs with ``step``, ``stage``, ``violation`` and ``violations``, as ``metrics.json`` lists them.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    figure = _figure(width=10, height=4)
    axes = figure.subplots()
    steps = [entry["step"] for entry in history]
    for name in history[0].get("violations", {}):
        values = [max(entry["violations"][name], _FLOOR) for entry in history]
        axes.plot(steps, values, color=_HIGH, linewidth=0.7, alpha=0.7)
    means = [max(entry["violation"], _FLOOR) for entry in history]
    axes.plot(steps, means, color=_LOW, linewidth=2, marker="o", markersize=4, label="mean over layers")
    if hold := next((entry["step"] for entry in history if entry.get("stage") == "hold"), None):
        axes.axvline(hold, color=_MUTED, linewidth=1, linestyle=":", label="hold: exactly low rank")
    axes.set(yscale="log", xlabel="optimiser step", ylabel="relative violation")
    axes.set_title("Distance of the layers from their ranks during training", loc="left", fontsize=10, color=_MUTED)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    _style(axes)
    return figure


def curves_figure(curves: Mapping[str, Mapping[int, Any]], label: str) -> Any:
    """Draw one value over the epochs of a run, with one curve for each name.

    Args:
        curves: Value by epoch, by name. A value that is not a finite number leaves a gap.
        label: Label of the vertical axis.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _figure(width=6, height=3)
    axes = figure.subplots()
    for (name, points), colour in zip(curves.items(), itertools.cycle(_COLOURS), strict=False):
        axes.plot(list(points), list(map(_number, points.values())), color=colour, marker=".", markersize=4, label=name)
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.legend(fontsize=9, frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    _style(axes)
    return figure


def violations_figure(violations: Mapping[str, Mapping[int, Any]]) -> Any:
    """Draw the violation of every layer at every epoch as a heatmap on a log scale; zero is blank.

    Args:
        violations: Violation by epoch, by layer.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    epochs = [epoch for values in violations.values() for epoch in values]
    first, last = min(epochs), max(epochs)
    rows = [[_number(values.get(epoch)) for epoch in range(first, last + 1)] for values in violations.values()]
    cells = [[min(max(value, _FLOOR), 1.0) if value > 0 else math.nan for value in row] for row in rows]
    figure = _figure(width=6, height=1 + 0.2 * len(rows))
    axes = figure.subplots()
    extent = (first - 0.5, last + 0.5, len(rows) - 0.5, -0.5)
    image = axes.imshow(
        cells, cmap=_blues(), norm=LogNorm(_FLOOR, 1), extent=extent, aspect="auto", interpolation="nearest"
    )
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, label="violation", location="top", aspect=40, pad=0.01)
    _style(axes)
    _name_rows(axes, list(violations))
    return figure


def rank_bars_figure(layers: Mapping[str, tuple[Any, str]]) -> Any:
    """Draw the rank of every decomposed layer as a bar, with a text beside it.

    Args:
        layers: Rank over all groups, and the text, by layer.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    ranks, texts = [_number(rank) for rank, _ in layers.values()], [_short(text) for _, text in layers.values()]
    largest = max([1.0, *(rank for rank in ranks if rank > 0)])
    figure = _figure(width=6, height=0.7 + 0.2 * len(ranks))
    axes = figure.subplots()
    rest = axes.barh(range(len(ranks)), [largest] * len(ranks), height=0.75, color=_FULL)
    axes.barh(range(len(ranks)), ranks, height=0.75, color=_LOW)
    axes.bar_label(rest, texts, padding=4, fontsize=9, color=_MUTED, parse_math=False)
    axes.set(xlabel="rank, all groups", xlim=(0, largest), ylim=(len(ranks) - 0.5, -0.5))
    _style(axes)
    _name_rows(axes, list(layers))
    return figure


def decay_figure(falls: Mapping[str, Sequence[Any]]) -> Any:
    """Draw the decay of every layer's singular values in one model.

    Args:
        falls: Singular values over the largest, by layer, first layer first.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    figure = _figure(width=6, height=3.2)
    axes = figure.subplots()
    _draw_falls(axes, {name: list(map(_number, values)) for name, values in falls.items()})
    axes.set_ylabel("singular value / largest")
    _depth_bar(figure, axes, *_depths(len(falls)))
    return figure


def inline_svg(label: str, draw: Callable[..., Any], *data: Any) -> str:
    """Draw a figure as one ``<svg>`` element to be placed into an HTML page, as wide as its column.

    Matplotlib's defaults hold while it draws, whatever the user's ``matplotlibrc`` says.

    Args:
        label: What the picture shows, for readers who cannot see it. It must be unique in the page.
        draw: Function that draws the figure.
        *data: Its arguments.

    Returns:
        The element, the same text for the same data.

    Raises:
        ArpHubError: If matplotlib is missing.
    """
    _figure(width=1)  # refuses a missing matplotlib
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Matplotlib warns of characters that its own font lacks; the browser has others.
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.fonttype"] = "none"
        # Element ids are hashes of the salt and the content: a salt for each picture keeps them unique in a page.
        matplotlib.rcParams["svg.hashsalt"] = label
        draw(*data).savefig(text, format="svg", dpi=150, metadata={"Date": None})
    svg = minidom.parseString(text.getvalue().encode()).documentElement
    assert svg is not None
    for metadata in svg.getElementsByTagName("metadata"):
        svg.removeChild(metadata)
    for group in svg.getElementsByTagName("g"):
        # Names such as "axes_1" are the same in every picture, and nothing refers to them.
        if group.hasAttribute("id"):
            group.removeAttribute("id")
    svg.removeAttribute("width")
    svg.removeAttribute("height")
    svg.setAttribute("role", "img")
    svg.setAttribute("aria-label", label)
    return svg.toxml()


def can_draw() -> bool:
    """Whether pictures are drawn: matplotlib is installed, and ``ARP_HUB_PICTURES`` is not 0.

    The pictures of a card and a report take about 8 seconds of CPU time.
    """
    return os.environ.get("ARP_HUB_PICTURES") != "0" and importlib.util.find_spec("matplotlib") is not None


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure atomically, in the format that the path's suffix names.

    Raises:
        ArpHubError: If the suffix is none of a picture, or the folder does not exist.
    """
    check_picture_path(path)
    path = Path(path)
    try:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=150, format=path.suffix.lower()[1:])
    except OSError as error:
        raise ArpHubError(f"cannot write the picture '{path}': {error}") from error


def check_picture_path(path: str | os.PathLike[str]) -> None:
    """Check that a picture can be written to ``path``, and that matplotlib is there to draw it.

    Raises:
        ArpHubError: If not.
    """
    path = checked_path(path, "a picture")
    suffixes = (".png", ".svg", ".pdf")
    if path.suffix.lower() not in suffixes:
        raise ArpHubError(f"a picture's name ends in {', '.join(suffixes)}, got '{path}'")
    if not path.parent.is_dir():
        raise ArpHubError(f"cannot write '{path}': there is no folder '{path.parent}'")
    _figure(width=1)


def _figure(width: float, height: float = 8) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArpHubError("pictures need matplotlib: pip install 'arp-hub[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor=_SURFACE)


def _draw_decay(figure: Any, axes: Any, spectra: Mapping[str, Spectrum]) -> None:
    ramp, norm = _depths(len(spectra))
    for depth, spectrum in enumerate(spectra.values(), start=1):
        values = spectrum.values.double()
        _draw_fall(axes, (values / values[:, :1].clamp_min(1e-30)).mean(0).tolist(), ramp(norm(depth)))
    axes.set(yscale="log", xlim=(0, 1), xlabel="index / full rank", ylabel="singular value / largest")
    axes.set_title("Decay of each layer's singular values", loc="left", fontsize=10, color=_MUTED)
    _depth_bar(figure, axes, ramp, norm)
    _style(axes)


def _draw_fall(axes: Any, values: Sequence[float], colour: Any) -> None:
    """One layer's singular values over the largest, against their place between the first and the last."""
    x = [k / max(1, len(values) - 1) for k in range(len(values))]
    axes.plot(x, [max(value, _FLOOR) for value in values], color=colour, linewidth=1.2)


def _draw_falls(axes: Any, falls: Mapping[str, Sequence[float]]) -> None:
    """The singular values of every layer, the first layer palest."""
    ramp, norm = _depths(len(falls))
    for depth, values in enumerate(falls.values(), start=1):
        _draw_fall(axes, values, ramp(norm(depth)))
    axes.set(yscale="log", xlim=(0, 1), xlabel="index / full rank")
    _style(axes)


def _depths(count: int) -> tuple[Any, Any]:
    """Colours of ``count`` layers by depth."""
    from matplotlib.colors import Normalize

    return _blues(), Normalize(1, max(2, count))


def _blues() -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    # The palest blues would vanish on the surface, so the ramp starts part of the way in.
    return LinearSegmentedColormap.from_list("depth", colormaps["Blues"]([0.35 + 0.65 * k / 255 for k in range(256)]))


def _depth_bar(figure: Any, axes: Any, ramp: Any, norm: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(integer=True)
    figure.colorbar(ScalarMappable(norm, ramp), ax=axes, label="depth, first layer to last", pad=0.01, ticks=ticks)


def _draw_ranks(axes: Any, spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> None:
    names = list(spectra)
    positions = range(len(names))
    heights = (
        ("full rank", _FULL, [1.0] * len(names)),
        ("99 % of the energy", _HIGH, [s.energy_rank(0.99) / s.full_rank for s in spectra.values()]),
        ("90 % of the energy", _LOW, [s.energy_rank(0.90) / s.full_rank for s in spectra.values()]),
    )
    for label, colour, values in heights:
        axes.bar(positions, values, width=0.8, color=colour, label=label)
    marked = [(k, ranks[name] / spectra[name].full_rank) for k, name in enumerate(names) if name in ranks]
    if marked:
        x, y = zip(*marked, strict=True)
        axes.scatter(x, y, marker="_", s=max(12, 4000 / len(names)), linewidth=2, color=_PLANNED, label="rank chosen")
    axes.set(ylabel="rank / full rank", xlim=(-0.6, len(names) - 0.4))
    _name_columns(axes, names)
    axes.set_title("Ranks of each layer", loc="left", fontsize=10, color=_MUTED)
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    _style(axes)


def _style(axes: Any) -> None:
    axes.set_facecolor(_SURFACE)
    axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelcolor=_MUTED)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_GRID)


def _name_columns(axes: Any, names: Sequence[str]) -> None:
    size = 7 if len(names) <= 60 else 5
    axes.set_xticks(range(len(names)), list(map(_short, names)), rotation=90, fontsize=size, parse_math=False)


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), list(map(_short, names)), fontsize=9, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)


def _short(name: Any, limit: int = 26) -> str:
    """The end of a name, without characters that cannot be printed: names come from files."""
    text = str(name)
    text = text if len(text) <= limit else "…" + text[1 - limit :]
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _number(value: Any) -> float:
    """A value from a file as a float; NaN, which is not drawn, if it is not a number that float32 can hold."""
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError):
        return math.nan
    return number if abs(number) < 3e38 else math.nan
