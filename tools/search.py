"""Random search for a method's settings on a small backbone: the same space and number of trials for every method.

    python tools/search.py rows --methods coop maple --trials 8 > rows.yaml
    vlprompt bench base-to-novel --rows rows.yaml --data imagenette --root DATA --seeds 1 --split val --out runs/search
    python tools/search.py best rows.yaml runs/search --write

Trials start from the official settings without a preset. They differ in learning rate (a factor on the official one),
epochs, smallest crop and, where the method has them, number of prompt tokens and depth; all have batches of 16. The
best has the highest harmonic mean on validation images; ``--write`` makes it the method's preset ``mini``.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from vlprompt.bench.report.report import read_sections, to_dict
from vlprompt.bench.rows import Rows, read_rows
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
AVERAGED = 0.75  # PromptSRC's average of prompts is centred at this part of the training


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
        "rows": {
            f"{method}-{k}": {"method": method, "preset": None} | trial(method, *point)
            for method in methods
            for k, point in enumerate(points, 1)
        }
    }


def best(rows: Rows, figures: dict[str, dict[str, float | None]]) -> dict[str, dict[str, Any]]:
    """Each method's row with the highest harmonic mean, and its figures, of ``base``, ``novel`` and ``hm`` by row."""
    found: dict[str, dict[str, Any]] = {}
    for name, (method, settings) in rows.items():
        hm = figures.get(name, {}).get("hm")
        if hm is not None and hm > found.get(method, {"hm": -1})["hm"]:
            own = {key: value for key, value in settings.items() if key != "preset"}
            found[method] = {"settings": own, **figures[name], "name": name}
    return found


def with_presets(text: str, found: dict[str, dict[str, Any]]) -> str:
    """The file of presets ``text`` with the settings found in the place of those that these methods had."""
    head = [line for line in text.splitlines() if line.startswith("#")]
    presets = yaml.safe_load(text) | {method: line["settings"] for method, line in found.items()}
    return "\n".join([*head, yaml.safe_dump(dict(sorted(presets.items())), sort_keys=False)])


def read_figures(folder: Path) -> dict[str, dict[str, float | None]]:
    """Base, novel and harmonic mean of the file's rows, from the first table that ``vlprompt report`` makes."""
    table = to_dict(read_sections(folder))[0]
    heads = {"base": "base", "novel": "novel", "hm": "HM"}
    return {
        row.removesuffix("-transductive"): {key: cells[head]["mean"] for key, head in heads.items()}
        for row, cells in table["rows"].items()
    }


def main() -> None:
    """Read the arguments and do what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("rows", help="write the trials")
    write.add_argument("--methods", nargs="+", required=True, choices=sorted(METHODS), metavar="METHOD")
    write.add_argument("--trials", type=int, default=8)
    write.add_argument("--seed", type=int, default=0)
    choose = commands.add_parser("best", help="print the best trial of each method")
    choose.add_argument("rows", type=Path, help="the file of trials")
    choose.add_argument("folder", type=Path, help="of the bench")
    choose.add_argument("--write", action="store_true", help=f"write them into {FILE.name}, too")
    args = parser.parse_args()
    if args.command == "rows":
        print(yaml.safe_dump(rows(args.methods, args.trials, args.seed), sort_keys=False), end="")
    else:
        found = best(read_rows(args.rows), read_figures(args.folder))
        print(yaml.safe_dump(found, sort_keys=False), end="")
        if args.write:
            write_atomically(FILE, with_presets(FILE.read_text("utf-8"), found))


if __name__ == "__main__":
    main()
