"""Small charts as inline SVG, for pages that must be one file and need no library to be drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

Point = tuple[float, float]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 220, 54, 14, 10, 34
_ROW = 16
COLOURS = ("#2a78d6", "#d4622a", "#2f9e6e", "#8a5cd1", "#c9a227", "#c2407a")


def line_chart(series: Mapping[str, Sequence[Point]], x_label: str, y_label: str, log: bool = False) -> Markup:
    """Lines over one pair of axes, each with its name in a legend.

    Args:
        series: Points by name; those that are not finite, or not positive on a log scale, are left out.
        x_label: What x is.
        y_label: What y is.
        log: Whether y is on a log scale.
    """
    drawn = {name: _finite(points, log) for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return Markup("<p class='none'>No values yet.</p>")
    every = [point for points in drawn.values() for point in points]
    x_low, x_high = _range([x for x, _ in every], margin=0)
    y_low, y_high = _range([y for _, y in every])

    def place(point: Point) -> str:
        x = _LEFT + (point[0] - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - (point[1] - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = [_axes((x_low, x_high), (y_low, y_high), x_label, y_label, log)]
    many = len(drawn) > len(COLOURS)
    for k, (name, points) in enumerate(drawn.items()):
        colour = f"hsl(212 70% {75 - 45 * k / max(1, len(drawn) - 1):.0f}%)" if many else COLOURS[k]
        path = " ".join(map(place, points))
        parts.append(
            f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.6'>{_title(name)}</polyline>"
        )
        if len(points) == 1:
            x, y = path.split(",")
            parts.append(f"<circle cx='{x}' cy='{y}' r='3' fill='{colour}'>{_title(name)}</circle>")
    chart = _svg(_HEIGHT, "".join(parts), f"{y_label} over {x_label}")
    return chart if many else chart + _legend(list(drawn))


def heatmap(rows: Mapping[str, Sequence[float | None]], columns: Sequence[str], decades: int = 8) -> Markup:
    """A row a name, a column a moment: the darker, the larger, on a log scale; exact zeros are blank.

    Args:
        rows: Values by name; None where there is none.
        columns: What each column is.
        decades: Values this many powers of ten below 1 are as pale as it gets.
    """
    if not rows or not columns:
        return Markup("<p class='none'>No values yet.</p>")
    left = 160
    cell = min(40.0, (_WIDTH - left - _RIGHT) / len(columns))
    parts = []
    for row, (name, values) in enumerate(rows.items()):
        y = _TOP + row * _ROW
        parts.append(f"<text x='{left - 8}' y='{y + 11}' text-anchor='end'>{escape(_short(name))}</text>")
        for column, value in enumerate(values):
            if value is not None and value > 0:
                share = min(1.0, max(0.05, 1 + math.log10(value) / decades))
                title = _title(f"{name}, {columns[column]}: {value:.3g}")
                parts.append(
                    f"<rect x='{left + column * cell:.1f}' y='{y}' width='{max(0.5, cell - 1):.1f}' "
                    f"height='{_ROW - 2}' fill='{COLOURS[0]}' fill-opacity='{share:.2f}'>{title}</rect>"
                )
    bottom = _TOP + len(rows) * _ROW
    for column in {0, len(columns) // 2, len(columns) - 1}:
        x = left + (column + 0.5) * cell
        parts.append(f"<text x='{x:.0f}' y='{bottom + 14}' text-anchor='middle'>{escape(columns[column])}</text>")
    return _svg(bottom + 24, "".join(parts), "violation of every layer over time")


def bars(values: Mapping[str, tuple[float, str]], label: str) -> Markup:
    """A horizontal bar a name.

    Args:
        values: Length as a share between 0 and 1, and the text at the bar's end, by name.
        label: What the lengths are.
    """
    if not values:
        return Markup("<p class='none'>No values yet.</p>")
    left, room = 160, _WIDTH - 160 - 110
    parts = []
    for row, (name, (share, text)) in enumerate(values.items()):
        y = _TOP + row * _ROW
        width, title = room * min(1.0, max(0.0, share)), _title(name)
        parts.append(f"<text x='{left - 8}' y='{y + 11}' text-anchor='end'>{escape(_short(name))}</text>")
        parts.append(f"<rect x='{left}' y='{y}' width='{room}' height='{_ROW - 4}' class='rest'/>")
        parts.append(
            f"<rect x='{left}' y='{y}' width='{width:.1f}' height='{_ROW - 4}' fill='{COLOURS[0]}'>{title}</rect>"
        )
        parts.append(f"<text x='{left + room + 6}' y='{y + 11}'>{escape(text)}</text>")
    return _svg(_TOP + len(values) * _ROW + 8, "".join(parts), label)


def _finite(points: Sequence[Point], log: bool) -> list[Point]:
    kept = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)]
    return [(x, math.log10(y)) for x, y in kept] if log else kept


def _range(values: Sequence[float], margin: float = 0.04) -> Point:
    low, high = min(values), max(values)
    pad = max(0.5, 0.1 * abs(low)) if low == high else margin * (high - low)
    return (max(0.0, low - pad) if low >= 0 else low - pad), high + pad


def _axes(x_range: Point, y_range: Point, x_label: str, y_label: str, log: bool) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for k in range(5):
        y = bottom - k / 4 * (bottom - _TOP)
        value = y_range[0] + k / 4 * (y_range[1] - y_range[0])
        text = f"{10**value:.0e}" if log else f"{value:.3g}"
        parts.append(f"<line x1='{_LEFT}' x2='{right}' y1='{y:.1f}' y2='{y:.1f}' class='grid'/>")
        parts.append(f"<text x='{_LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{text}</text>")
    for k in range(5):
        x = _LEFT + k / 4 * (right - _LEFT)
        value = x_range[0] + k / 4 * (x_range[1] - x_range[0])
        parts.append(f"<text x='{x:.1f}' y='{bottom + 15}' text-anchor='middle'>{value:.3g}</text>")
    parts.append(f"<text x='{right}' y='{_HEIGHT - 4}' text-anchor='end' class='label'>{escape(x_label)}</text>")
    parts.append(f"<text x='{_LEFT}' y='{_HEIGHT - 4}' class='label'>{escape(y_label)}</text>")
    return "".join(parts)


def _legend(names: Sequence[str]) -> Markup:
    entries = (
        f"<span><i style='background:{colour}'></i>{escape(name)}</span>"
        for name, colour in zip(names, COLOURS, strict=False)
    )
    return Markup(f"<div class='legend'>{''.join(entries)}</div>")


def _svg(height: float, content: str, label: str) -> Markup:
    return Markup(f"<svg viewBox='0 0 {_WIDTH} {height:.0f}' role='img' aria-label='{escape(label)}'>{content}</svg>")


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _short(name: str, limit: int = 26) -> str:
    return name if len(name) <= limit else "…" + name[1 - limit :]
