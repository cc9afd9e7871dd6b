"""LP++ (Huang et al., CVPR 2024): a linear probe mixed with text logits, its step sizes computed from the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from vlprompt.backbones.backbone import unit
from vlprompt.methods.base import Can, Count, MethodConfig, Support
from vlprompt.methods.heads.common import Head, as_views, chosen_on, folds, with_images
from vlprompt.methods.registry import register

MOMENTUM = 0.9
EVERY = 10
"""Epochs from one step of α to the next."""


class Probe(NamedTuple):
    """W [C, E], b [C] and α [C] after an epoch."""

    w: Tensor
    b: Tensor
    alpha: Tensor

    def logits(self, v: Tensor, t: Tensor) -> Tensor:
        """[B, C]"""
        return v @ self.w.T + self.b + self.alpha * (v @ t.T)


@register("lp_plus_plus")
class LPPlusPlus(Head):
    """logits = v Wᵀ + b + α_c (v · t_c), without the backbone's scale.

    Official code: FereshteShakeri/FewShot-CLIP-Strong-Baseline, ``methods/linear_probe_p2.py``. All images in each of
    300 steps, of one augmented view each; steps of 4N / λ_max(FᵀF) with momentum for W and b, and of N / (4 max_c Σ
    (v·t_c)²) every 10th epoch for α, along the sum of all gradients so far: the official code never resets it. The
    epoch is the one with the best accuracy on val images, the last of equals; without them, by cross-validation, else
    the last.
    """

    paper, year, learns = "Huang et al., CVPR", 2024, "linear classifier, mixed with text logits"
    official = {"data.views": 1, "data.min_scale": 0.5}

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of lp_plus_plus."""

        epochs: Count = 300
        """Steps, on all images each."""

        @property
        def can(self) -> Can:
            """It takes steps of its own."""
            return Can.USE_FROZEN_FEATURES | Can.EXPORT_CLASSES | Can.JOIN_CLASSES

    w: Tensor
    b: Tensor
    alpha: Tensor

    def build(self) -> None:
        """W and α, zero until fitted, and b as nn.Linear starts."""
        c, e = len(self.class_names), self.backbone.embed_dim
        self.register_buffer("w", torch.zeros(c, e))
        self.register_buffer("b", nn.Linear(e, c).bias.detach())
        self.register_buffer("alpha", torch.zeros(c))

    @property
    def minimises_a_loss(self) -> bool:
        """By steps of its own."""
        return True

    def fit_features(self, features: Tensor, labels: Tensor) -> None:
        """Where the steps begin; every class needs an image."""
        with_images(self, labels)
        self._take(self.start(unit(as_views(features)).flatten(0, -2), labels.repeat(len(as_views(features)))))

    def finish(self, support: Support) -> str:
        """Take the steps, as many as are best on the val images or by cross-validation."""
        v, y = unit(support.views).flatten(0, -2), support.labels.repeat(len(support.views))
        last = self.config.epochs
        right = [0] * last
        for fit, held in () if support.val else folds(support.labels):
            rows, images = fit.repeat(len(support.views)), (support.whole[held], support.labels[held])
            right = [
                n + self._right(probe, *images) for n, probe in zip(right, self.descend(v[rows], y[rows]), strict=True)
            ]
        best, most = 0, -1
        for epoch, probe in enumerate(self.descend(v, y)):
            n = self._right(probe, *support.val) if support.val else right[epoch]
            if n >= most:
                best, most = epoch, n
                self._take(probe)
        how = chosen_on(support) or "the last one, as a class has one image and there are no val images"
        return f"epoch {best + 1} of {last}: {how}"

    def start(self, v: Tensor, y: Tensor) -> Probe:
        """Class sums, b, and α of 250 times the mean similarity of images and their class."""
        c, counts = len(self.class_names), torch.bincount(y, minlength=len(self.class_names))
        own = (v * self.text_features(self.class_names)[y]).sum(-1).double()
        mean = torch.zeros(c, dtype=torch.double, device=v.device).index_add(0, y, own) / counts
        w = torch.zeros(c, v.shape[1], dtype=v.dtype, device=v.device).index_add(0, y, v)
        return Probe(w, self.b.to(v.dtype), (250 * mean.mean()).to(v.dtype).expand(c))

    def steps(self, v: Tensor) -> tuple[float, float]:
        """Step sizes of W and b, and of α."""
        f, s = v.double(), (v @ self.text_features(self.class_names).T).double()
        return 4 * len(v) / torch.linalg.eigvalsh(f.T @ f)[-1].item(), len(v) / (4 * s.square().sum(0).max().item())

    def descend(self, v: Tensor, y: Tensor) -> Iterator[Probe]:
        """The probe after each epoch on normalised features v [N, E]."""
        (w, b, alpha), (rate, alpha_rate) = self.start(v, y), self.steps(v)
        s, target = v @ self.text_features(self.class_names).T, one_hot(y, len(self.class_names)).to(v.dtype)
        prior = 0 if self.log_prior is None else self.log_prior
        pace_w, pace_b, pull = torch.zeros_like(w), torch.zeros_like(b), torch.zeros_like(alpha)
        for epoch in range(self.config.epochs):
            slope = ((v @ w.T + b + alpha * s + prior).softmax(-1) - target) / len(v)
            pace_w, pace_b = MOMENTUM * pace_w + slope.T @ v, MOMENTUM * pace_b + slope.sum(0)
            pull = pull + (slope * s).sum(0)
            w, b = w - rate * pace_w, b - rate * pace_b
            if (epoch + 1) % EVERY == 0:
                alpha = alpha - alpha_rate * pull
            yield Probe(w, b, alpha)

    def _right(self, probe: Probe, v: Tensor, y: Tensor) -> int:
        return int((probe.logits(v, self.text_features(self.class_names)).argmax(-1) == y).sum())

    def _take(self, probe: Probe) -> None:
        for name, value in probe._asdict().items():
            setattr(self, name, value.clone())

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """W + α t [C, E] (not normalised); only for the classes it was fitted on."""
        self.check_classes(class_names)
        return self.w + self.alpha[:, None] * self.text_features(self.class_names)

    def logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """v (W + α t)ᵀ + b: [B, C]."""
        return image_features @ class_features.T + self.b

    def scale_and_bias(self) -> tuple[Tensor, Tensor]:
        """1 and b."""
        return torch.ones(()), self.b
