"""``vlprompt demo``: the whole job on the embedded backbone and pictures drawn on this machine, offline."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vlprompt.data.datasets import load_dataset
from vlprompt.data.images import load_image
from vlprompt.data.splits import Split
from vlprompt.errors import ConfigError
from vlprompt.files import write_atomically
from vlprompt.methods import Method
from vlprompt.training.config import build_config
from vlprompt.training.evaluate import EvaluationImages, evaluate, harmonic_mean, predict_logits
from vlprompt.training.run import train

METHODS: dict[str, dict[str, Any]] = {
    "zero_shot": {},
    "coop": {"method.n_ctx": 4, "method.init": "a photo of a", "train.epochs": 10},
    "maple": {},
}
"""What runs, with changes to the official settings (CoOp's 50 epochs would take a minute more)."""

MARKER = "demo.json"
ARTEFACT = ("prompts.safetensors", "config.json", "README.md")
CELL, ROW, COLUMNS = 170, 150, 6  # pixels, pixels, pictures in a row
RIGHT, WRONG = "#14803c", "#b42318"


def run_demo(out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Train on half of the classes, measure both halves, draw predictions before and after; returns the figures.

    ``out`` is made anew if it holds an earlier demo. Raises ConfigError if it holds anything else.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / MARKER).is_file():
            raise ConfigError(f"output folder {out} is already in use: choose another with --out")
        shutil.rmtree(out)
    write_atomically(out / MARKER, "{}")
    began = time.monotonic()
    dataset = load_dataset("openmoji", out / "data")
    base, novel = dataset.split.subset("base"), dataset.split.subset("novel")
    say(
        f"{len(dataset.split.train) + len(dataset.split.test)} OpenMoji pictures of {len(dataset.split.class_names)} "
        f"classes, drawn from a font into {out / 'data'}.\n"
        f"Prompts are tuned on the {len(base.train)} training pictures of {len(base.class_names)} base classes "
        f"({', '.join(base.class_names[:3])}, …).\n"
        f"They are then measured on test pictures of these, and of {len(novel.class_names)} novel classes "
        f"({', '.join(novel.class_names[:3])}, …) that they never saw.\n"
        f"The backbone is `mini`, a small model made for this demonstration: expect low figures.\n"
    )
    images = {
        name: EvaluationImages(split.paths("test"), [i.label for i in split.test])
        for name, split in (("base", base), ("novel", novel))
    }
    tuned: dict[str, Method] = {}
    rows: dict[str, dict[str, float]] = {}
    for name, changes in METHODS.items():
        say(f"{name}: running …")
        given = {"data.name": "openmoji", "data.root": str(out / "data"), "data.classes": "base", **changes}
        tuned[name], result = train(build_config(name, overrides=given), out / name)
        accuracy = {
            half: evaluate(tuned[name], images[half], split.class_names).accuracy
            for half, split in (("base", base), ("novel", novel))
        }
        rows[name] = {**accuracy, "harmonic_mean": harmonic_mean(**accuracy), "seconds": result.seconds}
        say(f"{name}: done in {result.seconds:.0f} s ({result.trainable_parameters:,} learned parameters)")
    picture = out / "predictions.png"
    _draw(picture, (base, novel), tuned["zero_shot"], tuned["maple"])
    total = time.monotonic() - began
    say(_table(rows, len(base.class_names)))
    say(
        f"Predictions before (zero_shot) and after (maple): {picture}\n"
        f"The tuned prompts, ready to use elsewhere: {out / 'maple'} "
        f"({', '.join(ARTEFACT)}: {_size(out / 'maple')} kB)\n"
        f"All in {total:.0f} s. On your own images, one folder a class:\n"
        f"  vlprompt train maple PHOTOS --out runs/photos\n"
        f"  vlprompt evaluate runs/photos PHOTOS\n"
        f'  vlprompt predict runs/photos IMAGE.jpg --class-names "any,other,classes"\n'
        f"With a real model add --backbone openai/clip-vit-base-patch16 (a folder or a hub id) to the first."
    )
    figures = {"methods": rows, "picture": str(picture), "seconds": total}
    write_atomically(out / MARKER, json.dumps(figures, indent=2))
    return figures


def _table(rows: dict[str, dict[str, float]], classes: int) -> str:
    lines = ["", f"accuracy in percent (guessing: {100 / classes:.1f})", f"{'':12} base   novel  harmonic mean"]
    for name, row in rows.items():
        lines.append(f"{name:12} {row['base']:5.1f}  {row['novel']:5.1f}  {row['harmonic_mean']:5.1f}")
    return "\n".join([*lines, ""])


def _size(folder: Path) -> int:
    return round(sum((folder / name).stat().st_size for name in ARTEFACT) / 1000)


def _draw(file: Path, halves: Sequence[Split], before: Method, after: Method) -> None:
    """The first test picture of every class, with what each model says among its half's classes, right in green."""
    cells: list[tuple[Path, str, str, str]] = []
    for split in halves:
        first = [next(i for i in split.test if i.label == c) for c in range(len(split.class_names))]
        paths = [split.root / item.path for item in first]
        guesses = (_names(method, paths, split.class_names) for method in (before, after))
        cells += zip(paths, split.class_names, *guesses, strict=True)
    sheet = Image.new("RGB", (COLUMNS * CELL, -(-len(cells) // COLUMNS) * ROW), "white")
    draw, title, font = ImageDraw.Draw(sheet), ImageFont.load_default(13), ImageFont.load_default(12)
    for n, (path, name, *said) in enumerate(cells):
        x, y = n % COLUMNS * CELL, n // COLUMNS * ROW
        sheet.paste(load_image(path).resize((80, 80)), (x + 45, y + 4))
        draw.text((x + 6, y + 86), name, "black", title)
        for line, (when, guess) in enumerate(zip(("before", "after"), said, strict=True)):
            draw.text((x + 6, y + 104 + 16 * line), f"{when}: {guess}", RIGHT if guess == name else WRONG, font)
    sheet.save(file)


def _names(method: Method, paths: Sequence[Path], class_names: Sequence[str]) -> list[str]:
    images = EvaluationImages(paths, [0] * len(paths))
    best = predict_logits(method, images.features(method), class_names).argmax(-1)
    return [class_names[c] for c in best.tolist()]
