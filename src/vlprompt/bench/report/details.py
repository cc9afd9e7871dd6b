"""What the run folders of a study hold beside its results: accuracy of each class, and which weights and images."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlprompt.bench.report.tables import Study
from vlprompt.bench.runs import FIGURES, read_figures

PerClass = dict[str, dict[str, dict[str, dict[str, float]]]]
"""Accuracy of each class: data set → row → seed → class."""


def read_runs(folder: Path, study: Study) -> dict[Path, dict[str, Any]]:
    """What the run folders of a study hold, by folder; none where they are not at hand."""
    places = [f"{study.protocol}/*/*/{study.backbone}/shots_{shots}/*/{FIGURES}" for shots in study.shots]
    return {file.parent: read_figures(file.parent) or {} for place in places for file in sorted(folder.glob(place))}


def per_class(runs: Mapping[Path, Mapping[str, Any]], study: Study) -> PerClass:
    """Accuracy of each class on the data set that was trained on; in few-shot, of the most shots."""
    found: PerClass = {}
    for folder, figures in runs.items():
        for measured in figures["measured"] if folder.parent.name == f"shots_{study.shots[-1]}" else ():
            if measured["data"] == figures["data"] and measured["split"] == study.split:
                seeds = found.setdefault(figures["data"], {}).setdefault(figures["name"], {})
                seeds.setdefault(folder.name, {}).update(measured.get("per_class", {}))
    return found


def unlike(runs: Iterable[Mapping[str, Any]], study: Study) -> list[str]:
    """Notes on weights and images that should be the same in runs of a study and are not."""
    found: dict[str, set[str]] = {}
    for figures in runs:
        weights = figures.get("weights", {})
        same = {"Weights of the backbone": weights.get("backbone")}
        same[f"Weights of the teacher of {figures['name']}"] = weights.get("teacher")
        for m in figures["measured"]:
            if m["split"] == study.split:
                same[f"{study.split.capitalize()} images of {m['data']}, {m['classes']} classes,"] = m.get(
                    "images_fingerprint"
                )
        for what, value in same.items():
            found.setdefault(what, set()).update([value] if value else [])
    return [f"{what} differ between runs." for what, values in found.items() if len(values) > 1]


def gains(own: Mapping[str, Mapping[str, float]], other: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Each class's gain in points, paired by seed: the mean over the seeds that both rows have it for."""
    found: dict[str, list[float]] = {}
    for seed, classes in own.items():
        for name, accuracy in classes.items():
            if name in other.get(seed, {}):
                found.setdefault(name, []).append(accuracy - other[seed][name])
    return {name: statistics.mean(values) for name, values in found.items()}
