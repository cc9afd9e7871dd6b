"""Which images ``vlprompt evaluate`` measures, and among which classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from filecmp import cmp
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from vlprompt.config.schema import read_config
from vlprompt.data.datasets import LoadedDataset, load_dataset
from vlprompt.data.reading import ImageReader, readable
from vlprompt.data.splits import Classes, Item, Split, find_classes, read_split
from vlprompt.errors import DataError, first_few
from vlprompt.methods import Method
from vlprompt.training.attack import Attack, AttackedImages
from vlprompt.training.evaluate import Evaluation, EvaluationImages, evaluate, predict_logits, score

Say = Callable[[str], object]


@dataclass(frozen=True)
class Asked:
    """What ``vlprompt evaluate`` is asked to measure on."""

    data: str
    root: Path | None
    split_file: Path | None
    classes: Classes
    split: str | None
    among: Literal["model", "folder"] | None
    skip_bad: bool
    attack: Attack | None = None

    def dataset(self) -> LoadedDataset:
        """Its data set; raises DataError if there are no such images."""
        dataset = load_dataset(self.data, self.root, self.split_file, least=1)
        chosen = dataset.split.subset(self.classes)
        if self.split and not chosen.items(self.split):
            raise DataError(f"data set '{dataset.name}' has no {self.split} images")
        return dataset


@dataclass(frozen=True)
class Measured:
    """An evaluation, and what it was made of."""

    result: Evaluation
    paths: Sequence[Path]
    images: EvaluationImages
    """The same, with labels."""
    logits: Tensor
    """[n, C]"""
    asked: Asked
    split: str
    among: Literal["model", "folder"]
    class_names: tuple[str, ...]
    """Those of the images; they may be scored among more."""
    skipped: int
    robust: Evaluation | None = None
    """Under the attack that was asked for."""

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints: the evaluation with its metrics, and what it was made on."""
        figures = {**self.result.to_dict(), **self.result.metrics(), "confusion": self.result.confusion}
        if self.robust:
            figures |= {"attack": vars(self.asked.attack), "robust_accuracy": self.robust.accuracy}
        return {**figures, "split": self.split, "among": self.among, "skipped": self.skipped}


def measure(method: Method, run: Path, asked: Asked, dataset: LoadedDataset, reader: ImageReader, say: Say) -> Measured:
    """Score a tuned model, of the folder ``run``; raises DataError where it cannot be asked about these classes."""
    for note in dataset.notes:
        say(note)
    chosen = dataset.split.subset(asked.classes)
    among, names, position = _compared(method, asked, dataset, chosen.class_names, say)
    split, dataset, trained = _part(run, asked, dataset, say)
    chosen = dataset.split.subset(asked.classes)
    items = chosen.items(split)
    if not items:
        raise DataError(f"data set '{dataset.name}' has no {split} images")
    told = split != "all" and (among == "folder" or len(chosen.class_names) > 1)
    if told and (note := dataset.gap(split, asked.classes)):
        say(note)
    trained_on = sum(item.path in trained for item in items)
    if trained_on and (split != "train" or dataset.split.divided):  # of a part called train it goes without saying
        say(f"note: {run} was trained on {trained_on} of these {len(items)} images")
    if not dataset.own:
        method.take_template(dataset.template)
    paths = [chosen.root / item.path for item in items]
    kept = readable(paths, reader, asked.skip_bad, say)
    images = EvaluationImages([paths[i] for i in kept], [position[items[i].label] for i in kept], reader)
    logits = predict_logits(method, images, names)
    attacked = AttackedImages(images, asked.attack, names) if asked.attack else None
    robust = evaluate(method, attacked, names) if attacked else None
    return Measured(
        score(logits, images.labels, names), [paths[i] for i in kept], images, logits, asked, split, among,
        chosen.class_names, len(paths) - len(kept), robust,
    )  # fmt: skip


def _part(run: Path, asked: Asked, dataset: LoadedDataset, say: Say) -> tuple[str, LoadedDataset, set[str]]:
    """The part to measure on, of which data, and which of the user's own images were trained on.

    Says so where the data set does not name its parts itself.
    """
    trained = _images_trained_on(run, dataset.split) if dataset.own else set[str]()
    if not dataset.division:
        return asked.split or "test", dataset, trained
    test = _test_images(run, dataset.split, trained) if trained else dataset.split.test
    part = asked.split or ("test" if trained and test else "all")
    if part == "test" and test != dataset.split.test:
        say(f"{run} was trained on images of '{dataset.name}': its own test images are measured, those still there")
        return part, replace(dataset, split=replace(dataset.split, test=test)), trained
    if part == "test" and not asked.split:
        say(f"{run} was trained on images of '{dataset.name}': its test part is measured (--split all measures all)")
    if part == "all":
        say(f"data set '{dataset.name}' names no train, val and test images: all are measured")
    else:
        say(dataset.division)
    return part, dataset, trained


def _test_images(run: Path, split: Split, trained: set[str]) -> tuple[Item, ...]:
    """The run's own test images that are still there, and the drawn ones of classes that the run does not have.

    The draw of a folder that has changed since would take some that were trained on.
    """
    own = read_split(run / "split.json", split.root)
    paths, drawn = {item.path for item in own.test or split.test} - trained, set(split.test)
    place = find_classes(split.class_names, own.class_names)
    return tuple(
        item for item in split.items("all") if item.path in paths or (place[item.label] is None and item in drawn)
    )


def _images_trained_on(run: Path, split: Split) -> set[str]:
    """The images of a split that a run was trained on: by name and, where its data still lie there, content.

    Other folders may well have images of the same names. One image of the same name and content is enough: some may
    have been removed, renamed or moved to another class since.
    """
    if not (run / "split.json").is_file() or not (run / "config.yaml").is_file():
        return set()
    if read_config(run / "config.yaml").get("data.class_names_file"):
        return set()  # it was trained on a folder without labels, which is never measured
    trained = {item.path for item in read_split(run / "split.json", split.root).train}
    here = trained & {item.path for item in split.items("all")}
    data = Path(str(read_config(run / "config.yaml").get("data.name"))).expanduser()
    root = data if data.is_dir() else data.parent
    there = {path for path in trained if (root / path).is_file()}
    if not there:  # the data have moved: a few equal names may be chance, most of them hardly
        return here if 2 * len(here) > len(trained) else set()
    return {path for path in here & there if cmp(root / path, split.root / path, shallow=False)}


def _compared(
    method: Method, asked: Asked, dataset: LoadedDataset, names: tuple[str, ...], say: Say
) -> tuple[Literal["model", "folder"], tuple[str, ...], list[int]]:
    """Whose classes the images are scored among, the classes, and the place of each of ``names`` in them.

    The model's own, unless they lack some, or the data set or --classes says which classes are to be told apart, as in
    published protocols.
    """
    found = find_classes(names, method.class_names)
    strange = [name for name, c in zip(names, found, strict=True) if c is None]
    if not method.takes_new_classes:
        method.own_classes(names)  # they all are, or it says which is not
    if asked.among == "model" and strange:
        raise DataError(
            f"--among model: {len(strange)} of {len(names)} classes are none of the model's: {_few(strange)}"
        )
    if asked.among is None and strange and len(strange) < len(names):
        say(
            f"{len(strange)} of {len(names)} classes are none of the model's ({_few(strange)}): scored among those of "
            f"'{dataset.name}'"
        )
    protocol = not dataset.own or asked.classes != "all"
    if strange or asked.among == "folder" or (asked.among is None and protocol):
        if len(names) < 2 and asked.classes == "all":
            raise DataError(f"data set '{dataset.name}' has the class '{names[0]}' alone: nothing to tell it from")
        return "folder", names, list(range(len(names)))
    if len(names) < len(method.class_names):
        say(
            f"'{dataset.name}' has {len(names)} of the model's {len(method.class_names)} classes: scored among all of "
            "the model's (--among folder: among those alone)"
        )
    return "model", method.class_names, [c for c in found if c is not None]


def _few(names: Sequence[str]) -> str:
    return first_few([f"'{name}'" for name in names])
