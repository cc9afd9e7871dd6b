"""Batches of views: random regions or centre crops for training, whole images for evaluation, made ahead by threads.

Every view depends on (seed, epoch, image) alone, not on the number of threads or on what ran before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from vlprompt.data.augment import augment_patches
from vlprompt.data.images import ImageSource, Preprocess, Region, random_regions
from vlprompt.data.reading import ImageReader

FOLDS = 5
"""Of a cross-validation, unless said otherwise."""


@dataclass(frozen=True)
class Batch:
    """One step's images, labels, and what comes with them; what does not is None.

    The loop adds what the method needs and the data did not bring.
    """

    images: Tensor | None
    """[B, 3, S, S] preprocessed; left out where frozen features are all that is read of them."""
    labels: Tensor
    """[B]"""
    frozen_image_features: Tensor | None = None
    """Normalised features of the same views from the frozen image tower, [B, E]."""
    teacher_probabilities: Tensor | None = None
    """What a teacher takes the same views for, [B, C] in fp32 at least; each row sums to 1. In place of labels."""
    second_view: Tensor | None = None
    """The same views, each of their patches changed by a RandAugment of its own, [B, 3, S, S]."""
    teacher_images: Tensor | None = None
    """The same views as the teacher reads them, if it reads others."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Whatever else a method needs of each image, by name: [B, …]."""
    classes: Tensor | None = None
    """Of a teacher's classes those that are compared, as indices [K]; all if not given."""
    whole: int | None = None
    """Images of the whole batch that this is a process's share or a part of; if not given, as in every batch."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with each of its tensors changed."""
        own: dict[str, Any] = {
            f.name: change(value) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **own, extra={name: change(value) for name, value in self.extra.items()})

    def parts(self, n: int) -> list[Batch]:
        """Nearly equal pieces, in order; some are empty if there are fewer images. Before classes are chosen."""
        assert self.classes is None
        return [self.map(lambda t, k=k: t.tensor_split(n)[k]) for k in range(n)]  # type: ignore[misc]

    def tensors(self) -> dict[str, Tensor]:
        """By name, those of ``extra`` too."""
        own = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return own | {f"extra.{name}": value for name, value in self.extra.items()}

    @property
    def compared(self) -> Tensor | slice:
        """The classes whose logits are compared, as an index into all."""
        return slice(None) if self.classes is None else self.classes

    @property
    def taught(self) -> Tensor:
        """The teacher's probabilities among the classes that are compared, [B, K]."""
        p = self.teacher_probabilities
        assert p is not None
        if self.classes is None:
            return p
        p = p[:, self.classes].clamp_min(torch.finfo(p.dtype).tiny)
        return p / p.sum(-1, keepdim=True)

    def comparing(self, k: int | None) -> Batch:
        """With the k classes that the teacher finds most probable in this batch, which alone are compared."""
        p = self.teacher_probabilities
        if k is None or p is None or k >= p.shape[-1]:
            return self
        return replace(self, classes=p.mean(0).topk(k).indices.sort().values)

    @property
    def targets(self) -> Tensor:
        """The class of each image among those compared, [B]: its label, or what a teacher finds likeliest."""
        return self.labels if self.teacher_probabilities is None else self.taught.argmax(-1)


def batches_of(n: int, batch_size: int, drop_last: bool) -> int:
    """Batches of n images; the last incomplete one does not count if it is dropped, unless it is the only one."""
    whole, rest = divmod(n, batch_size)
    return max(whole + (rest > 0 and not drop_last), 1)


def drawn_region(image: Image, rng: np.random.Generator, min_scale: float, flip: float) -> Region:
    """The random region of a training view: at least a share ``min_scale`` of the image, mirrored with chance ``flip``.

    ``rng`` is that of :func:`view_rng`.
    """
    return random_regions(rng, image.width, image.height, scale=(min_scale, 1.0), flip=flip)[0]


def view_rng(seed: int, epoch: int, i: int) -> np.random.Generator:
    """What decides the view of image i in an epoch, and nothing else does."""
    return np.random.default_rng([seed, epoch, i])


def epoch_order(labels: Tensor, seed: int, epoch: int, balanced: bool) -> NDArray[np.int64]:
    """The images of an epoch in the order they are drawn in, [n]: each once, or every class equally often.

    Of a class that is drawn more often than it has images, none comes again before all have come.
    """
    rng, n = np.random.default_rng([seed, epoch]), len(labels)
    if not balanced:
        return rng.permutation(n)
    of_class = [np.flatnonzero(labels.numpy() == c) for c in labels.unique().tolist()]
    each = -(-n // len(of_class))
    drawn = [np.concatenate([rng.permutation(r) for _ in range(-(-each // len(r)))])[:each] for r in of_class]
    return rng.permutation(np.concatenate(drawn))[:n]


def fold_of(labels: Tensor, k: int = FOLDS) -> Tensor:
    """Each image's fold in a cross-validation, [n]: the images of a class take turns, in their order.

    A class begins where the last one of fewer than k images ended, so that small classes fill all folds alike.
    """
    counts, order = torch.bincount(labels), labels.argsort(stable=True)
    large = counts * (counts >= k)  # behind these the next class begins where they did
    fold = torch.empty_like(labels)
    fold[order] = (torch.arange(len(labels), device=labels.device) - (large.cumsum(0) - large)[labels[order]]) % k
    return fold


class TrainingViews:
    """The images in a new order in every epoch: a new random resized crop and flip of each, or its ``center``.

    ``center`` is the view of evaluation. What frozen towers say of it never changes: ``constant`` names what a batch
    brings of that, by field, and computes it for all images when it is first asked for. Without ``pixels`` that is all.
    ``flip`` is a probability.
    """

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
        reader: ImageReader,
        min_scale: float = 0.08,
        flip: float = 0.5,
        teacher: Preprocess | None = None,
        patch_size: int | None = None,
        extra: Mapping[str, Tensor] | None = None,
        balanced: bool = False,
        drop_last: bool = True,
        center: bool = False,
        constant: Mapping[str, Callable[[], Tensor]] | None = None,
        pixels: bool = True,
    ) -> None:
        self.images, self.labels, self.extra = images, torch.tensor(labels), extra or {}
        self.balanced = balanced
        self.drop_last, self.center, self.pixels = drop_last, center, pixels or patch_size is not None
        self.constant = {name: cache(compute) for name, compute in (constant or {}).items()}
        # Where the teacher reads what the student does, it needs no view of its own.
        self.preprocess, self.teacher = preprocess, None if teacher == preprocess else teacher
        self.batch_size, self.seed, self.min_scale = batch_size, seed, min_scale
        self.reader, self.patch_size, self.flip = reader, patch_size, flip

    def __len__(self) -> int:
        """Batches in an epoch."""
        return batches_of(len(self.images), self.batch_size, self.drop_last)

    @property
    def images_per_batch(self) -> int:
        """Images in every batch but a last incomplete one: the batch size, or all there are if they are fewer."""
        return min(self.batch_size, len(self.images))

    def epoch(self, epoch: int, start: int = 0, shard: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Batches of one epoch, from batch ``start`` on.

        Teacher images come with a ``teacher`` that reads images of another size or scale, second views with a
        ``patch_size`` in pixels, and of ``extra`` [n, …] the rows of the batch's images.

        ``shard=(k, n)`` gives the k-th of n nearly equal pieces of every batch, one for each of n processes. Where the
        last batch has fewer images than there are processes, those that have none are given its first one.
        """
        order = epoch_order(self.labels, self.seed, epoch, self.balanced)
        whole = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(start, len(self))]
        k, n = shard
        constant = {name: compute() for name, compute in self.constant.items()}
        batches = [np.array_split(batch, n)[k] if k < len(batch) else batch[:1] for batch in whole]
        made: Iterable[tuple[NDArray, dict[str, Any]]] = ((batch, {"images": None}) for batch in batches)
        if self.pixels:
            made = self.reader.batches(lambda i: self._views(i, epoch), batches)
        for (batch, views), all_of_it in zip(made, whole, strict=True):
            rows = torch.from_numpy(batch)
            extra = {name: values[rows] for name, values in self.extra.items()}
            known = {name: values[rows] for name, values in constant.items()}
            yield Batch(labels=self.labels[rows], extra=extra, whole=len(all_of_it), **known, **views)

    def _views(self, i: int, epoch: int) -> dict[str, Tensor]:
        """One image's view, the teacher's and the second one where there are any: [3, S, S] each."""
        image, rng = self.reader.image(self.images[i]), view_rng(self.seed, epoch, i)
        region = None if self.center else drawn_region(image, rng, self.min_scale, self.flip)
        views = both_views(image, region, self.preprocess, self.patch_size, rng)
        if self.teacher is None or "teacher_probabilities" in self.constant:
            return views
        return {**views, "teacher_images": self.teacher.tensor(pixels_of(image, region, self.teacher))}


def pixels_of(image: Image, region: Region | None, preprocess: Preprocess) -> Image:
    """Of a region, or of the evaluation view, S × S."""
    return preprocess.whole(image) if region is None else preprocess.cropped(image, region)


def both_views(
    image: Image, region: Region | None, preprocess: Preprocess, patch_size: int | None, rng: np.random.Generator
) -> dict[str, Tensor]:
    """The view of a region, or of evaluation, and, with a ``patch_size``, its second one, [3, S, S] each."""
    crop = pixels_of(image, region, preprocess)
    views = {"images": preprocess.tensor(crop)}
    if patch_size is not None:
        views["second_view"] = preprocess.tensor(augment_patches(crop, patch_size, rng))
    return views


def evaluation_batches(
    images: Sequence[ImageSource] | NDArray[np.uint8],
    make: Callable[[Image], Tensor | NDArray],
    reader: ImageReader,
    batch_size: int = 100,
) -> Iterator[Tensor]:
    """What ``make`` (a :class:`Preprocess`, say) gives for the images, stacked, a batch at a time, in order."""
    order = np.arange(len(images))
    batches = [order[i : i + batch_size] for i in range(0, len(images), batch_size)]
    for _, made in reader.batches(lambda i: make(reader.image(images[i])), batches):
        yield made
