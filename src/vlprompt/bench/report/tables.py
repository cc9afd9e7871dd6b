"""Tables of results as papers print them: means over seeds, averages over data sets, differences to a reference."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlprompt.bench.cells import MISSING, AnyCell, Cell, Difference, Seconds
from vlprompt.bench.protocols import PROTOCOLS
from vlprompt.bench.results import Row
from vlprompt.bench.runs import GROUPS
from vlprompt.errors import ConfigError, DataError, first_few, unknown
from vlprompt.training.evaluate import harmonic_mean


@dataclass(frozen=True)
class Table:
    """Methods as rows."""

    title: str
    head: tuple[str, ...]
    lines: tuple[tuple[str, tuple[AnyCell, ...]], ...]
    best: tuple[float | None, ...]
    """The highest mean of each column; None where there is nothing to compare."""
    note: str = ""
    data: tuple[str, ...] = ()
    """The data sets that were trained on."""

    def label(self, name: str) -> str:
        """A row's name as it is printed."""
        return name


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
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """What it is, in a line."""
        shots = "" if self.protocol == "few-shot" else f", {self.shots[0]} shots"
        split = "" if self.split == "test" else f", {self.split} images"
        return f"{self.protocol}, {self.backbone}{shots}{split}"

    def figure(self, name: str, data: Sequence[str], on: str | None, classes: str, shots: int) -> Cell:
        """Accuracy by seed, the mean over data sets; only seeds that all the data sets have count.

        ``on`` is what is measured on, if not the data set that was trained on.
        """
        found: dict[int, dict[str, float]] = {}
        not_asked = False
        for row in self.rows:
            here = (row.name, row.classes, row.shots) == (name, classes, shots) and row.data in data
            if not here or row.measured_on != (on or row.data):
                continue
            if row.accuracy is None:
                not_asked = True
            else:
                found.setdefault(row.seed, {})[row.data] = row.accuracy
        whole = {s: statistics.mean(v.values()) for s, v in sorted(found.items()) if len(v) == len(data)}
        return Cell(whole, len(self.seeds), not_asked and not whole)


def studies(rows: Sequence[Row], planned: Iterable[dict] = ()) -> list[Study]:
    """The results by protocol, backbone, shots and split, in the order of protocols.

    ``planned`` are runs that there should be (protocol, data, name, backbone, shots, seed, and measured: data, classes
    and split of each measurement), in the order of the tables: without results they are shown as missing. Those of
    earlier versions do not say what is measured, and belong to every split that has results. Raises DataError where
    runs of one cell have different settings.
    """
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(_key(vars(row), row.split), []).append(row)
    wanted: dict[tuple, list[dict]] = {}
    for run in planned:
        measured = run.get("measured") or [
            {"data": run["data"], "split": key[-1]} for key in found if key == _key(run, key[-1])
        ]
        for m in measured:
            wanted.setdefault(_key(run, m["split"]), []).append({**run, "measured_on": m["data"]})
    result = []
    for key in {**wanted, **found}:
        protocol, backbone, _, split = key
        there = found.get(key, [])
        _check_settings(there)
        runs = wanted.get(key, []) + [vars(row) for row in there]
        names, data = _distinct(run["name"] for run in runs), _distinct(run["data"] for run in runs)
        shots = tuple(sorted({run["shots"] for run in runs}))
        seeds = tuple(sorted({run["seed"] for run in runs}))
        measured_on = tuple(dict.fromkeys((run["data"], run["measured_on"]) for run in runs))
        result.append(Study(protocol, backbone, shots, split, names, data, seeds, measured_on, tuple(there)))
    order = list(PROTOCOLS)
    return sorted(result, key=lambda s: (order.index(s.protocol) if s.protocol in order else len(order), s.title))


def _key(run: Mapping[str, Any], split: str) -> tuple:
    """What the runs of one study have in common."""
    shots = None if run["protocol"] == "few-shot" else run["shots"]
    return run["protocol"], run["backbone"], shots, split


def _distinct(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _check_settings(rows: Iterable[Row]) -> None:
    known: dict[tuple, Row] = {}
    for row in rows:
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
    build = {
        "base-to-novel": _base_to_novel,
        "few-shot": _few_shot,
        "cross-dataset": _transfer,
        "domain-generalization": _transfer,
        "long-tail": _long_tail,
    }.get(study.protocol)
    if build is None:
        raise DataError(unknown("protocol", study.protocol, PROTOCOLS))
    n = len(study.data)
    several = [(f"Average over {n} data sets", study.data)] if n > 1 and build is not _transfer else []
    parts = several + [(d, (d,)) for d in study.data]
    return [_table(study, title, data, build(study, data), reference) for title, data in parts]


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
    def of(classes: str) -> Callable[[str], Cell]:
        return lambda name: study.figure(name, data, None, classes, study.shots[0])

    def both(name: str) -> Cell:
        base, novel = of("base")(name), of("novel")(name)
        shared = [seed for seed in base.values if seed in novel.values]
        if not shared:
            return Cell(seeds=base.seeds, not_asked=novel.not_asked)
        values = {seed: harmonic_mean(base.values[seed], novel.values[seed]) for seed in shared}
        means = (statistics.mean(cell.values[seed] for seed in shared) for cell in (base, novel))
        return Cell(values, base.seeds, mean_of=harmonic_mean(*means))

    return {"base": of("base"), "novel": of("novel"), "HM": both}


def _few_shot(study: Study, data: Sequence[str]) -> Columns:
    def of(shots: int) -> Callable[[str], Cell]:
        return lambda name: study.figure(name, data, None, "all", shots)

    return {f"{shots} shot{'s' if shots > 1 else ''}": of(shots) for shots in study.shots}


def _transfer(study: Study, data: Sequence[str]) -> Columns:
    targets = _distinct(on for trained, on in study.measured if trained in data and on not in data)

    def of(on: str) -> Callable[[str], Cell]:
        return lambda name: study.figure(name, data, on, "all", study.shots[0])

    def average(name: str) -> Cell:
        cells = [of(target)(name) for target in targets]
        shared = [seed for seed in study.seeds if all(seed in cell.values for cell in cells)]
        values = {seed: statistics.mean(cell.values[seed] for cell in cells) for seed in shared}
        return Cell(values, len(study.seeds), any(cell.not_asked for cell in cells) and not values)

    return {f"{data[0]} (source)": of(data[0]), **{t: of(t) for t in targets}, "average of targets": average}


def _long_tail(study: Study, data: Sequence[str]) -> Columns:
    def every(name: str) -> Cell:
        return study.figure(name, data, None, "all", study.shots[0])

    def of(group: str) -> Callable[[str], Cell]:
        def cell(name: str) -> Cell:
            found, whole = study.figure(name, data, None, group, study.shots[0]), every(name)
            # What is measured as a whole but not in a group: no class, or no image, is in that group.
            return replace(found, not_asked=whole.mean is not None or whole.not_asked) if not found.values else found

        return cell

    return {**{group: of(group) for group in GROUPS}, "all": every}


def _table(study: Study, title: str, data: Sequence[str], columns: Columns, reference: str) -> Table:
    cells = {name: [column(name) for column in columns.values()] for name in study.names}
    compared = len(cells) > 1
    lines: list[tuple[str, tuple[AnyCell, ...]]] = []
    for name, row in cells.items():
        own, other = row[-1].values, cells[reference][-1].values
        shared = () if name == reference else tuple(own[seed] - other[seed] for seed in own if seed in other)
        most = [r for r in study.rows if r.name == name and r.data in data and r.shots == study.shots[-1]]
        seconds = Seconds(tuple({(r.data, r.seed): r.train_seconds for r in most}.values()))
        lines.append((name, (*row, *([Difference(shared)] if compared else []), seconds)))
    head, best = list(columns), [_highest(column) if compared else None for column in zip(*cells.values(), strict=True)]
    head += [f"{head[-1]} − {reference}"] if compared else []
    best += [None] * (len(head) + 1 - len(best))
    gone = [name for name, row in cells.items() if any(str(cell) == MISSING for cell in row)]
    notes = [f"Missing runs: {first_few(gone)}."] if gone else []
    return Table(title, (*head, "train, s"), tuple(lines), tuple(best), " ".join(notes), tuple(data))


def _highest(cells: Iterable[Cell]) -> float | None:
    return max((cell.mean for cell in cells if cell.mean is not None), default=None)
