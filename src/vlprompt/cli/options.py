"""What commands share: options, each a type, a help text and the panel of `--help` it stands in; and messages."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vlprompt.cli.fields import Field, read_fields
from vlprompt.data.splits import Classes
from vlprompt.errors import printable

DATA, MODEL, TRAINING, OUTPUT = "Data", "Model", "Training", "Output"
"""Panels of ``--help``, in the order in which commands show them."""

_CONFIG = read_fields(Path(__file__).parents[1] / "config" / "schema.py")


def configured(key: str, panel: str, *names: str, default: str = "", **more: Any) -> Any:
    """An option for a key of the run configuration; ``default`` in words if it is not the field's."""
    section, _, name = key.rpartition(".")
    field = _CONFIG[f"{section.title() or 'Run'}Config"][name]
    return described(field._replace(default=default or field.default), panel, *names, **more)


def described(field: Field, panel: str, *names: str, **more: Any) -> Any:
    """An option for a field: the text under it is the help, and its default is shown, as the command may have none."""
    shown = str(field.default) if field.default else False
    return typer.Option(*names, help=field.text, rich_help_panel=panel, show_default=shown, **more)


_DATA = "A known data set's name (with --root), a folder of class folders, or a CSV file."

Data = Annotated[str, typer.Argument(metavar="DATA", help=_DATA)]
Root = Annotated[Path | None, configured("data.root", DATA)]
SplitFile = Annotated[Path | None, configured("data.split_file", DATA)]
SkipBad = Annotated[bool, configured("data.skip_bad", DATA, "--skip-bad")]
MaxPixels = Annotated[int | None, configured("data.max_pixels", DATA, min=1)]
Device = Annotated[str, configured("train.device", MODEL)]
Precision = Annotated[str, configured("train.precision", MODEL)]
RunFolder = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder, any folder that holds a tuned model, or a hub id.")
]
OtherBackbone = Annotated[
    str | None, typer.Option(help="Where the backbone is now, if it has moved.", rich_help_panel=MODEL)
]
ClassNames = Annotated[str | None, typer.Option(help="Other classes, separated by commas.", rich_help_panel=DATA)]
ClassNamesFile = Annotated[Path | None, typer.Option(help="File of other classes, one per line.", rich_help_panel=DATA)]
AttackName = Annotated[
    str | None,
    typer.Option("--attack", metavar="pgd", help="Also measure accuracy under this attack.", rich_help_panel=OUTPUT),
]
Eps = Annotated[
    str | None, typer.Option(help="How far an attack may change a pixel of 0 to 1.", rich_help_panel=OUTPUT)
]
AttackSteps = Annotated[int | None, typer.Option(help="Steps of an attack.", rich_help_panel=OUTPUT)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.", rich_help_panel=OUTPUT)]

# Of `train`, where nothing is given for what the configuration decides; other commands take some of them.
MethodName = Annotated[
    str | None,
    typer.Argument(metavar="METHOD", help="One of `vlprompt list methods`, or a file of your own.", show_default=False),
]
TrainData = Annotated[str | None, typer.Argument(metavar="DATA", help=_DATA, show_default=False)]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Any setting; --dry-run shows them all.")
]
Shots = Annotated[int | None, configured("data.shots", DATA)]
Imbalance = Annotated[float, configured("data.imbalance", DATA)]
AllowFewer = Annotated[bool, configured("data.allow_fewer", DATA, "--allow-fewer")]
WhichClasses = Annotated[Classes, configured("data.classes", DATA)]
TrainClasses = Annotated[Classes | None, configured("data.classes", DATA)]
TrainClassNamesFile = Annotated[Path | None, configured("data.class_names_file", DATA)]
Descriptions = Annotated[Path | None, configured("data.descriptions", DATA)]
OtherDescriptions = Annotated[
    Path | None,
    typer.Option(
        "--descriptions",
        help="JSON file of texts of other classes, name to list of texts, of a model that reads them.",
        rich_help_panel=DATA,
    ),
]
TrainPrior = Annotated[Path | None, configured("data.prior", DATA)]
OtherPrior = Annotated[
    Path | None,
    typer.Option(
        "--prior", help="File of `vlprompt describe` about other classes, of a model with one.", rich_help_panel=DATA
    ),
]
OtherTeacher = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        help="Where the teacher is now, of a model that asks its own about other classes, if it has moved.",
        rich_help_panel=MODEL,
    ),
]
ValFraction = Annotated[float | None, configured("data.val_fraction", DATA)]
DrawSeed = Annotated[int, typer.Option("--seed", help="Decides which few images --shots draws.", rich_help_panel=DATA)]
TrainBackbone = Annotated[str | None, configured("backbone", MODEL)]
TeacherBackbone = Annotated[str | None, configured("teacher.backbone", MODEL, "--teacher")]
TrainBank = Annotated[Path | None, configured("data.bank", DATA)]
TrainViews = Annotated[str | None, configured("data.views", DATA, metavar="random|center|R")]
TrainDevice = Annotated[str | None, configured("train.device", MODEL)]
TrainPrecision = Annotated[str | None, configured("train.precision", MODEL)]
Seed = Annotated[int | None, configured("seed", TRAINING)]
Epochs = Annotated[int | None, configured("train.epochs", TRAINING, default="the method's official number")]
Preset = Annotated[
    str | None, typer.Option(help="Other settings of the method by name, e.g. few-shot.", rich_help_panel=TRAINING)
]
WarmStart = Annotated[str | None, configured("train.warm_start", TRAINING, "--from", metavar="RUN")]
Select = Annotated[Literal["last", "val"] | None, configured("train.select", TRAINING)]
ValEvery = Annotated[int | None, configured("train.val_every", TRAINING)]
ConfigFile = Annotated[Path | None, typer.Option(help="YAML file with any settings.", rich_help_panel=TRAINING)]
Resume = Annotated[
    Path | None,
    typer.Option(
        help="Resume this stopped run with its own settings; DATA, --root and --split-file say where its data is now.",
        rich_help_panel=TRAINING,
    ),
]
ReportTo = Annotated[Literal["tensorboard", "wandb"] | None, configured("train.report_to", OUTPUT)]
Out = Annotated[Path | None, typer.Option(help="Run folder; default: runs/DATA-METHOD-seedN.", rich_help_panel=OUTPUT)]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the merged configuration and stop.", rich_help_panel=OUTPUT)
]


def say(text: str) -> None:
    """A message for people, on standard error."""
    print(printable(text), file=sys.stderr)


def first_process() -> bool:
    """Whether this process prints: the first of those that train together."""
    return os.environ.get("RANK", "0") == "0"
