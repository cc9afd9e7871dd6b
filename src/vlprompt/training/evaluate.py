"""Accuracy per class and overall, and calibration, of a method on images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlprompt.data.images import ImageSource
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import repeated
from vlprompt.data.views import evaluation_batches
from vlprompt.methods import Method

BINS = 15
TEXTS_AT_ONCE = 2000  # class texts encoded together where each image has its own (CoCoOp)


class EvaluationImages:
    """Images to evaluate on; features of the frozen image tower are computed once and remembered.

    Labels are read where accuracy is measured only.
    """

    def __init__(
        self,
        images: Sequence[ImageSource],
        labels: Sequence[int] = (),
        workers: int = 2,
        reader: ImageReader | None = None,
    ) -> None:
        self.images, self.labels, self.workers, self.reader = images, torch.tensor(labels), workers, reader
        self._frozen: dict[str, Tensor] = {}

    def features(self, method: Method) -> Iterator[Tensor]:
        """Normalised features with the method's visual prompts, [B, E] at a time."""
        if method.prompts_images:
            for images in self.views(method):
                yield method.encode_images(images)
            return
        yield self.frozen(method)

    def frozen(self, method: Method) -> Tensor:
        """Normalised features from the frozen image tower, [n, E]."""
        key = f"{method.backbone.fingerprint} {method.backbone.dtype}"
        if key not in self._frozen:
            self._frozen[key] = torch.cat([method.backbone.encode_images(images) for images in self.views(method)])
        return self._frozen[key]

    def views(self, method: Method) -> Iterator[Tensor]:
        """Evaluation views for the method's backbone, [B, 3, S, S] at a time."""
        return evaluation_batches(self.images, method.backbone.preprocess, workers=self.workers, reader=self.reader)


@torch.no_grad()
def predict_logits(method: Method, features: Iterator[Tensor], class_names: Sequence[str]) -> Tensor:
    """Logits of image features for any class names: [n, C], on the CPU."""
    names = tuple(class_names)
    if not method.image_dependent:
        t = method.class_features(names)
        return torch.cat([method.logits(v, t).cpu() for v in features])
    step = max(TEXTS_AT_ONCE // len(names), 1)
    parts = [part for v in features for part in v.split(step)]
    return torch.cat([method.logits(v, method.class_features(names, v)).cpu() for v in parts])


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

    def to_dict(self) -> dict[str, Any]:
        """What the command line prints, as JSON values."""
        return {k: v for k, v in vars(self).items() if k != "confusion"} | {"classes": list(self.classes)}


def evaluate(method: Method, images: EvaluationImages, class_names: Sequence[str]) -> Evaluation:
    """Evaluate on images labelled by index into ``class_names``, which need not be those trained on."""
    logits, labels = predict_logits(method, images.features(method), class_names), images.labels
    return score(logits, labels, class_names)


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
    pairs, times = torch.stack([labels, predicted], 1).unique(dim=0, return_counts=True)
    return Evaluation(
        accuracy=100 * right.mean().item(),
        n=len(labels),
        classes=tuple(class_names),
        per_class={name: 100 * (hits[c] / count[c]).item() for c, name in enumerate(distinct) if count[c]},
        calibration_error=(gap.abs().sum() / len(labels)).item(),
        confusion=tuple((c, p, n) for (c, p), n in zip(pairs.tolist(), times.tolist(), strict=True)),
    )


def harmonic_mean(base: float, novel: float) -> float:
    """2·base·novel / (base + novel), 0 if both are 0."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0
