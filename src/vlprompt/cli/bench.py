"""``vlprompt bench`` and ``vlprompt report``: commands only, no logic."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from vlprompt.cli.options import (
    DATA,
    MODEL,
    OUTPUT,
    TRAINING,
    AllowFewer,
    Json,
    Root,
    Settings,
    TrainBackbone,
    TrainDevice,
    TrainPrecision,
    say,
)
from vlprompt.errors import ConfigError, VlpromptError, first_few, unknown

FAILED = 1
ListOf = list[str] | None

bench_app = typer.Typer()


@bench_app.command(
    epilog="Example: vlprompt bench base-to-novel --methods coop,maple --data dtd --root data --out runs/b2n"
)
def bench(
    protocol: Annotated[
        str,
        typer.Argument(
            metavar="PROTOCOL",
            help="base-to-novel, few-shot, cross-dataset, domain-generalization, long-tail, class-incremental, "
            "robustness or unlabelled (`vlprompt list protocols`).",
        ),
    ],
    settings: Settings = None,
    *,
    data: Annotated[
        list[str],
        typer.Option(
            help="Data sets, separated by commas. cross-dataset and domain-generalization train on the first and test "
            "on all; a data set with known domains needs no others.",
            rich_help_panel=DATA,
        ),
    ],
    root: Root = None,
    shots: Annotated[
        ListOf,
        typer.Option(
            help="Training images per class, separated by commas; default: the protocol's.", rich_help_panel=DATA
        ),
    ] = None,
    allow_fewer: AllowFewer = False,
    tasks: Annotated[
        int | None,
        typer.Option(
            help="Of class-incremental: tasks that the classes arrive in, in an order by the seed; default: 5.",
            rich_help_panel=DATA,
        ),
    ] = None,
    split: Annotated[
        Literal["test", "val"],
        typer.Option(help="Images to measure on; choose settings on val.", rich_help_panel=DATA),
    ] = "test",
    methods: Annotated[
        ListOf,
        typer.Option(
            help="Of `vlprompt list methods`, or files (`./my_method.py`), separated by commas.", rich_help_panel=MODEL
        ),
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(help="Instead of --methods: YAML file of names, each with settings.", rich_help_panel=MODEL),
    ] = None,
    only: Annotated[
        ListOf,
        typer.Option(
            help="Rows of --rows to run, separated by commas (a name with commas: an --only of its own); default: all.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    backbone: TrainBackbone = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Teacher of the methods that need one, given like --backbone.", rich_help_panel=MODEL),
    ] = None,
    device: TrainDevice = None,
    precision: TrainPrecision = None,
    seeds: Annotated[
        ListOf, typer.Option(help="Separated by commas; default: 1,2,3.", rich_help_panel=TRAINING)
    ] = None,
    eps: Annotated[
        str | None,
        typer.Option(
            help="Of robustness: how far the attack may change a pixel of 0 to 1; default: 1/255.",
            rich_help_panel=DATA,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="Of robustness: steps of the attack; default: 100.", rich_help_panel=DATA),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(
            help="Processes of this machine, or Ray tasks: on the cluster at RAY_ADDRESS, or else on this machine.",
            rich_help_panel=TRAINING,
        ),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(
            help="Runs at once, each in a process of one thread; default: 1, with ray as many as there is room for.",
            min=1,
            rich_help_panel=TRAINING,
        ),
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Do the I-th of N shares of the runs.", rich_help_panel=TRAINING)
    ] = None,
    skip_existing: Annotated[
        bool,
        typer.Option("--skip-existing", help="Keep finished runs and resume stopped ones.", rich_help_panel=TRAINING),
    ] = False,
    out: Annotated[Path, typer.Option(help="The bench folder.", rich_help_panel=OUTPUT)],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the runs' folders and stop.", rich_help_panel=OUTPUT)
    ] = False,
    json_output: Json = False,
) -> None:
    """Run a protocol over methods, data sets and seeds, and keep results.csv.

    A run is a folder OUT/PROTOCOL/DATA/METHOD/BACKBONE/shots_N/seed_N, as `vlprompt train` makes it, with figures.json.
    Methods have the protocol's official settings; KEY=VALUE changes them in all runs. A run that fails does not stop
    the others, and is reported at the end (exit code 1). `vlprompt report OUT` prints the tables.
    """
    from vlprompt.bench.bench import bench as run_bench
    from vlprompt.bench.protocols import Asked, plan, take_shard, unused
    from vlprompt.bench.rows import read_rows, rows_of_methods
    from vlprompt.cli.progress import CountBar
    from vlprompt.config.schema import agreed, parse_override

    if (methods is None) == (rows is None):
        raise ConfigError("give either --methods or --rows")
    with _in_options():
        chosen = read_rows(rows) if rows else rows_of_methods(split_values("--methods", methods))
    if only is not None:
        chosen = {name: chosen[name] for name in chosen if name in _chosen("--only", only, chosen)}
    given = {
        "backbone": backbone,
        "data.root": root and str(root.expanduser()),
        "data.allow_fewer": allow_fewer or None,
        "train.device": device,
        "train.precision": precision,
    }
    every = dict(parse_override(text) for text in settings or [])
    given = {key: value for key, value in given.items() if value is not None}
    for method, _ in chosen.values():
        agreed(method, every, given | ({"teacher.backbone": teacher} if teacher else {}))
    every |= given
    asked = Asked(
        protocol, chosen, split_values("--data", data), split_numbers("--seeds", seeds or ["1,2,3"]),
        split_numbers("--shots", shots or []), every, teacher, split, tasks, eps, steps,
    )  # fmt: skip
    with _in_options():
        runs = plan(asked)
        for note in unused(asked):
            _say(f"--{note}")
        if dry_run:
            folders = [run.folder.as_posix() for run in take_shard(runs, shard)]
            print(json.dumps({"runs": folders}) if json_output else "\n".join(folders))
            return
        with CountBar(protocol) as bar:
            done = run_bench(
                runs, out, engine=engine, workers=workers, shard=shard, skip_existing=skip_existing, say=_say,
                progress=bar,
            )  # fmt: skip
    for folder, reason in done.failed.items():
        say(f"failed: {folder}: {reason}")
    say(f"{done.done} runs done, {done.kept} kept, {len(done.failed)} failed; {done.results}")
    if json_output:
        print(json.dumps(vars(done)))
    if done.failed:
        raise typer.Exit(FAILED)


@bench_app.command("bench-run", hidden=True)
def bench_run(out: Path, workers: int, place: int) -> None:
    """Do the run that is given on standard input, and print its outcome; ends with the process that started it."""
    from vlprompt.bench.launch import work

    print(work(out, workers, place))


@bench_app.command(epilog="Example: vlprompt report runs/b2n --reference coop")
def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A bench folder: the --out of `vlprompt bench`.")],
    reference: Annotated[
        str | None,
        typer.Option(help="Row to compare the others with; default: zero_shot.", rich_help_panel=OUTPUT),
    ] = None,
    json_output: Json = False,
) -> None:
    """Print the tables of a bench folder, and write report.md, report.tex and report.html into its folder.

    Means and standard deviations over seeds, averages over data sets, paired differences to a reference; missing runs
    are shown as missing. The HTML page also has plots, and needs no other file.
    """
    from vlprompt.bench.report.report import read_sections, to_dict, write_report

    with _in_options():
        text = write_report(folder, reference)
        if json_output:
            text = json.dumps({"tables": to_dict(read_sections(folder, reference))}) + "\n"
    print(text, end="")
    say(f"written: {', '.join(str(folder / f'report.{kind}') for kind in ('md', 'tex', 'html'))}")


# --- options --------------------------------------------------------------------------------------


def split_values(option: str, given: Sequence[str] | None) -> list[str]:
    """Values of an option given with commas, or several times; raises ConfigError for empty or repeated ones."""
    values = [part.strip() for text in given or [] for part in text.split(",")]
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise ConfigError(f"{option}: given twice: {first_few(twice)}")
    if not all(values):
        raise ConfigError(f"{option}: there is an empty name between commas")
    return values


def split_numbers(option: str, given: Sequence[str]) -> list[int]:
    """The same for whole numbers."""
    values = split_values(option, given)
    if strange := [value for value in values if not value.isdecimal()]:
        raise ConfigError(f"{option} {strange[0]} (allowed: whole numbers separated by commas)")
    return [int(value) for value in values]


def _chosen(option: str, given: Sequence[str], allowed: Mapping[str, object]) -> list[str]:
    """The names that an option gives; one that has commas in it stands alone."""
    whole = [text for text in given if text in allowed]
    parts = [text for text in given if text not in allowed]
    names = whole + (split_values(option, parts) if parts else [])
    if strange := [name for name in names if name not in allowed]:
        raise ConfigError(f"{option}: {unknown('row', strange[0], allowed)}")
    return names


def _options(text: str) -> str:
    """What the library says of its arguments, with the names of their options."""
    text = re.sub(
        r"^(methods|data|seeds|shots|shard|engine|tasks|eps|steps)( = |: )",
        lambda m: f"--{m[1]}{m[2].replace(' = ', ' ')}",
        text,
    )
    return text.replace("skip_existing", "--skip-existing").replace("--attack-steps", "--steps")


def _say(text: str) -> None:
    say(_options(text))


@contextmanager
def _in_options() -> Iterator[None]:
    try:
        yield
    except VlpromptError as error:
        raise type(error)(_options(str(error))) from error
