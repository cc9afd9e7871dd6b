"""Random search for a method's settings on a small backbone: the same space and number of trials for every method.

    python tools/search.py rows --methods coop maple --trials 6 > rows.yaml
    vlprompt bench base-to-novel --rows rows.yaml --data imagenette,openmoji --root DATA --seeds 1 --split val \
        --allow-fewer --out runs/search
    vlprompt bench base-to-novel --rows rows.yaml --only $(python tools/search.py finalists rows.yaml runs/search) \
        --data imagenette,openmoji --root DATA --seeds 2,3 --split val --allow-fewer --out runs/finals
    python tools/search.py best rows.yaml runs/search runs/finals --write

Trials start from the official settings without a preset. They differ in learning rate (a factor on the official one),
epochs, smallest crop and, where the method has them, number of prompt tokens and depth; all have batches of 16. Each is
run with one seed; the three of each method with the highest harmonic mean, the mean over the data sets, are run with
more, and the highest of these, the mean over seeds and data sets, is taken. ``--write`` makes it the method's preset
``mini``.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from vlprompt.bench.report.tables import Cell, studies, tables
from vlprompt.bench.results import RESULTS, Row, read_results
from vlprompt.bench.rows import Rows, read_rows, unmarked
from vlprompt.config.presets import FILE
from vlprompt.config.schema import build_config
from vlprompt.errors import VlpromptError
from vlprompt.files import write_atomically
from vlprompt.methods import METHODS

RATES = (0.3, 1, 3, 10)
EPOCHS = (4, 8)
BATCH = 16
SCALES = (0.08, 0.6)
TOKENS = (2, 4, 8)
DEPTHS = (3, 6, 9, 12)
FINALISTS = 3
FROZEN = "zero_shot"
AVERAGED = 0.75  # PromptSRC's average of prompts is centred at this part of the training
Figures = dict[str, dict[str, dict[str, float]]]
"""Of each data set and row: base, novel and hm."""


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


def finalists(rows: Rows, figures: Figures) -> list[str]:
    """The ``FINALISTS`` trials of each method with the highest mean of harmonic means, from the figures of one seed.

    Raises ValueError for trials that a data set lacks.
    """
    trials = [name for name in rows if name != FROZEN]
    _refuse_missing(trials, figures, "not yet run")
    own: dict[str, list[str]] = {}
    for name in trials:
        own.setdefault(rows[name][0], []).append(name)
    ordered = (sorted(names, key=lambda name: _mean(figures, name), reverse=True) for names in own.values())
    return [name for names in ordered for name in names[:FINALISTS]]


def search(rows: Rows, first: Figures, final: Figures) -> dict[str, dict[str, Any]]:
    """Each method's trial that is taken, with its settings and figures.

    ``first`` has the figures of the first seed, ``final`` those that are means over every seed. Raises ValueError for
    trials that a data set lacks.
    """
    names = finalists(rows, first)
    _refuse_missing(names, final, "not yet run with every seed")
    best: dict[str, str] = {}
    for name in names:
        method = rows[name][0]
        if method not in best or _mean(final, name) > _mean(final, best[method]):
            best[method] = name
    return {
        method: {"name": name, "settings": {key: value for key, value in rows[name][1].items() if key != "preset"}}
        | {data: known[name] for data, known in final.items()}
        for method, name in best.items()
    }


def _refuse_missing(names: Sequence[str], figures: Figures, what: str) -> None:
    for data, known in figures.items():
        if absent := [name for name in names if name not in known]:
            raise ValueError(f"{what} on {data}: {', '.join(absent)}")


def _mean(figures: Figures, name: str) -> float:
    return mean(known[name]["hm"] for known in figures.values())


def with_presets(text: str, found: dict[str, dict[str, Any]]) -> str:
    """The file of presets ``text`` with the settings found in the place of those that these methods had."""
    head = [line for line in text.splitlines() if line.startswith("#")]
    presets = yaml.safe_load(text) | {method: line["settings"] for method, line in found.items()}
    return "\n".join([*head, yaml.safe_dump(dict(sorted(presets.items())), sort_keys=False)])


def read_figures(benches: Sequence[Path]) -> tuple[Figures, Figures]:
    """Base, novel and harmonic mean of the rows of each data set: with the lowest seed, and as means over every seed.

    The second has only the rows that were run with every seed that there is. Both have every data set, one without such
    rows as well. Figures are those of ``vlprompt report``. Raises ValueError for figures that are of anything but val
    images in base to novel: test images choose no settings.
    """
    rows = [row for bench in benches for row in read_results(bench / RESULTS)]
    if strange := {f"{row.protocol}, {row.split} images" for row in rows} - {"base-to-novel, val images"}:
        raise ValueError(f"there are figures of {'; '.join(sorted(strange))} (allowed: base-to-novel with --split val)")
    seeds = sorted({row.seed for row in rows})
    return _figures(rows, seeds[:1]), _figures(rows, seeds)


def _figures(rows: list[Row], seeds: list[int]) -> Figures:
    figures: Figures = {row.data: {} for row in rows}
    rows = [row for row in rows if row.seed in seeds]
    for table in (table for study in studies(rows) for table in tables(study) if len(table.data) == 1):
        for name, cells in table.lines.items():
            known = [cell for cell in cells[:3] if isinstance(cell, Cell) and len(cell.values) == len(seeds)]
            means = [cell.mean for cell in known if cell.mean is not None]
            if len(means) == 3:
                own = dict(zip(("base", "novel", "hm"), means, strict=True))
                figures[table.data[0]][unmarked(name)] = own
    return figures


def main() -> None:
    """Read the arguments and do what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("rows", help="write the trials")
    write.add_argument("--methods", nargs="+", required=True, choices=sorted(METHODS), metavar="METHOD")
    write.add_argument("--trials", type=int, default=8)
    write.add_argument("--seed", type=int, default=0)
    name = commands.add_parser("finalists", help=f"name the {FINALISTS} best trials of each method, for --only")
    choose = commands.add_parser("best", help="print the trial of each method that is taken")
    for command in (name, choose):
        command.add_argument("rows", type=Path, help="the file of trials")
        command.add_argument("benches", type=Path, nargs="+", help="the benches of them: data sets, rows or seeds")
    choose.add_argument("--write", action="store_true", help=f"write them into {FILE.name}, too")
    args = parser.parse_args()
    if args.command == "rows":
        print(yaml.safe_dump(rows(args.methods, args.trials, args.seed), sort_keys=False), end="")
        return
    try:
        trials, (first, final) = read_rows(args.rows), read_figures(args.benches)
        if args.command == "finalists":
            print(",".join(finalists(trials, first)))
            return
        found = search(trials, first, final)
    except (VlpromptError, ValueError) as error:
        parser.error(str(error))
    print(yaml.safe_dump(found, sort_keys=False), end="")
    if args.write:
        write_atomically(FILE, with_presets(FILE.read_text("utf-8"), found))


if __name__ == "__main__":
    main()
