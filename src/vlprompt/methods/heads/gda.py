"""Gaussian discriminant analysis (Wang et al., ICLR 2024): class means and one covariance, beside the class names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from vlprompt.backbones.backbone import unit
from vlprompt.data.splits import find_classes
from vlprompt.errors import DataError
from vlprompt.methods.base import Can, Count, MethodConfig, Support, Weight
from vlprompt.methods.heads.common import Head, Searched, as_views, folds, text_of, with_images
from vlprompt.methods.registry import register

SCALE = 100.0
GRID = tuple(10.0**i for i in range(-4, 3))
START = 0.1


@register("gda")
class GDA(Searched):
    """logits = 100 v · t + α (v W + b) with W = P μᵀ, b_c = log(1/C) − μ_c P μ_c / 2, whatever the classes' sizes.

    Official code: mrflogs/ICLR24. Every one of 10 views is a sample; μ_c is the mean of a class. ``shrunk`` is its
    few-shot script, P = E ((n − 1) S + tr(S) I)⁻¹; ``mean`` its base-to-new script, P the pseudo-inverse of the
    classes' mean covariance. α is the first of the best of 10⁻⁴ … 100 on the val images (officially on the test images
    of ImageNet); where there are none, by cross-validation; else 0.1.

    New class names: each takes the ``k`` nearest samples of the known classes and ``text_copies`` of its text feature
    for its mean, and their spread around the text for its covariance; the mean of the new classes' P is P. Known names
    keep their row; officially known and new are never scored together, here they may be.

    Where classes arrive in tasks, no sample is kept: means, counts and scatter are, and add up, so that the tasks'
    models side by side are the model of all classes at once, but for α: the best for the held-out images of all tasks,
    each told from the classes of its own.
    """

    paper, year, learns = "Wang et al., ICLR", 2024, "class means and a covariance"
    official = {"data.views": 10, "data.min_scale": 0.5}
    presets = {"base-to-novel": {"method.covariance": "mean"}, "imagenet": {"data.min_scale": 0.08}}
    grown = ("support", "mu", "scatter", "n", "right")

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of gda."""

        alpha: Weight | None = None
        """Weight of the Gaussian classifier; chosen on images held out if not given."""
        covariance: Literal["shrunk", "mean"] = "shrunk"
        """Shrunk covariance of all samples around their class, or the mean of the classes' own."""
        k: Annotated[int, Ge(0)] = 64
        """Samples that stand for a new class; 0 for a smaller model that takes no new classes."""
        text_copies: Count = 16
        """Times that a new class's text counts in its mean."""

        @property
        def can(self) -> Can:
            """There are no steps."""
            return Can.USE_FROZEN_FEATURES | Can.JOIN_CLASSES

    support: Tensor
    mu: Tensor | None
    """The classes' means [C, E], in tasks alone, as the next two: their ``scatter`` [E, E], of n samples [1]."""
    w: Tensor
    b: Tensor
    alpha: Tensor

    def build(self) -> None:
        """A classifier that says nothing until fitted."""
        c, e = len(self.class_names), self.backbone.embed_dim
        for name in self.grown:
            self.register_buffer(name, torch.zeros(0, e) if name == "support" else None)
        self.register_buffer("w", torch.zeros(c, e))
        self.register_buffer("b", torch.zeros(c))
        self.register_buffer("alpha", torch.tensor(START if self.config.alpha is None else float(self.config.alpha)))

    @property
    def takes_new_classes(self) -> bool:
        """By its rule for them, if it keeps its samples."""
        return self.config.k > 0 and self.mu is None

    def fit_features(self, features: Tensor, labels: Tensor) -> None:
        """W and b, from views [V, n, E] or whole images [n, E]."""
        with_images(self, labels)
        views = unit(as_views(features))
        x, y = views.flatten(0, -2), labels.repeat(len(views))
        if self.in_tasks:
            mu, scatter = self.sums(x, y)
            self.mu, self.scatter, self.n = mu.float(), scatter.float(), torch.tensor([float(len(x))]).to(x.device)
        elif self.config.k:
            self.support = x
        w, b = self.classifier(x, y)
        self.w.copy_(w)
        self.b.copy_(b)

    def join(self, models: Sequence[Head]) -> None:
        """Also the scatter of all their classes' samples."""
        super().join(models)
        assert self.mu is not None
        n, scatter = (torch.stack([m.get_buffer(name).double() for m in models]).sum(0) for name in ("n", "scatter"))
        c = sum(len(model.class_names) for model in models)
        w, b = _discriminant(self.mu.double(), self.precision(scatter, int(n), c), c)
        self.w.copy_(w)
        self.b.copy_(b)

    def classifier(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """W [C, E] and b [C] of normalised samples x [N, E] of classes y [N]; computed in float64."""
        mu, scatter = self.sums(x, y)
        return _discriminant(mu, self.precision(scatter, len(x), len(mu)), len(mu))

    def sums(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The classes' means [C, E], and the sum over samples, or over the classes' covariances, [E, E]."""
        c, e, x64 = len(self.class_names), x.shape[1], x.double()
        n = torch.bincount(y, minlength=c)
        mu = torch.zeros(c, e, dtype=torch.double, device=x.device).index_add(0, y, x64) / n[:, None]
        around = x64 - mu[y]
        if self.config.covariance == "mean":
            around = around / (n - 1).clamp(min=1).sqrt()[y, None]
        return mu, around.T @ around

    def precision(self, scatter: Tensor, n: int, c: int) -> Tensor:
        """P [E, E], from the sum over n samples of c classes."""
        e = len(scatter)
        if self.config.covariance == "shrunk":
            return _inverse(scatter, scatter.trace() / max(n - 1, 1), e)  # (n − 1) S
        # What a pseudo-inverse in fp32, as the official one, takes for zero.
        return torch.linalg.pinv(scatter / c, rtol=e * torch.finfo(torch.float32).eps, hermitian=True)

    def new_classifier(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """W [K, E] and b [K] of new classes, from their text features t [K, E]."""
        k = min(self.config.k, len(self.support))
        if k < 2:
            raise DataError(f"{self.name} was not fitted: it has no samples to stand for new classes")
        x = self.support[(t.to(self.support.dtype) @ self.support.T).topk(k).indices].double()  # [K, k, E]
        t = t.double()
        mu = (x.sum(1) + self.config.text_copies * t) / (k + self.config.text_copies)
        p = torch.zeros(t.shape[1], t.shape[1], dtype=torch.double, device=t.device)
        for near, text in zip(x, t, strict=True):
            around = near - text
            p += _inverse(scatter := around.T @ around, scatter.trace() / (k - 1), t.shape[1])
        return _discriminant(mu, p / len(t), len(t))

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """Rows 100 t + α W, with α b behind: [C, E + 1], of any class names."""
        t = self.text_features(class_names)
        if tuple(class_names) == self.class_names:
            return self._rows(t, self.w, self.b)
        if not self.takes_new_classes:
            self.check_classes(class_names)
        found = find_classes(class_names, self.class_names)
        rows = torch.tensor([-1 if c is None else c for c in found], device=t.device)
        w, b = self.w[rows], self.b[rows]
        if (new := rows < 0).any():
            new_w, new_b = self.new_classifier(t[new])
            w[new], b[new] = new_w.to(w.dtype), new_b.to(b.dtype)
        return self._rows(t, w, b)

    def _rows(self, t: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.cat([SCALE * t + self.alpha * w, self.alpha * b[:, None]], 1)

    def logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """[B, C]"""
        return image_features @ class_features[:, :-1].T + class_features[:, -1]

    def points(self) -> Sequence[tuple[float, ...]]:
        """α."""
        return [(alpha,) for alpha in GRID]

    def take(self, point: tuple[float, ...]) -> None:
        """α."""
        self.alpha.fill_(point[0])

    def finish(self, support: Support) -> str | None:
        """Choose α."""
        if self.config.alpha is not None:
            return None
        t = SCALE * self.text_features(self.class_names)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []  # what the text and the Gaussians say, and what is right
        if support.val:
            v, y = support.val
            parts.append((v @ t.T, v @ self.w.T + self.b, y))
        else:
            x = unit(support.views)
            for fit, held in folds(support.labels):
                w, b = self.classifier(x[:, fit].flatten(0, 1), support.labels[fit].repeat(len(x)))
                v, y = support.whole[held], support.labels[held]
                parts.append((v @ t.T, v @ w.to(v.dtype).T + b.to(v.dtype), y))
        if parts:
            text, own, y = (torch.cat(each) for each in zip(*parts, strict=True))
            self.choose(torch.stack([((text + alpha * own).argmax(-1) == y).sum() for alpha in GRID]))
        return text_of({"alpha": self.alpha.item()}, support)


def _inverse(scatter: Tensor, shrinkage: Tensor, e: int) -> Tensor:
    """E (scatter + shrinkage · I)⁻¹; the pseudo-inverse where samples do not differ at all."""
    return e * torch.linalg.pinv(scatter + shrinkage * torch.eye(e).to(scatter), hermitian=True)


def _discriminant(mu: Tensor, p: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """W [C, E] and b [C] of means [C, E] and a shared inverse covariance [E, E], each of c classes as probable."""
    w = mu @ p
    return w, -log(c) - (w * mu).sum(-1) / 2
