"""What ``vlprompt evaluate`` prints."""

from __future__ import annotations

from vlprompt.cli.predict import csv_text
from vlprompt.documents import csv_cell, csv_path
from vlprompt.errors import printable
from vlprompt.evaluation.measure import Measured


def summary(measured: Measured) -> str:
    """The classes, worst first, and a line about all."""
    result, n, model = measured.result, len(measured.class_names), len(measured.result.classes)
    lines = [
        printable(f"{accuracy:6.1f} %  {name}")
        for name, accuracy in sorted(result.per_class.items(), key=lambda x: x[1])
    ]
    images = "images" if measured.split == "all" else f"{measured.split} images"
    among = f", among {model} of the model" if model > n else ""
    last = f"accuracy {result.accuracy:.2f} % on {result.n} {images} of {n} classes ({measured.asked.classes}){among}"
    under = [f"accuracy {measured.robust.accuracy:.2f} % under {measured.asked.attack}"] if measured.robust else []
    return "\n".join([*lines, f"{last}; calibration error {result.calibration_error:.3f}", *under])


def per_image(measured: Measured) -> str:
    """The image, truth, prediction and its probability of each image, as CSV."""
    names = measured.result.classes
    probability, best = measured.logits.double().softmax(-1).max(-1)
    rows = zip(measured.paths, measured.images.labels.tolist(), best.tolist(), probability.tolist(), strict=True)
    return csv_text(
        ("image", "truth", "prediction", "probability"),
        [(csv_path(str(path)), csv_cell(names[c]), csv_cell(names[b]), f"{p:.6f}") for path, c, b, p in rows],
    )
