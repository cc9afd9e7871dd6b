"""``vlprompt data``: commands only, no logic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vlprompt.cli.options import (
    DATA,
    OUTPUT,
    AllowFewer,
    Data,
    DrawSeed,
    Imbalance,
    Json,
    Root,
    Shots,
    SplitFile,
    ValFraction,
    WhichClasses,
    say,
)
from vlprompt.errors import ConfigError, DataError, unknown

data_app = typer.Typer(
    rich_markup_mode="markdown",
    no_args_is_help=True,
    help="Data sets: list them, fetch them, check their folders, and write splits to publish.",
    epilog="Example: vlprompt data get dtd --root data",
)


@data_app.command("list", epilog="Example: vlprompt data list --json")
def list_(json_output: Json = False) -> None:
    """List the known data sets: folder, classes, images, licence, and whether they can be fetched."""
    from vlprompt.cli.listing import listing, table

    rows = listing("datasets")
    print(json.dumps({"datasets": rows}) if json_output else table(rows))


@data_app.command(epilog="Example: vlprompt data get dtd eurosat --root data")
def get(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="One or more of `vlprompt data list`.")],
    root: Annotated[Path, typer.Option(help="Folder that holds the data sets.", rich_help_panel=DATA)],
    json_output: Json = False,
) -> None:
    """Fetch data sets from public mirrors into CoOp's layout.

    What is there already is left alone, and a broken download continues. Files are compared with their checksums where
    those are known, and archives are unpacked aside and moved into place whole. An archive that you put into
    ROOT/.vlprompt-downloads yourself is used as if it had been fetched. Mind the licences.
    """
    from vlprompt.cli.progress import CountBar
    from vlprompt.data.known.table import DATASETS, find_dataset
    from vlprompt.provision.fetch import get as get_dataset

    chosen = {name: find_dataset(name) for name in names}
    if strange := [name for name, dataset in chosen.items() if dataset is None]:
        raise DataError(unknown("data set", strange[0], DATASETS))
    fetched = {}
    for dataset in filter(None, chosen.values()):
        say(f"{dataset.name}: {dataset.title}, licence: {dataset.licence}")
        with CountBar("bytes") as bar:
            fetched[dataset.name] = get_dataset(dataset, root.expanduser(), say, bar)
        say(f"{dataset.name} is in {root / dataset.folder}; see vlprompt data check {dataset.name} --root {root}")
    if json_output:
        print(json.dumps({"fetched": fetched}))


@data_app.command(epilog="Example: vlprompt data check sun397 --root data --quick")
def check(
    data: Data,
    root: Root = None,
    split_file: SplitFile = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Only check that the files exist, without reading them.", rich_help_panel=DATA),
    ] = False,
    json_output: Json = False,
) -> None:
    """Compare a data set's folder with its split: missing and unreadable images, images per class, wrong layout.

    The usual mistakes of layout (ImageNet's val images in one folder, SUN397 in SUN397, …) and the commands that mend
    them are in docs/datasets.md. The exit code is 2 if anything is wrong.
    """
    from vlprompt.cli.progress import CountBar
    from vlprompt.provision.check import check as check_dataset

    with CountBar("images") as bar:
        report = check_dataset(data, root and root.expanduser(), split_file, not quick, bar)
    print(json.dumps(report.to_dict()) if json_output else report)
    if report.fault:
        raise DataError(f"data set '{report.name}': {report.fault}")


@data_app.command(epilog="Example: vlprompt data split dtd --root data --shots 16 --classes base --out dtd-base.json")
def split(
    data: Data,
    *,
    root: Root = None,
    shots: Shots = None,
    allow_fewer: AllowFewer = False,
    imbalance: Imbalance = 1.0,
    seed: DrawSeed = 1,
    classes: WhichClasses = "all",
    val_fraction: ValFraction = None,
    split_file: SplitFile = None,
    out: Annotated[Path, typer.Option(help="The JSON file to write.", rich_help_panel=OUTPUT)],
    json_output: Json = False,
) -> None:
    """Write a file to publish that says which images a run would train, validate and test on.

    It holds no images and no folders of this machine. `vlprompt train … --split-file FILE` reads it back, and needs
    none of --shots, --seed and --classes then.
    """
    from vlprompt.config.images import run_split
    from vlprompt.config.schema import build_config
    from vlprompt.data.datasets import check_outside, in_two_parts, load_dataset
    from vlprompt.data.splits import PARTS, write_split

    if out.exists():
        raise ConfigError(f"{out} is there already: choose another --out, or remove it")
    given = {
        "data.name": data,
        "data.shots": shots,
        "data.allow_fewer": allow_fewer,
        "data.imbalance": imbalance,
        "data.classes": classes,
        "data.val_fraction": val_fraction,
        "seed": seed,
    }
    config = build_config(  # of any method: all are given the same images
        "zero_shot", overrides={key: value for key, value in given.items() if value is not None}
    )
    dataset = load_dataset(data, root, split_file)
    check_outside(out, dataset)
    chosen = run_split(config, dataset)
    for note in (*dataset.notes, *in_two_parts(chosen)):
        say(note)
    write_split(chosen, out)
    images = {part: len(chosen.items(part)) for part in PARTS}
    if json_output:
        print(json.dumps({"split": str(out), "classes": len(chosen.class_names), **images}))
    counts = ", ".join(f"{n} {part}" for part, n in images.items())
    say(f"{len(chosen.class_names)} classes; images: {counts}; written to {out}")
