"""Tables of figures that were written before; rows of several files on one backbone make one table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from speed import bank, growth, heads, job, predict, step, text
from vlprompt.errors import DataError

COMMANDS: dict[str, Any] = {
    "step": step,
    "growth": growth,
    "text": text,
    "predict": predict,
    "bank": bank,
    "job": job,
    "heads": heads,
}
"""Those that measure, and whose figures may be shown again."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read the files; raises DataError naming one that is none of ours."""
    found: dict[tuple, dict[str, Any]] = {}
    for file in args.files:
        try:
            result = json.loads(file.read_text("utf-8"))
            settings = result["settings"]
            command, about = COMMANDS[settings["command"]], (settings.get("backbone"), settings.get("precision"))
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"{file} holds no figures of python -m speed") from None
        key = (command, *about, None if command in (step, predict, job) else file)
        if key in found:
            found[key]["rows"] += result["rows"]
        else:
            found[key] = result
    return {"results": list(found.values())}


def table(result: dict[str, Any]) -> str:
    """Each under what it was measured with."""
    return "\n\n".join(f"{_about(r)}\n\n{COMMANDS[r['settings']['command']].table(r)}" for r in result["results"])


def _about(result: dict[str, Any]) -> str:
    e, s = result["environment"], result["settings"]
    given = [s["command"], *(str(s[k]) for k in ("backbone", "precision") if s.get(k))]
    return f"{', '.join(given)}; {e['device']}, {e['threads']} thread(s), {e['processor']}, torch {e['torch']}"
