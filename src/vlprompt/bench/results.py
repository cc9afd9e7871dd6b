"""``results.csv``: a row for each run and what was measured of it, rebuilt from the figures in the run folders."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from vlprompt.bench.figures import FIGURES, GROUPS, read_figures
from vlprompt.bench.protocols import PROTOCOLS, attack_of, seen
from vlprompt.data.splits import Classes
from vlprompt.documents import csv_cell, csv_text
from vlprompt.errors import DataError, one_line, unknown
from vlprompt.files import write_atomically

RESULTS = "results.csv"


@dataclass(frozen=True)
class Row:
    """One measurement of one run."""

    protocol: str
    data: str
    """Trained on."""
    name: str
    """The row of the tables: a method, or a name for a method and settings."""
    method: str
    backbone: str
    shots: int
    seed: int
    measured_on: str
    classes: str
    """base, novel, all; many, medium, few; seen-t-of-T: of the first t of T tasks; pgd-EPS-STEPS: all, attacked."""
    split: str
    images: int
    """0 where the method cannot be asked about these classes."""
    accuracy: float | None
    """Percent, as the next."""
    macro_accuracy: float | None
    calibration_error: float | None
    epochs: int
    learned_parameters: int
    train_seconds: float
    measure_seconds: float
    settings: str
    """Fingerprint of every setting that decides the result, except the seed."""
    code: str
    """What measured it: version, and a fingerprint of the package's files."""


_COLUMNS = [field.name for field in fields(Row)]
_MEASURED = ("protocol", "data", "name", "backbone", "shots", "seed", "measured_on", "classes", "split")
"""What tells rows apart: there is one figure of each."""
_ALLOWED = {"protocol": PROTOCOLS, "classes": (*get_args(Classes), *GROUPS), "split": ("test", "val")}
_TYPES = {field.name: str(field.type) for field in fields(Row)}


def rows_of(figures: Mapping[str, Any]) -> list[Row]:
    """The rows of one run's figures.json."""
    common = {key: figures[key] for key in ("protocol", "data", "name", "method", "backbone", "shots", "seed")}
    common |= {"settings": figures["settings"], "epochs": figures["epochs"]}
    common |= {"learned_parameters": figures["trainable_parameters"], "train_seconds": round(figures["seconds"], 3)}
    rows = []
    for m in figures["measured"]:
        place = {"measured_on": m["data"], "split": m["split"], "code": m["code"]}
        place["measure_seconds"] = round(m["seconds"], 3)
        for classes, score in {m["classes"]: m, **m.get("groups", {})}.items():
            numbers = {key: score.get(key) for key in ("accuracy", "macro_accuracy", "calibration_error")}
            rows.append(Row(**common, **place, **numbers, classes=classes, images=score["n"]))
    return rows


class Results:
    """The results file of a bench folder; what was read of the run folders is kept until they change."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._known: dict[Path, tuple[int, list[Row]]] = {}

    def write(self) -> list[Row]:
        """Rebuild the file from all run folders, so that no bench that shares the folder is forgotten.

        Raises OutputError if it cannot be written; the folders still hold everything then.
        """
        while True:
            files = self._files()
            rows = self.read(files)
            write_atomically(self.out / RESULTS, to_csv(rows))
            # Another shard may have written a newer file than this one meanwhile: whoever writes last looks once more.
            if self._files() == files:
                return rows

    def read(self, files: Mapping[Path, int] | None = None) -> list[Row]:
        """The rows of all run folders, or of these figures."""
        rows = list[Row]()
        for file, changed in (self._files() if files is None else files).items():
            if file not in self._known or self._known[file][0] != changed:
                self._known[file] = changed, _rows_of_file(file)
            rows += self._known[file][1]
        return rows

    def _files(self) -> dict[Path, int]:
        """The figures of all runs, in the order of rows, each with the time of its last change."""
        found = sorted(self.out.glob(f"*/*/*/*/*/*/{FIGURES}"), key=_in_order)
        return {file: file.stat().st_mtime_ns for file in found}


def _rows_of_file(file: Path) -> list[Row]:
    figures = read_figures(file.parent)
    try:
        return rows_of(figures or {})
    except KeyError as error:
        raise DataError(f"{file} lacks figures: {error}") from None


def _in_order(file: Path) -> list[tuple[str, int, str]]:
    """seed_10 after seed_2."""
    return [(part.rstrip("0123456789"), int("0" + part[len(part.rstrip("0123456789")) :]), part) for part in file.parts]


def to_csv(rows: Iterable[Row]) -> str:
    """The content of results.csv."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        values = ("" if value is None else value for value in vars(row).values())
        writer.writerow(csv_cell(value) if isinstance(value, str) else value for value in values)
    return text.getvalue()


def read_results(file: Path) -> list[Row]:
    """The rows of a results.csv. Raises DataError that names the line of the first that is corrupt or repeated."""
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            lines = csv.reader(stream, strict=True)
            if (head := next(lines, [])) != _COLUMNS:
                lack = [column for column in _COLUMNS if column not in head]
                reason = f"it lacks the columns {', '.join(lack)}" if lack else "its columns are in another order"
                raise DataError(f"{file}, line 1: {reason}")
            rows: dict[tuple, Row] = {}
            for values in filter(None, lines):
                where = f"{file}, line {lines.line_num}"
                row = _row(values, where)
                key = tuple(getattr(row, column) for column in _MEASURED)
                if key in rows:
                    raise DataError(f"{where}: it is of the same run and images as a line above")
                rows[key] = row
            return list(rows.values())
    except FileNotFoundError:
        raise DataError(f"there are no results in {file.parent}: it has no {file.name}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {file}: {one_line(error, most=None)}") from None


def _row(values: list[str], where: str) -> Row:
    if len(values) != len(_COLUMNS):
        raise DataError(f"{where}: {len(values)} values instead of {len(_COLUMNS)}")
    return Row(**{key: _value(key, text, where) for key, text in zip(_COLUMNS, values, strict=True)})


def _value(key: str, text: str, where: str) -> Any:
    kind, percent = _TYPES[key], key.endswith("accuracy")
    if not text and kind.endswith("None"):
        return None
    if not text:
        raise DataError(f"{where}: {key} is empty")
    if text not in _ALLOWED.get(key, [text]) and not (key == "classes" and (seen(text) or attack_of(text))):
        raise DataError(f"{where}: {unknown(key, text[:60], _ALLOWED[key])}")
    if kind == "str":
        return csv_text(text)
    with suppress(ValueError):
        value = int(text) if kind == "int" else float(text)
        if 0 <= value <= (100 + 1e-9 if percent else sys.float_info.max):
            return value
    allowed = "a percentage" if percent else "a whole number" if kind == "int" else "a number"
    raise DataError(f"{where}: {key} = '{text}' (allowed: {allowed})")
