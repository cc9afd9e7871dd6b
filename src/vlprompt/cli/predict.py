"""Classify image files with a tuned model."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vlprompt.artefact.calibration import Calibration, check_share
from vlprompt.artefact.calibration import probabilities as calibrated
from vlprompt.data.files import IMAGE_EXTENSIONS, LeftOut, image_files, missing_error
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import check_class_names, names_in_file, refuse_json
from vlprompt.documents import csv_cell, csv_path
from vlprompt.errors import ConfigError, DataError, printable
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


def check_sets(run: str, calibration: Calibration | None, own: bool, sets: float | None, by_class: bool) -> None:
    """Raise ConfigError where a model cannot give the sets that are asked for."""
    if sets is None:
        if by_class:
            raise ConfigError("--by-class is about --sets: give both")
        return
    check_share("--sets", sets)
    if calibration is None:
        raise ConfigError(f"--sets = {sets:g}: {run} is not calibrated; see `vlprompt calibrate {run} DATA`")
    if not own:
        raise ConfigError(f"--sets = {sets:g}: sets are of the model's own classes; leave out other class names")


def predict_images(
    method: Method,
    paths: Sequence[Path],
    class_names: Sequence[str],
    top: int,
    reader: ImageReader,
    calibration: Calibration | None = None,
    sets: float | None = None,
    by_class: bool = False,
) -> list[dict[str, Any]]:
    """For each image its ``top`` most probable classes: ``{"image": …, "top": [{"class": …, "probability": …}]}``.

    With ``"spread"``, the standard deviation of the probability, where the method has one.
    With a calibration, probabilities are calibrated, and of the model's own classes ``none_of_these`` says whether the
    image seems to be of none; ``set`` lists the classes of its set as ``top`` does, where ``sets`` asks for it.
    """
    images = EvaluationImages(paths, [], reader)
    if len(class_names) == 1:
        predict_logits(method, EvaluationImages(paths[:1], [], reader), class_names)  # its name may be what is wrong
        raise DataError(f"there is only one class, '{class_names[0]}', so it is always right: commas separate names")
    logits = predict_logits(method, images, class_names)
    scale = calibration.scale(method, logits, class_names) if calibration else None
    spread = predict_spread(method, images, class_names, scale)
    probabilities, none = calibrated(calibration, method, logits, class_names)
    chosen = calibration.sets(probabilities, sets, by_class) if calibration and sets is not None else None

    def listed(i: int, classes: Tensor) -> list[dict[str, Any]]:
        numbers = {"probability": probabilities[i], **({} if spread is None else {"spread": spread[i].double()})}
        return [{"class": class_names[c]} | {n: of[c].item() for n, of in numbers.items()} for c in classes.tolist()]

    best = probabilities.topk(min(top, len(class_names))).indices
    predictions: list[dict[str, Any]] = []
    for i, path in enumerate(paths):
        row: dict[str, Any] = {"image": str(path), "top": listed(i, best[i])}
        if none is not None:
            row["none_of_these"] = bool(none[i])
        if chosen is not None:
            order = probabilities[i].argsort(descending=True, stable=True)
            row["set"] = listed(i, order[chosen[i, order]])
        predictions.append(row)
    return predictions


def show(predictions: Sequence[dict[str, Any]], as_csv: bool) -> str:
    """Predictions for people, or as image,class,probability rows."""
    if as_csv:
        return _csv(predictions)
    lines = []
    for p in predictions:
        lines += [p["image"], *["  none of these"] * p.get("none_of_these", False)]
        lines += [f"  {_percent(t)} %  {t['class']}" for t in p["top"]]
        if "set" in p:
            lines.append(f"  set: {', '.join(t['class'] for t in p['set']) or 'empty, no class is probable enough'}")
    return "\n".join(printable(line) for line in lines)


def _csv(predictions: Sequence[dict[str, Any]]) -> str:
    """Rows of the top classes and of those in the set, with a column for each of what the calibration says."""
    spread = ["spread"] * any("spread" in t for p in predictions for t in p["top"])
    numbers = ["probability", *spread]
    more = [key for key in ("none_of_these", "set") if predictions and key in predictions[0]]
    rows = []
    for p in predictions:
        inside = [t["class"] for t in p.get("set", ())]
        for t in [*p["top"], *(t for t in p.get("set", ()) if t not in p["top"])]:
            extra = [str(p[key] if key == "none_of_these" else t["class"] in inside).lower() for key in more]
            rows.append([csv_path(p["image"]), csv_cell(t["class"]), *(f"{t[n]:.6f}" for n in numbers), *extra])
    return csv_text(["image", "class", *numbers, *("in_set" if key == "set" else key for key in more)], rows)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as CSV, without a line end after its last row."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().rstrip("\n")


def _percent(shown: dict[str, Any]) -> str:
    return f"{100 * shown['probability']:5.1f}" + (f" ± {100 * shown['spread']:4.1f}" if "spread" in shown else "")
