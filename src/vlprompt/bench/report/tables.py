"""Tables of results as papers print them: means over seeds, averages over data sets, differences to a reference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vlprompt.bench.figures import GROUPS
from vlprompt.bench.protocols import PROTOCOLS, attack_of, seen
from vlprompt.bench.report.published import Published
from vlprompt.bench.results import Row
from vlprompt.errors import ConfigError, DataError, first_few, unknown
from vlprompt.training.evaluate import harmonic_mean

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

    @property
    def incomplete(self) -> bool:
        """Whether runs are missing."""
        return not self.not_asked and (self.mean is None or len(self.values) < self.seeds)

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
    """How long a run trained; None if there are none."""

    mean: float | None

    def __str__(self) -> str:
        return MISSING if self.mean is None else f"{self.mean:.0f}"


AnyCell = Cell | Difference | Seconds | Published


@dataclass(frozen=True)
class Table:
    """Methods as rows."""

    title: str
    head: tuple[str, ...]
    lines: dict[str, tuple[AnyCell, ...]]
    data: tuple[str, ...]
    """The data sets that were trained on."""
    note: str = ""

    def is_best(self, name: str, column: int) -> bool:
        """Whether it is the highest of its column as it is printed, so that ties all are."""
        cells = {row: line[column] for row, line in self.lines.items()}
        means = {row: c.mean for row, c in cells.items() if isinstance(c, Cell) and c.mean is not None}
        return len(cells) > 1 and name in means and f"{means[name]:.2f}" == f"{max(means.values()):.2f}"


@dataclass(frozen=True)
class Study:
    """The results of one protocol on one backbone and split, and with one number of shots (all in few-shot)."""

    protocol: str
    backbone: str
    shots: tuple[int, ...]
    split: str
    names: tuple[str, ...]
    data: tuple[str, ...]
    seeds: tuple[int, ...]
    measured: tuple[tuple[str, str], ...]
    """Data sets that are trained on, each with one that is measured then."""
    classes: tuple[str, ...]
    """What is measured of them: ``all``, ``seen-1-of-5``, …"""
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """What it is, in a line."""
        shots = "" if self.protocol == "few-shot" else f", {self.shots[0]} shots"
        split = "" if self.split == "test" else f", {self.split} images"
        tasks = f", {self.tasks} tasks" if self.tasks else ""
        return f"{self.protocol}, {self.backbone}{shots}{tasks}{split}"

    @property
    def tasks(self) -> int:
        """Tasks that the classes arrive in; 0 where they do not."""
        return _tasks(self.classes[0])

    def figure(self, name: str, data: Sequence[str], classes: str, on: str | None = None, shots: int = 0) -> Cell:
        """Accuracy by seed, the mean over data sets; only seeds that all the data sets have count.

        ``on`` is what is measured on, if not the data set that was trained on.
        """
        found: dict[int, dict[str, float]] = {}
        wanted, not_asked = (name, classes, shots or self.shots[0]), False
        for row in self.rows:
            here = (row.name, row.classes, row.shots) == wanted and row.data in data
            if here and row.measured_on == (on or row.data):
                if row.accuracy is not None:
                    found.setdefault(row.seed, {})[row.data] = row.accuracy
                not_asked = not_asked or row.accuracy is None
        whole = {s: statistics.mean(v.values()) for s, v in sorted(found.items()) if len(v) == len(data)}
        return Cell(whole, len(self.seeds), not_asked and not whole)


def studies(rows: Sequence[Row], planned: Iterable[Mapping[str, Any]] = ()) -> list[Study]:
    """The results by protocol, backbone, shots and split, in the order of protocols.

    ``planned`` are runs that there should be (protocol, data, name, backbone, shots, seed, and measured: data, classes
    and split of each measurement), in the order of the tables: without results they are shown as missing. Raises
    DataError where runs of one cell have different settings.
    """
    wanted = [
        {**run, "measured_on": m["data"], "split": m["split"], "classes": m["classes"]}
        for run in planned
        for m in run["measured"]
    ]
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for run in wanted + [{**vars(row), "row": row} for row in rows]:
        shots = None if run["protocol"] == "few-shot" else run["shots"]
        key = run["protocol"], run["backbone"], shots, run["split"], _tasks(run["classes"])
        groups.setdefault(key, []).append(run)
    result = []
    for (protocol, backbone, _, split, _), runs in groups.items():
        there = tuple(run["row"] for run in runs if "row" in run)
        _check_settings(there)
        names, data = (tuple(dict.fromkeys(run[key] for run in runs)) for key in ("name", "data"))
        shots, seeds = (tuple(sorted({run[key] for run in runs})) for key in ("shots", "seed"))
        measured_on = tuple(dict.fromkeys((run["data"], run["measured_on"]) for run in runs))
        classes = tuple(dict.fromkeys(run["classes"] for run in runs))
        result.append(Study(protocol, backbone, shots, split, names, data, seeds, measured_on, classes, there))
    order = list(PROTOCOLS)
    return sorted(result, key=lambda s: (order.index(s.protocol) if s.protocol in order else len(order), s.title))


def _tasks(classes: str) -> int:
    return (seen(classes) or (0, 0))[1]


def _check_settings(rows: Iterable[Row]) -> None:
    known: dict[tuple, Row] = {}
    methods: dict[str, Row] = {}
    for row in rows:
        if (other := methods.setdefault(row.name, row)).method != row.method:
            raise DataError(
                f"{row.protocol}: '{row.name}' is {row.method} on {row.data} and {other.method} on {other.data}: "
                "they cannot be averaged"
            )
        first = known.setdefault((row.data, row.name, row.shots), row)
        if first.settings != row.settings:
            raise DataError(
                f"{row.protocol}: '{row.name}' on {row.data} has other settings for seed {row.seed} than for seed "
                f"{first.seed} ({row.settings}, {first.settings}): they cannot be averaged"
            )


def tables(study: Study, reference: str | None = None) -> list[Table]:
    """A study's tables: the average over data sets first, if there are several, then each data set.

    Behind the accuracies stand the difference to ``reference`` (zero_shot if it is there, or the first), paired by
    seed, and the seconds that a run trained (of the most shots). Raises ConfigError if there is no such row.
    """
    reference = find_reference(study, reference)
    if study.protocol not in _COLUMNS:
        raise DataError(unknown("protocol", study.protocol, PROTOCOLS))
    columns, parts = _COLUMNS[study.protocol], dict[str, tuple[str, ...]]({d: (d,) for d in study.data})
    if len(study.data) > 1 and columns is not _transfer:
        parts = {f"Average over {len(study.data)} data sets": study.data, **parts}
    return [_table(study, title, data, columns(study, data), reference) for title, data in parts.items()]


def find_reference(study: Study, reference: str | None) -> str:
    """The row that others are compared with; raises ConfigError if there is no such row."""
    if reference is None:
        return "zero_shot" if "zero_shot" in study.names else study.names[0]
    if reference not in study.names:
        raise ConfigError(unknown("reference", reference, study.names))
    return reference


Columns = dict[str, Callable[[str], Cell]]
"""Heads, each with what gives a row's cell; the last one is what methods are compared by."""


def _base_to_novel(study: Study, data: Sequence[str]) -> Columns:
    def both(name: str) -> Cell:
        base, novel = (study.figure(name, data, classes) for classes in ("base", "novel"))
        shared = [seed for seed in base.values if seed in novel.values]
        if not shared:
            return Cell(seeds=base.seeds, not_asked=novel.not_asked)
        values = {seed: harmonic_mean(base.values[seed], novel.values[seed]) for seed in shared}
        means = (statistics.mean(cell.values[seed] for seed in shared) for cell in (base, novel))
        return Cell(values, base.seeds, mean_of=harmonic_mean(*means))

    return {
        "base": lambda name: study.figure(name, data, "base"),
        "novel": lambda name: study.figure(name, data, "novel"),
        "HM": both,
    }


def _few_shot(study: Study, data: Sequence[str]) -> Columns:
    def of(shots: int) -> Callable[[str], Cell]:
        return lambda name: study.figure(name, data, "all", shots=shots)

    return {f"{shots} shot{'s' if shots > 1 else ''}": of(shots) for shots in study.shots}


def _transfer(study: Study, data: Sequence[str]) -> Columns:
    targets = tuple(dict.fromkeys(on for trained, on in study.measured if trained in data and on not in data))

    def of(on: str) -> Callable[[str], Cell]:
        return lambda name: study.figure(name, data, "all", on)

    def average(name: str) -> Cell:
        cells = [of(target)(name) for target in targets]
        shared = [seed for seed in study.seeds if cells and all(seed in cell.values for cell in cells)]
        values = {seed: statistics.mean(cell.values[seed] for cell in cells) for seed in shared}
        return Cell(values, len(study.seeds), any(cell.not_asked for cell in cells) and not values)

    return {f"{data[0]} (source)": of(data[0]), **{t: of(t) for t in targets}, "average of targets": average}


def _long_tail(study: Study, data: Sequence[str]) -> Columns:
    def every(name: str) -> Cell:
        return study.figure(name, data, "all")

    def of(group: str) -> Callable[[str], Cell]:
        def cell(name: str) -> Cell:
            found, whole = study.figure(name, data, group), every(name)
            # What is measured as a whole but not in a group: no class, or no image, is in that group.
            return replace(found, not_asked=whole.mean is not None or whole.not_asked) if not found.values else found

        return cell

    return {**{group: of(group) for group in GROUPS}, "all": every}


def _class_incremental(study: Study, data: Sequence[str]) -> Columns:
    def of(t: int) -> Callable[[str], Cell]:
        return lambda name: study.figure(name, data, f"seen-{t}-of-{study.tasks}")

    def average(name: str) -> Cell:
        cells = [of(t)(name) for t in range(1, study.tasks + 1)]
        shared = [seed for seed in study.seeds if cells and all(seed in cell.values for cell in cells)]
        values = {seed: statistics.mean(cell.values[seed] for cell in cells) for seed in shared}
        return Cell(values, len(study.seeds), any(c.not_asked for c in cells) and not values)

    return {"last": of(study.tasks), "average": average}


def _robustness(study: Study, data: Sequence[str]) -> Columns:
    def of(classes: str) -> Callable[[str], Cell]:
        return lambda name: study.figure(name, data, classes)

    attacks = {str(attack): classes for classes in study.classes if (attack := attack_of(classes))}
    return {"clean": of("all"), **{attack: of(classes) for attack, classes in attacks.items()}}


def _all(study: Study, data: Sequence[str]) -> Columns:
    return {"accuracy": lambda name: study.figure(name, data, "all")}


_COLUMNS: dict[str, Callable[[Study, Sequence[str]], Columns]] = {
    "base-to-novel": _base_to_novel,
    "few-shot": _few_shot,
    "cross-dataset": _transfer,
    "domain-generalization": _transfer,
    "long-tail": _long_tail,
    "class-incremental": _class_incremental,
    "robustness": _robustness,
    "unlabelled": _all,
}


def _table(study: Study, title: str, data: tuple[str, ...], columns: Columns, reference: str) -> Table:
    cells = {name: [column(name) for column in columns.values()] for name in study.names}
    lines: dict[str, tuple[AnyCell, ...]] = {}
    for name, row in cells.items():
        own, other = row[-1].values, cells[reference][-1].values
        shared = () if name == reference else tuple(own[seed] - other[seed] for seed in own if seed in other)
        most = [r for r in study.rows if r.name == name and r.data in data and r.shots == study.shots[-1]]
        trained = {(r.data, r.seed): r.train_seconds for r in most}.values()
        seconds = Seconds(statistics.mean(trained) if trained else None)
        lines[name] = (*row, *([Difference(shared)] if len(cells) > 1 else []), seconds)
    head = list(columns)
    head += [f"{head[-1]} − {reference}"] if len(cells) > 1 else []
    gone = [name for name, row in cells.items() if any(str(cell) == MISSING for cell in row)]
    return Table(title, (*head, "train, s"), lines, data, f"Missing runs: {first_few(gone)}." if gone else "")
