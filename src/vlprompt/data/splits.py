"""Which image belongs to which class and part: few-shot draws, base and novel classes, split files."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Literal

from vlprompt.errors import DataError, unknown

PARTS = ("train", "val", "test")
_VAL_SHOTS = 4  # CoOp's cap


@dataclass(frozen=True)
class Item:
    """One image."""

    path: str
    """Relative to the split's root, with forward slashes; the image's name in few-shot draws."""
    label: int
    """Index into the split's class names."""


@dataclass(frozen=True)
class Split:
    """A data set's images by part, with its class names (spaces, not underscores, between words)."""

    root: Path
    class_names: tuple[str, ...]
    train: tuple[Item, ...]
    val: tuple[Item, ...] = ()
    test: tuple[Item, ...] = ()

    def items(self, part: str) -> tuple[Item, ...]:
        """The images of "train", "val" or "test"."""
        if part not in PARTS:
            raise DataError(unknown("part", part, PARTS))
        return getattr(self, part)

    def paths(self, part: str) -> list[Path]:
        """Where the part's images lie, in the order of ``items``."""
        return [self.root / item.path for item in self.items(part)]

    def labels(self, part: str) -> list[int]:
        """The part's labels, in the order of ``items``."""
        return [item.label for item in self.items(part)]

    def few_shot(self, shots: int, seed: int) -> Split:
        """Cut train to ``shots`` images per class, and val to at most min(shots, 4), as CoOp does.

        The draw depends on the seed and the images' relative paths only: not on their order here, nor on any
        random state. For one seed, fewer shots are a subset of more. Items come sorted by label and path.
        Raises DataError if a class has too few training images (too few in val are all kept).
        """
        if shots < 1:
            raise DataError(f"shots must be at least 1, not {shots}")
        train, val = ranked_by_class(self.train, seed), ranked_by_class(self.val, seed)
        for label, name in enumerate(self.class_names):
            if (n := len(train.get(label, ()))) < shots:
                raise DataError(f"class '{name}' has {n} training images, too few for {shots} shots")
        return replace(
            self,
            train=in_order(item for group in train.values() for item in group[:shots]),
            val=in_order(item for group in val.values() for item in group[: min(shots, _VAL_SHOTS)]),
        )

    def subset(self, classes: Literal["base", "novel", "all"]) -> Split:
        """Keep the base classes (first half, rounded up), the novel ones, or all; labels restart from 0."""
        n, half = len(self.class_names), (len(self.class_names) + 1) // 2
        ranges = {"base": range(half), "novel": range(half, n), "all": range(n)}
        if classes not in ranges:
            raise DataError(unknown("classes", classes, ranges))
        kept = ranges[classes]
        if not kept:
            raise DataError(f"there are no {classes} classes among {n}")

        def relabelled(items: Iterable[Item]) -> tuple[Item, ...]:
            return tuple(Item(item.path, item.label - kept.start) for item in items if item.label in kept)

        names = self.class_names[kept.start : kept.stop]
        return Split(self.root, names, *(relabelled(self.items(part)) for part in PARTS))


def ranked_by_class(items: Iterable[Item], key: str | int) -> dict[int, list[Item]]:
    """Items by label; within one, in an order that the key and the relative paths alone decide (sha256)."""
    groups: defaultdict[int, list[Item]] = defaultdict(list)
    for item in items:
        groups[item.label].append(item)
    for group in groups.values():
        group.sort(key=lambda item: sha256(f"{key}:{item.path}".encode(errors="surrogateescape")).digest())
    return groups


def in_order(items: Iterable[Item]) -> tuple[Item, ...]:
    """Items sorted by label and path, so that equal sets are equal splits."""
    return tuple(sorted(items, key=lambda item: (item.label, item.path)))


def class_name(name: str) -> str:
    """A folder's or file's name for a class, as words: "sea_horse" is "sea horse"."""
    return name.replace("_", " ").strip()


def missing(what: str, path: Path) -> DataError:
    """The error for a file or folder that is not there, with the nearest name beside it."""
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, siblings, n=1, cutoff=0.5)
    return DataError(f"{what} {path} does not exist" + (f": did you mean '{near[0]}'?" if near else ""))


def read_split(file: str | os.PathLike[str], root: str | os.PathLike[str]) -> Split:
    """Read a split file in CoOp's format: ``{"train": [[path, label, class name], …], "val": …, "test": …}``.

    Paths are relative to ``root``; underscores in class names become spaces; a part may be missing. Raises
    DataError if the file cannot be read, or its labels are not 0 … C − 1 with one distinct name each.
    """
    file = Path(file)
    try:
        parts = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise missing("split file", file) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read split file {file}: {error}") from error
    if not isinstance(parts, dict) or not all(isinstance(parts.get(part, []), list) for part in PARTS):
        raise DataError(f"split file {file} must hold lists named {', '.join(PARTS)}")
    items: dict[str, tuple[Item, ...]] = {}
    names: dict[int, str] = {}
    for part in PARTS:
        for i, row in enumerate(rows := parts.get(part, [])):
            if not isinstance(row, list) or [type(value) for value in row] != [str, int, str]:
                where = f"split file {file}: {part}[{i}]"
                raise DataError(f"{where} is not [path, label, class name]: {str(row)[:80]}")
            name = class_name(row[2])
            if names.setdefault(row[1], name) != name:
                raise DataError(f"split file {file}: label {row[1]} is both '{names[row[1]]}' and '{name}'")
        items[part] = tuple(Item(path, label) for path, label, _ in rows)
    gap = next((label for label in range(len(names)) if label not in names), None)
    if gap is not None or not names:
        found = f"{gap} is missing" if names else "it lists no images"
        raise DataError(f"split file {file}: labels must be 0, 1, 2, … without gaps, but {found}")
    class_names = tuple(names[label] for label in range(len(names)))
    check_class_names(class_names, f"split file {file}")
    return Split(Path(root), class_names, **items)


def check_class_names(class_names: Sequence[str], source: str) -> None:
    """Raise DataError, naming the source, if a class has no name or another's."""
    for name, n in Counter(class_names).items():
        if not name:
            raise DataError(f"{source}: a class has no name")
        if n > 1:
            raise DataError(f"{source}: {n} classes are named '{name}'")


def write_split(split: Split, file: str | os.PathLike[str]) -> None:
    """Write a split file in CoOp's format, one image a line; a reader sees the old file or the whole new."""
    file = Path(file)
    parts = []
    for part in PARTS:
        rows = [[item.path, item.label, split.class_names[item.label]] for item in split.items(part)]
        parts.append(f'"{part}": [' + ",".join(f"\n{json.dumps(row)}" for row in rows) + "\n]")
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        unfinished.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
