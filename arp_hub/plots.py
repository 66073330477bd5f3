"""Pictures of a model's spectra and ranks. Needs the extra ``plots``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ArpHubError
from .spectra import Spectrum

_SURFACE, _INK, _MUTED, _GRID = "#fcfcfb", "#0b0b0b", "#52514e", "#e1e0d9"
_FULL, _HIGH, _LOW, _PLANNED = "#e1e0d9", "#86b6ef", "#2a78d6", "#0b0b0b"
_FLOOR = 1e-7
"""Relative singular values below this are rounding error in float32 and are not drawn."""


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


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure atomically, in the format that the path's suffix names.

    Raises:
        ArpHubError: If the suffix is none of a picture, or the folder does not exist.
    """
    path = Path(path)
    check_picture_path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        figure.savefig(temporary, dpi=150)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_picture_path(path: str | os.PathLike[str]) -> None:
    """Check that a picture can be written to ``path``, and that matplotlib is there to draw it.

    Raises:
        ArpHubError: If not.
    """
    path = Path(path)
    suffixes = (".png", ".svg", ".pdf")
    if path.suffix.lower() not in suffixes:
        raise ArpHubError(f"a picture's name ends in {', '.join(suffixes)}, got '{path}'")
    if not path.parent.is_dir():
        raise ArpHubError(f"cannot write '{path}': there is no folder '{path.parent}'")
    _figure(width=1)


def _figure(width: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArpHubError("pictures need matplotlib: pip install 'arp-hub[plots]'") from error
    return Figure(figsize=(width, 8), layout="constrained", facecolor=_SURFACE)


def _draw_decay(figure: Any, axes: Any, spectra: Mapping[str, Spectrum]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    # The palest blues would vanish on the surface, so the ramp starts part of the way in.
    ramp = LinearSegmentedColormap.from_list("depth", colormaps["Blues"]([0.35 + 0.65 * k / 255 for k in range(256)]))
    norm = Normalize(1, max(2, len(spectra)))
    for depth, spectrum in enumerate(spectra.values(), start=1):
        values = spectrum.values.double()
        mean = (values / values[:, :1].clamp_min(1e-30)).mean(0).clamp_min(_FLOOR).tolist()
        x = [k / max(1, len(mean) - 1) for k in range(len(mean))]
        axes.plot(x, mean, color=ramp(norm(depth)), linewidth=1.2)
    axes.set(yscale="log", xlim=(0, 1), xlabel="index / full rank", ylabel="singular value / largest")
    axes.set_title("Decay of each layer's singular values", loc="left", fontsize=10, color=_MUTED)
    ticks = MaxNLocator(integer=True)
    figure.colorbar(ScalarMappable(norm, ramp), ax=axes, label="depth, first layer to last", pad=0.01, ticks=ticks)
    _style(axes)


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
    size = 7 if len(names) <= 60 else 5
    axes.set_xticks(positions, names, rotation=90, fontsize=size)
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
