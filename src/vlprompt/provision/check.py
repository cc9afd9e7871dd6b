"""A data set's folder compared with its split, and the commands that put right the usual mistakes of layout."""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from vlprompt.data.datasets import absent, known_folder, load_dataset, read_known
from vlprompt.data.folders import IMAGE_EXTENSIONS, hidden
from vlprompt.data.known.layouts import CLASS_NAMES
from vlprompt.data.known.table import DATASETS, Dataset, find_dataset
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import PARTS, Split, read_split
from vlprompt.errors import SHOWN, DataError

_DEPTH, _FOLDERS = 5, 5_000  # how far, and how much, is searched for what lies elsewhere
_CLASS_FOLDER = re.compile(r"n\d{8}|\d{1,3}")
_VALPREP = "https://raw.githubusercontent.com/soumith/imagenetloader.torch/master/valprep.sh"


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
    fixes: list[str] = field(default_factory=list)
    """Shell commands that put the layout right."""

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
        if self.fixes:
            lines += ["to put this right:", *(f"  {command}" for command in self.fixes)]
        return "\n".join(lines)


def check(
    data: str,
    root: Path | None,
    split_file: Path | None = None,
    decode: bool = True,
    progress: Callable[[int, int], object] = lambda done, of: None,
) -> Report:
    """Compare a data set's folder with its split (or that of ``split_file``): what is missing, unreadable, misplaced.

    ``decode`` reads every image; otherwise it is only looked whether the files exist. A known data set is
    compared with its published numbers of classes and images too. Raises DataError for a folder or a CSV file that
    cannot be loaded.
    """
    dataset = find_dataset(data)
    if dataset is None:
        loaded = load_dataset(data, root, split_file)
        report, split = Report(loaded.name, loaded.split.root), loaded.split
    else:
        folder = known_folder(dataset, root)
        report = Report(dataset.name, folder)
        if dataset.make is None:
            report.fixes = layout_fixes(dataset, folder.parent)
        try:
            split, _ = read_known(dataset, folder, split_file)
        except DataError as error:
            report.problems.append(str(error).removeprefix(f"data set '{dataset.name}': "))
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
    if decode:
        there = dict.fromkeys(path for part in PARTS for path in split.paths(part) if path not in gone)
        report.unreadable = _unreadable(list(there), progress)
    return report


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


# --- layout ---------------------------------------------------------------------------------------


def layout_fixes(dataset: Dataset, root: Path) -> list[str]:
    """Shell commands that move a data set's files from where they are found to where they should lie."""
    folder = root / dataset.folder
    if root.name == dataset.folder and not folder.is_dir():
        return [f"vlprompt data check {dataset.name} --root {quote(str(root.parent))}"]
    fixes: list[str] = []
    lacks = False

    def put(place: Path, candidates: Iterator[Path]) -> Path:
        """Have ``place`` moved there from the first candidate; returns where it is now."""
        nonlocal lacks, fixes
        found = next(candidates, None)
        lacks = lacks or found is None
        fixes += _move(found, place, list_files) if found else []
        return found or place

    lists, list_files = folder, list(filter(None, (dataset.split_file, *dataset.needs)))
    for name in list_files:
        if not (folder / name).is_file() and not (name == CLASS_NAMES and (root / "imagenet" / name).is_file()):
            near = [d for d in _folders(dataset, root) if name != CLASS_NAMES or folder in d.parents]  # many have one
            lists = put(folder / name, (d / name for d in near if (d / name).is_file())).parent
    for sub in dataset.subfolders:
        place, holds = folder / dataset.images / sub, _holds(dataset, folder, sub, _samples(dataset, lists, sub))
        if holds(place):
            continue
        if dataset.from_folders and (commands := _into_class_folders(place, dataset, root)):
            fixes += commands
        else:
            put(place, (d for d in _folders(dataset, root) if d not in (place, root) and holds(d)))
    fixes += [f"vlprompt data get {dataset.name} --root {quote(str(root))}"] if lacks else []
    return list(dict.fromkeys(fixes))  # each folder is made once


def _holds(dataset: Dataset, folder: Path, sub: str, samples: list[str]) -> Callable[[Path], bool]:
    """Whether a folder holds what should be in ``sub``, wherever it is."""
    place, alone = folder / dataset.images / sub, len(dataset.subfolders) == 1

    def holds(candidate: Path) -> bool:
        here = candidate == place
        if dataset.from_folders:
            named = here or candidate.name == place.name or (alone and folder in (candidate, *candidate.parents))
            return named and any(map(_CLASS_FOLDER.fullmatch, _names(candidate, folders=True)))
        if samples:
            return (here or alone or candidate.name == place.name) and any((candidate / s).is_file() for s in samples)
        return candidate.is_dir() and (here or (candidate.name == place.name and folder in candidate.parents))

    return holds


def _samples(dataset: Dataset, lists: Path, sub: str) -> list[str]:
    """Some of the split's images, relative to ``sub``; none if the split is nowhere, or in the names of folders."""
    if dataset.from_folders:
        return []
    try:
        split = dataset.read(lists, lists) if dataset.read else read_split(lists / dataset.split_file, lists)
    except DataError:
        return []
    start = f"{sub}/" if sub else ""
    paths = [item.path for part in PARTS for item in split.items(part) if item.path.startswith(start)]
    return [path.removeprefix(start) for path in paths[:: len(paths) // 20 + 1]]


def _into_class_folders(place: Path, dataset: Dataset, root: Path) -> list[str]:
    """For ImageNet as it is unpacked: archives of the classes, or all images in one folder."""
    names, there = _names(place, folders=False), quote(str(place))
    if any(name.endswith(".tar") for name in names):
        return [f'for f in {there}/*.tar; do mkdir "${{f%.tar}}" && tar -xf "$f" -C "${{f%.tar}}" && rm "$f"; done']
    if not any(map(_is_image, names)):
        return []
    for folder in _folders(dataset, root):
        if (table := folder / "LOC_val_solution.csv").is_file():
            to = f"{there}/${{box%% *}}"
            loop = f"while IFS=, read -r image box; do mkdir -p {to} && mv {there}/$image.JPEG {to}; done"
            return [f"tail -n +2 {quote(str(table))} | {loop}"]
    # The usual script is a list of moves: read as one, whatever else it may hold by now.
    moves = r"sed -nE 's|^mv (ILSVRC2012_val_[0-9]{8}[.]JPEG) (n[0-9]{8})/?$|\1 \2|p'"
    to = f"{there}/$class"
    loop = f"while read -r image class; do mkdir -p {to} && mv {there}/$image {to}; done"
    return [f"curl -fsSL {_VALPREP} | {moves} | {loop}"]


def _move(source: Path, target: Path, list_files: list[str]) -> list[str]:
    if source in target.parents:  # what belongs into the folder lies around it, beside the data set's lists
        there, stay = quote(str(target)), [target.relative_to(source).parts[0], *list_files]
        others = " ".join(f"! -name {quote(name)}" for name in stay)
        return [
            f"mkdir -p {there}",
            f"find {quote(str(source))} -mindepth 1 -maxdepth 1 {others} -exec mv {{}} {there} \\;",
        ]
    old = target.with_name(f"{target.name}.old")
    commands = [] if target.parent.is_dir() else [f"mkdir -p {quote(str(target.parent))}"]
    if target.exists():
        commands.append(f"mv {quote(str(target))} {quote(str(old))}")
        if target in source.parents:
            source = old / source.relative_to(target)
    return [*commands, f"mv {quote(str(source))} {quote(str(target))}"]


def _folders(dataset: Dataset, root: Path) -> Iterator[Path]:
    """The root and the folders below it, nearest first, but not those of other data sets, nor ImageNet's classes."""
    others = {root / d.folder for d in DATASETS.values()} - {root / dataset.folder}
    waiting = deque([(root, 0)])
    for _ in range(_FOLDERS):
        if not waiting:
            return
        folder, depth = waiting.popleft()
        yield folder
        if depth < _DEPTH:
            below = [n for n in _names(folder, folders=True) if not hidden(n) and not _CLASS_FOLDER.fullmatch(n)]
            waiting += [(folder / n, depth + 1) for n in below if folder / n not in others]


def _names(folder: Path, folders: bool) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() == folders)
    except OSError:
        return []


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)
