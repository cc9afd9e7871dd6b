"""Base-to-novel tables: train on base classes, measure base and novel classes, per seed.

    python tools/base_to_novel.py caltech101 --root DATA --methods zero_shot coop --seeds 1 2 3 --out runs/caltech101
    python tools/base_to_novel.py caltech101 --root DATA --rows tools/ablations/dpl.yaml --split val --out runs/dpl

A row is a method with its defaults (--methods), or a name for a method and settings from a file (--rows):

    method: dpl                  # of rows that name no other
    set: {carry: add}            # settings of the rows of this method
    rows:
      exact: {instance_to_prompt: exact}
      frozen: {method: zero_shot}

Runs `vlprompt train`, `vlprompt evaluate` and nothing else, and resumes: what is finished is kept, in OUT/ROW/seed_N
with its figures beside it in seed_N.json, and a run that was stopped goes on. After each row OUT/SPLIT.md and
OUT/SPLIT.json hold the table so far: mean ± standard deviation over seeds, HM of the mean base and the mean novel
accuracy. Choose between rows on --split val; test images are for what was chosen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from vlprompt.errors import VlpromptError
from vlprompt.files import write_atomically
from vlprompt.training.config import build_config, parse_override
from vlprompt.training.evaluate import harmonic_mean

Row = tuple[str, dict[str, Any]]
"""A method and its settings."""


def vlprompt(*arguments: str) -> dict[str, Any]:
    """The JSON object that a `vlprompt` command prints; stops with its error where it refuses."""
    done = subprocess.run([sys.executable, "-m", "vlprompt", *arguments, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"vlprompt {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def read_rows(file: Path) -> dict[str, Row]:
    """The rows of a file, by name."""
    content = yaml.safe_load(file.read_text("utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("rows"), dict) or not content["rows"]:
        raise SystemExit(f"{file} must hold rows: names with settings")
    if unknown := set(content) - {"method", "set", "rows"}:
        raise SystemExit(f"{file}: unknown key '{min(unknown)}' (allowed: method, set, rows)")
    rows: dict[str, Row] = {}
    for key, own in content["rows"].items():
        name, own = str(key), dict(own or {})
        method = own.pop("method", content.get("method"))
        if method is None:
            raise SystemExit(f"{file}: row '{name}' names no method")
        if Path(name).name != name:
            raise SystemExit(f"{file}: row '{name}' is no name of a folder")
        common = content.get("set") or {} if content.get("method") in (None, method) else {}
        rows[name] = method, common | own
    return rows


def run(name: str, row: Row, seed: int, args: argparse.Namespace) -> dict[str, float | None]:
    """Accuracy on base and novel classes of one row and seed, in percent, and the seconds that training took."""
    method, settings = row
    folder, file = args.out / name / f"seed_{seed}", args.out / name / f"seed_{seed}.json"
    where = ["--root", str(args.root)] if args.root else []
    where += ["--split-file", str(args.split_file)] if args.split_file else []
    options = ["--shots", str(args.shots), "--seed", str(seed), "--classes", "base", "--backbone", args.backbone]
    own = [f"{key}={'null' if value is None else value}" for key, value in settings.items()]
    asked = ["train", method, args.data, *where, *options, *args.set, *own]
    state = json.loads(file.read_text()) if file.exists() else {"asked": asked}
    if state["asked"] != asked:
        raise SystemExit(f"{folder} was run as '{' '.join(state['asked'])}': choose another --out, or remove it")

    def keep(**figures: Any) -> None:
        state.update(figures)
        write_atomically(file, json.dumps(state, indent=2))

    keep()
    if "seconds" not in state:
        begun = (folder / "config.yaml").exists()
        trained = vlprompt(*(["train", "--resume", str(folder)] if begun else [*asked, "--out", str(folder)]))
        keep(seconds=trained["seconds"], learned=trained["trainable_parameters"])
    for classes in ("base", "novel"):
        scores = state.get(args.split, {})
        if classes not in scores:
            known = classes == "base" or method != "linear_probe"  # which reads no text: it knows no other classes
            ask = ["evaluate", str(folder), args.data, *where, "--classes", classes, "--split", args.split]
            keep(**{args.split: scores | {classes: vlprompt(*ask)["accuracy"] if known else None}})
    return {**state[args.split], "seconds": state["seconds"]}


def summary(name: str, row: Row, runs: list[dict[str, float | None]]) -> dict[str, Any]:
    """A line of the table: mean and standard deviation over seeds."""
    line: dict[str, Any] = {"name": name, "method": row[0], "settings": row[1], "runs": runs}
    for classes in ("base", "novel"):
        values = [r[classes] for r in runs if r[classes] is not None]
        line[classes] = statistics.mean(values) if values else None
        line[f"{classes}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    line["hm"] = None if line["novel"] is None else harmonic_mean(line["base"], line["novel"])
    return {**line, "seconds": statistics.mean(r["seconds"] for r in runs)}


def markdown(lines: list[dict[str, Any]], head: str) -> str:
    """The table."""
    rows = [f"| {head} | base | novel | HM | seconds to train |", "|---|---|---|---|---|"]
    for line in lines:
        base, novel = ("–" if line[c] is None else f"{line[c]:.2f} ± {line[f'{c}_std']:.2f}" for c in ("base", "novel"))
        hm = "–" if line["hm"] is None else f"{line['hm']:.2f}"
        rows.append(f"| {line['name']} | {base} | {novel} | {hm} | {line['seconds']:.0f} |")
    return "\n".join(rows) + "\n"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--root", type=Path)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--methods", nargs="+", default=["zero_shot", "linear_probe", "coop", "maple", "promptsrc"])
    what.add_argument("--rows", type=Path, metavar="FILE.yaml", help="named settings instead of methods")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows of the file")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--split", choices=["test", "val"], default="test", help="images that are measured")
    parser.add_argument("--split-file", type=Path, help="for a data set without val images")
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all rows")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Read the arguments and do what they say."""
    args = parse(arguments)
    try:
        table(args)
    except VlpromptError as error:
        raise SystemExit(f"error: {error}") from None


def table(args: argparse.Namespace) -> None:
    """Run what is missing, write and print the table."""
    rows = read_rows(args.rows) if args.rows else {name: (name, {}) for name in args.methods}
    if missing := set(args.only or []) - set(rows):
        raise SystemExit(f"no row '{min(missing)}' (allowed: {', '.join(rows)})")
    for method, settings in rows.values():
        build_config(method, overrides=dict(map(parse_override, args.set)) | settings)  # before anything is trained
    lines: list[dict[str, Any]] = []
    head = "settings" if args.rows else "method"
    for name in args.only or rows:
        runs = []
        for seed in args.seeds:
            runs.append(run(name, rows[name], seed, args))
            print(name, seed, runs[-1], file=sys.stderr, flush=True)
        lines.append(summary(name, rows[name], runs))
        write_atomically(args.out / f"{args.split}.json", json.dumps(lines, indent=2))
        write_atomically(args.out / f"{args.split}.md", markdown(lines, head))
    print(markdown(lines, head), end="")


if __name__ == "__main__":
    main()
