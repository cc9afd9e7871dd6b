"""Pictures drawn with Pillow: sheets of text, lines and images, and on them the demo's predictions and curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from vlprompt.data.images import load_image

SCALE = 2  # all is drawn this many times larger, then reduced: smooth lines
INK, FAINT, GRID = "#1f2328", "#656d76", "#d8dee4"
RIGHT, WRONG = "#14803c", "#b42318"
COLOURS = ("#0969da", "#bc4c00", "#8250df", "#1a7f37")


class Curve(NamedTuple):
    """A run's figures by epoch."""

    losses: Sequence[float]
    accuracies: Sequence[float]
    """Percent, on val images."""


class Shown(NamedTuple):
    """A picture with its class and what a model said before and after."""

    path: Path
    class_name: str
    before: str
    after: str


class Sheet:
    """A white sheet of width × height pixels, on which text and lines are placed in pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (SCALE * width, SCALE * height), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        colour: str = INK,
        size: int = 13,
        anchor: str = "ls",
        margin: float | None = None,
    ) -> None:
        """``anchor`` as in Pillow; by default (x, y) is the left end of the baseline.

        What reaches into the right ``margin``, if one is given, is cut off.
        """
        font = ImageFont.load_default(SCALE * size)
        while margin is not None and self.draw.textlength(text, font) > self.image.width - SCALE * (x + margin):
            text = text.removesuffix("…")[:-1] + "…"
        self.draw.text((SCALE * x, SCALE * y), text, colour, font, anchor=anchor)

    def line(self, points: Iterable[tuple[float, float]], colour: str, width: float = 2) -> None:
        """Straight pieces from point to point."""
        scaled = [(SCALE * x, SCALE * y) for x, y in points]
        self.draw.line(scaled, colour, round(SCALE * width), joint="curve")

    def dot(self, x: float, y: float, colour: str, radius: float = 3) -> None:
        """A disc."""
        box = [SCALE * (x - radius), SCALE * (y - radius), SCALE * (x + radius), SCALE * (y + radius)]
        self.draw.ellipse(box, colour)

    def box(self, x: float, y: float, width: float, height: float, fill: tuple[int, ...] | None, edge: str) -> None:
        """A rectangle with an edge of one pixel."""
        corners = [SCALE * x, SCALE * y, SCALE * (x + width) - 1, SCALE * (y + height) - 1]
        self.draw.rectangle(corners, fill, edge, SCALE)

    def paste(self, image: Image.Image, x: int, y: int, size: int) -> None:
        """A picture in a square."""
        resized = image.resize((SCALE * size, SCALE * size), Image.Resampling.LANCZOS)
        self.image.paste(resized, (SCALE * x, SCALE * y))

    def finished(self) -> Image.Image:
        """The sheet in its own size."""
        return self.image.reduce(SCALE)

    def save(self, file: Path) -> None:
        """Write a PNG of the sheet's size."""
        self.finished().save(file)


def draw_predictions(file: Path, names: Mapping[str, str], groups: Mapping[str, Sequence[Shown]]) -> None:
    """Every picture with its class and both predictions, marked as right or wrong, under a heading a group.

    ``names`` has two entries, method → "before" and "after".
    """
    columns, width, height, margin = 4, 292, 84, 16
    rows = sum(math.ceil(len(shown) / columns) for shown in groups.values())
    sheet = Sheet(columns * width + 2 * margin, rows * height + 44 * len(groups) + margin)
    top = 0
    for heading, shown in groups.items():
        right = [sum(guess == s.class_name for s in shown for guess in [getattr(s, when)]) for when in names.values()]
        told = "; ".join(f"{when} ({name}) {n} right" for (name, when), n in zip(names.items(), right, strict=True))
        sheet.text(margin, top + 30, heading, size=18)
        sheet.text(margin + 140, top + 30, f"of {len(shown)} pictures: {told}", FAINT)
        top += 44
        for n, (path, name, *said) in enumerate(shown):
            x, y = margin + n % columns * width, top + n // columns * height
            sheet.paste(load_image(path), x, y, 72)
            sheet.text(x + 82, y + 20, name, size=14)
            for line, (when, guess) in enumerate(zip(names.values(), said, strict=True)):
                colour, baseline = RIGHT if guess == name else WRONG, y + 41 + 19 * line
                _mark(sheet, x + 82, baseline, guess == name)
                sheet.text(x + 96, baseline, f"{when}: {guess}", colour, 12)
        top += math.ceil(len(shown) / columns) * height
    sheet.save(file)


def _mark(sheet: Sheet, x: float, y: float, right: bool) -> None:
    """A tick or a cross of 8 pixels on the baseline, for those who do not tell red from green."""
    if right:
        sheet.line([(x, y - 4), (x + 3, y - 1), (x + 8, y - 8)], RIGHT)
    else:
        sheet.line([(x, y - 8), (x + 8, y)], WRONG)
        sheet.line([(x, y), (x + 8, y - 8)], WRONG)


def draw_curves(file: Path, curves: Mapping[str, Curve], levels: Mapping[str, float]) -> None:
    """Two panels over epochs: training loss, and val accuracy with ``levels`` (percent) as dashed lines."""
    sheet = Sheet(1000, 380)
    losses = {name: curve.losses for name, curve in curves.items()}
    accuracies = {name: curve.accuracies for name, curve in curves.items()}
    _panel(sheet, 0, "loss on training pictures", losses, {})
    _panel(sheet, 500, "accuracy on val pictures, percent", accuracies, levels)
    sheet.save(file)


def _panel(
    sheet: Sheet, x0: int, title: str, lines: Mapping[str, Sequence[float]], levels: Mapping[str, float]
) -> None:
    left, top, right, bottom = x0 + 64, 56, x0 + 400, 330
    values = [v for line in lines.values() for v in line] + list(levels.values())
    step = _step(max(values) - min(values))
    low, high = math.floor(min(values) / step), max(math.ceil(max(values) / step), math.floor(min(values) / step) + 1)
    epochs = max(len(line) for line in lines.values())

    def x(epoch: int) -> float:
        return left + (right - left) * ((epoch - 1) / (epochs - 1) if epochs > 1 else 0.5)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value / step - low) / (high - low)

    sheet.text(x0 + 24, 30, title, size=16)
    for tick in range(low, high + 1):
        sheet.line([(left, y(tick * step)), (right, y(tick * step))], GRID, 1)
        sheet.text(left - 10, y(tick * step), f"{tick * step:g}", FAINT, 12, "rm")
    for epoch in range(1, epochs + 1, math.ceil(epochs / 10)):
        sheet.text(x(epoch), bottom + 8, str(epoch), FAINT, 12, "ma")
    sheet.text((left + right) / 2, bottom + 26, "epoch", FAINT, 12, "ma")
    labels = [(y(level), name, FAINT) for name, level in levels.items()]
    for level in levels.values():
        for start in range(left, right, 10):
            sheet.line([(start, y(level)), (min(start + 5, right), y(level))], FAINT, 1.5)
    for n, (name, line) in enumerate(lines.items()):
        colour = COLOURS[n % len(COLOURS)]
        points = [(x(epoch), y(value)) for epoch, value in enumerate(line, 1)]
        sheet.line(points, colour)
        for point in points:
            sheet.dot(*point, colour)
        labels.append((points[-1][1], name, colour))
    nearest = -math.inf
    for height, name, colour in sorted(labels):
        nearest = max(height, nearest + 16)  # labels of lines that end together stand below each other
        sheet.text(right + 12, nearest, name, colour, anchor="lm")


def _step(span: float) -> float:
    """The distance of grid lines, 1, 2 or 5 times a power of ten, for about five of them."""
    if span <= 0:
        return 1.0
    power = 10 ** math.floor(math.log10(span / 4))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= span / 4 * 0.999)
