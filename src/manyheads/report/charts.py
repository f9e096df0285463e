"""Small charts and tables as HTML, from plain values; no script is needed to read them.

Colours come from the page's own variables, so that a chart is readable in the light
and in the dark. Whatever came from a file is escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

__all__ = ["Cell", "line_chart", "table"]

Cell = str | tuple[str, float | None] | tuple[str, float | None, bool]
"""Text; or text and the number to sort by; or these and whether it is a loss."""

_WIDE, _HIGH = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 236, 16, 44
_SERIES = 4
_NUMBER = ' class="number"'


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Write a table whose columns a reader can sort; losses are marked."""
    numeric = [
        any(isinstance(row[place], tuple) for row in rows)
        for place in range(len(heads))
    ]
    top = "".join(
        f'<th scope="col" aria-sort="none"{_NUMBER if number else ""}>'
        f'<button type="button">{html.escape(head)}</button></th>'
        for head, number in zip(heads, numeric, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(_cell(cell, first=not i) for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return (
        '<div class="wide" tabindex="0" role="region" '
        f'aria-label="{html.escape(caption)}"><table class="sortable">'
        f"<caption><span>{html.escape(caption)}</span></caption>"
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def line_chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    across: str,
    up: str,
) -> str:
    """Draw lines over two logarithmic axes, named at their ends and described in words.

    Args:
        title: What the chart shows.
        series: Points by name; all values above zero.
        across: Name of the horizontal axis.
        up: Name of the vertical axis.
    """
    points = [point for line in series.values() for point in line]
    bounds = [_bounds([point[axis] for point in points]) for axis in (0, 1)]
    parts = [_ticks(bounds[0], vertical=False), _ticks(bounds[1], vertical=True)]
    ends: list[float] = []
    for number, (name, line) in enumerate(series.items()):
        places = [(_x(x, bounds[0]), _y(y, bounds[1])) for x, y in sorted(line)]
        colour = f"s{number % _SERIES}"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="{colour}" points="{path}"/>')
        parts += [
            f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
            for x, y in places
        ]
        level = places[-1][1]
        # Names of lines that end together are kept a line apart.
        while any(abs(level - other) < 15 for other in ends):
            level += 15
        ends.append(level)
        parts.append(
            f'<text class="{colour}" x="{_WIDE - _RIGHT + 10}" y="{level + 4:.1f}">'
            f"{html.escape(name)}</text>"
        )
    legend = "".join(
        f'<span class="k{number % _SERIES}">{html.escape(name)}</span>'
        for number, name in enumerate(series)
    )
    told = "; ".join(
        f"{name}: " + ", ".join(f"{y:.3g} at {x:.3g}" for x, y in sorted(line))
        for name, line in series.items()
    )
    label = html.escape(f"{title}. {up} by {across}. {told}")
    return (
        '<figure><div class="wide">'
        f'<svg role="img" viewBox="0 0 {_WIDE} {_HIGH}" aria-label="{label}">'
        f"<title>{html.escape(title)}</title>{''.join(parts)}"
        f'<text class="axis" x="{(_LEFT + _WIDE - _RIGHT) / 2}" y="{_HIGH - 6}" '
        f'text-anchor="middle">{html.escape(across)}</text>'
        f'<text class="axis" transform="translate(14 {_HIGH / 2}) rotate(-90)" '
        f'text-anchor="middle">{html.escape(up)}</text></svg></div>'
        f'<p class="legend" aria-hidden="true">{legend}</p>'
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
    )


def _cell(cell: Cell, *, first: bool) -> str:
    text, number, loss = cell, None, False
    if isinstance(cell, tuple):
        text, number, loss = (*cell, False)[:3]
    shown = html.escape(str(text))
    if loss:
        shown += ' <span class="loss" title="worse than the baseline">worse</span>'
    if first:
        return f'<th scope="row">{shown}</th>'
    key = "" if number is None else f' data-key="{number:.12g}"'
    kind = _NUMBER if isinstance(cell, tuple) else ""
    return f"<td{kind}{key}>{shown}</td>"


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    spread = max(high / low, 1.5) ** 0.08
    return low / spread, high * spread


def _x(value: float, bounds: tuple[float, float]) -> float:
    return _LEFT + _share(value, bounds) * (_WIDE - _LEFT - _RIGHT)


def _y(value: float, bounds: tuple[float, float]) -> float:
    return _HIGH - _BOTTOM - _share(value, bounds) * (_HIGH - _TOP - _BOTTOM)


def _share(value: float, bounds: tuple[float, float]) -> float:
    return math.log(value / bounds[0]) / math.log(bounds[1] / bounds[0])


def _ticks(bounds: tuple[float, float], *, vertical: bool) -> str:
    """Draw lines at 1, 2 and 5 times powers of ten, fewer where they would crowd."""
    first = math.floor(math.log10(bounds[0]))
    powers = range(first, math.ceil(math.log10(bounds[1])) + 1)
    steps = (1, 2, 5) if len(powers) < 5 else (1,)
    parts = []
    values = [step * 10.0**power for power in powers for step in steps]
    values = [value for value in values if bounds[0] <= value <= bounds[1]]
    if len(values) < 2:
        # Data within one step: its own ends are the ticks.
        spread = (bounds[1] / bounds[0]) ** 0.07
        values = [float(f"{v:.3g}") for v in (bounds[0] * spread, bounds[1] / spread)]
    for value in values:
        if vertical:
            y = _y(value, bounds)
            parts.append(
                f'<line class="tick" x1="{_LEFT}" x2="{_WIDE - _RIGHT}" y1="{y:.1f}" '
                f'y2="{y:.1f}"/><text class="axis" x="{_LEFT - 8}" y="{y + 4:.1f}" '
                f'text-anchor="end">{value:g}</text>'
            )
        else:
            x = _x(value, bounds)
            parts.append(
                f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" '
                f'y2="{_HIGH - _BOTTOM}"/><text class="axis" x="{x:.1f}" '
                f'y="{_HIGH - _BOTTOM + 16}" text-anchor="middle">{value:g}</text>'
            )
    return "".join(parts)
