"""Training views from a region bank: its regions of each image, and what the bank knows about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, groupby, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from vlprompt.bank.records import Bank
from vlprompt.bank.regions import restored
from vlprompt.data.batches import Batch, both_views
from vlprompt.data.images import Preprocess
from vlprompt.data.reading import ImageReader


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
        reader: ImageReader,
        regions: int | None = None,
        regions_per_image: int = 1,
        features: bool = False,
        probabilities: bool = False,
        patch_size: int | None = None,
        extra: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.bank, self.files, self.labels, self.preprocess = bank, files, torch.tensor(labels), preprocess
        self.batch_size, self.seed, self.regions_per_image = batch_size, seed, regions_per_image
        self.features, self.probabilities, self.patch_size = features, probabilities, patch_size
        self.reader, self.extra = reader, extra or {}
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

    def epoch(self, epoch: int, start: int = 0, shard: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Batches of one epoch, from batch ``start`` on; ``shard`` as in :class:`TrainingViews`."""
        k, n = shard
        steps = range(epoch * len(self) + start, (epoch + 1) * len(self))
        pieces = [np.array_split(self._samples(step), n)[k] for step in steps]
        made: Iterator[dict[str, Any]] = repeat({"images": None})
        if self.preprocess is not None:
            visits = ([list(group) for _, group in groupby(piece.tolist(), itemgetter(0))] for piece in pieces)
            made = (views for _, views in self.reader.batches(self._views, visits, _collate_visits))
        for piece, views in zip(pieces, made, strict=False):
            records = self.bank.read(self.rows[piece[:, 0]], piece[:, 1])
            rows = torch.from_numpy(piece[:, 0])
            yield Batch(
                labels=self.labels[rows],
                extra={name: values[rows] for name, values in self.extra.items()},
                frozen_image_features=self.bank.features(records) if self.features else None,
                teacher_probabilities=self.bank.probabilities(records) if self.probabilities else None,
                **views,
            )

    def _samples(self, step: int) -> NDArray[np.int64]:
        """(image, region, turn) of each sample of the step-th batch since training began, [B, 3].

        No region of an image comes twice in a turn.
        """
        # By arithmetic from the step alone: a resumed run, and each of several processes, knows it without a state.
        # Every round walks through all images in a new order; each image goes on with its regions where it stopped,
        # from a start of its own, so that the first regions of all do not come in the same epoch.
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
            both_views(image, region, self.preprocess, self.patch_size, rng)
            for region, rng in zip(restored(stored), rngs, strict=True)
        ]


def _collate_visits(visits: Sequence[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    return default_collate([*chain.from_iterable(visits)])
