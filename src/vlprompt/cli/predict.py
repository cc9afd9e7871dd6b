"""Classify image files with a tuned model."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from vlprompt.data.files import IMAGE_EXTENSIONS, LeftOut, image_files, missing_error
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import check_class_names, names_in_file, refuse_json
from vlprompt.documents import csv_cell, csv_path
from vlprompt.errors import DataError, printable
from vlprompt.methods import Method
from vlprompt.training.evaluate import EvaluationImages, predict_logits, predict_spread


def find_images(places: Sequence[Path], say: Callable[[str], object] = lambda text: None) -> list[Path]:
    """The image files among ``places``, and below those that are folders, sorted by name; other files are told of."""
    found: list[Path] = []
    for place in places:
        if os.path.isdir(place):
            left_out = LeftOut()
            inside = sorted(image_files(place, left_out))
            if not inside:
                others = f"; it has {left_out}" if left_out.files else ""
                raise DataError(f"no images in folder {place} (looked for {', '.join(IMAGE_EXTENSIONS)}){others}")
            for note in left_out.notes(place):
                say(note)
            found += inside
        elif os.path.isfile(place):
            found.append(place)
        elif os.path.exists(place):
            raise DataError(f"{place} is neither an image nor a folder")
        else:
            raise missing_error("image", place)
    return found


def read_class_names(text: str | None, file: Path | None) -> tuple[str, ...] | None:
    """Class names from a comma-separated text or a file with one a line; None if neither is given."""
    if text is not None and file is not None:
        raise DataError("--class-names and --class-names-file exclude each other")
    if file is not None:
        return names_in_file(file)
    if text is None:
        return None
    refuse_json(text, "--class-names", "separated by commas")
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
    if len(class_names) == 1:
        predict_logits(method, EvaluationImages(paths[:1], [], reader), class_names)  # its name may be what is wrong
        raise DataError(f"there is only one class, '{class_names[0]}', so it is always right: commas separate names")
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
        return "\n".join(printable(line) for group in lines for line in group)
    spread = ["spread"] * any("spread" in t for p in predictions for t in p["top"])
    numbers = ["probability", *spread]
    rows = [
        (csv_path(p["image"]), csv_cell(t["class"]), *(f"{t[n]:.6f}" for n in numbers))
        for p in predictions
        for t in p["top"]
    ]
    return csv_text(("image", "class", *numbers), rows)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as CSV, without a line end after its last row."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().rstrip("\n")


def _percent(shown: dict[str, Any]) -> str:
    return f"{100 * shown['probability']:5.1f}" + (f" ± {100 * shown['spread']:4.1f}" if "spread" in shown else "")
