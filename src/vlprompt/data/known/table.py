"""The known data sets, from ``datasets.yaml``: where each lies, which split it has, and where it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from vlprompt.data.folders import from_folder
from vlprompt.data.known.domains import DOMAINS
from vlprompt.data.known.layouts import (
    CLASS_NAMES,
    class_folders,
    read_aircraft,
    read_imagenette,
    read_tiny_imagenet,
)
from vlprompt.data.splits import Split

DEFAULT_TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class Source:
    """A file on the network, and what of it goes where."""

    urls: tuple[str, ...]
    """The same file at several places; the first that answers is used."""
    moves: dict[str, str]
    """What is in the archive → its place below the data set's folder; of a file that is no archive: "" → its place."""
    checksum: str = ""
    """``md5:…`` or ``sha256:…``; empty where none is known."""
    inner: str = ""
    """An archive in the archive that holds what is moved."""
    file: str = ""
    """What it is called, where the URL does not say it."""

    @property
    def name(self) -> str:
        """What the downloaded file is called."""
        return self.file or self.urls[0].partition("?")[0].rpartition("/")[2]


@dataclass(frozen=True)
class Dataset:
    """A known data set: where it lies below the root, or how it is made."""

    name: str
    folder: str
    """Below the root."""
    images: str = ""
    """Below the folder; the split's paths start here."""
    split_file: str = ""
    """Below the folder: a file in CoOp's format."""
    template: str = DEFAULT_TEMPLATE
    """A class name in words; a method may bring its own."""
    make: Callable[[Path], Split] | None = None
    """For a data set that is made on this machine: writes the folder if it has to, and gives its split."""
    read: Callable[[Path, Path], Split] | None = None
    """For one without a split file: the split of (folder, images)."""
    title: str = ""
    """As papers print it; accepted as a name too."""
    domain_of: str = ""
    """The data set whose classes, or some of them, it shows in another look."""
    needs: tuple[str, ...] = ()
    """Files below the folder that ``read`` reads."""
    subfolders: tuple[str, ...] = ("",)
    """Below ``images``: the folders that must be there."""
    classes: int = 0
    """As published; 0 if that is not fixed."""
    sizes: tuple[int, int, int] = (0, 0, 0)
    """Train, val and test images, as published."""
    licence: str = ""
    homepage: str = ""
    sources: tuple[Source, ...] = field(default=(), repr=False)
    by_hand: str = ""
    """What has no public mirror, and how to get it."""

    @property
    def from_folders(self) -> bool:
        """Whether its split is what lies in class folders, and not a list that images can be missing from."""
        return CLASS_NAMES in self.needs


PHOTOGRAPHS = Path(__file__).parent / "clothing"
"""Photographs of ten kinds of clothes that come with the package."""


def _openmoji(folder: Path, domain: str | None = None) -> Split:
    from vlprompt.data.known.openmoji import make_openmoji

    return from_folder(make_openmoji(folder, domain))


READERS: dict[str, Callable[[Path, Path], Split]] = {
    "aircraft": read_aircraft,
    "class_folders": class_folders,
    "folders": lambda folder, images: from_folder(images),
    "imagenet": partial(class_folders, train="train", test="val"),
    "imagenette": read_imagenette,
    "tiny_imagenet": read_tiny_imagenet,
}
MAKERS: dict[str, Callable[[Path], Split]] = {
    "clothing": lambda folder: from_folder(PHOTOGRAPHS),
    "openmoji": _openmoji,
}
"""What ``read`` and ``make`` of ``datasets.yaml`` mean."""
_DRIVE = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"


def _source(
    url: str = "", mirror: str = "", drive: str = "", moves: dict[str, str] | None = None, **rest: str
) -> Source:
    """A file at one or two addresses, or of that key on Google Drive; one without ``moves`` is no archive."""
    urls = tuple(filter(None, (url, mirror))) or (_DRIVE.format(drive),)
    return Source(urls, moves or {"": rest["file"]}, **rest)


def _dataset(name: str, facts: dict[str, Any]) -> Dataset:
    lists: dict[str, Any] = {key: tuple(facts.pop(key)) for key in ("needs", "subfolders", "sizes") if key in facts}
    sources = tuple(_source(**source) for source in facts.pop("sources", ()))
    read, make = READERS.get(facts.pop("read", "")), MAKERS.get(facts.pop("make", ""))
    return Dataset(name, facts.pop("folder", name), read=read, make=make, sources=sources, **lists, **facts)


def _read_table() -> dict[str, Dataset]:
    content = yaml.safe_load(Path(__file__).with_name("datasets.yaml").read_text("utf-8"))
    known = {name: _dataset(name, facts) for name, facts in content.items()}
    drawn = known["openmoji"]
    for domain in DOMAINS:
        name = f"openmoji-{domain}"
        looks = partial(_openmoji, domain=domain)
        known[name] = replace(drawn, name=name, folder=name, title=name, domain_of="openmoji", make=looks)
    return known


DATASETS: dict[str, Dataset] = _read_table()


def find_dataset(name: str) -> Dataset | None:
    """The data set of that name or title; case, "-" and "_" do not matter."""
    return next((d for d in DATASETS.values() if _plain(name) in (_plain(d.name), _plain(d.title or d.name))), None)


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
