"""``vlprompt demo``: the whole job on the embedded backbone and images that come along, offline."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprompt.artefact.artefact import FILES
from vlprompt.cli.progress import Bar
from vlprompt.config.schema import build_config
from vlprompt.data.datasets import LoadedDataset, load_dataset
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import Split
from vlprompt.demo.drawing import Curve, Shown, draw_curves, draw_predictions
from vlprompt.documents import read_sealed
from vlprompt.errors import ConfigError, unknown
from vlprompt.files import in_use, write_atomically
from vlprompt.methods import Method
from vlprompt.training.evaluate import EvaluationImages, evaluate, harmonic_mean, predict_logits
from vlprompt.training.run import Result, train

BEFORE, PROBE = "zero_shot", "linear_probe"
MARKER = "demo.json"
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Show:
    """What the demo does with a data set."""

    thing: str
    """What its images are called."""
    shots: int
    methods: Mapping[str, Mapping[str, Any]]
    """Method → changes to its official settings, from trials on validation images (``docs/results.md``)."""
    best: str
    """The method whose predictions are drawn, and whose model is kept for use."""
    twice: tuple[str, ...]
    """Methods that are tuned on all classes, too."""


_STEADY = {"data.batch_size": 16, "optim.warmup_epochs": 0, "optim.cosine_epochs": 1}
_SHORT = {**_STEADY, "data.min_scale": 0.6}


def _branches(n_ctx: int, depth: int) -> dict[str, int]:
    """Prompts of both branches: ``n_ctx`` tokens at each of ``depth`` blocks."""
    tokens = dict.fromkeys(("method.n_ctx_text", "method.n_ctx_vision"), n_ctx)
    return tokens | dict.fromkeys(("method.depth_text", "method.depth_vision"), depth)


_PROMPTSRC = {**_SHORT, **_branches(2, 9), "method.average_mean": 3, "optim.lr": 0.0075, "train.epochs": 4}
SHOWS = {
    "clothing-demo": Show(
        "photograph",
        16,
        {
            BEFORE: {},
            PROBE: {},
            "coop": {**_SHORT, "method.n_ctx": 8, "optim.lr": 0.002, "train.epochs": 4},
            "promptsrc": _PROMPTSRC,
            "drople": {**_STEADY, **_branches(8, 12), "optim.lr": 0.002, "train.epochs": 8},
        },
        "drople",
        (BEFORE, PROBE, "coop"),
    ),
    "openmoji": Show(
        "picture",
        8,
        {
            BEFORE: {},
            "coop": {**_STEADY, "method.n_ctx": 4, "optim.lr": 0.02, "train.epochs": 4},
            "promptsrc": _PROMPTSRC,
        },
        "promptsrc",
        (),
    ),
}
"""By data set."""


def run_demo(out: Path, say: Callable[[str], None], data: str = "clothing-demo") -> dict[str, Any]:
    """Train on half of the classes, measure both halves, then on all; draw curves and predictions; gives the figures.

    ``out`` is made anew if it holds an earlier demo. Raises ConfigError if it holds anything else, and for a data set
    that the demo does not know.
    """
    if data not in SHOWS:
        raise ConfigError(unknown("data set of the demo", data, SHOWS))
    if in_use(out):
        if not (out / MARKER).is_file():
            raise ConfigError(f"output folder {out} is already in use: choose another with --out")
        shutil.rmtree(out)
    write_atomically(out / MARKER, "{}")
    began = time.monotonic()
    show, dataset = SHOWS[data], load_dataset(data, out / "data")
    parts = {classes: dataset.split.subset(classes) for classes in ("base", "novel", "all")}
    say(_opening(show, dataset, parts))
    images = {
        name: EvaluationImages(split.paths("test"), split.labels("test"), ImageReader(0))
        for name, split in parts.items()
    }

    def tune(name: str, classes: str, folder: Path) -> tuple[Method, Result]:
        given = {"data.name": data, "data.root": str(out / "data"), "data.classes": classes, "data.shots": show.shots}
        given["train.val_every"] = 1  # a point of the learning curve
        say(f"\n{name}, {classes} classes …")
        method, result = train(build_config(name, overrides={**given, **show.methods[name]}), folder, [Bar()])
        say(_done(method, result))
        return method, result

    tuned: dict[str, Method] = {}
    rows: dict[str, dict[str, float]] = {}
    curves: dict[str, Curve] = {}
    for name in show.methods:
        tuned[name], result = tune(name, "base", out / name)
        known = ["base"] if name == PROBE else ["base", "novel"]  # a classifier knows no other classes
        row = {half: evaluate(tuned[name], images[half], parts[half].class_names).accuracy for half in known}
        if len(row) == 2:
            row["harmonic_mean"] = harmonic_mean(**row)
        rows[name] = {**row, "seconds": result.seconds}
        if curve := _curve(out / name):
            curves[name] = curve
    for name in show.twice:
        method, result = tune(name, "all", out / f"{name}-all")
        rows[name]["all"] = evaluate(method, images["all"], parts["all"].class_names).accuracy
        rows[name]["seconds"] += result.seconds
    picture, drawn = out / "predictions.png", out / "learning_curves.svg"
    halves = {half: parts[half] for half in ("base", "novel")}
    draw_predictions(picture, {BEFORE: "before", show.best: "after"}, _shown(halves, tuned, show.best))
    draw_curves(drawn, curves, {BEFORE: _val_accuracy(out / BEFORE)})
    total = time.monotonic() - began
    say(_table(show, rows, parts))
    say(_curves_in_text(curves, show.thing))
    model = out / (f"{show.best}-all" if show.best in show.twice else show.best)
    say(_closing(show, data, out, model, picture, drawn, total))
    figures = {
        "data": data,
        "methods": rows,
        "picture": str(picture),
        "learning_curves": str(drawn),
        "artefact": str(model),
        "seconds": total,
    }
    write_atomically(out / MARKER, json.dumps(figures, indent=2))
    return figures


def _opening(show: Show, dataset: LoadedDataset, parts: Mapping[str, Split]) -> str:
    split, base, novel = dataset.split, parts["base"], parts["novel"]
    n = len(split.train) + len(split.val) + len(split.test)

    def few(names: Sequence[str]) -> str:
        return ", ".join(names) if len(names) <= 5 else f"{', '.join(names[:3])}, …"

    thing, text = show.thing, dataset.template.format(base.class_names[0])
    return (
        f"{n:,} {thing}s of {len(split.class_names)} classes, and the task to name the class of a new one.\n"
        f"  base classes:  {len(base.class_names)}, which are tuned on ({few(base.class_names)})\n"
        f"  novel classes: {len(novel.class_names)}, which are not ({few(novel.class_names)})\n"
        f"\n"
        f"The backbone `mini`, a small model that comes along, turns a {thing} into numbers, and a text like\n"
        f'"{text}" too. It was trained so that what belongs together lies close, and the class\n'
        f"whose text lies nearest wins: that is zero_shot, which needs no example at all (before).\n"
        f"Prompt learning leaves `mini` as it is. It tunes a few vectors, the prompts, that go into the model beside\n"
        f"the words or the {thing}, until the training {thing}s lie nearest to the texts of their own classes.\n"
        f"It sees {show.shots} {thing}s of each base class; then other {thing}s of both halves are named (after).\n"
        f"A good method gains on the base classes, and loses nothing on the novel ones. linear_probe is a plain\n"
        f"classifier on `mini`'s numbers: it uses no words, and so it cannot name a novel class."
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
    accuracy = read_sealed(run / "metrics.json", Result).val_accuracy
    assert accuracy is not None  # the demo's data sets have val images
    return accuracy


def _table(show: Show, rows: Mapping[str, Mapping[str, float]], parts: Mapping[str, Split]) -> str:
    n = {name: len(split.test) for name, split in parts.items()}
    guess = {name: 100 / len(split.class_names) for name, split in parts.items()}
    guesses = {"guessing": {**guess, "harmonic_mean": harmonic_mean(guess["base"], guess["novel"])}}
    columns = {"base": "base", "novel": "novel", "harmonic_mean": "harmonic mean"}
    columns |= {"all": f"all {len(parts['all'].class_names)} classes"} if show.twice else {}

    def line(name: str, cells: Iterable[str]) -> str:
        return name.ljust(12) + "".join(
            cell.rjust(max(8, len(head) + 2)) for cell, head in zip(cells, columns.values(), strict=True)
        )

    lines = ["", f"Accuracy in percent on the test {show.thing}s", line("", columns.values())]
    for name, row in (guesses | dict(rows)).items():
        lines.append(line(name, (f"{row[key]:.1f}" if key in row else "-" for key in columns)))
    halves = [(row[half], n[half]) for row in rows.values() for half in ("base", "novel") if half in row]
    error = max(math.sqrt(accuracy * (100 - accuracy) / of) for accuracy, of in halves)
    gain = {half: rows[show.best][half] - rows[BEFORE][half] for half in ("base", "novel")}
    counted = f"{n['base']} base and {n['novel']} novel {show.thing}s"
    lines += [
        f"From {BEFORE} to {show.best}: {gain['base']:+.1f} points on base, {gain['novel']:+.1f} on novel classes.",
        f"The harmonic mean is high only if both are. On {counted} the standard error is up to {error:.1f} points.",
    ]
    return "\n".join([*lines, ""])


def _curves_in_text(curves: Mapping[str, Curve], thing: str) -> str:
    lines = [f"Learning curves, epoch by epoch: loss on training {thing}s, accuracy in percent on val {thing}s"]
    for name, (losses, accuracies) in curves.items():
        loss = f"loss {losses[0]:5.2f} {_bars(losses)} {losses[-1]:.2f}"
        lines.append(f"{name:12} {loss}   val {accuracies[0]:5.1f} {_bars(accuracies)} {accuracies[-1]:.1f}")
    return "\n".join([*lines, ""])


def _bars(values: Sequence[float]) -> str:
    """A bar a value, from the least to the most of them."""
    low, span = min(values), max(values) - min(values)
    return "".join(BLOCKS[round((v - low) / span * (len(BLOCKS) - 1)) if span else 0] for v in values)


def _closing(show: Show, data: str, out: Path, model: Path, picture: Path, curves: Path, total: float) -> str:
    run, command, best = shlex.quote(str(model)), _command(), show.best
    size = round(sum((model / name).stat().st_size for name in FILES) / 1000)
    looks = (
        f"On these pictures in other looks (edges, grey, dark, small, rotated):\n"
        f"  {command} evaluate {run} openmoji-edges --root {shlex.quote(str(out / 'data'))} --classes base"
    )
    drawings = f"The same with drawings instead of photographs:\n  {command} demo --data openmoji --out demo-drawings"
    return (
        f"Predictions before ({BEFORE}) and after ({best}): {picture}\n"
        f"Learning curves: {curves}\n"
        f"The tuned model, ready to use elsewhere: {model} ({', '.join(FILES)}: {size} kB)\n"
        f"All in {total:.0f} s.\n"
        f"\n"
        f"Next, on your own images, one folder a class in PHOTOS:\n"
        f"  {command} train {best} PHOTOS --out runs/photos\n"
        f"  {command} evaluate runs/photos PHOTOS\n"
        f'  {command} predict runs/photos IMAGE.jpg --class-names "any,other,classes"\n'
        f"With a large model add --backbone openai/clip-vit-base-patch16 (a folder or a hub id) to the first.\n"
        + (looks if data == "openmoji" else drawings)
    )


def _command() -> str:
    """How to call vlprompt from here; it need not be on the path."""
    if shutil.which("vlprompt"):
        return "vlprompt"
    python, here = Path(sys.executable), Path.cwd()
    return f"{shlex.quote(str(python.relative_to(here) if python.is_relative_to(here) else python))} -m vlprompt"


def _shown(halves: Mapping[str, Split], tuned: Mapping[str, Method], best: str) -> dict[str, list[Shown]]:
    """Test images of every class, four where there are few classes, with what each model says among its half's."""
    shown = {}
    for half, split in halves.items():
        each = 1 if len(split.class_names) > 10 else 4
        of_class = [[i for i in split.test if i.label == c] for c in range(len(split.class_names))]
        chosen = [item for items in of_class for item in items[:each]]
        paths = [split.root / item.path for item in chosen]
        guesses = [_names(tuned[name], paths, split.class_names) for name in (BEFORE, best)]
        truths = [split.class_names[item.label] for item in chosen]
        shown[f"{half} classes"] = [Shown(*row) for row in zip(paths, truths, *guesses, strict=True)]
    return shown


def _names(method: Method, paths: Sequence[Path], class_names: Sequence[str]) -> list[str]:
    best = predict_logits(method, EvaluationImages(paths, [], ImageReader(0)), class_names).argmax(-1)
    return [class_names[c] for c in best.tolist()]
