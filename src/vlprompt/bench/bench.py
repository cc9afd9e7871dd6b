"""``vlprompt bench``: the runs of a protocol, those that are missing done, and the results file kept up to date."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from typing_extensions import TypedDict

from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import check_device, load_backbone
from vlprompt.bank.use import find_bank
from vlprompt.bench import launch, on_ray
from vlprompt.bench.launch import Outcome, Process
from vlprompt.bench.protocols import Run, take_shard
from vlprompt.bench.results import RESULTS, Results
from vlprompt.bench.runs import Load, check_same, finished, measured_dataset, measured_split
from vlprompt.bench.shared import SHARED
from vlprompt.bench.stages import check_method, stages
from vlprompt.config.images import run_split
from vlprompt.config.schema import RunConfig
from vlprompt.config.teacher import load_teacher_model, teacher_name
from vlprompt.data.datasets import check_outside, in_two_parts, load_dataset
from vlprompt.data.known.table import find_dataset
from vlprompt.documents import read_sealed, write_sealed
from vlprompt.errors import ConfigError, DataError, Interrupted, VlpromptError, first_few, one_line
from vlprompt.files import held, in_use, write_error
from vlprompt.methods import find_method
from vlprompt.training.prepare import build, describe, find_sources
from vlprompt.training.warm_start import start_from

PLANNED, LOCK = "planned.json", ".lock"
Say = Callable[[str], None]


class Wanted(TypedDict):
    """What is to be measured, as :meth:`Measurement.to_dict` writes it."""

    data: str
    classes: str
    split: str


class Planned(TypedDict):
    """A run that was asked for, and what was to be measured of it."""

    data: str
    name: str
    backbone: str
    shots: int | None
    seed: int
    measured: list[Wanted]


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
    say: Say = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Done:
    """Do the runs of ``shard`` (all, or "i/n"), each in its folder below ``out``; a failed one does not stop the rest.

    ``workers`` are runs at once: one if not given, on ``ray`` as many as it has room for. With ``skip_existing``
    finished runs are kept and stopped ones resumed. Raises ConfigError before anything is done if a run's folder is
    there already (without it) or holds results from other settings or data, if another bench that is no shard is at
    work in ``out``, if there is no Ray, or if a bank does not fit; BackboneError for a backbone, teacher or device that
    does not do; DataError for data sets and banks that are not there, and data sets that are too small; Interrupted
    after Ctrl-C, when the runs at work have saved a checkpoint.
    """
    mine = take_shard(runs, shard)
    there = [str(run.folder) for run in mine if in_use(out / run.folder)]
    if there and not skip_existing:
        raise ConfigError(f"{out} holds {first_few(there)}: skip_existing keeps what is finished and continues")
    load = cache(load_dataset)  # each data set once
    for run in mine:
        check_same(run, out, load)
    todo = [run for run in mine if not finished(run, out)]
    check_data(todo, load)
    for data in {run.config.data.name: run.config.data for run in runs}.values():
        check_outside(out, load(data.name, data.root, data.split_file))
    elsewhere = engine == "ray" and bool(todo)
    check_models(todo, elsewhere, load)
    with on_ray.connected() if elsewhere else nullcontext():
        ended = _begin(todo, out, elsewhere, workers, say)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(out, error) from None
        with held(out / LOCK, shared=shard is not None) as free:
            if not free:
                raise ConfigError(f"{out} is in use: another bench is at work there; choose another folder, or wait")
            note_planned(runs, out)
            for note in gaps(todo, load):
                say(note)
            result = Done(str(out / RESULTS), len(mine), kept=len(mine) - len(todo))
            if result.kept:
                say(f"{result.kept} of {len(mine)} runs were finished before")
            _do_all(ended, len(todo), out, result, say, progress)
            with suppress(DataError):  # figures of another shard that cannot be read hinder nothing that was done here
                if all(finished(run, out) for run in runs):
                    shutil.rmtree(out / SHARED, ignore_errors=True)
    return result


def _begin(
    todo: Sequence[Run], out: Path, elsewhere: bool, workers: int | None, say: Say
) -> Iterable[tuple[Run, Outcome]]:
    """What does the runs, one by one as it is asked for the next that has ended."""
    if elsewhere:
        begin, at_once = on_ray.launcher(todo, out, workers)
        return launch.outcomes(begin, todo, at_once, say)
    at_once = min(workers or 1, len(todo))
    if at_once <= 1:
        return launch.one_by_one(todo, out)
    return launch.outcomes(lambda run, place: Process(run.to_json(), out, at_once, place), todo, at_once, say)


def _do_all(
    ended: Iterable[tuple[Run, Outcome]],
    todo: int,
    out: Path,
    result: Done,
    say: Say,
    progress: Callable[[int, int], None],
) -> None:
    results, began, interrupted = Results(out), time.monotonic(), False
    progress(result.kept, result.runs)
    for n, (run, outcome) in enumerate(ended, 1):
        interrupted = interrupted or outcome.interrupted
        if outcome.interrupted:
            continue
        if outcome.failure:
            result.failed[run.folder.as_posix()] = outcome.failure
            if outcome.trace:
                say(outcome.trace.rstrip())
        else:
            result.done += 1
        told = f"FAILED: {outcome.failure}" if outcome.failure else outcome.told
        left = (time.monotonic() - began) / n * (todo - n)
        say(f"[{result.kept + n}/{result.runs}] {run}: {told}" + (f"; about {_span(left)} left" if left else ""))
        progress(result.kept + n, result.runs)
        _write(results)  # what hinders it is told at the end, if it still does
    if unwritten := _write(results):
        say(f"{unwritten}; nothing is lost: the run folders hold all figures, and skip_existing writes it again")
        result.failed[RESULTS] = unwritten
    if interrupted:
        raise Interrupted(f"{result.kept + result.done} of {result.runs} runs are finished; to continue: skip_existing")


def _write(results: Results) -> str:
    """Write results.csv; what hinders it, if anything does."""
    try:
        results.write()
    except VlpromptError as error:  # a full disk, a run folder that somebody has edited
        return str(error)
    return ""


def _span(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"


def check_data(runs: Sequence[Run], load: Load = load_dataset) -> None:
    """Raise DataError if data or a bank of a run are not there, or too few; ConfigError if a bank does not fit it."""
    seen = set()
    for run in runs:
        config, data = run.config, run.config.data
        # Whatever decides which images there are; the seed, which classes are of a task.
        images = replace(data, batch_size=1), config.seed if data.task else 0
        if images not in seen:
            for stage in stages(run, Path()):
                run_split(stage.config, load(data.name, data.root, data.split_file))
            for m in run.measurements:
                measured_split(config, m, load)
        asked = (data, config.method, config.teacher)
        if data.bank is not None and asked not in seen:
            find_bank(config, run_split(config, load(data.name, data.root, data.split_file)).class_names)
        seen |= {images, asked}


def check_models(runs: Sequence[Run], elsewhere: bool = False, load: Load = load_dataset) -> None:
    """Load each backbone and teacher, and build each row's method, once before the first run: an error is that of all.

    Raises what these raise, what the files do that a run reads beside images, and ConfigError for a bank, a teacher or
    prompts to begin with of a row that takes no training steps. Runs that are done ``elsewhere`` may have devices that
    are not here.
    """
    seen = set[object]()
    for run in runs:
        config = run.config
        device = "cpu" if elsewhere else config.train.device
        check_device(config.train.device)
        if (name := teacher_name(config)) and name not in seen:
            load_teacher_model(name)
            seen.add(name)
        asked = (
            config.backbone,
            device,
            config.train.precision,
            config.method,
            config.options,
            config.data.bank,
            config.taught,
            replace(config, seed=config.seed if config.data.task else 0) if reads_files(config) else None,
        )
        if asked not in seen:
            backbone = load_backbone(*asked[:3])
            with torch.random.fork_rng(devices=[]):
                method = find_method(config.method)(backbone, ("a", "b"), config.options)
                check_method(run, method, backbone)
                if asked[-1]:
                    check_files(run, backbone, load)
            if not method.trains and (given := config.data.bank or config.teacher.backbone or config.train.warm_start):
                raise ConfigError(f"row '{run.name}' takes no training steps: it does nothing with {given}")
            seen.add(asked)


def reads_files(config: RunConfig) -> bool:
    """Whether a run reads files of the user's beside images."""
    data = config.data
    return any((data.descriptions, data.prior, config.teacher.class_names_file, config.train.warm_start))


def check_files(run: Run, backbone: Backbone, load: Load = load_dataset) -> None:
    """Raise what a run would for these: they cannot be read, or lack a class, or do not fit the method."""
    data = run.config.data
    known = load(data.name, data.root, data.split_file)
    for config in (stage.config for stage in stages(run, Path())):
        names = run_split(config, known).class_names
        template = config.data.template or known.template
        sources = find_sources(config, names, template, backbone)
        method = build(config, sources, backbone, template, names)
        describe(method, config, known.split.class_names, lambda told: None)
        if config.train.warm_start and method.trains:
            start_from(method, config.train.warm_start)
        if method.keeps_descriptions and method.descriptions is not None:
            for m in run.measurements:
                method.texts_of(measured_split(config, m, load).class_names)


def gaps(runs: Sequence[Run], load: Load = load_dataset) -> list[str]:
    """A line for each choice of images that the runs are measured on in which some of its classes have none."""
    asked = [(measured_dataset(run.config, m, load), m) for run in runs for m in run.measurements]
    notes = [note for dataset, m in asked for note in (*dataset.notes, dataset.gap(m.split, m.half))]
    own = {data.name: data for data in (run.config.data for run in runs) if not find_dataset(data.name)}
    notes += [note for d in own.values() for note in in_two_parts(load(d.name, d.root, d.split_file).split)]
    notes += [
        f"note: {len(names)} classes of {run.data} for {n} tasks: a task of one class has nothing to tell it from"
        for run in runs
        if run.config.data.task
        for n, names in [(len(run.measurements), measured_split(run.config, run.measurements[-1], load).class_names)]
        if len(names) < 2 * n
    ]
    return list(filter(None, dict.fromkeys(notes)))


def note_planned(runs: Sequence[Run], out: Path) -> None:
    """Add to ``PROTOCOL/planned.json`` which runs and measurements there should be, so that none is missing unseen."""
    file = out / runs[0].protocol / PLANNED
    known = read_planned(file)
    for run in runs:
        place = run.folder.relative_to(run.protocol).as_posix()
        before = known[place]["measured"] if place in known else []
        asked = [Wanted(**m.to_dict()) for m in run.measurements]  # type: ignore[typeddict-item]
        known[place] = Planned(
            data=run.data,
            name=run.name,
            backbone=run.folder.parts[3],
            shots=run.config.data.shots,
            seed=run.config.seed,
            measured=before + [m for m in asked if m not in before],
        )
    write_sealed(file, {"runs": known}, indent=1)


def read_planned(file: Path) -> dict[str, Planned]:
    """The planned runs by folder; none if there is no file. Raises DataError if they are not what was saved."""
    try:
        return read_sealed(file, dict[Literal["runs"], dict[str, Planned]])["runs"]
    except FileNotFoundError:
        return {}
    except (KeyError, OSError, ValueError) as error:
        advice = "remove it, and repeat the bench with skip_existing to have missing runs named"
        raise DataError(f"cannot read {file}: {one_line(error)}: {advice}") from None
