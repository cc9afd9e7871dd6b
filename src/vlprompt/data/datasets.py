"""The benchmarks as one table, and ``load_dataset`` for their names, folders and CSV files."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vlprompt.data.domains import DOMAINS
from vlprompt.data.folders import from_csv, from_folder
from vlprompt.data.splits import PARTS, Split, missing, read_split
from vlprompt.errors import DataError, unknown

DEFAULT_TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class Dataset:
    """Where a benchmark lies below the root (CoOp's layout), or how it is made."""

    name: str
    folder: str
    """Below the root."""
    images: str = ""
    """Below the folder; the split file's paths start here."""
    split_file: str = ""
    """Below the folder."""
    template: str = DEFAULT_TEMPLATE
    """A class name in words; a method may bring its own."""
    make: Callable[[Path], Split] | None = None
    """For a data set that is made on this machine: writes the folder if it has to, and gives its split."""


def _openmoji(folder: Path, domain: str | None = None) -> Split:
    from vlprompt.data.openmoji import make_openmoji

    return from_folder(make_openmoji(folder, domain))


def _made(name: str, domain: str | None = None) -> Dataset:
    return Dataset(name, name, template="a picture of a {}.", make=partial(_openmoji, domain=domain))


DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset("caltech101", "caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json"),
        Dataset("dtd", "dtd", "images", "split_zhou_DescribableTextures.json", "{} texture."),
        Dataset("eurosat", "eurosat", "2750", "split_zhou_EuroSAT.json", "a centered satellite photo of {}."),
        Dataset(
            "oxford_flowers", "oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json",
            "a photo of a {}, a type of flower.",
        ),
        Dataset(
            "oxford_pets", "oxford_pets", "images", "split_zhou_OxfordPets.json",
            "a photo of a {}, a type of pet.",
        ),
        Dataset("stanford_cars", "stanford_cars", "", "split_zhou_StanfordCars.json"),
        Dataset(
            "ucf101", "ucf101", "UCF-101-midframes", "split_zhou_UCF101.json",
            "a photo of a person doing {}.",
        ),
        _made("openmoji"),
        *(_made(f"openmoji-{domain}", domain) for domain in DOMAINS),
    )
}  # fmt: skip


@dataclass(frozen=True)
class LoadedDataset:
    """A data set ready to use."""

    name: str
    split: Split
    template: str
    """With ``{}`` where the class name goes."""


def load_dataset(
    data: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    split_file: str | os.PathLike[str] | None = None,
) -> LoadedDataset:
    """Load a benchmark of ``DATASETS`` (case, "-" and "_" do not matter), a folder, or a CSV file.

    A benchmark lies in its folder below ``root``; without ``root``, one made on this machine goes to the
    user's cache. A benchmark's name wins over a folder of that name: write ``./dtd`` for the folder.

    With ``split_file``, ``data`` says where the images lie (for a CSV, beside it) and the file says which of them are
    what: the ``split.json`` of a run, a split file in CoOp's format or a published few-shot list. It replaces the data
    set's own classes and parts, and its images must exist. A run's file holds the classes of that run only.

    Raises DataError for what does not exist, naming the path looked for or the nearest name.
    """
    data, file = os.fspath(data), None if split_file is None else Path(split_file).expanduser()
    for dataset in DATASETS.values():
        if _plain(dataset.name) == _plain(data):
            return LoadedDataset(dataset.name, _load_benchmark(dataset, root, file), dataset.template)
    path = Path(data).expanduser()
    if path.suffix.lower() == ".csv":
        if file and not path.is_file():
            raise missing("CSV file", path)
        return LoadedDataset(path.stem, _listed(file, path.parent) if file else from_csv(path), DEFAULT_TEMPLATE)
    if path.is_dir():
        return LoadedDataset(path.resolve().name, _listed(file, path) if file else from_folder(path), DEFAULT_TEMPLATE)
    if path.is_file() and path.suffix.lower() == ".json":
        raise DataError(f"{path} is no data set: give the images as DATA, and this file with --split-file")
    if path.is_file():
        reason = f"{path} is not a .csv file"
    elif _looks_like_path(data):
        reason = str(missing("folder", path))
    else:
        reason = unknown("data set", data.lower(), DATASETS)
    raise DataError(f"{reason}; a folder of class folders or a .csv file of path,label is accepted too")


def _looks_like_path(data: str) -> bool:
    return "/" in data or os.sep in data


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _listed(file: Path, images: Path) -> Split:
    split = read_split(file, images)
    for part in PARTS:
        if absent := [path for path in split.paths(part) if not path.is_file()]:
            more = f" ({len(absent)} of {len(split.paths(part))} {part} images)" if len(absent) > 1 else ""
            raise DataError(f"split file {file}: {missing('image', absent[0])}{more}")
    return split


def _load_benchmark(dataset: Dataset, root: str | os.PathLike[str] | None, file: Path | None) -> Split:
    if root is None and dataset.make is None:
        raise DataError(f"data set '{dataset.name}' needs --root, the folder that holds '{dataset.folder}'")
    folder = (_cache() if root is None else Path(root).expanduser()) / dataset.folder
    if dataset.make is not None:
        made = dataset.make(folder)
        return _listed(file, made.root) if file else made
    images, split_file = folder / dataset.images, folder / dataset.split_file
    for place in (folder, images):
        if not place.is_dir():
            raise missing(f"data set '{dataset.name}': folder", place)
    return _listed(file, images) if file else read_split(split_file, images)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlprompt"
