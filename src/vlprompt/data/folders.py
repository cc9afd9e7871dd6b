"""Splits of one's own images: a folder of class folders, or a CSV file of paths and labels."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path

from vlprompt.data.splits import (
    PARTS,
    Item,
    Split,
    check_class_names,
    class_name,
    in_order,
    missing_error,
    ranked_by_class,
)
from vlprompt.errors import DataError, unknown

IMAGE_EXTENSIONS = (
    ".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
_PART_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def from_folder(root: str | os.PathLike[str]) -> Split:
    """Make a split of class folders, in alphabetical order; images may lie deeper inside them.

    Either ``train``, ``val`` (or ``valid``, ``validation``) and ``test`` stand above the class folders, and
    then train, if it is there, says which classes exist. Or the class folders stand alone: then the images of
    each class are ranked by a hash of their relative paths, and half of them (rounded up) are train, a fifth
    (rounded down) val, the rest test. Hidden files and files other than images are skipped. Raises DataError
    for a missing folder, fewer than two classes, or a class folder without images.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder") if root.exists() else missing_error("folder", root)
    folders = subfolders(root)
    parts = _parts(root, folders)
    every = [folder for classes in parts.values() for folder in classes] if parts else folders
    labels = _labels((folder.name for folder in parts.get("train", every)), f"folder {root}")
    for folder in every:
        if folder.name not in labels:
            raise DataError(f"{folder}: {unknown('class', folder.name, labels)}")

    def items(classes: Iterable[Path]) -> list[Item]:
        found = [(image, labels[folder.name]) for folder in classes for image in _images_of_class(folder)]
        return [Item(image.relative_to(root).as_posix(), label) for image, label in found]

    named = {part: items(classes) for part, classes in parts.items()} or _divided(items(folders))
    return _split(root, labels, named)


def from_csv(file: str | os.PathLike[str]) -> Split:
    """Make a split of a CSV file with a header: ``path,label`` or ``path,label,split``.

    Paths are relative to the CSV's folder, labels are class names (taken in alphabetical order), split is
    train, val or test; without that column the images are divided as in ``from_folder``. Raises DataError
    with the line that cannot be used.
    """
    file = Path(file)
    label_of: dict[str, str] = {}  # by path
    part_of: dict[str, str] = {}
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, restval="")
            columns = [name.strip().lower() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            for column in ("path", "label"):
                if column not in columns:
                    raise DataError(f"CSV file {file} has no column '{column}' (found: {', '.join(columns)})")
            for row in reader:
                where = f"CSV file {file}, line {reader.line_num}"
                path = _existing_path(row, file.parent, where)
                if path in label_of:
                    raise DataError(f"{where}: {path} is listed twice")
                label_of[path] = row["label"].strip()
                if "split" in columns:
                    part_of[path] = _part(row["split"], where)
    except FileNotFoundError:
        raise missing_error("CSV file", file) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read CSV file {file}: {error}") from error
    labels = _labels(label_of.values(), f"CSV file {file}")
    items = [Item(path, labels[label]) for path, label in label_of.items()]
    if not part_of:
        return _split(file.parent, labels, _divided(items))
    named = {part: [item for item in items if part_of[item.path] == part] for part in PARTS}
    return _split(file.parent, labels, named)


def _split(root: Path, labels: Iterable[str], items: dict[str, list[Item]]) -> Split:
    names = tuple(class_name(name) for name in labels)
    return Split(root, names, **{part: in_order(items.get(part, ())) for part in PARTS})


def _divided(items: Iterable[Item]) -> dict[str, list[Item]]:
    """Train, val and test, 50/20/30 % of each class: every class has train images, and test before val."""
    parts: dict[str, list[Item]] = {part: [] for part in PARTS}
    for ranked in ranked_by_class(items, "split").values():
        train, val = (len(ranked) + 1) // 2, len(ranked) // 5
        parts["train"] += ranked[:train]
        parts["val"] += ranked[train : train + val]
        parts["test"] += ranked[train + val :]
    return parts


def _labels(names: Iterable[str], source: str) -> dict[str, int]:
    labels = {name: label for label, name in enumerate(sorted(set(names)))}
    if len(labels) < 2:
        found = ", ".join(labels) or "none"
        raise DataError(f"{source}: at least two classes are needed (found: {found})")
    check_class_names(labels, source)
    return labels


def _parts(root: Path, folders: list[Path]) -> dict[str, list[Path]]:
    """The class folders of each part; empty if the folders are classes themselves."""
    parts: dict[str, list[Path]] = {}
    for folder in folders:
        part = _PART_NAMES.get(folder.name.lower())
        # A class may be called "train" too: its folder holds images, a part's holds class folders.
        if part and (classes := subfolders(folder)):
            if part in parts:
                raise DataError(f"{root} has two folders for '{part}'")
            parts[part] = classes
    return parts if "train" in parts or len(parts) == len(folders) else {}


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is no part of a data set."""
    return name.startswith(".") or name == "__MACOSX"


def subfolders(folder: Path) -> list[Path]:
    """The visible folders directly inside, in alphabetical order."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not hidden(path.name))


def image_files(folder: Path) -> list[Path]:
    """The visible files inside, at any depth, whose names say that they are images."""
    return [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_EXTENSIONS
        and not any(map(hidden, path.relative_to(folder).parts))
        and path.is_file()
    ]


def _images_of_class(folder: Path) -> list[Path]:
    images = image_files(folder)
    if not images:
        raise DataError(f"class folder {folder} holds no images ({', '.join(IMAGE_EXTENSIONS)})")
    return images


def _existing_path(row: dict[str, str], folder: Path, where: str) -> str:
    if None in row:
        raise DataError(f"{where}: more values than columns (quote a value that has a comma)")
    # Absolute paths too: an image's name must not change when the folder moves.
    path = Path(os.path.relpath(folder / row["path"].strip(), folder)).as_posix()
    if not (folder / path).is_file():
        raise missing_error(f"{where}: image", folder / path)
    return path


def _part(name: str, where: str) -> str:
    part = _PART_NAMES.get(name.strip().lower())
    if part is None:
        raise DataError(f"{where}: {unknown('split', name, PARTS)}")
    return part
