"""The loss over the tokens of a run, as an SVG of a few kilobytes that needs no library to make or to show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Point = tuple[float, float]

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 44, 52
_COLOURS = ("#2563eb", "#d97706")
_MAX_POINTS = 600
"""More cannot be told apart at this width."""


def loss_curve(training: Sequence[Point], held_out: Sequence[Point], *, title: str) -> str | None:
    """An SVG with both curves, or None where there are fewer than two points.

    Args:
        training: (tokens, nats per target); held_out: likewise.
    """
    series = [("training", _thinned(training)), ("held-out text", _thinned(held_out))]
    series = [(name, points) for name, points in series if points]
    points = [point for _, some in series for point in some]
    if len(points) < 2:
        return None
    right = max(x for x, _ in points) or 1.0
    ticks_y = _ticks(min(y for _, y in points), max(y for _, y in points))
    low, high = ticks_y[0], ticks_y[-1]
    scale, unit = next(
        ((s, u) for s, u in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")) if right >= s), (1.0, "")
    )

    def place(point: Point) -> str:
        x = _LEFT + point[0] / right * (_WIDTH - _LEFT - _RIGHT)
        y = _TOP + (high - point[1]) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
    ]
    for tick in ticks_y:
        x, y = place((0, tick)).split(",")
        parts.append(f'<line x1="{x}" y1="{y}" x2="{_WIDTH - _RIGHT}" y2="{y}" stroke="#e5e7eb"/>')
        parts.append(_text(float(x) - 8, float(y) + 4, f"{tick:g}", "end"))
    for tick in _ticks(0, right / scale, fill=False):
        x, y = place((tick * scale, low)).split(",")
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x}" y2="{float(y) + 5}" stroke="#6b7280"/>')
        parts.append(_text(float(x), float(y) + 20, f"{tick:g}", "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, f"tokens{f', {unit}' if unit else ''}", "middle"))
    parts.append(_text(_LEFT - 40, 26, "loss, nats per target", "start"))
    for number, (name, some) in enumerate(series):
        colour = _COLOURS[name != "training"]
        shown = " ".join(place(point) for point in some)
        parts.append(f'<polyline points="{shown}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if len(some) <= 40:
            parts += [f'<circle cx="{c[0]}" cy="{c[1]}" r="2.6" fill="{colour}"/>' for c in _centres(shown)]
        begin = _WIDTH - 260 + 110 * number
        parts.append(f'<line x1="{begin}" y1="22" x2="{begin + 22}" y2="22" stroke="{colour}" stroke-width="3"/>')
        parts.append(_text(begin + 28, 26, name, "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _centres(shown: str) -> list[list[str]]:
    return [pair.split(",") for pair in shown.split(" ")]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#374151">{escape(text)}</text>'


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most so many points, each the mean of its neighbours; numbers only."""
    kept = [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = math.ceil(len(kept) / _MAX_POINTS) or 1
    groups = [kept[start : start + size] for start in range(0, len(kept), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _ticks(low: float, high: float, *, fill: bool = True) -> list[float]:
    """Round numbers about a fifth of the range apart; with `fill`, they enclose it.

    >>> _ticks(2.31, 8.4)
    [2.0, 4.0, 6.0, 8.0, 10.0]
    """
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if span / (step * power) <= 5)
    first = math.floor(low / step)
    last = math.ceil(high / step - 1e-9) if fill else math.floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + fill) + 1)]
