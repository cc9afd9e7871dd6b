"""The command line: commands only, no logic. Heavy libraries are imported by the commands that need them."""

from __future__ import annotations

import json
import os
import sys
import warnings
from errno import EACCES, EDQUOT, EISDIR, ELOOP, ENAMETOOLONG, ENOSPC, ENOTDIR, EPERM, EROFS
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Literal

import typer

from vlprompt.__main__ import INTERRUPTED
from vlprompt.cli.bank import bank_app
from vlprompt.cli.bench import bench_app
from vlprompt.cli.compare import compare_app
from vlprompt.cli.data import data_app
from vlprompt.cli.describe import describe_app
from vlprompt.cli.models import models_app
from vlprompt.cli.options import DATA, OUTPUT, Json, first_process, say
from vlprompt.cli.serve import serve_app
from vlprompt.cli.train import train_app
from vlprompt.errors import Interrupted, VlpromptError, memory_is_full, one_line

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Adapt a frozen vision-language model (CLIP and relatives) to your classes by learning a few prompt tokens.",
    epilog="Example: vlprompt train promptsrc ./photos --shots 16 --out runs/photos",
)

OF_THE_SYSTEM = (EACCES, EDQUOT, EISDIR, ELOOP, ENAMETOOLONG, ENOSPC, ENOTDIR, EPERM, EROFS)
"""What a path or a disk may be refused for."""
MEMORY = (
    "out of memory: less is needed with a smaller data.batch_size, more parts of a batch (train.accumulate), and fewer "
    "texts at once (train.text_chunk)"
)


def main() -> None:
    """Run the command line; bad input ends in one line on standard error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # names of files and classes may be what a terminal cannot print
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # we tell what hinders us; the rest changes no pixel
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        code = app(standalone_mode=False, prog_name="vlprompt")
        if code == INTERRUPTED:  # typer turns an interrupt into a silent exit
            raise KeyboardInterrupt
    except Interrupted as stop:
        if first_process():
            say(f"interrupted; {stop}")
        code = INTERRUPTED
    except VlpromptError as error:
        process = "" if first_process() else f"process {os.environ['RANK']}: "
        say(f"{process}error: {error}")
        code = 2
    except typer.TyperException as error:  # unknown option, missing argument, …
        say(f"error: {error.format_message().replace('Value error, ', '')}")
        code = error.exit_code
    except OSError as error:
        if error.errno not in OF_THE_SYSTEM:
            raise
        place = str(error.filename or "")
        say(f"error: {f'{place[:100]}: ' if place else ''}{error.strerror}")
        code = 2
    except (MemoryError, RuntimeError) as error:
        in_a_circle = str(error).startswith("Symlink loop")  # pathlib has no type for it
        if not memory_is_full(error) and not in_a_circle:
            raise
        reason = one_line(error, 120) or "MemoryError"
        say(f"error: {reason if in_a_circle else f'{MEMORY} ({reason})'}")
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Adapt a frozen vision-language model (CLIP and relatives) to your classes by learning a few prompt tokens."""
    if version:
        from vlprompt.version import __version__

        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(epilog="Example: vlprompt demo --out demo")
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the pictures and the tuned models.", rich_help_panel=OUTPUT)
    ] = Path("demo"),
    data: Annotated[
        str,
        typer.Option(
            help="clothing-demo, photographs that come along; or openmoji, drawings made here.", rich_help_panel=DATA
        ),
    ] = "clothing-demo",
    json_output: Json = False,
) -> None:
    """Tune, measure and predict on the embedded backbone, offline, in under two minutes."""
    from vlprompt.demo.demo import run_demo

    result = run_demo(out, say, data)
    if json_output:
        print(json.dumps(result))


@app.command("list", epilog="Example: vlprompt list methods --json")
def list_(
    what: Annotated[
        Literal["methods", "backbones", "datasets", "protocols"], typer.Argument(metavar="WHAT", help="What to list.")
    ] = "methods",
    json_output: Json = False,
) -> None:
    """List methods, backbones, data sets or the protocols of `vlprompt bench`."""
    from vlprompt.cli.listing import listing, table

    rows = listing(what)
    print(json.dumps({what: rows}) if json_output else table(rows))


for commands in (train_app, compare_app, models_app, describe_app, serve_app, bench_app):
    app.add_typer(commands)
app.add_typer(bank_app, name="bank")
app.add_typer(data_app, name="data")
