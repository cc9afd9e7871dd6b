"""Classify image files with a tuned model."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlprompt.data.folders import IMAGE_EXTENSIONS, image_files
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import check_class_names, names_in_file
from vlprompt.errors import DataError
from vlprompt.methods import Method
from vlprompt.training.evaluate import EvaluationImages, predict_logits, predict_spread


def find_images(places: Sequence[Path]) -> list[Path]:
    """The image files among ``places``, and below those that are folders, sorted by name."""
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            inside = sorted(image_files(place))
            if not inside:
                raise DataError(f"no images in folder {place} (looked for {', '.join(IMAGE_EXTENSIONS)})")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise DataError(f"image {place} does not exist")
    return found


def read_class_names(text: str | None, file: Path | None) -> tuple[str, ...] | None:
    """Class names from a comma-separated text or a file with one a line; None if neither is given."""
    if text is not None and file is not None:
        raise DataError("--class-names and --class-names-file exclude each other")
    if file is not None:
        return names_in_file(file)
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(","))
    check_class_names(names, "--class-names")
    return names


def predict_images(
    method: Method, paths: Sequence[Path], class_names: Sequence[str], top: int, reader: ImageReader
) -> list[dict[str, Any]]:
    """For each image its ``top`` most probable classes: ``{"image": …, "top": [{"class": …, "probability": …}]}``.

    With ``"spread"``, the standard deviation of the probability, where the method has one.
    """
    images = EvaluationImages(paths, [], reader)
    probabilities = predict_logits(method, images, class_names).double().softmax(-1)
    best, labels = probabilities.topk(min(top, len(class_names)))
    found: list[dict[str, Any]] = [
        {
            "image": str(path),
            "top": [{"class": class_names[c], "probability": p} for p, c in zip(ps, cs, strict=True)],
        }
        for path, ps, cs in zip(paths, best.tolist(), labels.tolist(), strict=True)
    ]
    if (spread := predict_spread(method, images, class_names)) is not None:
        for image, values in zip(found, spread.double().gather(1, labels).tolist(), strict=True):
            for shown, value in zip(image["top"], values, strict=True):
                shown["spread"] = value
    return found


def show(predictions: Sequence[dict[str, Any]], as_csv: bool) -> str:
    """Predictions for people, or as image,class,probability rows."""
    if not as_csv:
        tops = ([f"  {_percent(t)} %  {t['class']}" for t in p["top"]] for p in predictions)
        lines = ([p["image"], *top] for p, top in zip(predictions, tops, strict=True))
        return "\n".join(line for group in lines for line in group)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    spread = ["spread"] * any("spread" in t for p in predictions for t in p["top"])
    numbers = ["probability", *spread]
    rows.writerow(["image", "class", *numbers])
    rows.writerows([p["image"], t["class"], *(f"{t[n]:.6f}" for n in numbers)] for p in predictions for t in p["top"])
    return text.getvalue().rstrip("\n")


def _percent(shown: dict[str, Any]) -> str:
    return f"{100 * shown['probability']:5.1f}" + (f" ± {100 * shown['spread']:4.1f}" if "spread" in shown else "")
