"""What is compared: the methods in order of their cost, their settings, the images held out, and what a run costs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import EMBEDDED
from vlprompt.compare.clock import Clock
from vlprompt.config.presets import presets_of
from vlprompt.config.schema import RunConfig, build_config
from vlprompt.data.batches import batches_of, evaluation_batches, fold_of
from vlprompt.data.datasets import LoadedDataset
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import Split, in_order, ranked_by_class
from vlprompt.documents import checksum
from vlprompt.errors import DataError
from vlprompt.methods import find_method
from vlprompt.methods.registry import file_fingerprint
from vlprompt.training.evaluate import EvaluationImages
from vlprompt.training.prepare import build, find_sources, prepare

SHORTLIST = (
    "zero_shot", "linear_probe", "clap", "gda", "tip_adapter", "prolip", "coop", "promptsrc", "drople", "dpl",
)  # fmt: skip
FOLDS = 3
SHOTS = 16
PROBED = 4
"""Steps that are taken to measure one; the first is not counted."""
IMAGES_PROBED = 32


@dataclass(frozen=True)
class Candidate:
    """A method as it is compared."""

    name: str
    config: RunConfig
    preset: str | None

    @property
    def settings(self) -> list[Any]:
        """What of it decides a result: its configuration, and what is in a method's file."""
        return [self.config.to_dict(), file_fingerprint(self.config.method)]

    @property
    def views(self) -> int:
        """Fixed random views of each image that the frozen tower must see."""
        views = self.config.data.views
        return views if isinstance(views, int) and find_method(self.config.method).fixes_views else 0

    @property
    def crop(self) -> tuple[float, float]:
        """How these views are made: the smallest share of the image, and the share that is flipped."""
        return self.config.data.min_scale, self.config.data.flip

    @property
    def light(self) -> bool:
        """Whether it takes no steps, or steps on frozen features that are there: these come first."""
        return self.views > 0 or "train.epochs" not in find_method(self.config.method).official

    def with_views_for(self, per_class: float) -> Candidate:
        """The official number of views is for 16 images a class; of more images fewer views say as much."""
        if not self.views or per_class <= SHOTS:
            return self
        views = math.ceil(self.views * SHOTS / per_class)
        return replace(self, config=replace(self.config, data=replace(self.config.data, views=views)))


def candidates(methods: Sequence[str], settings: dict[str, Any]) -> list[Candidate]:
    """The methods with settings that suit: those of small backbones, or a quick or few-shot preset, or official ones.

    Raises ConfigError for an unknown method or setting.
    """
    found = []
    for method in dict.fromkeys(methods):
        presets = presets_of(find_method(method))
        suiting = [*(["mini"] if settings.get("backbone") in EMBEDDED else []), "quick", "few-shot"]
        preset = next((name for name in suiting if name in presets), None)
        config = build_config(method, preset, overrides=settings)
        found.append(Candidate(find_method(method).name, config, preset))

    def views_and_steps(candidate: Candidate) -> tuple[int, bool]:
        return candidate.views, "train.epochs" in find_method(candidate.config.method).official

    return sorted(found, key=views_and_steps)  # stable: otherwise in the order given


@dataclass(frozen=True)
class Held:
    """How images are held out."""

    whole: Split
    """Everything that the best method is trained on in the end, as its training images."""
    folds: tuple[Split, ...]
    """Images to train on, and as val those to measure on."""
    how: str


def hold_out(dataset: LoadedDataset, split: Split) -> Held:
    """The val split, if it has two images a class on average; or else stratified folds of training and val images.

    Raises DataError where a class has too few images for that.
    """
    whole = replace(split, train=in_order([*split.train, *split.val]), val=(), test=())
    if len(split.val) >= 2 * len(split.class_names):
        return Held(whole, (replace(split, test=()),), f"{len(split.val)} val images")
    ranked = ranked_by_class(whole.train, "folds")
    fewest = min(range(len(split.class_names)), key=lambda label: len(ranked.get(label, ())))
    if (n := len(ranked.get(fewest, ()))) < 2:
        raise DataError(
            f"data set '{dataset.name}': class '{split.class_names[fewest]}' has {n} image{'' if n == 1 else 's'} to "
            "train on; to hold some out, every class needs two"
        )
    k, items = min(FOLDS, n), [item for group in ranked.values() for item in group]
    placed = list(zip(items, fold_of(torch.tensor([item.label for item in items]), k).tolist(), strict=True))

    def fold(held: int) -> Split:
        train, val = ([item for item, at in placed if (at == held) == out] for out in (False, True))
        return replace(whole, train=in_order(train), val=in_order(val))

    return Held(whole, tuple(map(fold, range(k))), f"{k} stratified folds of {len(items)} training images")


def digest(value: Any) -> str:
    """Twelve hexadecimal digits that stand for a JSON value."""
    return checksum(value)[:12]


def split_values(split: Split) -> list[Any]:
    """What of a split decides a result, but for the pixels."""
    return [split.class_names, [[(i.path, i.label) for i in part] for part in (split.train, split.val)]]


@dataclass(frozen=True)
class Cost:
    """Seconds that a method will take."""

    compared: float
    """To train it on every fold and measure it."""
    retrained: float
    """To train it on all images."""


class Costs:
    """What a method will cost, from what was measured so far."""

    def __init__(self, backbone: Backbone, template: str, held: Held) -> None:
        self.backbone, self.template, self.held = backbone, template, held
        self._seen: dict[tuple[float, float], int] = {}
        """Views that the frozen tower has seen, by how they are cropped."""
        self._whole = False
        """Whether it has seen the whole images."""
        self._step: dict[str, float] = {}
        paths = held.folds[0].paths("train")[:IMAGES_PROBED]
        with ImageReader(room=0) as reader:
            for _ in range(2):  # the first time takes longer
                began = time.monotonic()
                for images in evaluation_batches(paths, backbone.preprocess, reader):
                    backbone.encode_images(images)
        self.per_image = (time.monotonic() - began) / len(paths)
        """Seconds for an image to be read and seen by the frozen tower."""

    def of(self, candidate: Candidate) -> Cost:
        """Its cost; a few steps are taken to measure one. What the frozen tower has seen is not paid for again."""
        if candidate.name not in self._step:
            self._step[candidate.name] = self._seconds_of_a_step(candidate, self.held.folds[0])
        config, folds, n = candidate.config, self.held.folds, len(self.held.whole.train)
        trained = sum(len(fold.train) for fold in folds)
        new = max(candidate.views - self._seen.get(candidate.crop, 0), 0)
        if candidate.views or not config.reads_pixels:
            whole, again = (0 if self._whole else n), 0
        else:  # through a tower of its own, to measure it
            whole, again = sum(len(fold.train) + len(fold.val) for fold in folds), n
        step = self._step[candidate.name]

        def steps(images: int) -> float:
            return step * config.train.epochs * batches_of(images, config.data.batch_size, config.data.drop_last)

        return Cost(
            (whole + new * trained) * self.per_image + sum(steps(len(fold.train)) for fold in folds),
            (again + candidate.views * n) * self.per_image + steps(n),
        )

    def seen(self, candidate: Candidate) -> None:
        """What the frozen tower had to see for it is there now."""
        self._whole = self._whole or candidate.views > 0 or not candidate.config.reads_pixels
        self._seen[candidate.crop] = max(self._seen.get(candidate.crop, 0), candidate.views)

    def _seconds_of_a_step(self, candidate: Candidate, fold: Split) -> float:
        """Measured; 0 if the method takes none."""
        config = candidate.config
        if candidate.views:  # one view tells how long a step takes
            config = replace(config, data=replace(config.data, views=1))
        n = min(config.data.batch_size * PROBED, len(fold.train))  # whole batches, of all classes
        items = [fold.train[i * len(fold.train) // n] for i in range(n)]
        paths, labels = [fold.root / item.path for item in items], [item.label for item in items]
        with ImageReader(config.data.workers) as reader:
            sources = find_sources(config, fold.class_names, self.template, self.backbone)
            method = build(config, sources, self.backbone, self.template, fold.class_names)
            whole = EvaluationImages(paths, labels, reader)
            training = prepare(config, sources, method, paths, labels, config.seed, reader, whole=whole)
            if training is None:
                return 0.0
            clock = Clock()
            training.run([clock], lambda: len(clock.times) >= PROBED - 1)
        times = clock.times
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else times[0] - clock.began
