"""Accuracy per class and overall, and calibration, of a method on images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlprompt.data.batches import drawn_region, evaluation_batches, view_rng
from vlprompt.data.images import ImageSource
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import repeated
from vlprompt.errors import VlpromptError
from vlprompt.methods import Can, Method

BINS = 15
AT_ONCE = 100
"""Random views that the frozen tower sees together."""


class Crop(NamedTuple):
    """How random views are drawn, as :class:`TrainingViews` draws them."""

    seed: int
    min_scale: float
    flip: float


class EvaluationImages:
    """Images to evaluate on; features of the frozen image tower are computed once and remembered.

    Labels are read where accuracy is measured only.
    """

    def __init__(self, images: Sequence[ImageSource], labels: Sequence[int], reader: ImageReader) -> None:
        self.images, self.labels, self.reader = images, torch.tensor(labels), reader
        self._frozen: dict[str, Tensor] = {}
        self._random: dict[tuple[str, int, Crop], Tensor] = {}

    def read_by(self, method: Method) -> Iterator[Tensor]:
        """What the method's ``predict`` reads: views a batch at a time, or at once all that the frozen tower says."""
        if Can.USE_FROZEN_FEATURES in method.config.can:
            yield self.frozen(method)
        elif Can.USE_POOLED_FEATURES in method.config.can:
            yield self.pooled(method)[:, None]
        else:
            yield from self.views(method)

    def frozen(self, method: Method) -> Tensor:
        """Normalised features from the frozen image tower, [n, E]."""
        return self._once(made_by(method), method, method.backbone.encode_images)

    def pooled(self, method: Method) -> Tensor:
        """What the frozen image tower makes of the images before its projection, [n, D]."""
        return self._once(f"pooled {made_by(method)}", method, method.backbone.pool_images)

    def _once(self, key: str, method: Method, encode: Callable[[Tensor], Tensor]) -> Tensor:
        if key not in self._frozen:
            self._frozen[key] = torch.cat([encode(images) for images in self.views(method)])
        return self._frozen[key]

    def random_view(self, method: Method, k: int, crop: Crop) -> Tensor:
        """The same of a random view of each image, [n, D]: the one of :class:`TrainingViews` in its epoch k.

        It does not depend on the method: heads that fit on the same images share it.
        """
        key = made_by(method), k, crop
        if key not in self._random:
            self._random[key] = torch.cat([*self._pooled_view(method, k, crop)])
        return self._random[key]

    def _pooled_view(self, method: Method, k: int, crop: Crop) -> Iterator[Tensor]:
        backbone = method.backbone

        def view(i: int) -> Tensor:
            image = self.reader.image(self.images[i])
            region = drawn_region(image, view_rng(crop.seed, k, i), crop.min_scale, crop.flip)
            return backbone.preprocess.region(image, region)

        numbers = range(len(self.images))
        for _, images in self.reader.batches(view, [numbers[i : i + AT_ONCE] for i in numbers[::AT_ONCE]]):
            yield backbone.pool_images(images)

    def views(self, method: Method) -> Iterator[Tensor]:
        """Evaluation views for the method's backbone, [B, 3, S, S] at a time."""
        return evaluation_batches(self.images, method.backbone.preprocess, self.reader)


def made_by(method: Method) -> str:
    """The frozen model that features come from, by weights and precision."""
    return f"{method.backbone.fingerprint} {method.backbone.dtype}"


def predict_logits(method: Method, images: EvaluationImages, class_names: Sequence[str]) -> Tensor:
    """The method's logits of images for any class names: [n, C], on the CPU.

    Raises VlpromptError where they are not finite: no class could be named.
    """
    logits = torch.cat([method.predict(x, class_names).cpu() for x in images.read_by(method)])
    if not logits.isfinite().all():
        raise VlpromptError(
            f"logits of {method.name} are not finite: its prompts, or {method.backbone.name}, are damaged"
        )
    return logits


def predict_spread(
    method: Method, images: EvaluationImages, class_names: Sequence[str], scale: Tensor | None = None
) -> Tensor | None:
    """How far each class's probability moves with what the method leaves open, [n, C]; None where that is nothing.

    ``scale`` [n] is what calibration multiplies logits by.
    """
    if not method.has_spread:
        return None
    found: list[Tensor] = []
    for x in images.read_by(method):
        done = sum(map(len, found))
        found.append(method.spread(x, class_names, None if scale is None else scale[done : done + len(x)]).cpu())
    return torch.cat(found)


@dataclass(frozen=True)
class Evaluation:
    """What ``vlprompt evaluate`` reports."""

    accuracy: float
    """Percent."""
    n: int
    """Images."""
    classes: tuple[str, ...]
    per_class: dict[str, float]
    """Percent, for the classes that have images; classes that share a name have their number after it."""
    calibration_error: float
    """Expected calibration error, 0 to 1, over 15 equal bins of confidence (Guo et al., 2017)."""
    confusion: tuple[tuple[int, int, int], ...] = ()
    """(class, predicted class, images), by index into ``classes``, where there are any: a sparse confusion matrix."""

    @property
    def macro_accuracy(self) -> float:
        """Percent: the mean of the classes' accuracies."""
        return sum(self.per_class.values()) / len(self.per_class)

    def metrics(self) -> dict[str, Any]:
        """``macro_accuracy``, ``precision``, ``recall`` and ``f1``: means over the classes with images, in percent.

        ``by_class`` has the same of each of these, and its ``n`` images. A class that no image is taken for has
        precision 0. A class's recall is its accuracy, so the mean recall is the macro accuracy.
        """
        hits, truth, predicted = Counter[int](), Counter[int](), Counter[int]()
        for c, p, n in self.confusion:
            hits[c] += n * (c == p)
            truth[c] += n
            predicted[p] += n
        by_class = {
            name: {
                "n": truth[c],
                "precision": 100 * hits[c] / max(predicted[c], 1),
                "recall": self.per_class[name],
                "f1": 200 * hits[c] / (truth[c] + predicted[c]),
            }
            for c, name in zip(sorted(truth), self.per_class, strict=True)
        }
        means = {k: fmean(row[k] for row in by_class.values()) for k in ("precision", "recall", "f1")}
        return {"macro_accuracy": self.macro_accuracy, **means, "by_class": by_class}

    def to_dict(self) -> dict[str, Any]:
        """Its fields as JSON values, but the confusion matrix."""
        return {k: v for k, v in vars(self).items() if k != "confusion"} | {"classes": list(self.classes)}


def evaluate(method: Method, images: EvaluationImages, class_names: Sequence[str]) -> Evaluation:
    """Evaluate on images labelled by index into ``class_names``, which need not be those trained on."""
    return score(predict_logits(method, images, class_names), images.labels, class_names)


def score(logits: Tensor, labels: Tensor, class_names: Sequence[str]) -> Evaluation:
    """Accuracy and calibration of logits [n, C] against labels [n]."""
    confidence, predicted = logits.double().softmax(-1).max(-1)
    right = (predicted == labels).double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    twice = repeated(class_names)
    distinct = [f"{name} (class {c})" if name in twice else name for c, name in enumerate(class_names)]
    gap = torch.zeros(BINS, dtype=torch.double).index_add(0, bins, right - confidence)
    count = torch.bincount(labels, minlength=len(class_names))
    hits = torch.zeros(len(class_names), dtype=torch.double).index_add(0, labels, right)
    width = logits.shape[1]  # one number a pair: unique rows take ten times as long
    pairs, times = (labels * width + predicted).unique(return_counts=True)
    return Evaluation(
        accuracy=100 * right.mean().item(),
        n=len(labels),
        classes=tuple(class_names),
        per_class={name: 100 * (hits[c] / count[c]).item() for c, name in enumerate(distinct) if count[c]},
        calibration_error=(gap.abs().sum() / len(labels)).item(),
        confusion=tuple(
            (c, p, n)
            for c, p, n in zip((pairs // width).tolist(), (pairs % width).tolist(), times.tolist(), strict=True)
        ),
    )


def harmonic_mean(base: float, novel: float) -> float:
    """2·base·novel / (base + novel), 0 if both are 0."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0
