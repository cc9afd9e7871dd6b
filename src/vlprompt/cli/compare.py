"""``vlprompt compare``: command only, no logic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vlprompt.cli.options import (
    MODEL,
    OUTPUT,
    TRAINING,
    Data,
    Device,
    DrawSeed,
    Json,
    Precision,
    Root,
    Shots,
    SkipBad,
    SplitFile,
    say,
)

compare_app = typer.Typer()


@compare_app.command(epilog="Example: vlprompt compare photos --minutes 5 --out runs/photos")
def compare(
    data: Data,
    root: Root = None,
    shots: Shots = None,
    split_file: SplitFile = None,
    seed: DrawSeed = 1,
    skip_bad: SkipBad = False,
    backbone: Annotated[str, typer.Option(help="The frozen model, as for `train`.", rich_help_panel=MODEL)] = "mini",
    device: Device = "cpu",
    precision: Precision = "fp32",
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, separated by commas; default: zero_shot, linear_probe, clap, gda, tip_adapter, prolip, "
            "coop, promptsrc, drople, dpl.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="Time for all of it; methods that do not fit are named.", rich_help_panel=TRAINING)
    ] = 10.0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the best model; default: runs/DATA-compare.", rich_help_panel=OUTPUT)
    ] = None,
    json_output: Json = False,
) -> None:
    """Find the method that is best on held-out images of yours, within minutes, and train it on all of them.

    The cheap ones come first; what the next will take is estimated from some of its steps. The folder holds the best
    model, calibrated, and a page, compare.html. Stopped, the same command goes on where it was. Test images are not
    used.
    """
    from vlprompt.compare.plan import SHORTLIST
    from vlprompt.compare.rows import table
    from vlprompt.compare.run import compare as compare_methods

    result = compare_methods(
        data, root=root, split_file=split_file, shots=shots, seed=seed, skip_bad=skip_bad, backbone=backbone,
        device=device, precision=precision, minutes=minutes, out=out, say=say,
        methods=SHORTLIST if methods is None else [name.strip() for name in methods.split(",") if name.strip()],
    )  # fmt: skip
    if json_output:
        print(json.dumps(result.to_dict()))
        return
    print(table(result.rows))
    for left in result.left_out:
        print(f"left out: {left.method}: {left.reason}")
    print(f"{result.reason}\nThe model, trained on all {result.images} images: {result.run}; the page: {result.page}")
