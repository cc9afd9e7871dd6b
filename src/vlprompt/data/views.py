"""Batches of views: random or banked regions for training, whole images for evaluation, made ahead by threads.

Without a reader, training views keep one of their own, and each pass over evaluation images starts one.
Every view depends on (seed, epoch, image) alone, not on the number of threads or on what ran before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from itertools import chain, groupby, repeat
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import default_collate

from vlprompt.bank.records import Bank
from vlprompt.bank.regions import restored
from vlprompt.data.augment import augment_patches
from vlprompt.data.images import ImageSource, Preprocess, Region, random_regions
from vlprompt.data.reading import ImageReader


class Views(NamedTuple):
    """One batch of training views and what comes with them; what does not is None."""

    images: Tensor | None
    """[B, 3, S, S], as the student reads them."""
    labels: Tensor
    """[B]"""
    teacher_images: Tensor | None = None
    """The same regions as the teacher reads them, if it reads others."""
    frozen_image_features: Tensor | None = None
    """Of the same regions, normalised, [B, E]."""
    teacher_probabilities: Tensor | None = None
    """Of the same regions, [B, C]."""
    second_view: Tensor | None = None
    """The same regions under patch-wise RandAugment, [B, 3, S, S]."""


class TrainingViews:
    """A new random resized crop and flip of every image in every epoch, in a new order."""

    fingerprint: str | None = None
    """Of what the views come from, if that is more than the images."""

    def __init__(
        self,
        images: Sequence[ImageSource],
        labels: Sequence[int],
        preprocess: Preprocess,
        batch_size: int,
        seed: int,
        *,
        min_scale: float = 0.08,
        workers: int = 2,
        reader: ImageReader | None = None,
        teacher: Preprocess | None = None,
        patch_size: int | None = None,
    ) -> None:
        self.images, self.labels = images, torch.tensor(labels)
        # Where the teacher reads what the student does, it needs no view of its own.
        self.preprocess, self.teacher = preprocess, None if teacher == preprocess else teacher
        self.batch_size, self.seed, self.min_scale = batch_size, seed, min_scale
        self.reader, self.patch_size = reader or ImageReader(workers), patch_size

    def __len__(self) -> int:
        """Batches in an epoch: the last incomplete one is dropped, unless it is the only one."""
        return max(len(self.images) // self.batch_size, 1)

    @property
    def images_per_batch(self) -> int:
        """Images in every batch: the batch size, or all there are if they are fewer."""
        return min(self.batch_size, len(self.images))

    def epoch(self, epoch: int, start: int = 0, share: tuple[int, int] = (0, 1)) -> Iterator[Views]:
        """Batches of one epoch, from batch ``start`` on.

        Teacher images come with a ``teacher`` that reads images of another size or scale, second views with a
        ``patch_size`` in pixels.

        ``share=(k, n)`` gives the k-th of n nearly equal pieces of every batch, one for each of n processes.
        """
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
        whole = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(start, len(self))]
        k, n = share
        batches = [np.array_split(batch, n)[k] for batch in whole]
        for batch, views in self.reader.batches(lambda i: self._views(i, epoch), batches):
            yield Views(labels=self.labels[torch.from_numpy(batch)], **views)

    def _views(self, i: int, epoch: int) -> dict[str, Tensor]:
        """One image's view, the teacher's and the second one where there are any: [3, S, S] each."""
        image = self.reader.image(self.images[i])
        rng = np.random.default_rng([self.seed, epoch, i])
        region = random_regions(rng, image.width, image.height, scale=(self.min_scale, 1.0))[0]
        views = _both_views(image, region, self.preprocess, self.patch_size, rng)
        return views if self.teacher is None else {**views, "teacher_images": self.teacher.region(image, region)}


class BankViews:
    """Regions of a bank, several of each image that is decoded, with what the bank knows about them.

    A batch holds ``regions_per_image`` regions of each of its images, and an epoch as many samples as without a bank.
    So every image comes once in ``regions_per_image`` epochs, in a new order each time, and each of its regions (all,
    or the first ``regions`` ones) once before any comes again. Without ``preprocess`` no image is decoded. With a
    ``patch_size`` in pixels every view has a second one beside it, another each time that its region comes.
    """

    def __init__(
        self,
        bank: Bank,
        files: Sequence[Path],
        labels: Sequence[int],
        preprocess: Preprocess | None,
        batch_size: int,
        seed: int,
        *,
        regions: int | None = None,
        regions_per_image: int = 1,
        features: bool = False,
        probabilities: bool = False,
        patch_size: int | None = None,
        workers: int = 2,
        reader: ImageReader | None = None,
    ) -> None:
        self.bank, self.files, self.labels, self.preprocess = bank, files, torch.tensor(labels), preprocess
        self.batch_size, self.seed, self.regions_per_image = batch_size, seed, regions_per_image
        self.features, self.probabilities, self.patch_size = features, probabilities, patch_size
        self.reader = reader or ImageReader(workers)
        self.rows, self.regions = bank.rows(files), regions or bank.settings.regions
        self.fingerprint = bank.settings.fingerprint
        # Where each image begins to walk through its regions.
        self._first = np.random.default_rng(seed).integers(self.regions, size=len(files))
        self._order = lru_cache(2)(lambda r: np.random.default_rng([seed, r]).permutation(len(files)))

    def __len__(self) -> int:
        """Batches in an epoch, as in :class:`TrainingViews`."""
        return max(len(self.files) // self.batch_size, 1)

    @property
    def images_at_once(self) -> int:
        """Decoded images in a batch."""
        return min(self.batch_size // self.regions_per_image, len(self.files))

    @property
    def images_per_batch(self) -> int:
        """Views in every batch."""
        return self.images_at_once * self.regions_per_image

    def epoch(self, epoch: int, start: int = 0, share: tuple[int, int] = (0, 1)) -> Iterator[Views]:
        """Batches of one epoch, from batch ``start`` on; ``share`` as in :class:`TrainingViews`."""
        k, n = share
        steps = range(epoch * len(self) + start, (epoch + 1) * len(self))
        pieces = [np.array_split(self._samples(step), n)[k] for step in steps]
        made: Iterator[dict[str, Tensor | None]] = repeat({"images": None})
        if self.preprocess is not None:
            visits = ([list(group) for _, group in groupby(piece.tolist(), itemgetter(0))] for piece in pieces)
            made = (views for _, views in self.reader.batches(self._views, visits, _collate_visits))
        for piece, views in zip(pieces, made, strict=False):
            records = self.bank.read(self.rows[piece[:, 0]], piece[:, 1])
            yield Views(
                labels=self.labels[torch.from_numpy(piece[:, 0])],
                frozen_image_features=self.bank.features(records) if self.features else None,
                teacher_probabilities=self.bank.probabilities(records) if self.probabilities else None,
                **views,
            )

    def _samples(self, step: int) -> NDArray[np.int64]:
        """(image, region, turn) of each sample of the step-th batch since training began, [B, 3].

        No region of an image comes twice in a turn.
        """
        n, m = len(self.files), self.regions_per_image
        rounds, places = np.divmod(step * self.images_at_once + np.arange(self.images_at_once), n)
        images = np.array([self._order(int(r))[place] for r, place in zip(rounds, places, strict=True)])
        walked = (self._first[images] + rounds * m)[:, None] + np.arange(m)
        turns, regions = np.divmod(walked, self.regions)
        return np.stack([images.repeat(m), regions.ravel(), turns.ravel()], axis=1)

    def _views(self, samples: list[list[int]]) -> list[dict[str, Tensor]]:
        """The view, and the second one where there are any, of several samples of one image: [3, S, S] each."""
        assert self.preprocess is not None
        images, regions, _ = np.array(samples).T
        image = self.reader.image(self.files[images[0]])
        stored = self.bank.read(self.rows[images], regions)["region"]
        rngs = [np.random.default_rng([self.seed, *sample]) for sample in samples]
        return [
            _both_views(image, region, self.preprocess, self.patch_size, rng)
            for region, rng in zip(restored(stored), rngs, strict=True)
        ]


def _both_views(
    image: Image, region: Region, preprocess: Preprocess, patch_size: int | None, rng: np.random.Generator
) -> dict[str, Tensor]:
    """A region's view and, with a ``patch_size``, its second one, [3, S, S] each."""
    crop = preprocess.cropped(image, region)
    views = {"images": preprocess.tensor(crop)}
    if patch_size is not None:
        views["second_view"] = preprocess.tensor(augment_patches(crop, patch_size, rng))
    return views


def _collate_visits(visits: Sequence[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    return default_collate([*chain.from_iterable(visits)])


def evaluation_batches(
    images: Sequence[ImageSource] | NDArray[np.uint8],
    make: Callable[[Image], Tensor | NDArray],
    batch_size: int = 100,
    workers: int = 2,
    reader: ImageReader | None = None,
) -> Iterator[Tensor]:
    """What ``make`` (a :class:`Preprocess`, say) gives for the images, stacked, a batch at a time, in order."""
    order = np.arange(len(images))
    batches = [order[i : i + batch_size] for i in range(0, len(images), batch_size)]
    with nullcontext(reader) if reader else ImageReader(workers, room=0) as source:
        for _, made in source.batches(lambda i: make(source.image(images[i])), batches):
            yield made
