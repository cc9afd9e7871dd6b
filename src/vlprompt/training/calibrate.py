"""Calibration of a tuned model on held-out images, and what it is worth on images that it was not fitted on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlprompt.artefact.calibration import Calibration, check_share, fit_calibration
from vlprompt.config.schema import read_config
from vlprompt.data.batches import fold_of
from vlprompt.data.datasets import LoadedDataset, known_folder, read_known
from vlprompt.data.files import same_files
from vlprompt.data.known.table import find_dataset
from vlprompt.data.splits import find_classes, read_split
from vlprompt.errors import DataError, VlpromptError, first_few
from vlprompt.methods import Method
from vlprompt.training.evaluate import EvaluationImages, predict_logits, score

KEPT = 0.95
COVERAGE = 0.9


@dataclass(frozen=True)
class Worth:
    """What calibration does for images that it is not fitted on: by cross-validation on the held-out images."""

    images: int
    calibration_error: float
    """Before, 0 to 1; and after:"""
    calibrated_error: float
    coverage: float
    """Share of the images whose set holds the right class, where ``asked`` was asked for."""
    coverage_by_class: float
    """The same of sets by class."""
    set_size: float
    """Classes in a set, on average."""
    asked: float
    novel_images: int
    """Images of classes that the model does not know; where there are none, each half of the classes was left out."""
    auroc: dict[str, float]
    """How well each score tells images of known classes from others."""


def calibrate(
    method: Method,
    images: EvaluationImages,
    novel: EvaluationImages | None = None,
    kept: float = KEPT,
    coverage: float = COVERAGE,
) -> tuple[Calibration, Worth]:
    """Fit on held-out images of the method's own classes; ``novel`` ones are of no class that it knows.

    Raises DataError where no class has two images.
    """
    check_share("kept", kept)
    check_share("coverage", coverage)
    labels, names = images.labels, method.class_names
    if not len(labels) or int(torch.bincount(labels).max()) < 2:
        raise DataError(f"calibration needs two held-out images of a class, and there are {len(labels)} images")
    logits = predict_logits(method, images, names)
    other = predict_logits(method, novel, names) if novel and len(novel.images) else None
    calibration, areas = fit_calibration(logits, labels, kept, other)
    calibrated, sets, by_class = cross_validated(logits, labels, coverage)
    rows = torch.arange(len(labels))
    worth = Worth(
        images=len(labels),
        calibration_error=score(logits, labels, names).calibration_error,
        calibrated_error=score(calibrated, labels, names).calibration_error,
        coverage=sets[rows, labels].double().mean().item(),
        coverage_by_class=by_class[rows, labels].double().mean().item(),
        set_size=sets.sum(-1).double().mean().item(),
        asked=coverage,
        novel_images=0 if other is None else len(other),
        auroc=areas,
    )
    return calibration, worth


def calibrate_trained(
    method: Method,
    predicted: Sequence[Tensor],
    labels: Tensor,
    class_names: Sequence[str],
    say: Callable[[str], object],
) -> Calibration | None:
    """What the end of training calibrates, on the val images; None where they are too few, or of other classes.

    ``predicted`` holds the logits [n, C] of these images, where there are any.
    """
    if tuple(class_names) != method.class_names or not predicted or int(torch.bincount(labels).max()) < 2:
        return None
    calibration, _ = fit_calibration(predicted[0], labels, KEPT)
    say(described(calibration, len(labels), "val"))
    return calibration


def described(calibration: Calibration, n: int, part: str) -> str:
    """What was fitted, in a line."""
    note = f" ({calibration.temperature_note})" if calibration.temperature_note else ""
    if calibration.threshold is None:
        none = f"too few images for a threshold that keeps {100 * calibration.kept:g} % of them"
    else:
        none = f"none of the classes below a {calibration.score} of {calibration.threshold:.4g}"
    return f"calibrated on {n} {part} images: temperature {calibration.temperature:.3g}{note}; {none}"


def report(calibration: Calibration, worth: Worth, part: str) -> str:
    """What was fitted and what it is worth, in a few lines."""
    lines = [
        described(calibration, worth.images, part),
        "of images not fitted on (cross-validated): calibration error "
        f"{worth.calibration_error:.3f} before, {worth.calibrated_error:.3f} after",
        f"sets for {100 * worth.asked:g} %: right for {100 * worth.coverage:.1f} % "
        f"(by class {100 * worth.coverage_by_class:.1f} %), {worth.set_size:.2f} classes on average",
    ]
    if worth.auroc:
        against = f"{worth.novel_images} images of other classes" if worth.novel_images else "classes left out"
        areas = ", ".join(f"{name} {area:.3f}" for name, area in worth.auroc.items())
        lines.append(f"known images against {against}, area under the ROC curve: {areas}")
    return "\n".join(lines)


def cross_validated(logits: Tensor, labels: Tensor, coverage: float) -> tuple[Tensor, Tensor, Tensor]:
    """Calibrated logits and both kinds of sets, [n, C] each, of every image from a calibration on the other folds."""
    fold = fold_of(labels)
    calibrated = torch.empty(logits.shape, dtype=torch.double)
    sets, by_class = torch.empty(logits.shape, dtype=torch.bool), torch.empty(logits.shape, dtype=torch.bool)
    for k in fold.unique().tolist():
        fitted, _ = fit_calibration(logits[fold != k], labels[fold != k])
        calibrated[fold == k] = logits[fold == k].double() / fitted.temperature
        p = calibrated[fold == k].softmax(-1)
        sets[fold == k], by_class[fold == k] = fitted.sets(p, coverage), fitted.sets(p, coverage, by_class=True)
    return calibrated, sets, by_class


def held_out(method: Method, dataset: LoadedDataset, part: str) -> tuple[list[Path], list[int], list[Path]]:
    """Images of the method's own classes, by name, with their labels; and images of all other classes.

    Raises DataError where there are no images, or none of its classes.
    """
    split = dataset.split
    if not split.items(part):
        raise DataError(f"data set '{dataset.name}' has no {part} images to calibrate on")
    place = find_classes(split.class_names, method.class_names)
    known, labels, novel = [], [], []
    for path, label in zip(split.paths(part), split.labels(part), strict=True):
        if (own := place[label]) is None:
            novel.append(path)
        else:
            known.append(path)
            labels.append(own)
    if not known:
        raise DataError(
            f"data set '{dataset.name}' has no {part} images of the model's classes ({first_few(method.class_names)}): "
            f"its classes are {first_few(split.class_names)}"
        )
    return known, labels, novel


def check_not_trained_on(run: Path, paths: Sequence[Path]) -> bool:
    """Raise DataError if images are among those that a run was trained on, or copies; False if these are not known."""
    trained = images_trained_on(run)
    if trained is None:
        return False
    if used := [str(path) for path in same_files(list(paths), trained)]:
        raise DataError(
            f"{len(used)} of {len(paths)} images were trained on ({first_few(used)}): the model is surer of them than "
            "of others; calibrate on images that were held out"
        )
    return True


def images_trained_on(run: Path) -> list[Path] | None:
    """The training images of a run folder, by its own split; None if none of them lies where it lay."""
    file = run / "split.json"
    if not file.is_file() or not (run / "config.yaml").is_file():
        return None
    config = read_config(run / "config.yaml")
    try:
        if known := find_dataset(config["data.name"]):
            split, _ = read_known(known, known_folder(known, config.get("data.root")), file)
        else:
            data = Path(config["data.name"]).expanduser()
            split = read_split(file, data if data.is_dir() else data.parent)
    except VlpromptError:
        return None
    paths = split.paths("train")
    return paths if any(path.is_file() for path in paths) else None
