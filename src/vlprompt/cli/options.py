"""What commands share: options, each a type, a help text and the panel of `--help` it stands in; and messages."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from vlprompt.data.splits import Classes

DATA, MODEL, TRAINING, OUTPUT = "Data", "Model", "Training", "Output"
"""Panels of ``--help``, in the order in which commands show them."""

_DATA = "A known data set's name (with --root), a folder of class folders, or a CSV file."
SPLIT_FILE = (
    "File that says which of DATA's images are train, val and test: a run's split.json, CoOp's file, a few-shot list."
)

Data = Annotated[str, typer.Argument(metavar="DATA", help=_DATA)]
Root = Annotated[Path | None, typer.Option(help="Folder that holds the data sets.", rich_help_panel=DATA)]
SplitFile = Annotated[Path | None, typer.Option(help=SPLIT_FILE, rich_help_panel=DATA)]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out images that cannot be read, and count them.", rich_help_panel=DATA)
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.", rich_help_panel=MODEL)]
Precision = Annotated[str, typer.Option(help="fp32, bf16 or fp16 for the frozen towers.", rich_help_panel=MODEL)]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or any folder that holds a tuned model.")]
OtherBackbone = Annotated[
    str | None, typer.Option(help="Where the backbone is now, if it has moved.", rich_help_panel=MODEL)
]
ClassNames = Annotated[str | None, typer.Option(help="Other classes, separated by commas.", rich_help_panel=DATA)]
ClassNamesFile = Annotated[Path | None, typer.Option(help="File of other classes, one per line.", rich_help_panel=DATA)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.", rich_help_panel=OUTPUT)]

# Of `train`, where nothing is given for what the configuration decides; other commands take some of them.
MethodName = Annotated[
    str | None, typer.Argument(metavar="METHOD", help="One of `vlprompt list methods`.", show_default=False)
]
TrainData = Annotated[str | None, typer.Argument(metavar="DATA", help=_DATA, show_default=False)]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Any setting; --dry-run shows them all.")
]
Shots = Annotated[int | None, typer.Option(help="Training images per class; default: all.", rich_help_panel=DATA)]
AllowFewer = Annotated[
    bool, typer.Option("--allow-fewer", help="Classes with fewer images use all that they have.", rich_help_panel=DATA)
]
WhichClasses = Annotated[
    Classes, typer.Option(help="First half of the data set's classes, second half, or all.", rich_help_panel=DATA)
]
TrainClasses = Annotated[
    Classes | None,
    typer.Option(help="First half of the data set's classes, second half, or all (default).", rich_help_panel=DATA),
]
ValFraction = Annotated[
    float | None,
    typer.Option(
        help="Share of the training images to use for validation (taken before shots are drawn), where there is no "
        "val split.",
        rich_help_panel=DATA,
    ),
]
DrawSeed = Annotated[int, typer.Option("--seed", help="Decides which few images --shots draws.", rich_help_panel=DATA)]
TrainBackbone = Annotated[
    str | None,
    typer.Option(help="mini (default), a folder or file, a hub id, or open_clip:MODEL/TAG.", rich_help_panel=MODEL),
]
TeacherBackbone = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        help="Frozen model that kdpl and fdbpl learn from, given like --backbone; or efficientnet-lite0.",
        rich_help_panel=MODEL,
    ),
]
TrainBank = Annotated[
    Path | None,
    typer.Option("--bank", help="Region bank that views, labels and features come from.", rich_help_panel=DATA),
]
TrainViews = Annotated[
    str | None,
    typer.Option(
        "--views",
        metavar="random|R",
        help="random (default), or with --bank the first R regions of each image (default: all).",
        rich_help_panel=DATA,
    ),
]
TrainDevice = Annotated[str | None, typer.Option(help="cpu (default), cuda or cuda:N.", rich_help_panel=MODEL)]
TrainPrecision = Annotated[str | None, typer.Option(help="fp32 (default), bf16 or fp16.", rich_help_panel=MODEL)]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Decides the few-shot images, the initial prompts, and the order and crops of images; default: 1.",
        rich_help_panel=TRAINING,
    ),
]
Epochs = Annotated[int | None, typer.Option(help="Default: the method's official number.", rich_help_panel=TRAINING)]
Preset = Annotated[
    str | None, typer.Option(help="Other settings of the method by name, e.g. few-shot.", rich_help_panel=TRAINING)
]
Select = Annotated[
    Literal["last", "val"] | None,
    typer.Option(help="Keep the last epoch's prompts (default) or the best on val images.", rich_help_panel=TRAINING),
]
ConfigFile = Annotated[Path | None, typer.Option(help="YAML file with any settings.", rich_help_panel=TRAINING)]
Resume = Annotated[
    Path | None,
    typer.Option(
        help="Resume this stopped run with its own settings; only --json may be given too.", rich_help_panel=TRAINING
    ),
]
ReportTo = Annotated[
    Literal["tensorboard", "wandb"] | None,
    typer.Option(help="Also send each epoch's figures there.", rich_help_panel=OUTPUT),
]
Out = Annotated[Path | None, typer.Option(help="Run folder; default: runs/DATA-METHOD-seedN.", rich_help_panel=OUTPUT)]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the merged configuration and stop.", rich_help_panel=OUTPUT)
]


def say(text: str) -> None:
    """A message for people, on standard error."""
    print(text, file=sys.stderr)


def first_process() -> bool:
    """Whether this process prints: the first of those that train together."""
    return os.environ.get("RANK", "0") == "0"
