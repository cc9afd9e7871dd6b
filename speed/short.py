"""A short version of all, in minutes: writes JSON and a page of tables.

Steps of all methods on mini, two of them on random ViT-B/32, class features, growth of CoOp, and a small region bank.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from speed import bank, growth, step, text
from speed.inputs import write_figures
from vlprompt.files import write_atomically

RESULTS = Path(__file__).parent / "results"
PARTS: tuple[tuple[str, Any, list[str]], ...] = (
    ("step-mini", step, ["--repeats", "3"]),
    ("step-vit-b-32", step, ["coop", "maple", "--backbone", "random:32", "--repeats", "1", "--no-memory"]),
    ("text", text, ["mini", "--rounds", "5"]),
    ("growth", growth, ["coop", "--classes", "50,100,200", "--images", "1,8,32"]),
    ("bank", bank, ["mini", "mini", "--images", "32", "--regions", "10", "--epochs", "2"]),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--out", type=Path, default=RESULTS / "short", help="folder of the figures")
    parser.add_argument("--device", default="cpu")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything, and write what each command would have written."""
    results = {}
    for name, module, given in PARTS:
        parser = argparse.ArgumentParser()
        module.arguments(parser)
        own = parser.parse_args([*given, "--device", args.device])
        own.command = module.__name__.rpartition(".")[2]
        results[name] = module.run(own)
        write_figures(args.out / f"{name}.json", results[name], own)
    write_atomically(args.out / "README.md", table(results) + "\n")
    return results


def table(results: dict[str, Any]) -> str:
    """All tables under the commands that they come from, and the machine."""
    environment = next(iter(results.values()))["environment"]
    lines = ["# Speed, short version", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in environment.items()]
    for (_, module, given), result in zip(PARTS, results.values(), strict=True):
        command = " ".join([module.__name__, *given]).replace(".", " ", 1)
        lines += ["", f"## `python -m {command}`", "", module.table(result)]
    return "\n".join(lines)
