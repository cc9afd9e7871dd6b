"""Which image belongs to which class and part: few-shot draws, base and novel classes, split files."""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from vlprompt.data.files import read_text, with_slashes
from vlprompt.documents import parse_json
from vlprompt.errors import DataError, unknown
from vlprompt.files import write_atomically

Classes = Literal["base", "novel", "all"]
"""The first half of the classes (rounded up), the second half, or all."""

PARTS = ("train", "val", "test")
MOST_CLASSES = 50_000
"""Class names that a model is asked with; ImageNet-21k has 21,841."""
_VAL_SHOTS = 4  # CoOp's cap


@dataclass(frozen=True)
class Item:
    """One image."""

    path: str
    """Relative to the split's root, with forward slashes; the image's name in few-shot draws."""
    label: int
    """Index into the split's class names; −1 where nobody has labelled it."""


@dataclass(frozen=True)
class Split:
    """A data set's images by part, with its class names (spaces, not underscores, between words)."""

    root: Path
    class_names: tuple[str, ...]
    train: tuple[Item, ...]
    val: tuple[Item, ...] = ()
    test: tuple[Item, ...] = ()
    divided: bool = field(default=False, compare=False, kw_only=True)
    """Whether its parts were drawn here, from images that lay together."""

    def items(self, part: str) -> tuple[Item, ...]:
        """The images of "train", "val" or "test", or of "all" three."""
        if part == "all":
            return in_order(self.train + self.val + self.test)
        if part not in PARTS:
            raise DataError(unknown("part", part, PARTS))
        return getattr(self, part)

    def paths(self, part: str) -> list[Path]:
        """Where the part's images lie, in the order of ``items``."""
        return [self.root / item.path for item in self.items(part)]

    def labels(self, part: str) -> list[int]:
        """The part's labels, in the order of ``items``."""
        return [item.label for item in self.items(part)]

    @property
    def unlabelled(self) -> bool:
        """Whether nothing says which class an image belongs to."""
        return any(item.label < 0 for item in self.train)

    def without(self, paths: Collection[Path]) -> Split:
        """Leave out the images that lie at these paths, from every part."""
        if not paths:
            return self
        kept = (tuple(i for i in self.items(part) if self.root / i.path not in paths) for part in PARTS)
        return Split(self.root, self.class_names, *kept)

    def with_val(self, fraction: float) -> Split:
        """Move this share of each class's training images (rounded down) to val, which must be empty.

        The images' relative paths alone decide which: every seed and number of shots leaves the same ones to train.
        """
        if not 0 <= fraction < 1:
            raise DataError(f"val fraction = {fraction} (allowed: at least 0, less than 1)")
        if self.val:
            raise DataError("there is a val split already")
        train, val = [], []
        for ranked in ranked_by_class(self.train, "val").values():
            n = int(len(ranked) * fraction + 1e-9)  # 0.29 of 100 is 28.999…
            val += ranked[:n]
            train += ranked[n:]
        return replace(self, train=in_order(train), val=in_order(val))

    def few_shot(self, shots: int, seed: int, allow_fewer: bool = False, imbalance: float = 1.0) -> Split:
        """Cut train to ``shots`` images per class, and val to at most min(shots, 4), as CoOp does.

        ``imbalance`` > 1 leaves the later of C classes fewer (:func:`long_tail`): the last one shots / imbalance.
        The draw depends on the seed and the images' relative paths only: not on their order here, nor on any
        random state. For one seed, fewer shots are a subset of more. Items come sorted by label and path.
        Raises DataError if a class has too few training images, unless ``allow_fewer`` keeps what there is (but
        one at least); too few in val are all kept.
        """
        if shots < 1:
            raise DataError(f"shots must be at least 1, not {shots}")
        wanted = long_tail(shots, len(self.class_names), imbalance)
        train, val = ranked_by_class(self.train, seed), ranked_by_class(self.val, seed)
        counts = [len(train.get(label, ())) for label in range(len(self.class_names))]
        if short := [label for label, n in enumerate(counts) if n < (1 if allow_fewer else wanted[label])]:
            name, more = self.class_names[short[0]], len(short) - 1
            others = f" (and {more} more class{'es' if more > 1 else ''})" if more else ""
            hint = "" if allow_fewer else "; --allow-fewer uses what there is"
            n, needed = counts[short[0]], wanted[short[0]]
            raise DataError(f"class '{name}' has {n} training images, too few for {needed} shots{others}{hint}")
        return replace(
            self,
            train=in_order(item for label, group in train.items() for item in group[: wanted[label]]),
            val=in_order(item for group in val.values() for item in group[: min(shots, _VAL_SHOTS)]),
        )

    def long_tailed(self, seed: int, imbalance: float) -> Split:
        """Cut train to a :func:`long_tail` as DroPLe's code does, from all images of the class that has most.

        Classes are ranked by how many images they have (equal ones in their own order), and keep all where they have
        fewer than their rank gives. Which ones depends on seed and paths alone, as in :meth:`few_shot`.
        """
        train = ranked_by_class(self.train, seed)
        ranks = sorted(train, key=lambda label: (-len(train[label]), label))
        wanted = long_tail(len(train[ranks[0]]), len(ranks), imbalance)
        kept = (train[label][:n] for label, n in zip(ranks, wanted, strict=True))
        return replace(self, train=in_order(item for group in kept for item in group))

    def subset(self, classes: Classes) -> Split:
        """Keep the base classes (first half, rounded up), the novel ones, or all; labels restart from 0."""
        n, half = len(self.class_names), (len(self.class_names) + 1) // 2
        ranges = {"base": range(half), "novel": range(half, n), "all": range(n)}
        if classes not in ranges:
            raise DataError(unknown("classes", classes, ranges))
        if not ranges[classes]:
            raise DataError(f"there are no {classes} classes among {n}")
        return self.only(ranges[classes])

    def only(self, labels: Sequence[int]) -> Split:
        """Keep these classes, in this order; labels restart from 0."""
        place = {label: c for c, label in enumerate(labels)}

        def relabelled(items: Iterable[Item]) -> tuple[Item, ...]:
            return tuple(Item(item.path, place[item.label]) for item in items if item.label in place)

        names = tuple(self.class_names[label] for label in labels)
        return Split(self.root, names, *(relabelled(self.items(part)) for part in PARTS))

    def of_task(self, task: str, seed: int, seen: bool = False) -> Split:
        """Keep the classes of task "t/T", or those ``seen`` by then: of the tasks before it too, in order of arrival.

        Classes arrive in an order that seed and names alone decide (sha256), in T groups as equal as can be. Raises
        DataError where there are more tasks than classes.
        """
        t, n = map(int, task.split("/"))
        names = self.class_names
        if n > len(names):
            raise DataError(f"{n} tasks of {len(names)} classes: each needs one at least (allowed: 2 to {len(names)})")
        order = sorted(range(len(names)), key=lambda c: sha256(f"{seed}:{names[c]}".encode()).digest())
        first, end = (place * len(names) // n for place in (0 if seen else t - 1, t))
        return self.only(order[first:end])


def long_tail(n_max: int, classes: int, ratio: float) -> list[int]:
    """Images of each class, the most frequent first: n_c = ⌈n_max · ratio^(−c / (C − 1))⌉ (exponential profile).

    Raises DataError for a ratio below 1.
    """
    if not ratio >= 1:
        raise DataError(f"imbalance = {ratio:g} (allowed: at least 1, images of the first class to those of the last)")
    steps = max(classes - 1, 1)
    # The power is a hair above whole numbers that it should equal (100 · 10⁻¹ is 10.000000000000002).
    return [max(math.ceil(n_max * ratio ** (-c / steps) - 1e-9), 1) for c in range(classes)]


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


def read_split(file: str | os.PathLike[str], root: str | os.PathLike[str]) -> Split:
    """Read a split file in CoOp's format: ``{"train": [[path, label, class name], …], "val": …, "test": …}``.

    Published few-shot lists are read too: ``{"train": {"data": [{"impath": …, "label": …, "classname": …}, …]}}``.
    Their paths begin with the folders of whoever made them: those that are not found below ``root`` are dropped.
    Otherwise paths are relative to ``root``. Underscores in class names become spaces; a part may be missing. Classes
    are told apart by label, so that two may have one name, as in ImageNet. Raises DataError if the file cannot be read,
    or its labels are not 0 … C − 1 with one name each.
    """
    file, root = Path(file), Path(root)
    text = read_text(file, "split file")
    try:
        parts = parse_json(text)
    except ValueError as error:
        advice = "; paths are written with /" if "\\escape" in str(error) else ""
        raise DataError(f"cannot read split file {file}: {error}{advice}") from error
    rows = {part: _rows(parts.get(part, [])) for part in PARTS} if isinstance(parts, dict) else {}
    if not rows or not all(isinstance(part, list) for part in rows.values()):
        raise DataError(f"split file {file} must hold lists named {', '.join(PARTS)}")
    items: dict[str, tuple[Item, ...]] = {}
    names: dict[int, str] = {}
    for part in PARTS:
        for i, row in enumerate(rows[part]):
            if not isinstance(row, list) or [type(value) for value in row] != [str, int, str]:
                where = f"split file {file}: {part}[{i}]"
                raise DataError(f"{where} is not [path, label, class name]: {str(row)[:80]}")
            name = class_name(row[2])
            if not name:
                raise DataError(f"split file {file}: {part}[{i}]: label {row[1]} has no class name")
            if wrong := _unwritable(name):
                raise DataError(f"split file {file}: {part}[{i}]: {wrong}")
            if names.setdefault(row[1], name) != name:
                raise DataError(f"split file {file}: label {row[1]} is both '{names[row[1]]}' and '{name}'")
        items[part] = tuple(Item(with_slashes(path, root), label) for path, label, _ in rows[part])
    gap = next((label for label in range(len(names)) if label not in names), None)
    if gap is not None or not names:
        found = f"{gap} is missing" if names else "it lists no images"
        raise DataError(f"split file {file}: labels must be 0, 1, 2, … without gaps, but {found}")
    if any(isinstance(part, dict) for part in parts.values()):
        items = _without_prefix(items, file, root)
    return Split(root, tuple(names[label] for label in range(len(names))), *(items[part] for part in PARTS))


def _rows(part: Any) -> Any:
    """The rows of a part in CoOp's form; what is neither form stays as it is."""
    if not isinstance(part, dict):
        return part
    keys, data = ("impath", "label", "classname"), part.get("data")
    if not isinstance(data, list):
        return part
    return [[row.get(key) for key in keys] if isinstance(row, dict) else row for row in data]


def _without_prefix(items: dict[str, tuple[Item, ...]], file: Path, root: Path) -> dict[str, tuple[Item, ...]]:
    first = next(item.path for part in items.values() for item in part)
    folders = PurePosixPath(first).parts
    n = next((n for n in range(len(folders)) if os.path.isfile(root.joinpath(*folders[n:]))), None)
    if n is None:
        raise DataError(f"split file {file}: {first} is not below {root}")

    def shortened(item: Item) -> Item:
        parts = PurePosixPath(item.path).parts
        if parts[:n] != folders[:n]:
            raise DataError(f"split file {file}: {item.path} does not begin like {first}")
        return Item(str(PurePosixPath(*parts[n:])), item.label)

    return {part: tuple(map(shortened, rows)) for part, rows in items.items()}


def names_in_file(file: Path) -> tuple[str, ...]:
    """The class names of a file, one a line; raises DataError if it cannot be read, or for bad names."""
    if not os.path.exists(file):
        raise DataError(f"cannot read class names from {file}: it does not exist")
    text = read_text(file, "class names from")
    refuse_json(text, f"class names file {file}", "one a line")
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not names:
        raise DataError(f"class names file {file}: there are no class names")
    if len(names) == 1:
        raise DataError(f"class names file {file}: there is only one class, '{names[0]}': write one a line")
    check_class_names(names, f"class names file {file}")
    return names


def refuse_json(text: str, source: str, how: str) -> None:
    """Raise DataError for a list or an object in JSON, which would be read as names; ``how`` they are written."""
    with suppress(ValueError, RecursionError):
        if isinstance(json.loads(text), (list, dict)):
            raise DataError(f"{source}: class names are written {how}, not as JSON")


def check_class_names(class_names: Iterable[str], source: str) -> None:
    """Raise DataError, naming the source, if a class has no name, or one that reads like another's; for too many names.

    Names that differ only in case, underscores, white space or the way that accents are stored are the same text for a
    text tower, which could never tell their classes apart.
    """
    seen: dict[str, str] = {}
    class_names = list(class_names)
    if len(class_names) > MOST_CLASSES:
        raise DataError(f"{source}: {len(class_names)} class names (allowed: up to {MOST_CLASSES:,})")
    for name, n in Counter(class_names).items():
        if wrong := _unwritable(name):
            raise DataError(f"{source}: {wrong}")
        if n > 1 and name:
            raise DataError(f"{source}: {n} classes are named '{name}'")
        key = folded(name)
        if not key:
            raise DataError(f"{source}: a class has no name" + (f" but '{name}'" if name else ""))
        if key in seen:
            raise DataError(f"{source}: classes '{seen[key]}' and '{name}' have the same name for a text tower")
        seen[key] = name


@lru_cache(1 << 16)  # training with descriptions asks for the same names at every step
def folded(name: str) -> str:
    """A class name without what two spellings of it may differ in: case, underscores, white space, stored accents."""
    return " ".join(unicodedata.normalize("NFC", class_name(name)).casefold().split())


def find_classes(names: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """Which of the ``known`` classes each name is, up to what :func:`folded` leaves out; None for those that are none.

    Names that several classes share, which only split files allow, are found where both lists are the same.
    """
    if tuple(names) == tuple(known):
        return list(range(len(known)))
    here, there = Counter(map(folded, names)), Counter(map(folded, known))
    position = {key: c for c, key in enumerate(map(folded, known)) if there[key] == 1}
    return [position.get(key) if here[key] == 1 else None for key in map(folded, names)]


def _unwritable(name: str) -> str:
    """What is wrong with a name that is no text, as a folder's is that was named in another encoding; often nothing."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return f"class name '{name.encode('utf-8', 'backslashreplace').decode()}' is not UTF-8 text: rename it"
    return ""


def repeated(class_names: Sequence[str]) -> list[str]:
    """The names that several classes have, which only split files allow."""
    return [name for name in dict.fromkeys(class_names) if class_names.count(name) > 1]


def write_split(split: Split, file: str | os.PathLike[str]) -> None:
    """Write a split file in CoOp's format, one image a line; a reader sees the old file or the whole new."""
    write_atomically(Path(file), split_text(split))


def split_text(split: Split) -> str:
    """What :func:`write_split` writes; of unlabelled images their names, and those of the classes."""
    if split.unlabelled:
        content = {"class_names": split.class_names, "unlabelled": [item.path for item in split.train]}
        return json.dumps(content, indent=1) + "\n"
    parts = []
    for part in PARTS:
        rows = [[item.path, item.label, split.class_names[item.label]] for item in split.items(part)]
        parts.append(f'"{part}": [' + ",".join(f"\n{json.dumps(row)}" for row in rows) + "\n]")
    return "{" + ",\n".join(parts) + "}\n"
