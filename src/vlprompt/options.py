"""What commands share: options, each a type, a help text and the panel of `--help` it stands in; and messages."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

DATA, MODEL, RUN, OUTPUT = "Data", "Model", "Training", "Output"


class Classes(StrEnum):
    """Halves of the class list."""

    base = "base"
    novel = "novel"
    all = "all"


class Part(StrEnum):
    """Parts that can be evaluated."""

    test = "test"
    val = "val"


class Select(StrEnum):
    """Epochs that can be kept."""

    last = "last"
    val = "val"


class ReportTo(StrEnum):
    """Where figures can be sent."""

    tensorboard = "tensorboard"
    wandb = "wandb"


class Engine(StrEnum):
    """What runs the runs of a bench."""

    local = "local"
    ray = "ray"


class Listing(StrEnum):
    """What ``list`` lists."""

    methods = "methods"
    backbones = "backbones"
    datasets = "datasets"


Data = Annotated[str, typer.Argument(help="A benchmark's name (with --root), a folder of class folders, or a CSV.")]
Root = Annotated[Path | None, typer.Option(help="Folder that holds the benchmarks.", rich_help_panel=DATA)]
SplitFile = Annotated[
    Path | None,
    typer.Option(
        help="Which of DATA's images are what: a run's split.json, CoOp's file, a few-shot list.", rich_help_panel=DATA
    ),
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out images that cannot be read, and count them.", rich_help_panel=DATA)
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.", rich_help_panel=MODEL)]
Precision = Annotated[str, typer.Option(help="fp32, bf16 or fp16 for the frozen towers.", rich_help_panel=MODEL)]
RunFolder = Annotated[Path, typer.Argument(help="A run folder, or any folder that holds a tuned model.")]
OtherBackbone = Annotated[
    str | None, typer.Option(help="Where the backbone lies, if not where it was.", rich_help_panel=MODEL)
]
ClassNames = Annotated[str | None, typer.Option(help="Other classes, separated by commas.", rich_help_panel=DATA)]
ClassNamesFile = Annotated[Path | None, typer.Option(help="Other classes, one a line.", rich_help_panel=DATA)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.", rich_help_panel=OUTPUT)]

# Of `train` alone, where nothing is given for what the configuration decides.
MethodName = Annotated[str | None, typer.Argument(help="One of `vlprompt list methods`.", show_default=False)]
TrainData = Annotated[
    str | None,
    typer.Argument(help="A benchmark's name (with --root), a folder of class folders, or a CSV.", show_default=False),
]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Any setting; --dry-run shows them all.")
]
Shots = Annotated[int | None, typer.Option(help="Training images per class; default: all.", rich_help_panel=DATA)]
AllowFewer = Annotated[
    bool, typer.Option("--allow-fewer", help="Classes with fewer images use what they have.", rich_help_panel=DATA)
]
WhichClasses = Annotated[Classes, typer.Option(help="Half of the data set's classes, or all.", rich_help_panel=DATA)]
TrainClasses = Annotated[Classes | None, typer.Option(help="Default: all.", rich_help_panel=DATA)]
ValFraction = Annotated[
    float | None,
    typer.Option(
        help="Share of the training images that becomes val (before shots are drawn), where there is no val split.",
        rich_help_panel=DATA,
    ),
]
TrainBackbone = Annotated[
    str | None, typer.Option(help="mini (default), a folder or file, a hub id.", rich_help_panel=MODEL)
]
TeacherBackbone = Annotated[
    str | None,
    typer.Option(
        "--teacher", help="Frozen model that kdpl and fdbpl learn from; as --backbone.", rich_help_panel=MODEL
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
TrainDevice = Annotated[str | None, typer.Option(help="cpu (default), cuda, cuda:N.", rich_help_panel=MODEL)]
TrainPrecision = Annotated[str | None, typer.Option(help="fp32 (default), bf16 or fp16.", rich_help_panel=MODEL)]
Seed = Annotated[
    int | None, typer.Option(help="Decides images, initial prompts, order; default: 1.", rich_help_panel=RUN)
]
Epochs = Annotated[int | None, typer.Option(help="Default: the method's official number.", rich_help_panel=RUN)]
Preset = Annotated[str | None, typer.Option(help="Other official settings, e.g. few-shot.", rich_help_panel=RUN)]
Selection = Annotated[
    Select | None,
    typer.Option(help="Keep the last epoch's prompts (default) or the best on val images.", rich_help_panel=RUN),
]
ConfigFile = Annotated[Path | None, typer.Option(help="YAML file with any settings.", rich_help_panel=RUN)]
Resume = Annotated[
    Path | None,
    typer.Option(help="Go on with this stopped run, as configured there; nothing else is given.", rich_help_panel=RUN),
]
Report = Annotated[ReportTo | None, typer.Option(help="Also send each epoch's figures there.", rich_help_panel=OUTPUT)]
Out = Annotated[Path | None, typer.Option(help="Run folder; default: runs/DATA-METHOD-seedN.", rich_help_panel=OUTPUT)]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the merged configuration and stop.", rich_help_panel=OUTPUT)
]


def say(text: str) -> None:
    """A message for people, on standard error."""
    print(text, file=sys.stderr)
