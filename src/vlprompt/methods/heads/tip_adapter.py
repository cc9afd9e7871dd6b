"""Tip-Adapter (Zhang et al., ECCV 2022): a cache of training features that votes beside the class names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn
from torch.nn.functional import one_hot

from vlprompt.backbones.backbone import unit
from vlprompt.methods.base import Can, Count, MethodConfig, Support, Weight
from vlprompt.methods.heads.common import Searched, as_views, folds, text_of
from vlprompt.methods.registry import register

SCALE = 100.0
Positive = Annotated[float, Gt(0)]
STARTS = {  # α to start with, and how far β and α are searched
    "imagenet": (1.17, 7, 3),
    "caltech101": (3, 12, 5),
    "dtd": (2, 13, 13),
    "eurosat": (2, 12, 10),
    "fgvc_aircraft": (5, 30, 30),
    "food101": (1.17, 10, 10),
    "oxford_flowers": (10, 50, 50),
    "oxford_pets": (1.17, 7, 3),
    "stanford_cars": (3, 20, 10),
    "sun397": (1.17, 12, 10),
    "ucf101": (3, 7, 3),
}
"""The official settings of each data set, which are presets here."""


@register("tip_adapter")
class TipAdapter(Searched):
    """logits = 100 v · t + α exp(−β (1 − v · K)) V: keys K of the training images, values V their labels, one-hot.

    Official code: gaopengcuhk/Tip-Adapter. Keys are features averaged over 10 views, then normalised. α and β are
    searched on a grid, as there on the whole val split (there on the test images of ImageNet); where there is none, by
    cross-validation; else they stay. Where classes arrive in tasks, they are the best for the held-out images of all
    tasks, each told from the classes of its own. New class names are not taken: the cache has nothing of them.
    """

    paper, year, learns = "Zhang et al., ECCV", 2022, "nothing: a cache of training features"
    official = {"data.views": 10, "data.min_scale": 0.5}
    presets = {
        name: {"method.alpha": alpha, "method.most_beta": beta, "method.most_alpha": most}
        for name, (alpha, beta, most) in STARTS.items()
    }
    grown = ("keys", "labels", "right")
    remembers = True

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of tip_adapter."""

        alpha: Weight = 1.17
        """Weight of the cache, to start with."""
        beta: Weight = 1.0
        """Sharpness of the cache, to start with."""
        search: bool = True
        """Whether alpha and beta are chosen on images held out."""
        most_beta: Positive = 7.0
        """End of the grid of beta, which begins at 0.1."""
        most_alpha: Positive = 3.0
        """End of the grid of alpha, which begins at 0.1."""
        steps_beta: Count = 200
        """Values of beta on the grid."""
        steps_alpha: Count = 20
        """Values of alpha on the grid."""

        @property
        def can(self) -> Can:
            """It reads frozen features only; where there are steps, their loss is a mean over images."""
            return Can.USE_FROZEN_FEATURES | Can.SPLIT_BATCHES | Can.JOIN_CLASSES

    keys: Tensor
    labels: Tensor
    alpha: Tensor
    beta: Tensor

    def build(self) -> None:
        """An empty cache."""
        self.register_buffer("keys", torch.zeros(0, self.backbone.embed_dim))
        self.register_buffer("labels", torch.zeros(0))
        self.register_buffer("right", None)
        self.register_buffer("alpha", torch.tensor(float(self.config.alpha)))
        self.register_buffer("beta", torch.tensor(float(self.config.beta)))

    def fit_features(self, features: Tensor, labels: Tensor) -> None:
        """Fill the cache."""
        self.keys, self.labels = unit(as_views(features).mean(0)), labels.to(features.dtype)

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """Text features [C, E]; only of the classes in the cache."""
        self.check_classes(class_names)
        return self.text_features(class_names)

    def logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """[B, C]"""
        votes = torch.exp(-(self.beta - self.beta * image_features @ self.keys.T)) @ self.values(self.labels)
        return SCALE * image_features @ class_features.T + self.alpha * votes

    def values(self, labels: Tensor) -> Tensor:
        """V, [n, C]."""
        return one_hot(labels.long(), len(self.class_names)).to(self.keys.dtype)

    def finish(self, support: Support) -> str | None:
        """Choose α and β."""
        if not self.config.search:
            return None
        if support.val:
            v, y = support.val
            self._search([(v @ self.keys.T, self.labels)], v, y)
        elif parts := list(folds(support.labels)):
            mean, v, y = support.views.mean(0), support.whole, support.labels
            held = torch.cat([held.nonzero()[:, 0] for _, held in parts])
            near = [(v[held] @ unit(mean[fit]).T, y[fit]) for fit, held in parts]
            self._search(near, v[held], y[held])
        return text_of({"alpha": self.alpha.item(), "beta": self.beta.item()}, support)

    def points(self) -> Sequence[tuple[float, ...]]:
        """β and α, all α of a β after each other."""
        c = self.config
        betas = (0.1 + i * (c.most_beta - 0.1) / c.steps_beta for i in range(c.steps_beta))
        alphas = [0.1 + j * (c.most_alpha - 0.1) / c.steps_alpha for j in range(c.steps_alpha)]
        return [(beta, alpha) for beta in betas for alpha in alphas]

    def take(self, point: tuple[float, ...]) -> None:
        """β and α."""
        self.beta.fill_(point[0])
        self.alpha.fill_(point[1])

    @torch.no_grad()
    def _search(self, near: Sequence[tuple[Tensor, Tensor]], v: Tensor, y: Tensor) -> None:
        """Choose on images v [m, E], near to some caches of keys with these labels."""
        text = SCALE * v @ self.text_features(self.class_names).T
        values, right = [self.values(labels) for _, labels in near], []
        for beta, points in groupby(self.points(), itemgetter(0)):
            votes = torch.cat([(beta * s - beta).exp_() @ own for (s, _), own in zip(near, values, strict=True)])
            right += [((text + alpha * votes).argmax(-1) == y).sum() for _, alpha in points]
        self.choose(torch.stack(right))


@register("tip_adapter_f")
class TipAdapterF(TipAdapter):
    """Tip-Adapter whose keys are learned, at the α and β to start with; these are searched again afterwards.

    The official code keeps the epoch that is best on the test images; here it is the first of the best on the val
    images, or the last one where there are none, and α and β then stay those that the keys were learned with. Its crops
    are new in each epoch; here the 10 of the cache take turns.
    """

    learns = "the keys of a cache of training features"
    keeps_best = True
    official = {
        **TipAdapter.official,
        "data.batch_size": 256,
        "optim.name": "adamw",
        "optim.lr": 1e-3,
        "optim.eps": 1e-4,
        "optim.weight_decay": 0.01,
        "optim.warmup_epochs": 0,
        "optim.every_step": True,
        "train.epochs": 20,
    }
    presets = {**TipAdapter.presets, "eurosat": {**TipAdapter.presets["eurosat"], "train.epochs": 100}}

    @dataclass(frozen=True)
    class Config(TipAdapter.Config):
        """Options of tip_adapter_f."""

    def build(self) -> None:
        """An empty cache, whose keys are learned."""
        super().build()
        del self.keys
        self.keys = nn.Parameter(torch.zeros(0, self.backbone.embed_dim))

    def fit_features(self, features: Tensor, labels: Tensor) -> None:
        """Fill the cache."""
        self.keys, self.labels = nn.Parameter(unit(as_views(features).mean(0))), labels.to(features.dtype)

    def finish(self, support: Support) -> str | None:
        """Choose α and β for the learned keys, on val images."""
        if support.val or not self.config.search:
            return super().finish(support)
        return (
            f"alpha = {self.alpha:g}, beta = {self.beta:g}, last epoch: kept, as there are no val images to choose on"
        )
