"""Which method when: accuracy against CPU minutes of 16 photographs a class, as a table and a plot.

    python tools/which.py run --root DATA --out runs/which   # trains and measures; goes on where it was stopped
    cp runs/which/results.csv runs/which/cost.csv docs/results/which/
    python tools/which.py page                               # docs/compare.md and docs/which.svg, from these files
    python tools/which.py page --check                       # exit code 1 if they would change

DATA holds ``caltech-101/`` (CoOp's layout), ``clothing/`` and ``imagenette/`` (class folders in train, val and test).
Val images are left out: the photographs are all there is to choose on, as for ``vlprompt compare``.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from pages import REPOSITORY, marks, rewrite, table, write_changed

from vlprompt.backbones.load import load_backbone
from vlprompt.bench.bench import bench
from vlprompt.bench.protocols import Asked, Run, plan
from vlprompt.bench.report import plots
from vlprompt.bench.report.tables import MISSING, studies
from vlprompt.bench.results import RESULTS, Row, read_results
from vlprompt.bench.rows import Rows, fingerprint, read_rows
from vlprompt.config.schema import build_config
from vlprompt.data.datasets import load_dataset
from vlprompt.data.splits import write_split
from vlprompt.errors import DataError, VlpromptError
from vlprompt.files import write_atomically
from vlprompt.methods import find_method

ROWS = REPOSITORY / "tools" / "tables" / "which.yaml"
PAGE, PLOT = REPOSITORY / "docs" / "compare.md", REPOSITORY / "docs" / "which.svg"
FIGURES, COST = REPOSITORY / "docs" / "results" / "which", "cost.csv"
PANELS = {"10 classes": ("clothing", "imagenette"), "100 classes": ("caltech101",)}
DATA = tuple(name for panel in PANELS.values() for name in panel)
BACKBONE, SHOTS, SEEDS, TIMED = "mini", 16, (1, 2, 3), 1
"""TIMED is the seed whose training is timed."""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


# --- runs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What one training took."""

    data: str
    name: str
    seed: int
    settings: str
    """Fingerprint, as in results.csv."""
    cpu_seconds: float
    """Of the whole command `vlprompt train`, on one thread, with nothing kept from another run."""


def source(data: str, root: Path) -> str:
    """A data set as commands take it."""
    return data if data == "caltech101" else str(root / data)


def without_val(data: str, root: Path, out: Path) -> Path:
    """A split file of the data set that lists no val images."""
    file = out / "splits" / f"{data}.json"
    write_split(replace(load_dataset(source(data, root), root).split, val=()), file)
    return file


def planned(rows: Rows, data: Iterable[str], root: Path, out: Path, seeds: Sequence[int]) -> list[Run]:
    """The runs of the table."""
    runs = []
    for name in data:
        settings = {"data.root": str(root), "data.split_file": str(without_val(name, root, out)), "backbone": BACKBONE}
        runs += plan(Asked("few-shot", rows, [source(name, root)], seeds, (SHOTS,), settings))
    return runs


def do_runs(runs: Sequence[Run], out: Path, workers: int) -> int:
    """Train and measure what is missing; one seed of each row and data set is trained alone, and timed."""
    costs = {(cost.data, cost.name): cost for cost in read_csv(out / COST, Cost)}
    for run in (run for run in runs if run.config.seed == TIMED and (run.data, run.name) not in costs):
        if (seconds := timed(run, out)) is not None:
            say(f"{run}: {seconds:.0f} CPU seconds")
            costs[run.data, run.name] = Cost(run.data, run.name, TIMED, fingerprint(run.config), round(seconds, 2))
            write_csv(out / COST, costs.values(), Cost)
    done = bench(runs, out, workers=workers, skip_existing=True, say=say)
    for folder, failure in done.failed.items():
        say(f"{folder}: {failure}")
    return int(bool(done.failed))


def timed(run: Run, out: Path) -> float | None:
    """Train a run in a process of its own, into the folder where the bench finds it; None if that fails.

    The bench's own seconds are no cost of a method: it keeps what the frozen tower says of views for the next head,
    and they are seconds of a clock, on a machine that may do other things.
    """
    shutil.rmtree(out / run.folder, ignore_errors=True)  # a training that was stopped
    with TemporaryDirectory() as folder:
        (file := Path(folder) / "config.yaml").write_text(run.config.to_yaml(), "utf-8")
        command = [sys.executable, "-m", "vlprompt", "train", run.config.method, run.config.data.name]
        command += ["--config", str(file), "--out", str(out / run.folder)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        say(f"{run}: {done.stderr.strip()}")
        return None
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


# --- table and plot -----------------------------------------------------------------------------------


def front_of(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """The names of those (cost, accuracy) that no other is as good as in both and better in one."""
    every = set(points.values())
    return {name for name, (c, a) in points.items() if not any(c2 <= c and a2 >= a for c2, a2 in every - {(c, a)})}


class Which:
    """The figures of a folder: accuracies and costs."""

    def __init__(self, folder: Path) -> None:
        self.rows = read_table(folder)
        found = studies(self.rows)
        if len(found) != 1:
            what = f"{SHOTS} shots of {', '.join(DATA)}"
            raise DataError(f"{folder / RESULTS}: {what} on {len(found)} backbones (allowed: 1)")
        self.study = found[0]
        settings = {(row.data, row.name): row.settings for row in self.rows}
        self.minutes = {}
        for cost in read_csv(folder / COST, Cost):
            key = cost.data, cost.name
            if settings.get(key, cost.settings) != cost.settings:
                raise DataError(f"{folder / COST}: '{cost.name}' on {cost.data} has other settings than its accuracies")
            self.minutes[key] = cost.cpu_seconds / 60

    def points(self, data: Collection[str]) -> dict[str, tuple[float, float]]:
        """CPU minutes and accuracy, the means over data sets, of the rows that have all of them."""
        found = {}
        for name in self.study.names:
            minutes = [self.minutes[d, name] for d in data if (d, name) in self.minutes]
            accuracy = self.study.figure(name, tuple(data), "all").mean
            if len(minutes) == len(data) and accuracy is not None:
                found[name] = statistics.mean(minutes), accuracy
        return found

    def table(self, order: Sequence[str]) -> str:
        """In Markdown, a line for each of the rows ``order`` that there are."""
        panels = {panel: self.points(data) for panel, data in PANELS.items()}
        fronts = {panel: front_of(points) for panel, points in panels.items()}
        head, lines = ["method", "new names"], []
        for panel, data in PANELS.items():
            head += [*(f"{name}, %" for name in data), f"CPU minutes, {panel}"]
        methods = {row.name: row.method for row in self.rows}
        for name in (name for name in order if name in methods):
            line = [f"`{name}`", "yes" if takes_new_names(methods[name]) else "no"]
            for panel, data in PANELS.items():
                line += [str(self.study.figure(name, (d,), "all")) for d in data]
                line += [minutes_text(panels[panel][name][0]) if name in panels[panel] else MISSING]
            lines.append([*line, ", ".join(panel for panel in PANELS if name in fronts[panel])])
        return table([*head, "on the front of"], lines)

    def plot(self) -> str:
        """A panel for each number of classes, as SVG."""
        charts = []
        for panel, points in ((panel, self.points(data)) for panel, data in PANELS.items()):
            label = f"{panel} ({', '.join(PANELS[panel])}): accuracy, %"
            if points:
                charts.append(plots.costs(points, front_of(points), panel, "CPU minutes of one training", label))
        return plots.stack(charts)


def read_table(folder: Path) -> list[Row]:
    """The rows of results.csv that are of the table: all classes, test images."""
    asked = "few-shot", SHOTS, "test", "all"
    rows = read_results(folder / RESULTS)
    return [r for r in rows if (r.protocol, r.shots, r.split, r.classes) == asked and r.data in DATA]


def takes_new_names(method: str) -> bool:
    """Whether a tuned model of a method takes class names that it was not tuned on."""
    return find_method(method)(load_backbone(BACKBONE), ("a", "b"), build_config(method).options).takes_new_classes


def minutes_text(minutes: float) -> str:
    return f"{minutes:.{2 if minutes < 1 else 1 if minutes < 10 else 0}f}"


def page(figures: Path, check: bool) -> int:
    """Write the page and the plot, or with ``check`` only name those that would change."""
    which = Which(figures)
    content = f"{which.table(list(read_rows(ROWS)))}\n\n![Accuracy against CPU minutes]({PLOT.name})"
    return write_changed({PAGE: marked(PAGE.read_text("utf-8"), "which", content), PLOT: which.plot()}, check)


# --- files, which tools/regret.py reads and writes too ------------------------------------------------

T = TypeVar("T")
KINDS = {"str": str, "int": int, "float": float}


def read_csv(file: Path, kind: type[T]) -> list[T]:
    """What :func:`write_csv` wrote; nothing if there is no file."""
    if not file.is_file():
        return []
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            lines = list(csv.DictReader(stream))
        return [kind(**{f.name: KINDS[str(f.type)](line[f.name]) for f in fields(kind)}) for line in lines]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}") from None


def write_csv(file: Path, values: Iterable[T], kind: type[T]) -> None:
    """A line for each value of a dataclass."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(vars, values))
    write_atomically(file, text.getvalue())


def marked(text: str, name: str, content: str) -> str:
    """A page's text with ``content`` between its marks."""
    return rewrite(text, marks("figures", "end figures", name), lambda found: content)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- arguments ----------------------------------------------------------------------------------------


def arguments(about: str | None, run: str) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Of a tool with the commands ``run``, also given alone, and ``page``."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs, page = commands.add_parser("run", help=run), commands.add_parser("page", help="write the page")
    runs.add_argument("--root", type=Path, required=True, help="folder of the data sets")
    runs.add_argument("--out", type=Path, required=True)
    runs.add_argument("--data", type=lambda text: text.split(","), default=list(DATA))
    runs.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=list(SEEDS))
    page.add_argument("--check", action="store_true", help="change nothing")
    for command in (runs, page):
        command.add_argument("--figures", type=Path, default=FIGURES, help="folder of results.csv and cost.csv")
    return parser, runs


def main() -> int:
    """Read the arguments and do what they say."""
    parser, runs = arguments(__doc__, "train and measure")
    rows = read_rows(ROWS)
    runs.add_argument("--rows", nargs="+", choices=rows, default=list(rows), metavar="ROW", help="of which.yaml")
    runs.add_argument("--workers", type=int, default=1, help="runs at once, of those that are not timed")
    given = parser.parse_args()
    try:
        if given.command == "page":
            return page(given.figures, given.check)
        rows = {name: rows[name] for name in given.rows}
        return do_runs(planned(rows, given.data, given.root, given.out, given.seeds), given.out, given.workers)
    except VlpromptError as error:
        say(f"error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
