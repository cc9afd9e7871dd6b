"""``figures.json``: what was measured of one run, and what it cost, in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Required, cast

from annotated_types import Ge, Le
from pydantic import ConfigDict
from typing_extensions import TypedDict

from vlprompt.documents import MOST_JSON, fitted, parse_json, read_text, unsealed
from vlprompt.errors import DataError, one_line
from vlprompt.training.evaluate import Evaluation

FORMAT_VERSION = 2
"""2 added a checksum; version 1, of before any release, is refused."""
FIGURES = "figures.json"
GROUPS = ("many", "medium", "few")

Percent = Annotated[float, Ge(0), Le(100 + 1e-9)]
Number = Annotated[float, Ge(0)]


class Measured(TypedDict, total=False):
    """What was measured on some images; where the method cannot be asked, there are none and no figures."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    data: Required[str]
    classes: Required[str]
    split: Required[str]
    n: Required[Annotated[int, Ge(0)]]
    code: str
    seconds: Number
    images_fingerprint: str
    accuracy: Percent
    macro_accuracy: Percent
    calibration_error: Number
    per_class: dict[str, Percent]
    confusion: list[tuple[int, int, int]]
    class_names: list[str]
    groups: dict[str, dict[str, Annotated[int | float, Ge(0)]]]


class Figures(TypedDict, total=False):
    """What ``figures.json`` holds, besides its checksum."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    format_version: Required[int]
    protocol: Required[str]
    data: Required[str]
    name: Required[str]
    method: Required[str]
    backbone: Required[str]
    shots: Required[int]
    seed: Required[int]
    settings: Required[str]
    code: Required[str]
    measured: Required[list[Measured]]
    epochs: int
    train_accuracy: Percent
    val_accuracy: Percent | None
    trainable_parameters: Annotated[int, Ge(0)]
    seconds: Number
    weights: dict[str, str]


def described(score: Evaluation, groups: bool) -> dict[str, Any]:
    """A measurement's figures as JSON values; with ``groups`` those of many, medium and few training images too."""
    figures = {**score.to_dict(), "macro_accuracy": score.macro_accuracy, "confusion": score.confusion}
    figures["class_names"] = figures.pop("classes")
    return figures | ({"groups": group_figures(score.confusion, len(score.classes))} if groups else {})


def group_figures(confusion: Sequence[Sequence[int]], n_classes: int) -> dict[str, dict[str, float]]:
    """Accuracy (percent) of the thirds of the class list, whose first class has most training images in a long tail.

    A group without images is left out.
    """
    seen, right = [0] * n_classes, [0] * n_classes
    for c, predicted, n in confusion:
        seen[c] += n
        right[c] += n * (c == predicted)
    figures = {}
    for g, group in enumerate(GROUPS):
        classes = [c for c in range(n_classes) if 3 * c // n_classes == g and seen[c]]
        if n := sum(seen[c] for c in classes):
            macro = 100 * sum(right[c] / seen[c] for c in classes) / len(classes)
            figures[group] = {"n": n, "accuracy": 100 * sum(right[c] for c in classes) / n, "macro_accuracy": macro}
    return figures


def read_figures(folder: Path) -> dict[str, Any] | None:
    """A run's figures; None if there are none yet. Raises DataError if they are not what was saved."""
    file = folder / FIGURES
    if not file.is_file():
        return None
    try:
        content = parse_json(read_text(file, MOST_JSON))
        version = content.get("format_version") if isinstance(content, dict) else None
        if version == FORMAT_VERSION:
            return cast("dict[str, Any]", fitted(Figures, unsealed(content)))
    except (KeyError, OSError, ValueError) as error:
        raise unreadable_error(file, error) from None
    known = isinstance(version, int) and version > FORMAT_VERSION
    advice = f"this vlprompt reads up to {FORMAT_VERSION}: update it" if known else "remove it, and repeat the bench"
    raise DataError(f"{file} has format_version {str(version)[:40]}; {advice}")


def unreadable_error(file: Path, error: Exception) -> DataError:
    return DataError(f"cannot read {file}: {f'it has no {error}' if isinstance(error, KeyError) else one_line(error)}")
