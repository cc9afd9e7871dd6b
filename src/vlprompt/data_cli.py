"""``vlprompt data``: commands only, no logic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vlprompt.errors import ConfigError, DataError, unknown
from vlprompt.options import (
    DATA,
    OUTPUT,
    AllowFewer,
    Classes,
    Data,
    Json,
    Root,
    Shots,
    SplitFile,
    ValFraction,
    WhichClasses,
    say,
)

data_app = typer.Typer(
    rich_markup_mode="rich",
    no_args_is_help=True,
    help="Benchmarks: what there is, fetching them, whether a folder is as it should be; splits to publish.",
    epilog="Example: vlprompt data get dtd --root data",
)


@data_app.command("list", epilog="Example: vlprompt data list --json")
def list_(json_output: Json = False) -> None:
    """List the benchmarks: folder, classes, images, licence, and whether they can be fetched."""
    from vlprompt.listing import listing, table

    rows = listing("datasets")
    print(json.dumps({"datasets": rows}) if json_output else table(rows))


@data_app.command(epilog="Example: vlprompt data get dtd eurosat --root data")
def get(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="Of `vlprompt data list`.")],
    root: Annotated[Path, typer.Option(help="Folder that holds the benchmarks.", rich_help_panel=DATA)],
    json_output: Json = False,
) -> None:
    """Fetch benchmarks from public mirrors into CoOp's layout.

    What is there already is left alone; a download that broke goes on where it was. Files are compared with their
    checksums where those are known, and archives are unpacked aside and moved into place whole. An archive that you put
    into ROOT/.vlprompt-downloads yourself is used as if it had been fetched. Mind the licences.
    """
    from vlprompt.data.benchmarks.fetch import get as get_dataset
    from vlprompt.data.benchmarks.table import DATASETS, find_dataset
    from vlprompt.progress import CountBar

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
        bool, typer.Option("--quick", help="Look whether the files exist, but do not read them.", rich_help_panel=DATA)
    ] = False,
    json_output: Json = False,
) -> None:
    """Compare a data set's folder with its split: images missing and unreadable, images of each class, wrong layout.

    For the usual mistakes of layout (ImageNet's val images in one folder, SUN397 in SUN397, …) it prints the shell
    commands that put them right. Ends with exit code 2 if anything is wrong.
    """
    from vlprompt.data.benchmarks.check import check as check_dataset
    from vlprompt.progress import CountBar

    with CountBar("images") as bar:
        report = check_dataset(data, root and root.expanduser(), split_file, not quick, bar)
    print(json.dumps(report.to_dict()) if json_output else report)
    if report.fault:
        raise DataError(f"data set '{report.name}': {report.fault}")


@data_app.command(epilog="Example: vlprompt data split dtd --root data --shots 16 --classes base --out dtd-base.json")
def split(
    data: Data,
    out: Annotated[Path, typer.Option(help="The JSON file to write.", rich_help_panel=OUTPUT)],
    root: Root = None,
    shots: Shots = None,
    allow_fewer: AllowFewer = False,
    imbalance: Annotated[
        float, typer.Option(help="Shots of the first class to those of the last: a long tail.", rich_help_panel=DATA)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Decides which few.", rich_help_panel=DATA)] = 1,
    classes: WhichClasses = Classes.all,
    val_fraction: ValFraction = None,
    split_file: SplitFile = None,
    json_output: Json = False,
) -> None:
    """Write which images a run would train, validate and test on, to publish it: no images, no folders of this machine.

    `vlprompt train … --split-file FILE` reads it back, and nothing of --shots, --seed and --classes is needed then.
    """
    from vlprompt.data.datasets import load_dataset
    from vlprompt.data.splits import PARTS, write_split
    from vlprompt.training.config import build_config
    from vlprompt.training.selection import run_split

    if out.exists():
        raise ConfigError(f"{out} is there already: choose another --out, or remove it")
    given = {
        "data.name": data,
        "data.shots": shots,
        "data.allow_fewer": allow_fewer,
        "data.imbalance": imbalance,
        "data.classes": classes.value,
        "data.val_fraction": val_fraction,
        "seed": seed,
    }
    config = build_config(  # of any method: all are given the same images
        "zero_shot", overrides={key: value for key, value in given.items() if value is not None}
    )
    chosen = run_split(config, load_dataset(data, root, split_file))
    write_split(chosen, out)
    images = {part: len(chosen.items(part)) for part in PARTS}
    if json_output:
        print(json.dumps({"split": str(out), "classes": len(chosen.class_names), **images}))
    counts = ", ".join(f"{n} {part}" for part, n in images.items())
    say(f"{len(chosen.class_names)} classes; images: {counts}; written to {out}")
