"""What is said of each method: its figures on held-out images, the table of them, and which method to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vlprompt.training.evaluate import score


@dataclass(frozen=True)
class Row:
    """A method's figures on the images held out."""

    method: str
    preset: str | None
    accuracy: float
    """Percent."""
    standard_error: float
    """Of the accuracy, in points."""
    macro_accuracy: float
    calibration_error: float
    """Before calibration, 0 to 1; and after, by cross-validation:"""
    calibrated_error: float
    seconds: float
    """To train it once."""
    size: int
    """Bytes of the tuned model, without the backbone."""
    new_names: bool
    """Whether it takes class names that it was not tuned on."""


@dataclass(frozen=True)
class LeftOut:
    """A method that was not compared."""

    method: str
    reason: str
    needs: float | None = None
    """Seconds that it was estimated to take, if that is the reason."""


def row_of(
    method: str, preset: str | None, logits: Tensor, calibrated: Tensor, labels: Tensor, names: Sequence[str],
    seconds: float, size: int, new_names: bool,
) -> Row:  # fmt: skip
    """The figures of held-out logits [n, C], and of the same calibrated."""
    found = score(logits, labels, names)
    p = found.accuracy / 100
    return Row(
        method=method,
        preset=preset,
        accuracy=found.accuracy,
        standard_error=100 * math.sqrt(p * (1 - p) / found.n),
        macro_accuracy=found.macro_accuracy,
        calibration_error=found.calibration_error,
        calibrated_error=score(calibrated, labels, names).calibration_error,
        seconds=seconds,
        size=size,
        new_names=new_names,
    )


def best_of(rows: Sequence[Row]) -> Row:
    """The most accurate; of equal ones the one better by class, then the quicker."""
    return max(rows, key=lambda row: (row.accuracy, row.macro_accuracy, -row.seconds))


def reason_for(rows: Sequence[Row], right: dict[str, Tensor]) -> str:
    """Why the best is the best, and which others cannot be told from it; ``right`` [n] says who was right on what."""
    best = best_of(rows)
    others = [row for row in rows if row is not best]
    if not others:
        return f"{best.method} is the only method that was compared."
    parts = [f"{best.method} is the most accurate on held-out images: {best.accuracy:.1f} %."]
    near = []
    for row in sorted(others, key=lambda row: -row.accuracy):
        gap = (right[best.method].double() - right[row.method].double()) * 100
        error = gap.std(correction=0).item() / math.sqrt(len(gap))
        if gap.mean().item() <= 2 * error or gap.mean() == 0:
            near.append(f"{row.method} ({gap.mean().item():.1f} ± {error:.1f} points below, {row.seconds:.0f} s)")
    if near:
        parts.append(f"Not told from it by these images: {', '.join(near)}.")
    if not best.new_names and (taking := [row for row in others if row.new_names]):
        other = best_of(taking)
        parts.append(
            f"It knows its own classes only; of those that take new class names {other.method} is best "
            f"({other.accuracy:.1f} %)."
        )
    return " ".join(parts)


HEAD = (
    "method", "accuracy, %", "macro accuracy, %", "calibration error", "calibrated", "training, s", "size, kB",
    "new names",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    return (
        row.method,
        f"{row.accuracy:.1f} ± {row.standard_error:.1f}",
        f"{row.macro_accuracy:.1f}",
        f"{row.calibration_error:.3f}",
        f"{row.calibrated_error:.3f}",
        f"{row.seconds:.0f}",
        f"{row.size / 1000:.0f}",
        "yes" if row.new_names else "no",
    )


def table(rows: Sequence[Row]) -> str:
    """The table for people, the best first."""
    lines = [HEAD, *map(cells, ranked(rows))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return "\n".join(map("  ".join, padded))


def ranked(rows: Sequence[Row]) -> list[Row]:
    """The best first."""
    left, found = list(rows), []
    while left:
        found.append(best_of(left))
        left.remove(found[-1])
    return found
