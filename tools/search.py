"""Random search for a method's settings on a small backbone: the same space and number of trials for every method.

    python tools/search.py rows --methods coop maple --trials 8 > rows.yaml
    vlprompt bench base-to-novel --rows rows.yaml --data imagenette --root DATA --seeds 1 --split val --out runs/first
    vlprompt bench base-to-novel --rows rows.yaml --data openmoji --only \
        "$(python tools/search.py next rows.yaml runs/first runs/second)" --seeds 1 --split val --allow-fewer \
        --skip-existing --out runs/second                                   # until `next` names no more rows
    python tools/search.py best rows.yaml runs/first runs/second --write

Trials start from the official settings without a preset. They differ in learning rate (a factor on the official one),
epochs, smallest crop and, where the method has them, number of prompt tokens and depth; all have batches of 16.

The trials of a method are gone through in the order of their harmonic means on the first data set's validation images,
until one loses at most two points to the frozen model on those of the second, which has other pictures and more
classes. Of those gone through, that with the highest mean over both is taken. ``--write`` makes it the method's preset
``mini``.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from vlprompt.bench.report.report import read_sections, to_dict
from vlprompt.bench.rows import Rows, read_rows, unmarked
from vlprompt.config.presets import FILE
from vlprompt.config.schema import build_config
from vlprompt.files import write_atomically
from vlprompt.methods import METHODS

RATES = (0.3, 1, 3, 10)
EPOCHS = (4, 8)
BATCH = 16
SCALES = (0.08, 0.6)
TOKENS = (2, 4, 8)
DEPTHS = (3, 6, 9, 12)
HARM = 2.0  # points of the harmonic mean that a preset may lose to the frozen model on the second data set
FROZEN = "zero_shot"
AVERAGED = 0.75  # PromptSRC's average of prompts is centred at this part of the training
Figures = dict[str, dict[str, float]]
"""Of each row: base, novel and hm."""


def trial(method: str, rate: float, epochs: int, scale: float, tokens: int, depth: int) -> dict[str, Any]:
    """One point of the space, in the keys that the method has."""
    own = {
        **dict.fromkeys(("n_ctx", "n_ctx_text", "n_ctx_vision"), tokens),
        **dict.fromkeys(("depth", "depth_text", "depth_vision"), depth),
        "average_mean": round(AVERAGED * epochs),
    }
    known = {field.name for field in fields(METHODS[method].Config)}
    official = build_config(method)
    settings: dict[str, Any] = {
        "optim.lr": float(f"{official.optim.lr * rate:.3g}"),
        "optim.warmup_epochs": 0,
        "optim.cosine_epochs": 1,
        "train.epochs": epochs,
        "data.batch_size": BATCH,
        **({} if official.data.views == "center" else {"data.min_scale": scale}),
    }
    return settings | {f"method.{key}": value for key, value in own.items() if key in known}


def rows(methods: list[str], trials: int, seed: int) -> dict[str, Any]:
    """The content of a file for ``vlprompt bench --rows``: the same points for every method.

    A Latin hypercube: each value of a setting comes equally often, as far as the number of trials allows.
    """
    draw = random.Random(seed)
    columns = [values * -(-trials // len(values)) for values in (RATES, EPOCHS, SCALES, TOKENS, DEPTHS)]
    points = list(zip(*(draw.sample(column, trials) for column in columns), strict=True))
    return {
        "rows": {FROZEN: {"method": FROZEN}}
        | {
            f"{method}-{k}": {"method": method, "preset": None} | trial(method, *point)
            for method in methods
            for k, point in enumerate(points, 1)
        }
    }


def search(rows: Rows, first: Figures, second: Figures) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Each method's trial that is taken, with its settings and figures, and the rows still to run for the others.

    ``first`` and ``second`` are the figures of the two data sets.
    """
    found: dict[str, dict[str, Any]] = {}
    missing = [] if FROZEN in second else [FROZEN]
    least = second.get(FROZEN, {"hm": 0})["hm"] - HARM
    for method in dict.fromkeys(method for method, _ in rows.values() if method != FROZEN):
        trials = sorted((name for name, (of, _) in rows.items() if of == method), key=lambda name: -first[name]["hm"])
        for n, name in enumerate(trials, 1):
            if name not in second:
                missing.append(name)
                break
            if second[name]["hm"] >= least or n == len(trials):
                taken = max(trials[:n], key=lambda name: first[name]["hm"] + second[name]["hm"])
                settings = {key: value for key, value in rows[taken][1].items() if key != "preset"}
                found[method] = {"settings": settings, "first": first[taken], "second": second[taken], "name": taken}
                break
    return found, missing


def with_presets(text: str, found: dict[str, dict[str, Any]]) -> str:
    """The file of presets ``text`` with the settings found in the place of those that these methods had."""
    head = [line for line in text.splitlines() if line.startswith("#")]
    presets = yaml.safe_load(text) | {method: line["settings"] for method, line in found.items()}
    return "\n".join([*head, yaml.safe_dump(dict(sorted(presets.items())), sort_keys=False)])


def read_figures(folder: Path) -> Figures:
    """Base, novel and harmonic mean of the rows that have been run, from the table that ``vlprompt report`` makes."""
    if not (folder / "results.csv").exists():
        return {}
    table = to_dict(read_sections(folder))[0]
    heads = {"base": "base", "novel": "novel", "hm": "HM"}
    return {
        unmarked(row): {key: cells[head]["mean"] for key, head in heads.items()}
        for row, cells in table["rows"].items()
        if cells["HM"]["mean"] is not None
    }


def main() -> None:
    """Read the arguments and do what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("rows", help="write the trials")
    write.add_argument("--methods", nargs="+", required=True, choices=sorted(METHODS), metavar="METHOD")
    write.add_argument("--trials", type=int, default=8)
    write.add_argument("--seed", type=int, default=0)
    following = commands.add_parser("next", help="print the rows to run on the second data set, for `bench --only`")
    choose = commands.add_parser("best", help="print the trial of each method that is taken")
    for command in (following, choose):
        command.add_argument("rows", type=Path, help="the file of trials")
        command.add_argument("first", type=Path, help="the bench on the first data set")
        command.add_argument("second", type=Path, help="the bench on the second")
    choose.add_argument("--write", action="store_true", help=f"write them into {FILE.name}, too")
    args = parser.parse_args()
    if args.command == "rows":
        print(yaml.safe_dump(rows(args.methods, args.trials, args.seed), sort_keys=False), end="")
        return
    trials, first = read_rows(args.rows), read_figures(args.first)
    if absent := [name for name in trials if name not in first and name != FROZEN]:
        parser.error(f"not yet run on the first data set: {', '.join(absent)}")
    found, missing = search(trials, first, read_figures(args.second))
    if args.command == "next":
        print(",".join(missing))
        return
    print(yaml.safe_dump(found, sort_keys=False), end="")
    if missing:
        parser.error(f"not yet run on the second data set: {', '.join(missing)}")
    if args.write:
        write_atomically(FILE, with_presets(FILE.read_text("utf-8"), found))


if __name__ == "__main__":
    main()
