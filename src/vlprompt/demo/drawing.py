"""The demo's pictures: sheets of text, lines and images drawn with Pillow, and curves as the report has them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from vlprompt.bench.report import plots
from vlprompt.data.images import load_image
from vlprompt.files import write_atomically

SCALE = 2  # all is drawn this many times larger, then reduced: smooth lines
INK, FAINT, GRID = "#1f2328", "#656d76", "#d8dee4"
RIGHT, WRONG = "#14803c", "#b42318"


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
        font, text = ImageFont.load_default(SCALE * size), " ".join(text.split())
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
    """Two charts over epochs in an SVG: training loss, and val accuracy with ``levels`` (percent) as dashed lines."""
    colour = plots.colours(list(curves), "")
    charts = []
    for y_label, part, known in (("loss on training images", 0, {}), ("accuracy on val images, %", 1, levels)):
        lines = {n: {i: (v, 0.0) for i, v in enumerate(curve[part], 1)} for n, curve in curves.items()}
        charts.append(plots.curves(lines, colour, y_label, "epoch", y_label, known))
    write_atomically(file, plots.stack(charts))
