"""``vlprompt demo``: the whole job on the embedded backbone and pictures drawn on this machine, offline."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlprompt.data.datasets import LoadedDataset, load_dataset
from vlprompt.data.splits import Split
from vlprompt.drawing import Curve, Shown, draw_curves, draw_predictions
from vlprompt.errors import ConfigError
from vlprompt.files import write_atomically
from vlprompt.methods import Method
from vlprompt.progress import Bar
from vlprompt.training.artefact import FILES
from vlprompt.training.config import build_config
from vlprompt.training.evaluate import EvaluationImages, evaluate, harmonic_mean, predict_logits
from vlprompt.training.run import Result, train

SHOTS = 8
BEFORE, BEST = "zero_shot", "promptsrc"
COMMON = {"data.min_scale": 0.6, "optim.warmup_epochs": 0}
METHODS: dict[str, dict[str, Any]] = {
    BEFORE: {},
    "coop": {
        "method.n_ctx": 4,
        "method.init": "a photo of a",
        "data.batch_size": 16,
        "optim.lr": 0.001,
        "train.epochs": 5,
        **COMMON,
    },
    BEST: {"data.batch_size": 8, "train.epochs": 4, **COMMON},
}
"""What runs, with changes to the official settings: their 50 and 20 epochs would take minutes, and little is left of a
drawing in a crop of a twelfth of it. Chosen on validation pictures."""

MARKER = "demo.json"
BLOCKS = "▁▂▃▄▅▆▇█"


def run_demo(out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Train on half of the classes, measure both halves, draw curves and predictions; returns the figures.

    ``out`` is made anew if it holds an earlier demo. Raises ConfigError if it holds anything else.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / MARKER).is_file():
            raise ConfigError(f"output folder {out} is already in use: choose another with --out")
        shutil.rmtree(out)
    write_atomically(out / MARKER, "{}")
    began = time.monotonic()
    dataset = load_dataset("openmoji", out / "data")
    halves = {"base": dataset.split.subset("base"), "novel": dataset.split.subset("novel")}
    say(_opening(dataset, halves, out))
    images = {
        name: EvaluationImages(split.paths("test"), [i.label for i in split.test]) for name, split in halves.items()
    }
    tuned: dict[str, Method] = {}
    rows: dict[str, dict[str, float]] = {}
    curves: dict[str, Curve] = {}
    for name, changes in METHODS.items():
        given = {"data.name": "openmoji", "data.root": str(out / "data"), "data.classes": "base"}
        config = build_config(name, overrides={**given, "data.shots": SHOTS, **changes})
        say(f"\n{name} …")
        with Bar() as bar:
            tuned[name], result = train(config, out / name, bar)
        say(_done(tuned[name], result))
        accuracy = {
            half: evaluate(tuned[name], images[half], split.class_names).accuracy for half, split in halves.items()
        }
        rows[name] = {**accuracy, "harmonic_mean": harmonic_mean(**accuracy), "seconds": result.seconds}
        if curve := _curve(out / name):
            curves[name] = curve
    picture, drawn = out / "predictions.png", out / "learning_curves.png"
    draw_predictions(picture, {BEFORE: "before", BEST: "after"}, _shown(halves, tuned))
    draw_curves(drawn, curves, {BEFORE: _val_accuracy(out / BEFORE)})
    total = time.monotonic() - began
    say(_table(rows, halves))
    say(_curves_in_text(curves))
    say(_closing(out, picture, drawn, total))
    figures = {
        "methods": rows,
        "picture": str(picture),
        "learning_curves": str(drawn),
        "artefact": str(out / BEST),
        "seconds": total,
    }
    write_atomically(out / MARKER, json.dumps(figures, indent=2))
    return figures


def _opening(dataset: LoadedDataset, halves: Mapping[str, Split], out: Path) -> str:
    split, base, novel = dataset.split, halves["base"], halves["novel"]
    pictures = len(split.train) + len(split.val) + len(split.test)
    return (
        f"{pictures:,} OpenMoji pictures of {len(split.class_names)} classes, drawn from a font into {out / 'data'}.\n"
        f"  base classes:  {len(base.class_names)}, whose pictures train ({', '.join(base.class_names[:3])}, …)\n"
        f"  novel classes: {len(novel.class_names)}, never trained on ({', '.join(novel.class_names[:3])}, …)\n"
        f"The backbone `mini`, a small model of pictures and texts that comes with vlprompt, finds the class name\n"
        f"that fits a picture best. It stays as it is: prompts, a few vectors beside the words or the picture, are\n"
        f"tuned on {SHOTS} pictures of each base class, and then measured on other pictures of both halves."
    )


def _done(method: Method, result: Result) -> str:
    numbers = f" ({result.trainable_parameters:,} numbers)" if result.trainable_parameters else ""
    return f"learned {method.learns}{numbers} in {result.seconds:.0f} s"


def _curve(run: Path) -> Curve | None:
    """Loss (all terms) and val accuracy of each epoch of a run; None without epochs."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    losses = [sum(v for k, v in row.items() if k not in ("epoch", "lr", "val_accuracy")) for row in rows]
    return Curve(losses, [row["val_accuracy"] for row in rows]) if rows else None


def _val_accuracy(run: Path) -> float:
    return json.loads((run / "metrics.json").read_text("utf-8"))["val_accuracy"]


def _table(rows: Mapping[str, Mapping[str, float]], halves: Mapping[str, Split]) -> str:
    n = {name: len(split.test) for name, split in halves.items()}
    guess = {name: 100 / len(split.class_names) for name, split in halves.items()}
    guesses = {"guessing": {**guess, "harmonic_mean": harmonic_mean(**guess)}}
    lines = ["", "Accuracy in percent on the test pictures", f"{'':12} base   novel  harmonic mean"]
    for name, row in (guesses | dict(rows)).items():
        lines.append(f"{name:12} {row['base']:5.1f}  {row['novel']:5.1f}  {row['harmonic_mean']:5.1f}")
    error = max(math.sqrt(row[half] * (100 - row[half]) / n[half]) for row in rows.values() for half in n)
    lines.append(
        f"The harmonic mean is high only if both are. With {n['base']} and {n['novel']} pictures the standard error of "
        f"base and novel is {error:.1f} points.\n"
        "`mini` knows these class names, so little is left to learn; tuning gains most where names mean nothing to a\n"
        "backbone (docs/quick-start.md)."
    )
    return "\n".join([*lines, ""])


def _curves_in_text(curves: Mapping[str, Curve]) -> str:
    lines = ["Learning curves, epoch by epoch: loss on training pictures, accuracy in percent on val pictures"]
    for name, (losses, accuracies) in curves.items():
        loss = f"loss {losses[0]:5.2f} {_bars(losses)} {losses[-1]:.2f}"
        lines.append(f"{name:12} {loss}   val {accuracies[0]:5.1f} {_bars(accuracies)} {accuracies[-1]:.1f}")
    return "\n".join([*lines, ""])


def _bars(values: Sequence[float]) -> str:
    """A bar a value, from the least to the most of them."""
    low, span = min(values), max(values) - min(values)
    return "".join(BLOCKS[round((v - low) / span * (len(BLOCKS) - 1)) if span else 0] for v in values)


def _closing(out: Path, picture: Path, curves: Path, total: float) -> str:
    run, command = shlex.quote(str(out / BEST)), _command()
    size = round(sum((out / BEST / name).stat().st_size for name in FILES) / 1000)
    return (
        f"Predictions before ({BEFORE}) and after ({BEST}): {picture}\n"
        f"Learning curves: {curves}\n"
        f"The tuned prompts, ready to use elsewhere: {out / BEST} ({', '.join(FILES)}: {size} kB)\n"
        f"All in {total:.0f} s.\n"
        f"\n"
        f"Next, on your own images, one folder a class in PHOTOS:\n"
        f"  {command} train {BEST} PHOTOS --out runs/photos\n"
        f"  {command} evaluate runs/photos PHOTOS\n"
        f'  {command} predict runs/photos IMAGE.jpg --class-names "any,other,classes"\n'
        f"With a large model add --backbone openai/clip-vit-base-patch16 (a folder or a hub id) to the first.\n"
        f"On these pictures in other looks (edges, grey, dark, small, rotated):\n"
        f"  {command} evaluate {run} openmoji-edges --root {shlex.quote(str(out / 'data'))} --classes base"
    )


def _command() -> str:
    """How to call vlprompt from here; it need not be on the path."""
    if shutil.which("vlprompt"):
        return "vlprompt"
    python, here = Path(sys.executable), Path.cwd()
    return f"{shlex.quote(str(python.relative_to(here) if python.is_relative_to(here) else python))} -m vlprompt"


def _shown(halves: Mapping[str, Split], tuned: Mapping[str, Method]) -> dict[str, list[Shown]]:
    """The first test picture of every class, with what each model says among its half's classes."""
    shown = {}
    for half, split in halves.items():
        first = [next(i for i in split.test if i.label == c) for c in range(len(split.class_names))]
        paths = [split.root / item.path for item in first]
        guesses = [_names(tuned[name], paths, split.class_names) for name in (BEFORE, BEST)]
        shown[f"{half} classes"] = [Shown(*row) for row in zip(paths, split.class_names, *guesses, strict=True)]
    return shown


def _names(method: Method, paths: Sequence[Path], class_names: Sequence[str]) -> list[str]:
    best = predict_logits(method, EvaluationImages(paths).features(method), class_names).argmax(-1)
    return [class_names[c] for c in best.tolist()]
