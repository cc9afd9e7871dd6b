"""Batches of views: random regions for training, whole images for evaluation, made ahead by a reader's threads.

Without a reader, training views keep one of their own, and each pass over evaluation images starts one.
Every view depends on (seed, epoch, image) alone, not on the number of threads or on what ran before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from vlprompt.data.augment import augment_patches
from vlprompt.data.images import ImageSource, Preprocess, random_regions
from vlprompt.data.reading import ImageReader


class TrainingViews:
    """A new random resized crop and flip of every image in every epoch, in a new order."""

    def __init__(
        self,
        paths: Sequence[ImageSource],
        labels: Sequence[int],
        preprocess: Preprocess,
        batch_size: int,
        seed: int,
        *,
        min_scale: float = 0.08,
        workers: int = 2,
        reader: ImageReader | None = None,
        patch_size: int | None = None,
    ) -> None:
        self.paths, self.labels, self.preprocess = paths, torch.tensor(labels), preprocess
        self.batch_size, self.seed, self.min_scale = batch_size, seed, min_scale
        self.reader, self.patch_size = reader or ImageReader(workers), patch_size

    def __len__(self) -> int:
        """Batches in an epoch: the last incomplete one is dropped, unless it is the only one."""
        return max(len(self.paths) // self.batch_size, 1)

    @property
    def images_per_batch(self) -> int:
        """Images in every batch: the batch size, or all there are if they are fewer."""
        return min(self.batch_size, len(self.paths))

    def epoch(self, epoch: int, start: int = 0, share: tuple[int, int] = (0, 1)) -> Iterator[tuple[Tensor, ...]]:
        """Batches (images [B, 3, S, S], labels [B]) of one epoch, from batch ``start`` on.

        With a ``patch_size`` in pixels, second views of the same crops come third: patch-wise RandAugment.

        ``share=(k, n)`` gives the k-th of n nearly equal pieces of every batch, one for each of n processes.
        """
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.paths))
        whole = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(start, len(self))]
        k, n = share
        batches = [np.array_split(batch, n)[k] for batch in whole]
        for batch, views in self.reader.batches(lambda i: self._views(i, epoch), batches):
            images, *second = views.unbind(1)
            yield images, self.labels[torch.from_numpy(batch)], *second

    def _views(self, i: int, epoch: int) -> Tensor:
        """The view of one image, and the second one if there is any: [1 or 2, 3, S, S]."""
        image = self.reader.image(self.paths[i])
        rng = np.random.default_rng([self.seed, epoch, i])
        region = random_regions(rng, image.width, image.height, scale=(self.min_scale, 1.0))[0]
        views = [self.preprocess.cropped(image, region)]
        if self.patch_size is not None:
            views.append(augment_patches(views[0], self.patch_size, rng))
        return torch.stack([self.preprocess.tensor(view) for view in views])


def evaluation_batches(
    paths: Sequence[ImageSource],
    preprocess: Preprocess,
    batch_size: int = 100,
    workers: int = 2,
    reader: ImageReader | None = None,
) -> Iterator[Tensor]:
    """Evaluation views of the images, [B, 3, S, S] at a time, in order."""
    order = np.arange(len(paths))
    batches = [order[i : i + batch_size] for i in range(0, len(paths), batch_size)]
    with nullcontext(reader) if reader else ImageReader(workers, room=0) as source:
        for _, images in source.batches(lambda i: preprocess(source.image(paths[i])), batches):
            yield images
