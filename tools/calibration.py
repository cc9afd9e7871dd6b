"""Measure calibration: error before and after, coverage, and known against novel images.

    python tools/calibration.py run mini --root DATA   # writes docs/results/calibration.json
    python tools/calibration.py page                   # docs/calibration.md; --check changes nothing

DATA holds ``caltech-101/`` (CoOp's layout), ``clothing/`` and ``imagenette/`` (class folders in train, val and test).
Each method is trained on the base half of the classes (16 shots) and calibrated on the whole val split of these. It is
measured on test images of the base classes, and of the novel half as images of none of them; and on the latter under
their own class names.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pages import REPOSITORY, marks, rewrite, table, write_changed

from vlprompt.artefact.calibration import SCORES, Calibration, auroc, class_factors, fit_calibration
from vlprompt.config.schema import build_config
from vlprompt.data.datasets import load_dataset
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import Split
from vlprompt.files import write_atomically
from vlprompt.methods import Method
from vlprompt.training.evaluate import EvaluationImages, predict_logits, score
from vlprompt.training.run import train

DATA = ("caltech101", "clothing", "imagenette")
COVERAGES = (0.8, 0.9, 0.95)
FIGURES = REPOSITORY / "docs" / "results" / "calibration.json"
PAGE = REPOSITORY / "docs" / "calibration.md"


Found = dict[str, Any]
"""A data set and method, and what was measured of them."""


def accuracy_table(found: Sequence[Found]) -> str:
    """Known classes, in Markdown: accuracy, calibration error, coverage, and known against novel images."""
    asked = " / ".join(map(str, COVERAGES))
    head = ["data", "method", "accuracy, %", "calibration error before", "after", f"sets asked for {asked}", "by class"]
    lines = [
        [
            f["data"],
            f"`{f['method']}`",
            f"{f['accuracy']:.1f}",
            f"{f['ece_before']:.3f}",
            f"{f['ece_after']:.3f}",
            *(" / ".join(f"{f[f'{what}_{c}']:.3f}" for c in COVERAGES) for what in ("coverage", "coverage_by_class")),
            " / ".join(f"{f[f'auroc_{score}']:.3f}" for score in SCORES),
        ]
        for f in found
    ]
    return table([*head, f"known against novel: {' / '.join(SCORES)}"], lines)


def names_table(found: Sequence[Found]) -> str:
    """Calibration error of the novel half's own names, in Markdown, of methods that take other names."""
    ways = {"as it is": "before", "temperature": "temperature", "DAC": "dac", "both": "after"}
    lines = [
        [
            f["data"],
            f"`{f['method']}`",
            *(f"{f[f'novel_ece_{way}']:.3f}" for way in ways.values()),
            "–" if f["dac_factor"] is None else f"{f['dac_factor']:.2f}",
        ]
        for f in found
        if "novel_ece_before" in f
    ]
    return table(["data", "method", *ways, "mean factor"], lines)


TABLES = {"accuracy": accuracy_table, "names": names_table}


def page(check: bool) -> int:
    """Write the page's tables, or say whether they are those of the figures."""
    found = json.loads(FIGURES.read_text("utf-8"))
    marked = marks("calibration", "end of calibration")
    return write_changed({PAGE: rewrite(PAGE.read_text("utf-8"), marked, lambda name: TABLES[name](found))}, check)


def main() -> int:
    """Read the arguments and do what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs, pages = (
        commands.add_parser("run", help="train and measure"),
        commands.add_parser("page", help="write the page"),
    )
    runs.add_argument("backbone")
    runs.add_argument("--root", type=Path, required=True)
    runs.add_argument("--methods", default="zero_shot,coop,clap")
    runs.add_argument("--data", default=",".join(DATA))
    runs.add_argument("--out", type=Path, default=FIGURES)
    pages.add_argument("--check", action="store_true", help="change nothing")
    given = parser.parse_args()
    if given.command == "page":
        return page(given.check)
    rows: list[Found] = []
    for data in given.data.split(","):
        for name in given.methods.split(","):
            rows.append({"data": data, "method": name, **measure(name, data, given.root, given.backbone)})
            print(json.dumps(rows[-1]), flush=True)
    write_atomically(given.out, json.dumps(rows, indent=1) + "\n")
    return 0


def measure(name: str, data: str, root: Path, backbone: str) -> Found:
    """What both tables say of a method on a data set."""
    place = {"data.name": data, "data.root": str(root)} if data == "caltech101" else {"data.name": str(root / data)}
    settings = {"backbone": backbone, "data.classes": "base", "data.shots": 16, **place}
    # Few-shot training cuts val to 4 images a class; the whole val split calibrates.
    config = build_config(name, "mini" if name == "coop" and backbone == "mini" else None, overrides=settings)
    with TemporaryDirectory() as folder:
        method, _ = train(config, Path(folder) / "run")
    whole = load_dataset(config.data.name, config.data.root).split
    base, novel = whole.subset("base"), whole.subset("novel")
    names = base.class_names
    val, test = (logits_of(method, base, part, names) for part in ("val", "test"))
    unknown = logits_of(method, novel, "test", names)
    calibration, areas = fit_calibration(val, torch.tensor(base.labels("val")))
    labels = torch.tensor(base.labels("test"))
    calibrated = calibration.logits(method, test, names)
    p, index = calibrated.softmax(-1), torch.arange(len(labels))
    found: Found = {
        "accuracy": score(test, labels, names).accuracy,
        "val_images": len(val),
        "temperature": calibration.temperature,
        "ece_before": score(test, labels, names).calibration_error,
        "ece_after": score(calibrated, labels, names).calibration_error,
    }
    for asked in COVERAGES:
        sets, by_class = calibration.sets(p, asked), calibration.sets(p, asked, by_class=True)
        found[f"coverage_{asked}"] = sets[index, labels].double().mean().item()
        found[f"coverage_by_class_{asked}"] = by_class[index, labels].double().mean().item()
        found[f"set_size_{asked}"] = sets.sum(-1).double().mean().item()
    away = calibration.logits(method, unknown, names)
    found |= {f"auroc_{s}": auroc(of(calibrated), of(away)) for s, of in SCORES.items()}
    found |= {"score": calibration.score, "auroc_val": areas}
    if calibration.threshold is not None:
        for what, z in (("known", calibrated), ("novel", away)):
            none = calibration.none_of_these(z)
            assert none is not None
            found[f"none_of_{what}"] = none.double().mean().item()
    return found | other_names(method, novel, calibration)


def other_names(method: Method, novel: Split, calibration: Calibration) -> Found:
    """Calibration error of the novel half's own names: as they are, by temperature, by DAC, by both."""
    if not method.takes_new_classes:
        return {}
    names, labels = novel.class_names, torch.tensor(novel.labels("test"))
    logits = logits_of(method, novel, "test", names).double()
    plain = Calibration(1.0, (), calibration.score, None, calibration.kept)
    ways = {
        "novel_ece_before": logits,
        "novel_ece_temperature": logits / calibration.temperature,
        "novel_ece_dac": plain.logits(method, logits, names),
        "novel_ece_after": calibration.logits(method, logits, names),
    }
    factors = class_factors(method, names)
    mean = None if factors is None else factors.mean().item()
    return {key: score(z, labels, names).calibration_error for key, z in ways.items()} | {"dac_factor": mean}


def logits_of(method: Method, split: Split, part: str, names: tuple[str, ...]) -> torch.Tensor:
    """The method's logits of a part's images."""
    with ImageReader(2, room=0) as reader:
        return predict_logits(method, EvaluationImages(split.paths(part), [], reader), names)


if __name__ == "__main__":
    sys.exit(main())
