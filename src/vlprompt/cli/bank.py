"""``vlprompt bank``: commands only, no logic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vlprompt.cli.fields import read_fields
from vlprompt.cli.options import (
    DATA,
    MODEL,
    OUTPUT,
    AllowFewer,
    Data,
    Device,
    DrawSeed,
    Json,
    MaxPixels,
    Precision,
    Root,
    Shots,
    SkipBad,
    ValFraction,
    WhichClasses,
    configured,
    described,
    say,
)
from vlprompt.errors import ConfigError

REGIONS = "Regions"
_FOLDER = Path(__file__).parents[1] / "bank"
_BUILD, _CROPS = read_fields(_FOLDER / "config.py")["BankConfig"], read_fields(_FOLDER / "regions.py")["Crops"]

BankFolder = Annotated[Path, typer.Argument(metavar="BANK", help="A region bank's folder.")]
SplitFile = Annotated[Path | None, configured("data.split_file", DATA, "--split-file", "--split")]

bank_app = typer.Typer(
    rich_markup_mode="markdown",
    no_args_is_help=True,
    help="Region banks: fixed regions of training images with a teacher's labels and frozen features, computed once.",
    epilog="Example: vlprompt bank build ./photos --teacher openai/clip-vit-large-patch14 --out banks/photos",
)


@bank_app.command(
    epilog="Example: vlprompt bank build caltech101 --root data --teacher openai/clip-vit-large-patch14 "
    "--backbone openai/clip-vit-base-patch32 --shots 16 --classes base --out banks/caltech"
)
def build(
    data: Data,
    *,
    root: Root = None,
    shots: Shots = None,
    allow_fewer: AllowFewer = False,
    classes: WhichClasses = "all",
    split_file: SplitFile = None,
    val_fraction: ValFraction = None,
    skip_bad: SkipBad = False,
    max_pixels: MaxPixels = None,
    seed: DrawSeed = 1,
    class_names_file: Annotated[Path | None, configured("teacher.class_names_file", DATA)] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Frozen model that labels the regions, given as --backbone of train; or efficientnet-lite0.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    backbone: Annotated[str | None, described(_BUILD["backbone"], MODEL)] = None,
    template: Annotated[str | None, configured("teacher.template", MODEL)] = None,
    logit_scale: Annotated[
        float | None, configured("teacher.logit_scale", MODEL, default="without --backbone the teacher's own")
    ] = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    batch_size: Annotated[int, described(_BUILD["batch_size"], MODEL)] = 50,
    regions: Annotated[int, described(_BUILD["regions"], REGIONS)] = 500,
    min_scale: Annotated[float, described(_CROPS["min_scale"], REGIONS)] = 0.08,
    max_scale: Annotated[float, described(_CROPS["max_scale"], REGIONS)] = 0.936,
    flip: Annotated[float, described(_CROPS["flip"], REGIONS)] = 0.5,
    region_seed: Annotated[int, described(_CROPS["seed"], REGIONS)] = 1,
    top_k: Annotated[int | None, described(_BUILD["top_k"], REGIONS)] = None,
    features: Annotated[str | None, described(_BUILD["features"], REGIONS)] = None,
    out: Annotated[Path, typer.Option(help="The bank's folder.", rich_help_panel=OUTPUT)],
    part: Annotated[
        str, typer.Option(metavar="I/N", help="Do the I-th of N shares of the work.", rich_help_panel=OUTPUT)
    ] = "1/1",
    json_output: Json = False,
) -> None:
    """Compute the regions of a data set's training images, the teacher's labels of them, and the student's features.

    A build that was stopped, even killed, continues when the same command is given again. Builds with --part 1/N …
    N/N, in any number of processes or machines, fill one folder; the last one to end completes it. Images that an
    existing bank does not have are added to it; those that are not computed yet and no longer among the data are
    left out.
    """
    from vlprompt.bank.build import build_bank
    from vlprompt.bank.config import bank_config, parse_part
    from vlprompt.cli.progress import CountBar

    given = {
        "data.name": data,
        "data.root": root and str(root),
        "data.split_file": split_file and str(split_file),
        "data.val_fraction": val_fraction,
        "data.allow_fewer": allow_fewer,
        "data.skip_bad": skip_bad,
        "data.max_pixels": max_pixels,
        "data.shots": shots,
        "data.classes": classes,
        "seed": seed,
        "teacher.class_names_file": class_names_file and str(class_names_file),
        "teacher.backbone": teacher,
        "teacher.template": template,
        "teacher.logit_scale": logit_scale,
        "backbone": backbone,
        "device": device,
        "precision": precision,
        "batch_size": batch_size,
        "regions": regions,
        "crops.min_scale": min_scale,
        "crops.max_scale": max_scale,
        "crops.flip": flip,
        "crops.seed": region_seed,
        "top_k": top_k,
        "features": features,
        "part": parse_part(part),
    }
    config = bank_config({k: v for k, v in given.items() if v is not None})
    with CountBar("images") as bar:
        built = build_bank(config, out, say, bar)
    if json_output:
        print(json.dumps(vars(built)))
        return
    state = "complete" if built.finished else "not complete yet: other parts are missing"
    say(f"{built.built} images done; {out} has {built.images} and is {state}")


@bank_app.command(epilog="Example: vlprompt bank info banks/caltech --json")
def info(bank: BankFolder, json_output: Json = False) -> None:
    """Show what a region bank holds and how it was made."""
    from vlprompt.bank.manifest import describe, read_manifest, summary

    manifest = read_manifest(bank)
    print(json.dumps(describe(manifest)) if json_output else summary(manifest))


@bank_app.command(epilog="Example: vlprompt bank verify banks/caltech caltech101 --root data")
def verify(
    bank: BankFolder,
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="Also compare this data set's images with the bank's.")
    ] = None,
    root: Root = None,
    json_output: Json = False,
) -> None:
    """Compare a region bank's files with their checksums and, given DATA, its images with what they were."""
    from vlprompt.bank.records import verify as verify_bank
    from vlprompt.data.datasets import load_dataset

    if root and not data:
        raise ConfigError("--root is where DATA lies: give DATA too, or no image is compared")
    manifest = verify_bank(bank, load_dataset(data, root).split.root if data else None)
    compared = len(manifest.images) if data else 0
    if json_output:
        print(json.dumps({"bank": str(bank), "files": len(manifest.shards), "images_compared": compared}))
        return
    images = f", {compared} images as they were" if data else ""
    print(f"{bank}: {len(manifest.shards)} files as they were written{images}")
