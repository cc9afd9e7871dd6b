"""``vlprompt describe``: command only, no logic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vlprompt.cli.options import DATA, OUTPUT, Device, Json, Precision, Root, SplitFile, say
from vlprompt.errors import ConfigError

describe_app = typer.Typer()


@describe_app.command(
    epilog='Example: vlprompt describe models/llama --class-names "lynx,otter" --out texts.json, then '
    "vlprompt train zero_shot photos --descriptions texts.json"
)
def describe(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A folder with a Hugging Face causal language model.")],
    *,
    class_names: Annotated[
        str | None, typer.Option(help="The classes, separated by commas.", rich_help_panel=DATA)
    ] = None,
    class_names_file: Annotated[
        Path | None, typer.Option(help="File of the classes, one per line.", rich_help_panel=DATA)
    ] = None,
    data: Annotated[str | None, typer.Option(help="Data set whose classes they are.", rich_help_panel=DATA)] = None,
    root: Root = None,
    split_file: SplitFile = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            help="File of questions, one a line, with {} for the class name; eleven about looks if not given.",
            rich_help_panel=DATA,
        ),
    ] = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    out: Annotated[
        Path,
        typer.Option(
            help="The new file: .json for descriptions (--descriptions), .safetensors for drople's prior (--prior).",
            rich_help_panel=OUTPUT,
        ),
    ],
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens of an answer, in descriptions.", min=1, max=1000, rich_help_panel=OUTPUT)
    ] = 40,
    json_output: Json = False,
) -> None:
    """Have a local language model describe classes, or keep what its last layer knows of them.

    Every class is kept when it is done (in OUT.part): the same command continues a stopped one. Weights are read from
    safetensors alone, and no code of the model's folder is run.
    """
    from vlprompt.cli.predict import read_class_names
    from vlprompt.data.datasets import load_dataset
    from vlprompt.describe.describe import check_out, read_questions
    from vlprompt.describe.describe import describe as describe_classes
    from vlprompt.describe.language import load_language_model

    names = read_class_names(class_names, class_names_file)
    if (names is None) == (data is None):
        raise ConfigError("say which classes: --class-names, --class-names-file, or --data (one of them)")
    check_out(out)
    asked = read_questions(questions)
    if names is None:
        assert data is not None
        names = load_dataset(data, root, split_file, least=1).split.class_names
    language = load_language_model(model, device, precision)
    describe_classes(language, names, asked, out, max_tokens, say)
    if json_output:
        print(json.dumps({"out": str(out), "classes": len(names), "questions": len(asked)}))
    say(f"{len(names)} classes written to {out}")
