"""A data set's folder compared with its split: what is missing, unreadable or not as published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from vlprompt.data.datasets import absent, in_two_parts, known_folder, load_dataset, read_known
from vlprompt.data.known.table import Dataset, find_dataset
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import PARTS, Split
from vlprompt.errors import SHOWN, DataError

HELP = "docs/datasets.md, section 'Wrong layouts', has the commands that mend the usual mistakes"


@dataclass
class Report:
    """What was found."""

    name: str
    folder: Path
    images: dict[str, int] = field(default_factory=dict)
    """By part."""
    classes: list[dict[str, Any]] = field(default_factory=list)
    """Of each class its name and its images by part."""
    missing: list[str] = field(default_factory=list)
    """Images of the split that do not exist."""
    unreadable: list[str] = field(default_factory=list)
    """Images that cannot be read, with the reason."""
    problems: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    """Where files do not lie as they should: what to do."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and what is in two parts."""

    @property
    def fault(self) -> str:
        """All that is wrong, in one line; empty if nothing is."""
        n = sum(self.images.values())
        found = [f"{len(self.missing)} of {n} images are missing"] if self.missing else []
        found += [f"{len(self.unreadable)} of {n} images cannot be read"] if self.unreadable else []
        return "; ".join([*self.problems, *found])

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``; of missing and unreadable images the count and the first five."""
        few = {
            key: {"count": len(found), "first": found[:SHOWN]}
            for key, found in (("missing", self.missing), ("unreadable", self.unreadable))
        }
        return {**asdict(self), "folder": str(self.folder), **few, "ok": not self.fault}

    def __str__(self) -> str:
        parts = ", ".join(f"{self.images[part]} {part}" for part in PARTS if part in self.images)
        lines = [f"{self.name} in {self.folder}" + (f": {len(self.classes)} classes; images: {parts}" if parts else "")]
        width = max((len(row["class"]) for row in self.classes), default=0)
        for row in self.classes:
            lines.append("  ".join([row["class"].ljust(width), *(f"{row[part]:6} {part}" for part in self.images)]))
        for what, found in (("missing", self.missing), ("unreadable", self.unreadable)):
            if found:
                lines += [f"{len(found)} {what}:", *(f"  {line}" for line in found[:SHOWN])]
                lines += [f"  … and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        return "\n".join([*lines, *self.notes, *self.advice])


def check(
    data: str,
    root: Path | None,
    split_file: Path | None = None,
    decode: bool = True,
    progress: Callable[[int, int], object] = lambda done, of: None,
) -> Report:
    """Compare a data set's folder with its split (or that of ``split_file``).

    ``decode`` reads every image; otherwise it is only looked whether the files exist. A known data set is
    compared with its published numbers of classes and images too. Raises DataError for a folder or a CSV file that
    cannot be loaded.
    """
    dataset = find_dataset(data)
    if dataset is None:
        loaded = load_dataset(data, root, split_file)
        report, split = Report(loaded.name, loaded.split.root), loaded.split
        report.notes = [*loaded.notes, *in_two_parts(split)]
    else:
        folder = known_folder(dataset, root)
        report = Report(dataset.name, folder)
        try:
            split, _ = read_known(dataset, folder, split_file)
        except DataError as error:
            report.problems.append(str(error).removeprefix(f"data set '{dataset.name}': "))
            report.advice = _advice(dataset, folder)
            return report
    _count(report, split)
    if dataset and not split_file:
        published = dict(zip(PARTS, dataset.sizes, strict=True)) | {"classes": dataset.classes}
        found = {part: len(split.items(part)) for part in PARTS} | {"classes": len(split.class_names)}
        report.problems += [
            f"{found[key]} {key if key == 'classes' else f'{key} images'} instead of the published {n}"
            for key, n in published.items()
            if dataset.classes and found[key] != n
        ]
    gone = dict.fromkeys(absent(split))
    report.missing = [str(path) for path in gone]
    if dataset and gone:
        report.advice = _advice(dataset, report.folder)
    if decode:
        there = dict.fromkeys(path for part in PARTS for path in split.paths(part) if path not in gone)
        report.unreadable = _unreadable(list(there), progress)
    return report


def _advice(dataset: Dataset, folder: Path) -> list[str]:
    """What to do where files are missing, or lie elsewhere than they should."""
    if dataset.make is not None:
        return []
    root, command = folder.parent, f"vlprompt data {{}} {dataset.name} --root "
    if root.name == dataset.folder and not folder.is_dir():
        right = command.format("check") + quote(str(root.parent))
        return [f"--root {root} is the folder of the data set itself: {right}"]
    return [f"to fetch what is not there: {command.format('get')}{quote(str(root))}", HELP]


def _count(report: Report, split: Split) -> None:
    counts = {part: Counter(split.labels(part)) for part in PARTS if split.items(part)}
    report.images = {part: counter.total() for part, counter in counts.items()}
    report.classes = [
        {"class": name, **{part: counter[label] for part, counter in counts.items()}}
        for label, name in enumerate(split.class_names)
    ]


def _unreadable(paths: list[Path], progress: Callable[[int, int], object]) -> list[str]:
    found: list[str] = []
    with ImageReader(room=0) as reader:
        for i in range(0, len(paths), 256):
            found += reader.unreadable(paths[i : i + 256]).values()
            progress(min(i + 256, len(paths)), len(paths))
    return found
