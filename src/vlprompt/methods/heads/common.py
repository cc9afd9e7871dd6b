"""What heads share: un-normalised text features, classes of their own, and choosing on images held out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlprompt.data.batches import FOLDS, fold_of
from vlprompt.errors import DataError
from vlprompt.methods.base import Method, Support
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.prompting.text import check_known, fill


class Head(Method):
    """A method with a row for each of the classes it was fitted on: it takes no others."""

    parity = "golden"
    learns_prompts = False
    fixes_views = True
    grown: ClassVar[tuple[str, ...]] = ()
    """Tensors whose first size the training images decide."""
    remembers: ClassVar[bool] = False
    """Whether it keeps a feature of every training image where classes arrive in tasks."""

    @property
    def takes_new_classes(self) -> bool:
        """What it learns belongs to its classes."""
        return False

    @property
    def reads_names(self) -> bool:
        """It makes texts of its own classes' names."""
        return True

    def join(self, models: Sequence[Head]) -> None:
        """Before it answers beside models of other classes, itself among these: take over what they all share."""

    def load_inference_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over tensors whose size the training images decided."""
        for name in self.grown:
            own = getattr(self, name)
            if name in state and (own is None or state[name].shape[1:] == own.shape[1:]):
                new = torch.zeros_like(state[name], device=self.backbone.device)
                setattr(self, name, nn.Parameter(new) if isinstance(own, nn.Parameter) else new)
        super().load_inference_state(state)

    def check_classes(self, class_names: Sequence[str]) -> None:
        """Raise DataError for other classes than those it was fitted on."""
        if tuple(class_names) != self.class_names:
            raise DataError(f"{self.name} was fitted on its own classes, one row each: it cannot score others")

    def text_features(self, class_names: Sequence[str]) -> Tensor:
        """Normalised text features of the template, [C, E]."""
        return frozen_class_features(self.backbone, class_names, [self.template])

    def raw_text_features(self) -> Tensor:
        """Text features of the method's own classes as they come out of the tower, [C, E]."""

        def compute() -> Tensor:
            check_known(self.backbone, self.class_names)
            return self.backbone.encode_texts(fill(self.template, self.class_names), normalise=False)

        return self.backbone.remember((self.class_names, self.template, "raw text"), compute)


class Searched(Head):
    """A head with numbers that weigh all its classes alike, which are searched on a grid, on images held out."""

    right: Tensor | None
    """Where classes arrive in tasks: how many images held out each point of the grid tells right, [points]."""

    def points(self) -> Sequence[tuple[float, ...]]:
        """The grid."""
        raise NotImplementedError

    def take(self, point: tuple[float, ...]) -> None:
        """Weigh the classes so."""
        raise NotImplementedError

    def choose(self, right: Tensor) -> None:
        """Take the first of the points that tell the most images right, [points]; in tasks, remember what they told."""
        self._take_first_of_best(right)
        if self.in_tasks:
            self.right = right

    def join(self, models: Sequence[Head]) -> None:
        """Choose again, on what the held-out images of all say, each told from the classes of its own model."""
        if told := [model.right for model in models if isinstance(model, Searched) and model.right is not None]:
            self._take_first_of_best(torch.stack(told).sum(0))

    def _take_first_of_best(self, right: Tensor) -> None:
        self.take(self.points()[right.tolist().index(right.max())])


def as_views(features: Tensor) -> Tensor:
    """[V, n, E] of features of views, or of whole images [n, E] as a single view."""
    return features if features.ndim == 3 else features[None]


def with_images(method: Method, labels: Tensor) -> Tensor:
    """Images of each class, [C]; raises DataError naming a class that has none."""
    counts = torch.bincount(labels, minlength=len(method.class_names))
    if not counts.all():
        name = method.class_names[int(counts.argmin())]
        raise DataError(f"{method.name} cannot score class '{name}': it has no training images")
    return counts


def folds(labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Images to fit on and to choose on, [n] of booleans each; no folds if a class has one image.

    There are FOLDS, or as many as the smallest class has images.
    """
    counts = torch.bincount(labels)
    k = min(FOLDS, int(counts[counts > 0].min()))
    if k < 2:
        return
    fold = fold_of(labels, k)
    for held in range(k):
        yield fold != held, fold == held


def chosen_on(support: Support) -> str:
    """Which images a choice was made on, in words; empty if there are none."""
    if support.val:
        return f"chosen on {len(support.val[1])} val images"
    k = len(list(folds(support.labels)))
    return f"chosen by {k}-fold cross-validation on the training images" if k else ""


def text_of(values: dict[str, float], support: Support) -> str:
    """What was chosen, and on what: ``alpha = 1: chosen on 50 val images``."""
    how = chosen_on(support) or "kept, as a class has one image and there are no val images to choose on"
    return f"{', '.join(f'{name} = {value:g}' for name, value in values.items())}: {how}"
