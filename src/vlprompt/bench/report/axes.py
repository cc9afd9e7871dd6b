"""The sheet that plots are drawn on, and axes with ticks."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape

WIDTH, LETTER = 680, 6.6  # pixels; a letter is about so wide


class Drawing:
    """Shapes on a sheet."""

    def __init__(self, height: float, title: str) -> None:
        self.height, self.parts = height, [f"<title>{escape(title)}</title>"]

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = "#ccc", width: float = 1) -> None:
        self.parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'
        )

    def path(self, points: Sequence[tuple[float, float]], colour: str, width: float = 2, dash: str = "") -> None:
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>')

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>')

    def dot(self, x: float, y: float, colour: str) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')

    def text(self, x: float, y: float, text: str, anchor: str = "start", colour: str = "#222") -> None:
        """A line of text, on a white rim that keeps it apart from lines below it."""
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
        self.parts.append(f'<text {place} stroke="#fff" stroke-width="3" paint-order="stroke">{escape(text)}</text>')

    def __str__(self) -> str:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height:.0f}" width="{WIDTH}"'
        return f'{head} font-family="sans-serif" font-size="12" role="img">{"".join(self.parts)}</svg>'


class Axes:
    """A frame with ticks, and room for a legend at its right."""

    TOP, BOTTOM, LEFT, RIGHT = 28.0, 324.0, 56.0, 470.0

    def __init__(
        self,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        x_label: str,
        y_label: str,
        title: str,
        x_ticks: Mapping[float, str] | None = None,
    ) -> None:
        self.x_range, self.y_range = x_range, y_range
        self.drawing = drawing = Drawing(366, title)
        for value in ticks_of(*y_range):
            _, y = self.place(x_range[0], value)
            drawing.line(self.LEFT, y, self.RIGHT, y, "#eee")
            drawing.text(self.LEFT - 6, y + 4, f"{value:g}", "end")
        for value, text in (x_ticks or {v: f"{v:g}" for v in ticks_of(*x_range)}).items():
            x, _ = self.place(value, y_range[0])
            drawing.line(x, self.BOTTOM, x, self.BOTTOM + 4, "#222")
            drawing.text(x, self.BOTTOM + 18, text, "middle")
        drawing.line(self.LEFT, self.BOTTOM, self.RIGHT, self.BOTTOM, "#222")
        drawing.line(self.LEFT, self.TOP, self.LEFT, self.BOTTOM, "#222")
        drawing.text((self.LEFT + self.RIGHT) / 2, self.BOTTOM + 36, x_label, "middle")
        drawing.text(self.LEFT - 48, 12, y_label)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies on the sheet."""
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        right = self.LEFT + (x - x0) / (x1 - x0) * (self.RIGHT - self.LEFT)
        return right, self.BOTTOM - (y - y0) / (y1 - y0) * (self.BOTTOM - self.TOP)

    def legend(self, names: Collection[str], colour: Mapping[str, str]) -> None:
        """A line for each name, at the right."""
        self.drawing.height = max(self.drawing.height, 42 + 18 * len(names))
        for i, name in enumerate(names):
            self.drawing.dot(self.RIGHT + 22, 36 + 18 * i, colour[name])
            self.drawing.text(self.RIGHT + 32, 40 + 18 * i, short_name(name))


class NamedAxes(Axes):
    """One whose points have their names beside them, and which needs no legend."""

    RIGHT = 590.0


def wide_range(values: Sequence[float], least: float = 1.0) -> tuple[float, float]:
    """Of an axis: what the values span with room of ``least`` at least on both sides, and nothing below zero."""
    low, high = min(values), max(values)
    room = max((high - low) * 0.12, least or 0.05 * high or 1.0)
    return max(low - room, 0.0), high + room


def step_of(span: float) -> float:
    """A round distance of ticks, about six to a span."""
    power = 10.0 ** math.floor(math.log10(span / 6))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= span / 6)


def ticks_of(low: float, high: float) -> list[float]:
    """Round values between."""
    step = step_of(high - low)
    return [round(k * step, 6) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short_name(name: str) -> str:
    """A name that fits a legend."""
    return name if len(name) <= 28 else f"{name[:27]}…"
