"""``vlprompt bench``: the runs of a protocol, those that are missing done, and the results file kept up to date."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from vlprompt.bank.use import find_bank
from vlprompt.bench import on_ray, pool
from vlprompt.bench.lock import folder_lock
from vlprompt.bench.pool import Outcome
from vlprompt.bench.protocols import Run, data_name, fingerprint, take_shard
from vlprompt.bench.results import RESULTS, Results
from vlprompt.bench.runs import (
    Load,
    check_same_data,
    check_same_settings,
    finished,
    measured_dataset,
    measured_split,
)
from vlprompt.bench.shared import SHARED
from vlprompt.config.images import run_split
from vlprompt.data.datasets import load_dataset
from vlprompt.errors import ConfigError, DataError, Interrupted, VlpromptError, first_few, one_line
from vlprompt.files import write_atomically

PLANNED = "planned.json"
_OF_A_RUN = {"data", "name", "backbone", "shots", "seed"}


@dataclass
class Done:
    """What a bench did."""

    results: str
    runs: int
    """Of this shard."""
    kept: int = 0
    """Finished before."""
    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    """Run folders, and what went wrong in each."""


def bench(
    runs: Sequence[Run],
    out: Path,
    *,
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    shard: str | None = None,
    skip_existing: bool = False,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Done:
    """Do the runs of ``shard`` (all, or "i/n"), each in its folder below ``out``; a failed one does not stop the rest.

    ``workers`` are runs at once: one if not given, on ``ray`` as many as it has room for. With ``skip_existing``
    finished runs are kept and stopped ones resumed. Raises ConfigError before anything is done if a run's folder is
    there already (without it) or holds results from other settings or data, if another bench is at work in ``out``, if
    there is no Ray, or if a region bank does not fit; DataError for data sets and banks that are not there, and data
    sets that are too small; Interrupted after Ctrl-C, when the runs at work have saved a checkpoint.
    """
    mine = take_shard(runs, shard)
    identity = json.dumps([(run.folder.as_posix(), fingerprint(run.config)) for run in runs])
    with folder_lock(out, sha256(identity.encode()).hexdigest()[:12], shard):
        there = [
            run.folder.as_posix() for run in mine if (out / run.folder).exists() and any((out / run.folder).iterdir())
        ]
        if there and not skip_existing:
            raise ConfigError(f"{out} holds {first_few(there)}: --skip-existing keeps what is finished and continues")
        load = cache(load_dataset)  # each data set once
        for run in mine:
            check_same_settings(run, out)
            check_same_data(run, out, load)
        todo = [run for run in mine if not finished(run, out)]
        check_data(todo, load)
        check_banks(todo, load)
        elsewhere = engine == "ray" and bool(todo)
        with on_ray.connected() if elsewhere else nullcontext():
            outcomes = on_ray.outcomes(todo, out, workers) if elsewhere else pool.outcomes(todo, out, workers or 1, say)
            note_planned(runs, out)
            for note in gaps(todo, load):
                say(note)
            result = Done(str(out / RESULTS), len(mine), kept=len(mine) - len(todo))
            if result.kept:
                say(f"{result.kept} of {len(mine)} runs were finished before")
            _do_all(outcomes, len(todo), out, result, say, progress)
        with suppress(DataError):  # figures of another shard that cannot be read hinder nothing that was done here
            if all(finished(run, out) for run in runs):
                shutil.rmtree(out / SHARED, ignore_errors=True)
    return result


def _do_all(
    outcomes: Iterable[Outcome],
    todo: int,
    out: Path,
    result: Done,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> None:
    results, began, interrupted = Results(out), time.monotonic(), False
    progress(result.kept, result.runs)
    for n, outcome in enumerate(outcomes, 1):
        interrupted = interrupted or outcome.interrupted
        if outcome.interrupted:
            continue
        if outcome.failure:
            result.failed[outcome.run.folder.as_posix()] = outcome.failure
            if outcome.trace:
                say(outcome.trace.rstrip())
        else:
            result.done += 1
        left = (time.monotonic() - began) / n * (todo - n)
        say(f"[{result.kept + n}/{result.runs}] {_told(outcome)}" + (f"; about {_span(left)} left" if left else ""))
        progress(result.kept + n, result.runs)
        _write(results)  # what hinders it is told at the end, if it still does
    if unwritten := _write(results):
        say(f"{unwritten}; nothing is lost: the run folders hold all figures, and --skip-existing writes it again")
        result.failed[RESULTS] = unwritten
    if interrupted:
        raise Interrupted(
            f"{result.kept + result.done} of {result.runs} runs are finished; to continue: --skip-existing"
        )


def _write(results: Results) -> str:
    """Write results.csv; what hinders it, if anything does."""
    try:
        results.write()
    except VlpromptError as error:  # a full disk, a run folder that somebody has edited
        return str(error)
    return ""


def _told(outcome: Outcome) -> str:
    if outcome.failure or outcome.figures is None:
        return f"{outcome.run}: FAILED: {outcome.failure}"
    own = outcome.run.data
    told = []
    for m in outcome.figures["measured"]:
        what = m["classes"] if m["data"] == own else m["data"]
        told.append(f"{what} {m['accuracy']:.2f} %" if m["n"] else f"{what} –")
    return f"{outcome.run}: {', '.join(told)}"


def _span(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"


def check_data(runs: Sequence[Run], load: Load = load_dataset) -> None:
    """Raise DataError if a data set of a run is not there, or has too few images to train or none to measure on."""
    drawn = set()
    for run in runs:
        data = run.config.data
        images = replace(data, batch_size=1)  # whatever decides which images there are
        if images in drawn:
            continue
        drawn.add(images)
        run_split(run.config, load(data.name, data.root, data.split_file))
        for m in run.measurements:
            measured_split(run.config, m, load)


def check_banks(runs: Sequence[Run], load: Load = load_dataset) -> None:
    """Raise DataError if the region bank of a run is not there, ConfigError if it does not fit the run."""
    fitting = set()
    for run in runs:
        config = run.config
        data, asked = config.data, (config.data, config.method, config.teacher)
        if data.bank is not None and asked not in fitting:
            fitting.add(asked)
            find_bank(config, load(data.name, data.root, data.split_file).split.subset(data.classes).class_names)


def note_planned(runs: Sequence[Run], out: Path) -> None:
    """Add to ``PROTOCOL/planned.json`` which runs and measurements there should be, so that none is missing unseen."""
    file = out / runs[0].protocol / PLANNED
    known = read_planned(file)
    for run in runs:
        place = run.folder.relative_to(run.protocol).as_posix()
        before = known.get(place, {}).get("measured", [])
        asked = [{"data": data_name(m.data), "classes": m.classes, "split": m.split} for m in run.measurements]
        known[place] = {
            "data": run.data,
            "name": run.name,
            "backbone": run.folder.parts[3],
            "shots": run.config.data.shots,
            "seed": run.config.seed,
            "measured": before + [m for m in asked if m not in before],
        }
    write_atomically(file, json.dumps(known, indent=1))


def gaps(runs: Sequence[Run], load: Load = load_dataset) -> list[str]:
    """A line for each choice of images that the runs are measured on in which some of its classes have none."""
    found: dict[str, None] = {}
    for run in runs:
        for m in run.measurements:
            found[measured_dataset(run.config, m, load).gap(m.split, m.classes)] = None
    return list(filter(None, found))


def read_planned(file: Path) -> dict[str, Any]:
    """The planned runs by folder; none if there is no file. Raises DataError if it cannot be read.

    Those of earlier versions lack what was to be measured (``measured``).
    """
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        advice = "remove it, and repeat the bench with --skip-existing to have missing runs named"
        raise DataError(f"cannot read {file}: {one_line(error)}: {advice}") from None
    runs = content.items() if isinstance(content, dict) else ()
    return {place: run for place, run in runs if isinstance(run, dict) and run.keys() >= _OF_A_RUN}
