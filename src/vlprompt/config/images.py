"""Which images a run uses: its classes, its shots, and none that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from vlprompt.config.schema import DataConfig
from vlprompt.data.datasets import LoadedDataset
from vlprompt.data.reading import ImageReader, name_skipped, unusable_error
from vlprompt.data.splits import PARTS, Split, repeated
from vlprompt.errors import DataError, first_few


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

    In this order: its classes, its val images where the data set has none, the images that cannot be read taken out,
    its shots. So a val image is one for every seed and number of shots, and an unreadable image makes room for the next
    that the seed would have drawn. Raises DataError if a class has no training images, or too few.
    """
    data = config.data
    split = dataset.split.subset(data.classes)
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

    Raises DataError naming the unreadable ones, unless the configuration skips them.
    """
    bad: dict[Path, str] = {}
    while True:
        split = run_split(config, dataset, bad)
        paths = split.paths("train") + split.paths("val")
        found = reader.unreadable(paths, everything=config.data.skip_bad)
        if not found:
            break
        if not config.data.skip_bad:
            raise unusable_error(found, len(paths), "; --skip-bad leaves such images out")
        name_skipped(found, say)
        bad |= found
    if config.data.val_fraction and dataset.split.val:
        say(f"data set '{dataset.name}' has val images: data.val_fraction is not used")
    for part in PARTS[1:]:
        if note := dataset.gap(part, config.data.classes):
            say(note)
    if twice := repeated(split.class_names):
        say(f"several classes have the same name, so nothing tells them apart: {', '.join(twice)}")
    return split, len(bad)
