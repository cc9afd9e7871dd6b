"""Plots as SVG text that stands in a page, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from vlprompt.bench.report.axes import LETTER, WIDTH, Axes, Drawing, NamedAxes, short_name, step_of, wide_range

COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31", "#444444", "#b80058",
    "#7fbf7b", "#1b2a6b", "#f781bf", "#a8c800", "#00bcc8", "#9e9ac8", "#666600", "#ff7f7f", "#5e3c1e", "#4040ff",
)  # fmt: skip
GREY = "#999999"
SHOWN = 20  # classes at either end of a long list of gains


def colours(names: Sequence[str], reference: str) -> dict[str, str]:
    """A colour for each name, grey for the reference."""
    others = [name for name in names if name != reference]
    return {reference: GREY} | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}


def bars(values: Mapping[str, float], colour: Mapping[str, str], title: str) -> str:
    """Horizontal bars from zero, in percent."""
    left, row = _room(values), 24
    drawing = Drawing(row * len(values) + 10, title)
    scale = (WIDTH - left - 60) / max(*values.values(), 1e-9)
    for i, (name, value) in enumerate(values.items()):
        y = row * i + 5
        drawing.text(left - 8, y + 14, short_name(name), "end")
        drawing.box(left, y + 2, value * scale, row - 6, colour[name])
        drawing.text(left + value * scale + 6, y + 14, f"{value:.2f}")
    return str(drawing)


def base_and_novel(points: Mapping[str, tuple[float, float]], colour: Mapping[str, str], title: str) -> str:
    """Base accuracy to the right, novel accuracy upwards, with lines of equal harmonic mean."""
    axes = Axes(
        wide_range([x for x, _ in points.values()]),
        wide_range([y for _, y in points.values()]),
        "base, %",
        "novel, %",
        title,
    )
    (x0, x1), (y0, y1) = axes.x_range, axes.y_range
    low, high = (2 * x * y / (x + y) if x + y else 0.0 for x, y in ((x0, y0), (x1, y1)))
    step, named, left = step_of(high - low), list[tuple[float, float]](), axes.place(x0, y0)[0]
    for k in range(math.ceil(max(low, step / 2) / step), math.floor(high / step) + 1):
        mean = k * step
        curve = [(x, mean * x / (2 * x - mean)) for x in (x0 + (x1 - x0) * i / 60 for i in range(61)) if 2 * x > mean]
        inside = [axes.place(x, y) for x, y in curve if y0 <= y <= y1]
        if len(inside) < 2 or inside[-1][0] < left + 60:  # its name would stand on the axis
            continue
        if all(abs(inside[-1][0] - x) > 60 or abs(inside[-1][1] - y) > 16 for x, y in named):
            named.append(inside[-1])
            axes.drawing.path(inside, "#bbb", 1, "4 3")
            axes.drawing.text(inside[-1][0] - 4, inside[-1][1] - 4, f"HM {mean:g}", "end", "#888")
    for name, (x, y) in points.items():
        axes.drawing.dot(*axes.place(x, y), colour[name])
    axes.legend(points, colour)
    return str(axes.drawing)


def curves(
    lines: Mapping[str, Mapping[int, tuple[float, float]]],
    colour: Mapping[str, str],
    title: str,
    x_label: str = "training images a class",
    y_label: str = "accuracy, %",
    levels: Mapping[str, float] | None = None,
) -> str:
    """Figures (mean, standard deviation) against shots, on a logarithmic axis, or epochs; ``levels`` are dashed."""
    steps, levels = sorted({n for line in lines.values() for n in line}), levels or {}
    ends = [m + sign * s for line in lines.values() for m, s in line.values() for sign in (-1, 1)] + [*levels.values()]
    logarithmic, percent = "epoch" not in x_label, "%" in y_label
    places = {n: math.log2(n) if logarithmic else n for n in steps}
    shown = steps if logarithmic else steps[:: math.ceil(len(steps) / 10)]
    axes = Axes(
        (min(places.values()) - 0.2, max(places.values()) + 0.2), wide_range(ends, 1.0 if percent else 0.0), x_label,
        y_label, title, {places[n]: str(n) for n in shown},
    )  # fmt: skip
    for level in levels.values():
        axes.drawing.path([axes.place(x, level) for x in axes.x_range], GREY, 1.5, "5 5")
    for name, line in lines.items():
        axes.drawing.path([axes.place(places[n], line[n][0]) for n in sorted(line)], colour[name])
        for n, (mean, spread) in sorted(line.items()):
            if spread or logarithmic:
                below, above = (axes.place(places[n], mean + sign * spread) for sign in (-1, 1))
                axes.drawing.line(*below, *above, colour[name])
            axes.drawing.dot(*axes.place(places[n], mean), colour[name])
    axes.legend([*lines, *levels], dict.fromkeys(levels, GREY) | dict(colour))
    return str(axes.drawing)


def costs(points: Mapping[str, tuple[float, float]], front: Collection[str], title: str, x: str, y: str) -> str:
    """Accuracy upwards against cost on a logarithmic axis, each point with its name; those of the front joined."""
    places = {name: (math.log10(cost), accuracy) for name, (cost, accuracy) in points.items()}
    low, high = (pick(cost for cost, _ in places.values()) for pick in (min, max))
    tens = range(math.floor(low) - 1, math.ceil(high) + 1)
    ticks = {math.log10(k) + n: f"{k * 10.0**n:g}" for n in tens for k in (1, 2, 5)}
    left, right = low - 0.1, high + 0.1
    shown = {place: text for place, text in ticks.items() if left <= place <= right}
    axes = NamedAxes((left, right), wide_range([accuracy for _, accuracy in places.values()]), x, y, title, shown)
    dots = {name: axes.place(*place) for name, place in places.items()}
    axes.drawing.path(sorted(dots[name] for name in front), COLOURS[0], 1)
    taken, named = [(px - 5, py - 5, px + 5, py + 5) for px, py in dots.values()], {}
    # Those of the front come first, and find room beside their dots; then from the top.
    for name in sorted(dots, key=lambda name: (name not in front, dots[name][1])):
        spots = [(spot, _room_of(short_name(name), *spot)) for spot in _beside(*dots[name])]
        inside = (s for s in spots if s[1][0] > axes.LEFT and s[1][1] > axes.TOP - 12 and s[1][3] < axes.BOTTOM)
        named[name], box = next((s for s in inside if not any(_meet(s[1], other) for other in taken)), spots[0])
        taken.append(box)
        text_x, text_y, anchor = named[name]
        if anchor != "middle" and text_y - 4 != dots[name][1]:  # too far off to be told as its own
            axes.drawing.line(*dots[name], text_x, text_y - 4, "#aaa")
    for name, spot in named.items():
        axes.drawing.dot(*dots[name], COLOURS[0] if name in front else GREY)
        axes.drawing.text(*spot[:2], short_name(name), spot[2], COLOURS[0] if name in front else "#555")
    return str(axes.drawing)


def _beside(x: float, y: float) -> Iterable[tuple[float, float, str]]:
    """Where a dot's name may stand, the best first: place and anchor."""
    yield from ((x + 8, y + 4, "start"), (x - 8, y + 4, "end"), (x, y - 9, "middle"), (x, y + 17, "middle"))
    for away in range(12, 80, 6):
        for down in (y + 4 - away, y + 4 + away):
            yield from ((x + away, down, "start"), (x - away, down, "end"))


def _room_of(text: str, x: float, y: float, anchor: str) -> tuple[float, float, float, float]:
    """The box of a text: left, top, right, bottom."""
    wide = 1.1 * LETTER * len(text)  # of a wide typeface
    left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * wide
    return left, y - 10, left + wide, y + 3


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes (left, top, right, bottom) have a place in common."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def stack(charts: Sequence[str]) -> str:
    """Charts below each other in one picture."""
    top, parts = 0, list[str]()
    for chart in charts:
        height = int(chart.partition(f'viewBox="0 0 {WIDTH} ')[2].partition('"')[0])
        parts.append(chart.replace("<svg ", f'<svg y="{top}" height="{height}" ', 1))
        top += height
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}">'
    return f'{head}<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>'


def gains(values: Mapping[str, float], title: str) -> str:
    """Each class's gain in points, largest first; of a long list both ends."""
    ranked = sorted(values.items(), key=lambda item: -item[1])
    left_out = max(len(ranked) - 2 * SHOWN, 0)
    if left_out:
        ranked = ranked[:SHOWN] + ranked[-SHOWN:]
    left, row = _room(name for name, _ in ranked), 16
    drawing = Drawing(row * (len(ranked) + (left_out > 0)) + 10, title)
    largest = max(*(abs(value) for _, value in ranked), 1e-9)
    half = (WIDTH - left - 110) / 2
    middle = left + 50 + half
    drawing.line(middle, 0, middle, drawing.height)
    for i, (name, value) in enumerate(ranked):
        y = row * (i + (left_out > 0 and i >= SHOWN)) + 5
        length = abs(value) / largest * half
        drawing.text(left - 8, y + 11, short_name(name), "end")
        drawing.box(middle - (length if value < 0 else 0), y + 2, length, row - 4, COLOURS[1 if value < 0 else 0])
        place = middle + (length + 5 if value >= 0 else -length - 5)
        drawing.text(place, y + 11, f"{value:+.1f}".replace("-", "−"), "start" if value >= 0 else "end")
    if left_out:
        drawing.text(middle, row * SHOWN + 16, f"{left_out} classes in between", "middle", "#888")
    return str(drawing)


def matrix(names: Sequence[str], counts: Mapping[tuple[int, int], int], title: str) -> str:
    """Images by class (rows) and predicted class (columns), both numbered: right ones blue, mistakes orange."""
    rows = [f"{short_name(name)}  {i}" for i, name in enumerate(names, 1)]
    left, top, high = 16 + LETTER * max(map(len, rows)), 24, 20
    wide = min((WIDTH - left - 4) / len(names), 44)
    every = math.ceil(20 / wide)  # column numbers do not fit closer
    drawing = Drawing(top + high * len(names) + 8, title)
    totals = [sum(n for (row, _), n in counts.items() if row == i) for i in range(len(names))]
    for i, name in enumerate(rows):
        drawing.text(left - 6, top + high * i + 14, name, "end")
        if i % every == 0:
            drawing.text(left + wide * (i + 0.5), top - 8, str(i + 1), "middle", "#555")
        drawing.line(left, top + high * i, left + wide * len(names), top + high * i, "#eee")
    for (row, column), n in counts.items():
        x, y, of_class = left + wide * column, top + high * row, n / totals[row]
        drawing.box(x, y, wide - 1, high - 1, _tint(COLOURS[0 if row == column else 1], of_class))
        if LETTER * len(str(n)) + 3 < wide:
            drawing.text(x + wide / 2 - 0.5, y + 14, str(n), "middle")
    return str(drawing)


def _tint(colour: str, strength: float) -> str:
    """A colour mixed with white; never so faint that it is not seen."""
    strength = 0.12 + 0.7 * strength
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 + strength * (part - 255)):02x}" for part in parts)


def reliability(bins: Mapping[str, Sequence[tuple[float, float, int]]], colour: Mapping[str, str], title: str) -> str:
    """Of each model its bins: mean confidence, share right (± its standard error), images; the first's as grey bars."""
    axes = Axes((0.0, 1.0), (0.0, 1.0), "probability of the predicted class", "share right", title)
    first = next(iter(bins.values()))
    for confidence, _, n in first:
        x, y = axes.place(confidence, 0.2 * n / max(n for *_, n in first))
        axes.drawing.box(x - 6, y, 12, axes.BOTTOM - y, "#ddd")
    axes.drawing.path([axes.place(0, 0), axes.place(1, 1)], GREY, 1, "5 5")
    for name, points in bins.items():
        axes.drawing.path([axes.place(c, right) for c, right, _ in points], colour[name])
        for confidence, right, n in points:
            error = math.sqrt(right * (1 - right) / n)
            (x, low), (_, high) = axes.place(confidence, right - error), axes.place(confidence, right + error)
            axes.drawing.line(x, low, x, high, colour[name])
            axes.drawing.dot(*axes.place(confidence, right), colour[name])
    axes.legend(bins, colour)
    return str(axes.drawing)


def _room(names: Iterable[str]) -> float:
    return 20 + LETTER * max((len(short_name(name)) for name in names), default=0)
