"""``load_dataset``: a known data set's name, a folder or a CSV file in, its split and template out."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vlprompt.data.files import LeftOut, image_files, missing_error, same_files
from vlprompt.data.folders import from_csv, from_folder
from vlprompt.data.known.table import DATASETS, DEFAULT_TEMPLATE, Dataset, find_dataset
from vlprompt.data.splits import PARTS, Classes, Item, Split, in_order, names_in_file, read_split
from vlprompt.errors import ConfigError, DataError, first_few, unknown


@dataclass(frozen=True)
class LoadedDataset:
    """A data set ready to use."""

    name: str
    split: Split
    template: str
    """With ``{}`` where the class name goes."""
    notes: tuple[str, ...] = ()
    """What its reader should know: files and folders left out, another folder of its name."""
    is_folder: bool = True
    """Whether the folder that it lies in is its own, as that of a CSV file is not."""
    own: bool = False
    """Whether it is the user's folder or CSV file, not a known data set."""

    @property
    def division(self) -> str:
        """How the images of a folder or CSV file that names no parts became train, val and test; empty otherwise."""
        if not (self.own and self.split.divided):
            return ""
        train, val, test = (len(self.split.items(part)) for part in PARTS)
        return (
            f"data set '{self.name}' names no train, val and test images: half of each class's are train, a fifth val, "
            f"the rest test, drawn by their names ({train}, {val} and {test})"
        )

    def gap(self, part: str, classes: Classes = "all") -> str:
        """A line about the classes without images in a part, where others have some, or about there being one class.

        Empty if there is nothing to say.
        """
        if self.split.unlabelled:
            return ""
        split = self.split.subset(classes)
        if len(split.class_names) == 1:
            return f"note: there is only one class, '{split.class_names[0]}': every answer is right"
        there = set(split.labels(part))
        names = [name for label, name in enumerate(split.class_names) if label not in there]
        if not there or not names:
            return ""
        of = f"{len(names)} of {len(split.class_names)} classes"
        return f"note: data set '{self.name}' has no {part} images of {of} ({first_few(names)})"


def load_dataset(
    data: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    split_file: str | os.PathLike[str] | None = None,
    class_names_file: str | os.PathLike[str] | None = None,
    *,
    least: int = 2,
) -> LoadedDataset:
    """Load a data set of ``DATASETS`` (by name or title; case, "-" and "_" do not matter), a folder, or a CSV file.

    A known data set lies in its folder below ``root``; without ``root``, one made on this machine goes to the
    user's cache. A known name wins over a folder of that name: write ``./dtd`` for the folder.

    With ``split_file``, ``data`` says where the images lie (for a CSV, beside it) and the file says which of them are
    what: the ``split.json`` of a run, a split file in CoOp's format or a published few-shot list. It replaces the data
    set's own classes and parts. A run's file holds the classes of that run only. One's own images are of at least
    ``least`` classes: of one alone only where a model knows others.

    With ``class_names_file``, ``data`` is a folder of images that nobody has labelled, and the file names the classes
    that they are of, one a line.

    Raises DataError for what does not exist, naming the path looked for or the nearest name: all images of a split must
    be there. A known data set's training and test images must be of the same classes, those of ``split_file`` too.
    """
    if class_names_file is not None:
        return _unlabelled(Path(os.path.expanduser(data)), Path(os.path.expanduser(class_names_file)), split_file)
    data, file = os.fspath(data), None if split_file is None else Path(os.path.expanduser(split_file))
    if dataset := find_dataset(data):
        if "{}" not in dataset.template:
            raise DataError(f"data set '{dataset.name}': template = {dataset.template} (allowed: text with {{}} in it)")
        here = f"for the folder of that name here write ./{data}" if os.path.isdir(data) else ""
        try:
            folder = known_folder(dataset, root)
        except DataError as error:
            raise DataError("; ".join(filter(None, [str(error), here]))) from None
        try:
            split, source = read_known(dataset, folder, file)
            if file or not dataset.from_folders:
                _complete(split, source)
        except DataError as error:
            if file or dataset.make:
                raise
            advice = here or f"see `vlprompt data check {dataset.name} --root {root}`"
            raise DataError(f"{error}; {advice}") from None
        both = here and Path(data).resolve() != folder.resolve()
        notes = [f"note: data set '{dataset.name}' of {folder} is used; {here}"] if both else []
        return LoadedDataset(dataset.name, split, dataset.template, tuple(notes))
    path, left_out = Path(os.path.expanduser(data)), LeftOut()
    if path.suffix.lower() == ".csv" and not os.path.isdir(path):
        if file and not os.path.isfile(path):
            raise missing_error("CSV file", path)
        split = _listed(file, path.parent) if file else from_csv(path, least)
        return LoadedDataset(path.stem, split, DEFAULT_TEMPLATE, is_folder=False, own=True)
    if os.path.isdir(path):
        split = _listed(file, path) if file else from_folder(path, left_out, least)
        return LoadedDataset(path.resolve().name, split, DEFAULT_TEMPLATE, left_out.notes(path), own=True)
    if os.path.isfile(path) and path.suffix.lower() == ".json":
        raise DataError(f"{path} is no data set: give the images as DATA, and this file with --split-file")
    if os.path.exists(path):
        reason = f"{path} is not a .csv file"
    elif _looks_like_path(data):
        reason = str(missing_error("folder", path))
    else:
        reason = unknown("data set", data.lower(), DATASETS)
    raise DataError(f"{reason}; a folder of class folders or a .csv file of path,label is accepted too")


def _unlabelled(folder: Path, file: Path, split_file: str | os.PathLike[str] | None) -> LoadedDataset:
    """All images in a folder, at any depth."""
    names, left_out = names_in_file(file), LeftOut()
    if split_file is not None:
        raise ConfigError(f"data.class_names_file = {file}: the split file {split_file} has labels")
    if not os.path.isdir(folder):
        raise missing_error("folder", folder)
    items = [Item(path.relative_to(folder).as_posix(), -1) for path in image_files(folder, left_out)]
    if not items:
        raise DataError(f"folder {folder} holds no images")
    split = Split(folder, names, in_order(items))
    return LoadedDataset(folder.resolve().name, split, DEFAULT_TEMPLATE, left_out.notes(folder))


def known_folder(dataset: Dataset, root: str | os.PathLike[str] | None) -> Path:
    """Where a known data set lies, or will; raises DataError if it needs a root."""
    if root is None and dataset.make is None:
        raise DataError(f"data set '{dataset.name}' needs --root, the folder that holds '{dataset.folder}'")
    return (_cache() if root is None else Path(root).expanduser()) / dataset.folder


def read_known(dataset: Dataset, folder: Path, file: Path | None = None) -> tuple[Split, str]:
    """A known data set's split, or that of ``file`` with its images, and what it was read from.

    It is not looked whether the images exist. Raises DataError for folders and lists that do not, and for training and
    test images of different classes.
    """
    source = f"data set '{dataset.name}'"
    if dataset.make is not None:
        split = dataset.make(folder)
        images = split.root
    else:
        images = folder / dataset.images
        for place in (folder, *(images / sub for sub in dataset.subfolders)):
            if not os.path.isdir(place):
                raise missing_error(f"{source}: folder", place)
        if dataset.read is None:
            file = file or folder / dataset.split_file
        elif file is None:
            split = dataset.read(folder, images)
    if file is not None:
        split, source = read_split(file, images), _named(file)
    _same_classes(split, source)
    return split, source


def check_outside(out: Path, dataset: LoadedDataset) -> None:
    """Raise ConfigError if an output is to lie where the data set's images are: it would be taken for one of them."""
    if any(os.path.isfile(place) for place in out.parents):
        return  # it cannot be made, which is told where it is
    if dataset.is_folder and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(dataset.split.root)):
        raise ConfigError(f"--out {out} is inside the data set {dataset.split.root}: choose a place outside it")


def in_two_parts(split: Split) -> list[str]:
    """Lines for images that are trained on and are val or test images too, by their content."""
    train, notes = split.paths("train"), []
    for part in PARTS[1:]:
        paths = split.paths(part)
        if same := same_files(paths, train):
            shown = first_few([os.path.relpath(path, split.root) for path in same])
            notes.append(f"note: {len(same)} of {len(paths)} {part} images are among the training images too: {shown}")
    return notes


def absent(split: Split) -> list[Path]:
    """Which of a split's images do not exist; each folder is listed once, which is fast on network drives too."""
    root, names = os.fspath(split.root), dict[str, set[str]]()
    gone: dict[str, None] = {}
    for part in PARTS:
        for item in split.items(part):
            folder, name = os.path.split(os.path.join(root, item.path))
            if folder not in names:
                names[folder] = _files(folder)
            if name not in names[folder]:
                gone[item.path] = None
    return [split.root / path for path in gone]


def _files(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except PermissionError as error:
        raise DataError(f"cannot read folder {folder}: {error.strerror}") from None
    except (OSError, ValueError):  # it is not there, or nothing can be of that name
        return set()


def _same_classes(split: Split, source: str) -> None:
    """Raise DataError if some classes are only trained on, or only tested."""
    train, test = set(split.labels("train")), set(split.labels("test"))
    if not (train and test) or train == test:
        return
    only = [
        f"{len(labels)} only in {part} ({first_few([split.class_names[label] for label in sorted(labels)])})"
        for part, labels in (("train", train - test), ("test", test - train))
        if labels
    ]
    raise DataError(f"{source}: train and test have different classes: {'; '.join(only)}")


def _complete(split: Split, source: str) -> Split:
    """The split, if all its images exist."""
    if gone := absent(split):
        if len(gone) == 1:
            raise missing_error(f"{source}: image", gone[0])
        n = sum(len(split.items(part)) for part in PARTS)
        shown = first_few([os.path.relpath(path, split.root) for path in gone])
        raise DataError(f"{source}: {len(gone)} of {n} images do not exist in {split.root}: {shown}")
    return split


def _listed(file: Path, images: Path) -> Split:
    return _complete(read_split(file, images), _named(file))


def _named(file: Path) -> str:
    return f"split file {file}"


def _looks_like_path(data: str) -> bool:
    return "/" in data or os.sep in data


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlprompt"
