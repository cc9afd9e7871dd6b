"""Batches of views: random regions for training, whole images for evaluation, made ahead by threads.

Pillow decodes and resizes outside Python's lock, so threads are enough: they start at once and share the decoded
images. Every view depends on (seed, epoch, image) alone, not on the number of threads or on what ran before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlprompt.data.images import ImageSource, Preprocess, load_image, random_regions

CACHE_BYTES = 2 << 30  # decoded training images kept in memory; the rest is decoded again each epoch
AHEAD = 4  # batches being made while one is used


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
    ) -> None:
        self.paths, self.labels, self.preprocess = paths, torch.tensor(labels), preprocess
        self.batch_size, self.seed, self.min_scale, self.workers = batch_size, seed, min_scale, workers
        self._decoded: dict[int, Image.Image] = {}
        self._room = CACHE_BYTES

    def __len__(self) -> int:
        """Batches in an epoch: the last incomplete one is dropped, unless it is the only one."""
        return max(len(self.paths) // self.batch_size, 1)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (images [B, 3, S, S], labels [B]) of one epoch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.paths))
        batches = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(len(self))]
        for batch, images in _ahead(lambda i: self._view(i, epoch), batches, self.workers):
            yield images, self.labels[torch.from_numpy(batch)]

    def _view(self, i: int, epoch: int) -> Tensor:
        image = self._image(i)
        rng = np.random.default_rng([self.seed, epoch, i])
        region = random_regions(rng, image.width, image.height, scale=(self.min_scale, 1.0))[0]
        return self.preprocess.region(image, region)

    def _image(self, i: int) -> Image.Image:
        if i not in self._decoded:
            image = load_image(self.paths[i])
            size = 3 * image.width * image.height
            if size > self._room:
                return image
            self._room -= size
            self._decoded[i] = image
        return self._decoded[i]


def evaluation_batches(
    paths: Sequence[ImageSource], preprocess: Preprocess, batch_size: int = 100, workers: int = 2
) -> Iterator[Tensor]:
    """Evaluation views of the images, [B, 3, S, S] at a time, in order."""
    order = np.arange(len(paths))
    batches = [order[i : i + batch_size] for i in range(0, len(paths), batch_size)]
    for _, images in _ahead(lambda i: preprocess(load_image(paths[i])), batches, workers):
        yield images


def _ahead(make, batches, workers: int) -> Iterator[tuple[np.ndarray, Tensor]]:  # type: ignore[no-untyped-def]
    """``make`` every index of every batch, some batches ahead of the one that is handed out."""
    if not workers:
        for batch in batches:
            yield batch, torch.stack([make(int(i)) for i in batch])
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[np.ndarray, list[Future[Tensor]]]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, [pool.submit(make, int(i)) for i in batch]))
                if len(waiting) > AHEAD:
                    done, futures = waiting.popleft()
                    yield done, torch.stack([f.result() for f in futures])
            while waiting:
                done, futures = waiting.popleft()
                yield done, torch.stack([f.result() for f in futures])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
