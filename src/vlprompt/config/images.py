"""Which images a run uses: its classes, its shots, and none that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from vlprompt.config.schema import DataConfig
from vlprompt.data.datasets import LoadedDataset, in_two_parts
from vlprompt.data.images import ImageSource
from vlprompt.data.known.table import find_dataset
from vlprompt.data.reading import ImageReader, name_skipped, unusable_error
from vlprompt.data.splits import PARTS, Split, repeated
from vlprompt.errors import ConfigError, DataError, first_few


class Choice(Protocol):
    """What decides the images: of a run's configuration, or a bank's."""

    @property
    def data(self) -> DataConfig:
        """Which images of which classes."""

    @property
    def seed(self) -> int:
        """Which few."""


def run_split(config: Choice, dataset: LoadedDataset, unreadable: Collection[Path] = ()) -> Split:
    """The images that a run trains and validates on.

    In this order: its classes, those of its task, its val images where the data set has none, the images that cannot be
    read taken out, its shots. So a val image is one for every seed and number of shots, and an unreadable image makes
    room for the next that the seed would have drawn. Raises DataError if a class has no training images, or too few.
    """
    data = config.data
    if dataset.split.unlabelled:
        default = DataConfig()
        for key in ("classes", "task", "shots", "imbalance", "val_fraction"):
            if (value := getattr(data, key)) != getattr(default, key):
                raise ConfigError(f"data.{key} = {value}: images without labels (data.class_names_file) are all used")
        return dataset.split.without(unreadable)
    split = dataset.split.subset(data.classes)
    if data.task:
        split = split.of_task(data.task, config.seed)
    if not split.train:
        raise DataError(f"data set '{dataset.name}' has no training images")
    if data.val_fraction and not split.val:
        split = split.with_val(data.val_fraction)
    split = split.without(unreadable)
    if data.shots is not None:
        return split.few_shot(data.shots, config.seed, data.allow_fewer, data.imbalance)
    labels = {item.label for item in split.train}
    empty = [f"'{name}'" for label, name in enumerate(split.class_names) if label not in labels]
    if empty:
        raise DataError(f"classes without training images: {first_few(empty)}")
    return split.long_tailed(config.seed, data.imbalance) if data.imbalance > 1 else split


def choose_images(
    config: Choice, dataset: LoadedDataset, reader: ImageReader, say: Callable[[str], object]
) -> tuple[Split, int]:
    """The run's images, all looked at before training starts, and how many unreadable ones were left out.

    The reader is told what is white in deep greys. Raises DataError naming the unreadable ones, unless the
    configuration skips them.
    """
    bad: dict[Path, str] = {}
    while True:
        split = run_split(config, dataset, bad)
        paths = split.paths("train") + split.paths("val")
        if not bad:
            set_white(reader, config.data, split.paths("train"), say)
        found = reader.unreadable(paths, everything=config.data.skip_bad)
        if not found:
            break
        if not config.data.skip_bad:
            raise unusable_error(found, len(paths), "; --skip-bad leaves such images out")
        name_skipped(found, say)
        bad |= found
    if config.data.val_fraction and dataset.split.val:
        say(f"data set '{dataset.name}' has val images: data.val_fraction is not used")
    if dataset.division:
        say(dataset.division)
    if task := config.data.task:
        few = " (one class alone: nothing to tell it from)" if len(split.class_names) == 1 else ""
        say(f"task {task}{few}: {first_few(split.class_names)}")
    for note in dict.fromkeys(dataset.gap(part, config.data.classes) for part in PARTS):
        if note:
            say(note)
    if twice := repeated(split.class_names):
        say(f"several classes have the same name, so nothing tells them apart: {', '.join(twice)}")
    return split, len(bad)


def image_notes(config: Choice, dataset: LoadedDataset, split: Split, reader: ImageReader) -> list[str]:
    """Lines about a run's images, which have been looked at: what was left out, is there twice, or looks dark."""
    published = find_dataset(config.data.name) and not config.data.split_file  # its split is as it is
    return [*dataset.notes, *([] if published else in_two_parts(split)), *reader.range_notes()]


def set_white(
    reader: ImageReader, data: DataConfig, images: Sequence[ImageSource], say: Callable[[str], object] = lambda _: None
) -> None:
    """Tell the reader what is white in deep greys, as configured or by the training images."""
    if data.white != "auto":
        reader.white = data.white
        return
    reader.white = reader.find_white(images)
    found = "no image has more than 8 bits" if reader.white is None else f"{reader.white:g}, by the training images"
    say(f"data.white = auto: {found}")
