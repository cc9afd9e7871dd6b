"""Splits of known data sets without a split file: read from official lists or from class folders, as CoOp does."""

from __future__ import annotations

import os
from pathlib import Path

from vlprompt.data.files import IMAGE_EXTENSIONS, hidden, read_text, subfolders
from vlprompt.data.folders import from_folder
from vlprompt.data.splits import PARTS, Item, Split, class_name, in_order, ranked_by_class
from vlprompt.errors import DataError, unknown

CLASS_NAMES = "classnames.txt"
"""ImageNet's classes, one a line: ``n01440764 tench``."""

IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


def read_aircraft(folder: Path, images: Path) -> Split:
    """FGVC-Aircraft's official parts (``images_variant_train.txt``, …), labels in the order of ``variants.txt``."""
    names = [name for _, name in _lines(folder / "variants.txt")]
    labels = {name: label for label, name in enumerate(names)}
    parts: dict[str, tuple[Item, ...]] = {}
    for part in PARTS:
        file, items = folder / f"images_variant_{part}.txt", []
        for number, line in _lines(file):
            image, _, name = line.partition(" ")
            if name not in labels:
                raise DataError(f"{file}, line {number}: variant '{name}' is not in variants.txt")
            items.append(Item(f"{image}.jpg", labels[name]))
        parts[part] = tuple(items)
    return Split(images, tuple(map(class_name, names)), *(parts[part] for part in PARTS))


def class_folders(folder: Path, images: Path, train: str | None = None, test: str = "") -> Split:
    """Class folders of ImageNet or a domain of it, below ``images/train`` and ``images/test``.

    They are named by WordNet ids, or by line numbers from 0 as in ImageNet-V2; ``classnames.txt`` says what they
    show (a domain without one uses that of ``imagenet`` beside it). Labels follow its order, and only the classes that
    are there count. ImageNet's val folder is the test part, so there is no val part that could select anything.
    """
    names = _names_of_ids(folder)
    ids = list(names)
    found: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for part, place in (("train", train), ("test", test)):
        if place is None:
            continue
        for sub in subfolders(images / place):
            number = int(sub.name) if sub.name.isdecimal() else None
            key = sub.name if number is None else ids[number] if number < len(ids) else ""
            if key not in names:
                raise DataError(f"{sub}: class '{sub.name}' is not in {CLASS_NAMES}")
            if paths := _image_names(sub):
                found[part][key] = [f"{place}/{sub.name}/{path}".lstrip("/") for path in paths]
        if not found[part]:
            raise DataError(f"{images / place} has no class folders with images")
    present = [key for key in ids if any(key in classes for classes in found.values())]
    parts = {
        part: tuple(Item(path, label) for label, key in enumerate(present) for path in classes.get(key, ()))
        for part, classes in found.items()
    }
    return Split(images, tuple(class_name(names[key]) for key in present), *(parts.get(part, ()) for part in PARTS))


def read_imagenette(folder: Path, images: Path) -> Split:
    """Imagenette as it is unpacked: class folders named by WordNet ids in ``train`` and ``val``.

    Val is the test part. There is no third part: a tenth of the training images of each class, by a hash of their
    names, is val. A copy with class folders in ``train``, ``val`` and ``test`` is read as it is.
    """
    if (images / "test").is_dir():
        return from_folder(images)
    labels = {key: label for label, key in enumerate(IMAGENETTE)}
    found: dict[str, list[Item]] = {"train": [], "val": []}
    for part, items in found.items():
        for sub in subfolders(images / part):
            if sub.name not in labels:
                raise DataError(f"{sub}: {unknown('class of Imagenette', sub.name, labels)}")
            items += [Item(f"{part}/{sub.name}/{name}", labels[sub.name]) for name in _image_names(sub)]
    return _without_val(images, tuple(IMAGENETTE.values()), found["train"], found["val"])


def read_tiny_imagenet(folder: Path, images: Path) -> Split:
    """Tiny-ImageNet as it is unpacked; its val part, which ``val_annotations.txt`` labels, is the test part.

    The published test images have no labels. A tenth of the training images of each class, by a hash of their names, is
    val. A class is called by the first of its names in ``words.txt``.
    """
    words = dict(line.split("\t", 1) for _, line in _lines(folder / "words.txt"))
    ids = sorted(line for _, line in _lines(folder / "wnids.txt"))
    for key in ids:
        if key not in words:
            raise DataError(f"{folder / 'words.txt'} does not name class '{key}' of wnids.txt")
    labels = {key: label for label, key in enumerate(ids)}
    train = [
        Item(f"train/{key}/images/{name}", label)
        for key, label in labels.items()
        if (images / "train" / key / "images").is_dir()
        for name in _image_names(images / "train" / key / "images")
    ]
    file, test = folder / "val" / "val_annotations.txt", []
    for number, line in _lines(file):
        name, key, *_ = [*line.split("\t"), ""]
        if key not in labels:
            raise DataError(f"{file}, line {number}: class '{key}' is not in wnids.txt")
        test.append(Item(f"val/images/{name}", labels[key]))
    return _without_val(images, tuple(words[key].split(",")[0].strip() for key in ids), train, test)


def _without_val(images: Path, names: tuple[str, ...], train: list[Item], test: list[Item]) -> Split:
    """A split whose val part is a tenth of each class's training images."""
    parts: dict[str, list[Item]] = {"train": [], "val": [], "test": test}
    for ranked in ranked_by_class(train, "val").values():
        parts["val"] += ranked[: len(ranked) // 10]
        parts["train"] += ranked[len(ranked) // 10 :]
    return Split(images, names, *(in_order(parts[part]) for part in PARTS))


def _names_of_ids(folder: Path) -> dict[str, str]:
    file = folder / CLASS_NAMES
    if not file.is_file() and (folder.parent / "imagenet" / CLASS_NAMES).is_file():
        file = folder.parent / "imagenet" / CLASS_NAMES
    names: dict[str, str] = {}
    for number, line in _lines(file):
        key, _, name = line.partition(" ")
        if not name or key in names:
            raise DataError(f"{file}, line {number}: " + (f"{key} comes twice" if name else "there is no class name"))
        names[key] = name
    return names


def _image_names(folder: Path) -> list[str]:
    # Not Path.is_file for each of a million images: the listing knows the names already.
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    return sorted(n for n in names if n.lower().endswith(IMAGE_EXTENSIONS) and not hidden(n))


def _lines(file: Path) -> list[tuple[int, str]]:
    lines = read_text(file, "file").splitlines()
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
