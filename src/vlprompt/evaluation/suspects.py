"""Images to look at twice: near-duplicates of images that were trained on, and images whose label is doubtful."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from vlprompt.data.batches import fold_of
from vlprompt.data.reading import ImageReader
from vlprompt.errors import DataError

SIDE = 16
ALIKE = 0.95
"""Correlation of thumbnails from which on images are near-duplicates: copies that were saved anew, made smaller or
brighter have 0.97 and more, the most alike of 89 and 80 clothing photographs that come along 0.92."""
AT_ONCE = 512
LEAST = 3
"""How many images of a class the cross-validation takes."""


class Pair(NamedTuple):
    """An image, the image trained on that is most like it, and the correlation of their thumbnails."""

    image: Path
    trained_on: Path
    correlation: float


def near_duplicates(images: Sequence[Path], trained_on: Sequence[Path], reader: ImageReader) -> list[Pair]:
    """Images that are much like one trained on, or like its mirror image, most alike first; none is paired with itself.

    What cannot be read, and images of one colour, are like nothing.
    """
    if not trained_on:
        return []
    here, there = (_thumbnails(paths, reader) for paths in (images, trained_on))
    mirrored = here.unflatten(1, (SIDE, SIDE, 3)).flip(2).flatten(1)
    place = {path.resolve(): j for j, path in enumerate(trained_on)}
    pairs = []
    for start in range(0, len(images), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        alike = torch.maximum(here[part] @ there.T, mirrored[part] @ there.T)
        for path, row in zip(images[part], alike, strict=True):
            if (own := place.get(path.resolve())) is not None:
                row[own] = -1
            value, j = row.max(0)
            if value >= ALIKE:
                pairs.append(Pair(path, trained_on[int(j)], min(value.item(), 1.0)))
    return sorted(pairs, key=lambda pair: -pair.correlation)


def _thumbnails(paths: Sequence[Path], reader: ImageReader) -> Tensor:
    """Of each image its 16 × 16 colours, each channel centred, normalised together: [n, 768]."""

    def thumbnail(path: Path) -> Tensor:
        try:
            small = reader.image(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
        except DataError:
            return torch.zeros(3 * SIDE**2)
        colours = torch.from_numpy(np.array(small, np.float32))
        return normalize((colours - colours.mean((0, 1))).flatten(), dim=0, eps=1e-3)

    chunks = [paths[i : i + 64] for i in range(0, len(paths), 64)]
    return torch.cat([torch.zeros(0, 3 * SIDE**2)] + [made for _, made in reader.batches(thumbnail, chunks)])


class Doubts(NamedTuple):
    """Images whose label is doubtful, by index, the most doubtful first, with the class they rather are of."""

    found: list[tuple[int, int]]
    looked_at: int
    agree: float
    """Share of the images looked at whose label is the most probable class."""


def doubtful_labels(features: Tensor, labels: Tensor) -> Doubts:
    """By confident learning, from probabilities of a linear discriminant on features [n, E], cross-validated.

    Images of a class with fewer than three are left out; with fewer than two classes nothing is looked at.
    """
    counts = torch.bincount(labels)
    kept = (counts[labels] >= LEAST).nonzero()[:, 0]
    classes, y = labels[kept].unique(return_inverse=True)
    if len(classes) < 2:
        return Doubts([], 0, 0.0)
    p = cross_validated(features[kept].double(), y)
    best = p.argmax(-1)
    found = [(int(kept[i]), int(classes[best[i]])) for i in label_issues(p, y)]
    return Doubts(found, len(kept), (best == y).double().mean().item())


def cross_validated(features: Tensor, labels: Tensor) -> Tensor:
    """Probabilities [n, C] of features [n, E], each from a linear discriminant (LDA, shrunk) on the other folds.

    Every class has two images at least.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    fold = fold_of(labels)
    p = torch.zeros(len(labels), int(labels.max()) + 1, dtype=torch.double)
    for k in fold.unique().tolist():
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a class with one image in the other folds has no covariance of its own
            model.fit(features[fold != k].numpy(), labels[fold != k].numpy())
            p[fold == k] = torch.from_numpy(model.predict_proba(features[fold == k].numpy()))
    return p


def label_issues(p: Tensor, labels: Tensor) -> list[int]:
    """Confident learning (Northcutt et al., JAIR 2021): whose label is an error, the lowest self-confidence first.

    p: out-of-sample probabilities [n, C]; every class has a label. An image counts as one of class k if p of k is at
    least the mean that images labelled k have. Equal to cleanlab's ``find_label_issues`` by ``confident_learning``.
    """
    own = p[torch.arange(len(p)), labels]
    mean = torch.zeros(p.shape[1], dtype=p.dtype).index_add(0, labels, own) / torch.bincount(labels)
    sure, best = p >= mean - 1e-6, p.argmax(-1)
    taken_for = torch.where(sure.sum(-1) > 1, best, sure.int().argmax(-1))
    wrong = (sure.any(-1) & (taken_for != labels) & (best != labels)).nonzero()[:, 0]
    return wrong[own[wrong].argsort(stable=True)].tolist()
