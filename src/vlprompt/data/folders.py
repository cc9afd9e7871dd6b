"""Splits of one's own images: a folder of class folders, or a CSV file of paths and labels."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from vlprompt.data.files import (
    IMAGE_EXTENSIONS,
    LINKS,
    LeftOut,
    image_files,
    missing_error,
    read_text,
    subfolders,
    with_slashes,
)
from vlprompt.data.splits import (
    PARTS,
    Item,
    Split,
    check_class_names,
    class_name,
    in_order,
    ranked_by_class,
)
from vlprompt.errors import DataError, first_few, unknown

_PART_WORDS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_BESIDE = {"set", "data", "dataset", "image", "images", "img", "imgs", "photos", "pictures", "seg", "split", "files"}
"""Words that stand beside these in folders' names."""


def from_folder(root: str | os.PathLike[str], left_out: LeftOut | None = None, least: int = 2) -> Split:
    """Make a split of class folders, in alphabetical order; images may lie deeper inside them.

    Either folders of parts (``train``, ``val`` and ``test``, or the like: ``Training``, ``test_set``) stand above the
    class folders, and then train, if it is there, says which classes exist. Or the class folders stand alone: then the
    images of each class are ranked by a hash of their relative paths, and half of them (rounded up) are train, a fifth
    (rounded down) val, the rest test. Hidden files are skipped; ``left_out`` is told of others that are not read.
    Raises DataError for a missing folder, fewer than ``least`` classes, a class folder without images, and folders that
    seem to be no classes: some hold folders only (inside a part, more than one), or folders of the same names.
    """
    root, left_out = Path(root), LeftOut() if left_out is None else left_out
    if not os.path.isdir(root):
        raise DataError(f"{root} is not a folder") if os.path.exists(root) else missing_error("folder", root)
    folders = subfolders(root)
    parts = _parts(root, folders, left_out)
    every = [folder for classes in parts.values() for folder in classes] if parts else folders
    labels = _labels((folder.name for folder in parts.get("train", every)), f"folder {root}", least)
    if not parts:
        _check_classes(root, folders)
    for classes in parts.values():  # a class may have one folder of images there
        _check_classes(classes[0].parent, [folder for folder in classes if len(subfolders(folder)) > 1])
    for folder in every:
        if folder.name not in labels:
            raise DataError(f"{folder}: {unknown('class', folder.name, labels)}")
    for place in {root, *(folder.parent for folder in every)}:
        beside = LeftOut()
        if loose := image_files(place, beside, deep=False):
            left_out.files[f"images beside the folders of {place.name or place}"] += len(loose)
        left_out.files.update({kind: beside.files[kind] for kind in LINKS if beside.files[kind]})

    def items(classes: Iterable[Path]) -> list[Item]:
        found = [(image, labels[folder.name]) for folder in classes for image in _images_of_class(folder, left_out)]
        return [Item(image.relative_to(root).as_posix(), label) for image, label in found]

    named = {part: items(classes) for part, classes in parts.items()} or _divided(items(folders))
    return replace(_split(root, labels, named), divided=not parts)


def from_csv(file: str | os.PathLike[str], least: int = 2) -> Split:
    """Make a split of a CSV file with a header: ``path,label`` or ``path,label,split``.

    Paths are relative to the CSV's folder, labels are class names (taken in alphabetical order), split is
    train, val or test; without that column the images are divided as in ``from_folder``. Raises DataError
    with the line that cannot be used.
    """
    file = Path(file)
    label_of: dict[str, str] = {}  # by path
    part_of: dict[str, str] = {}
    try:
        reader = csv.DictReader(io.StringIO(read_text(file, "CSV file"), newline=""), restval="")
        columns = [name.strip().lower() for name in reader.fieldnames or ()]
        reader.fieldnames = columns
        _check_columns(columns, file)
        for row in reader:
            where = f"CSV file {file}, line {reader.line_num}"
            if not _filled(row, where):
                continue
            path = _existing_path(row["path"].strip(), file.parent, where)
            if path in label_of:
                raise DataError(f"{where}: {path} is listed twice")
            label_of[path] = row["label"].strip()
            if not class_name(label_of[path]):
                raise DataError(f"{where}: a class has no name: the label is '{label_of[path]}'")
            if "split" in columns:
                part_of[path] = _part(row["split"], where)
    except csv.Error as error:
        raise DataError(f"cannot read CSV file {file}: {error}") from error
    labels = _labels(label_of.values(), f"CSV file {file}", least)
    items = [Item(path, labels[label]) for path, label in label_of.items()]
    if not part_of:
        return replace(_split(file.parent, labels, _divided(items)), divided=True)
    named = {part: [item for item in items if part_of[item.path] == part] for part in PARTS}
    return _split(file.parent, labels, named)


def _check_columns(columns: list[str], file: Path) -> None:
    for column in ("path", "label"):
        if column not in columns:
            between = next((name for sign, name in _SIGNS.items() if any(sign in c for c in columns)), "")
            hint = f": columns are separated by commas, not by {between}" if between else ""
            found = ", ".join(columns).replace("\t", "<TAB>")
            raise DataError(f"CSV file {file} has no column '{column}' (found: {found}){hint}")
    for column in ("path", "label", "split"):
        if columns.count(column) > 1:
            raise DataError(f"CSV file {file} has {columns.count(column)} columns '{column}'")


_SIGNS = {";": "';'", "\t": "TAB", "|": "'|'"}


def _filled(row: dict, where: str) -> bool:
    """Whether a row has values: spreadsheets write rows of commas alone, and commas after the last value."""
    if any(value.strip() for value in row.pop(None, ())):
        raise DataError(f"{where}: more values than columns (quote a value that has a comma)")
    if any("\n" in value for value in row.values()):
        raise DataError(f"{where}: a value has several lines: is a quotation mark not closed?")
    return any(value.strip() for value in row.values())


def _split(root: Path, labels: Iterable[str], items: dict[str, list[Item]]) -> Split:
    names = tuple(class_name(name) for name in labels)
    return Split(root, names, *(in_order(items.get(part, ())) for part in PARTS))


def _divided(items: Iterable[Item]) -> dict[str, list[Item]]:
    """Train, val and test, 50/20/30 % of each class: every class has train images, and test before val."""
    parts: dict[str, list[Item]] = {part: [] for part in PARTS}
    for ranked in ranked_by_class(items, "split").values():
        train, val = (len(ranked) + 1) // 2, len(ranked) // 5
        parts["train"] += ranked[:train]
        parts["val"] += ranked[train : train + val]
        parts["test"] += ranked[train + val :]
    return parts


def _labels(names: Iterable[str], source: str, least: int) -> dict[str, int]:
    labels = {name: label for label, name in enumerate(sorted(set(names)))}
    if len(labels) < least:
        found = ", ".join(labels) or "none"
        raise DataError(
            f"{source}: at least {'two classes are' if least > 1 else 'one class is'} needed (found: {found})"
        )
    check_class_names(labels, source)
    return labels


def part_named(name: str) -> str | None:
    """The part that a folder or a column means by this name, in any case: ``Training``, ``test_set``, ``seg_train``."""
    words = [re.sub("(?<=.)(set|data|images)$", "", word) for word in re.findall(r"[^\W\d_]+", name.lower())]
    words = [word for word in words if word not in _BESIDE]
    return _PART_WORDS.get(words[0]) if len(words) == 1 else None


def _parts(root: Path, folders: list[Path], left_out: LeftOut) -> dict[str, list[Path]]:
    """The class folders of each part; empty if the folders are classes themselves."""
    parts: dict[str, list[Path]] = {}
    for folder in folders:
        part, classes = part_named(folder.name), subfolders(folder)
        # Some archives hold seg_train/seg_train/CLASS.
        while part and len(classes) == 1 and part_named(classes[0].name) == part:
            classes = subfolders(classes[0])
        # A class may be called "train" too: its folder holds images, a part's holds class folders.
        if part and classes:
            if part in parts:
                raise DataError(f"{root} has two folders for '{part}'")
            parts[part] = classes
        else:
            left_out.folders.append(folder.name)
    if "train" in parts or (parts and len(parts) == len(folders)):
        return parts
    left_out.folders.clear()
    return {}


def _check_classes(root: Path, folders: list[Path]) -> None:
    """Raise DataError if folders hold what seem to be the classes."""
    inside = {folder: [sub.name for sub in subfolders(folder)] for folder in folders}
    names = Counter(name for subs in inside.values() for name in subs)
    shared = [name for name, n in names.items() if n > 1]
    above = [folder.name for folder, subs in inside.items() if subs and not image_files(folder, deep=False)]
    if shared:
        above = [folder.name for folder, subs in inside.items() if shared[0] in subs]
    if above:
        subs = shared or inside[root / above[0]]
        what = f"{first_few(above)} all hold folders" if shared else f"{first_few(above)} hold folders only, as"
        raise DataError(
            f"folder {root}: are its folders classes? {what} {first_few(subs)}; folders of parts are called train, val "
            "and test, and a CSV file says of any images what they are"
        )


def _images_of_class(folder: Path, left_out: LeftOut) -> list[Path]:
    here = LeftOut()
    images = image_files(folder, here)
    if not images:
        others = f"; it has {here}" if here.files else ""
        raise DataError(f"class folder {folder} holds no images ({', '.join(IMAGE_EXTENSIONS)}){others}")
    left_out.files += here.files
    return images


def _existing_path(text: str, folder: Path, where: str) -> str:
    # Absolute paths too: an image's name must not change when the folder moves.
    path = Path(os.path.relpath(folder / with_slashes(text, folder), folder)).as_posix()
    if not os.path.isfile(folder / path):
        raise missing_error(f"{where}: image", folder / path) if text else DataError(f"{where}: the path is empty")
    return path


def _part(name: str, where: str) -> str:
    part = part_named(name)
    if part is None:
        raise DataError(f"{where}: {unknown('split', name, PARTS)}")
    return part
