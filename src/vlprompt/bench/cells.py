"""What stands in a table: a figure by seed, a difference that is paired by seed, seconds."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from vlprompt.bench.report.published import Published

MISSING, NOT_ASKED = "missing", "–"


@dataclass(frozen=True)
class Cell:
    """A figure by seed, in percent."""

    values: dict[int, float] = field(default_factory=dict)
    seeds: int = 0
    """How many there should be."""
    not_asked: bool = False
    """Whether there is nothing to ask: a linear probe about novel classes, a group without classes."""
    mean_of: float | None = None
    """The figure where it is not the mean over seeds: a harmonic mean of means."""

    @property
    def mean(self) -> float | None:
        """Over the seeds there are; None if there are none."""
        if not self.values:
            return None
        return statistics.mean(self.values.values()) if self.mean_of is None else self.mean_of

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    def __str__(self) -> str:
        if self.mean is None:
            return NOT_ASKED if self.not_asked else MISSING
        spread = "" if self.std is None or self.mean_of is not None else f" ± {self.std:.2f}"
        few = f" ({len(self.values)} of {self.seeds} seeds)" if len(self.values) < self.seeds else ""
        return f"{self.mean:.2f}{spread}{few}"


@dataclass(frozen=True)
class Difference:
    """A method's figure minus the reference's, seed by seed, in points."""

    values: tuple[float, ...]

    def __str__(self) -> str:
        if not self.values:
            return NOT_ASKED
        mean, p = statistics.mean(self.values), self.p
        spread = f" ± {statistics.stdev(self.values):.2f}" if len(self.values) > 1 else ""
        chance = "" if p is None else " (p < 0.001)" if p < 0.001 else f" (p = {p:.3f})"
        return f"{mean:+.2f}{spread}{chance}".replace("-", "−")

    @property
    def p(self) -> float | None:
        """Two-sided p of a paired t-test over seeds; None where the differences are all equal or fewer than two."""
        from scipy.special import stdtr  # comes with scikit-learn

        n = len(self.values)
        spread = statistics.stdev(self.values) if n > 1 else 0.0
        if spread < 1e-9:
            return None
        return float(2 * stdtr(n - 1, -abs(statistics.mean(self.values)) / (spread / math.sqrt(n))))


@dataclass(frozen=True)
class Seconds:
    """How long training took, run by run."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """Over runs; None if there are none."""
        return statistics.mean(self.values) if self.values else None

    def __str__(self) -> str:
        return MISSING if self.mean is None else f"{self.mean:.0f}"


AnyCell = Cell | Difference | Seconds | Published
