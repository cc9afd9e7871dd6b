"""Measure calibration: error before and after, coverage, and known against novel images.

    python tools/calibration.py mini --root DATA --out calibration.json

DATA holds ``caltech-101/`` (CoOp's layout), ``clothing/`` and ``imagenette/`` (class folders in train, val and test).
Each method is trained on the base half of the classes (16 shots) and calibrated on the whole val split of these. It is
measured on test images of the base classes, and of the novel half as images of none of them; and on the latter under
their own class names.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from vlprompt.artefact.calibration import SCORES, Calibration, auroc, class_factors, fit_calibration
from vlprompt.config.schema import build_config
from vlprompt.data.datasets import load_dataset
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import Split
from vlprompt.methods import Method
from vlprompt.training.evaluate import EvaluationImages, predict_logits, score
from vlprompt.training.run import train

DATA = ("caltech101", "clothing", "imagenette")
COVERAGES = (0.8, 0.9, 0.95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--methods", default="zero_shot,coop,clap")
    parser.add_argument("--data", default=",".join(DATA))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    for data in given.data.split(","):
        for name in given.methods.split(","):
            rows.append({"data": data, "method": name, **measure(name, data, given.root, given.backbone)})
            print(json.dumps(rows[-1]), flush=True)
    if given.out:
        given.out.write_text(json.dumps(rows, indent=2))


def measure(name: str, data: str, root: Path, backbone: str) -> dict[str, object]:
    """A row of the table."""
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
    found: dict[str, object] = {
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


def other_names(method: Method, novel: Split, calibration: Calibration) -> dict[str, object]:
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
    main()
