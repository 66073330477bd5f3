"""What all pictures share: style, names, numbers, and how a figure is written. Needs the extra ``plots``."""

from __future__ import annotations

import importlib.util
import io
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.dom import minidom

from .._utils.files import atomic_path
from ..errors import ArpHubError, checked_path

SURFACE, INK, MUTED, GRID = "#fcfcfb", "#0b0b0b", "#52514e", "#e1e0d9"
PALE, MID, STRONG = "#d8d7cf", "#86b6ef", "#2a78d6"
COLOURS = ("#2a78d6", "#e08a1e", "#3f9c6b", "#a05cc0", "#c94f4f", "#7a7a72")
"""Colours of the schemes, and of the curves, in the order in which they appear."""
FLOOR = 1e-7
"""Relative violations below this are drawn at this value: they are rounding error in float32."""
_THEME = {SURFACE: "var(--surface)", INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", PALE: "var(--pale)"}
"""Colours that follow the light or dark theme of the page that a picture is placed into."""


def inline_svg(label: str, draw: Callable[..., Any], *data: Any) -> str:
    """Draw a figure as one ``<svg>`` element to be placed into an HTML page, as wide as its column.

    The page sets the CSS variables ``--surface``, ``--ink``, ``--muted``, ``--line`` and ``--pale``.

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
    new_figure(width=1)  # refuses a missing matplotlib
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
    for element in svg.getElementsByTagName("*"):
        if style := element.getAttribute("style"):
            for colour, variable in _THEME.items():
                style = style.replace(colour, variable)
            element.setAttribute("style", style)
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
    new_figure(width=1)


def new_figure(width: float, height: float = 8) -> Any:
    """An empty figure, sizes in inches.

    Raises:
        ArpHubError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArpHubError("pictures need matplotlib: pip install 'arp-hub[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor=SURFACE)


def style(axes: Any, title: str | None = None) -> None:
    """Give axes the common style, and a title at their left."""
    axes.set_facecolor(SURFACE)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=MUTED)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(MUTED)
    if title:
        axes.set_title(short(title, 60), loc="left", fontsize=10, color=MUTED, parse_math=False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)


def legend(axes: Any, columns: int = 4) -> None:
    """A legend above the right end of the axes."""
    axes.legend(fontsize=8, frameon=False, ncols=columns, loc="lower right", bbox_to_anchor=(1, 1), labelcolor=MUTED)


def blues() -> Any:
    """The colour ramp of depths and violations. Its ends are visible on light and dark surfaces."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("depth", colormaps["Blues"]([0.35 + 0.5 * k / 255 for k in range(256)]))


def colour_scale(figure: Any, image: Any, axes: Any, label: str, **arguments: Any) -> None:
    """A labelled scale of the colours in a picture."""
    bar = figure.colorbar(image, ax=axes, **arguments)
    bar.set_label(label, color=MUTED)
    bar.ax.tick_params(colors=MUTED, labelcolor=MUTED)
    bar.outline.set_visible(False)


def name_columns(axes: Any, names: Sequence[str]) -> None:
    """Write names below the columns of a picture."""
    size = 7 if len(names) <= 60 else 5
    axes.set_xticks(range(len(names)), list(map(short, names)), rotation=90, fontsize=size, parse_math=False)


def name_rows(axes: Any, names: Sequence[str], size: float = 9) -> None:
    """Write names beside the rows of a picture, the first row at the top."""
    axes.set_yticks(range(len(names)), list(map(short, names)), fontsize=size, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)


def short(name: Any, limit: int = 26) -> str:
    """The end of a name, without characters that cannot be printed: names come from files."""
    text = str(name)
    text = text if len(text) <= limit else "…" + text[1 - limit :]
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def number(value: Any) -> float:
    """A value from a file as a float; NaN, which is not drawn, if it is not a number that float32 can hold."""
    try:
        found = float(value)
    except (OverflowError, TypeError, ValueError):
        return math.nan
    return found if abs(found) < 3e38 else math.nan
