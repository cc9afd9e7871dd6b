"""ZS-LP and CLAP (Silva-Rodríguez et al., CVPR 2024): a linear probe from the class names on, and kept near them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from vlprompt.backbones.backbone import unit
from vlprompt.data.batches import Batch
from vlprompt.methods.base import Can, MethodConfig, Output
from vlprompt.methods.heads.common import Head, as_views
from vlprompt.methods.registry import register


@register("zs_lp")
class ZSLP(Head):
    """Linear probe whose weights w_c start at the un-normalised text features t_c: logits = s · v̂ · ŵ_c.

    Official code: jusiro/CLAP, ``trainers/adapters.py``; 20 views of each image, of which an epoch draws as many
    samples as there are images. One setting for all data sets and shots. ``_`` in class names is a space here, as
    everywhere.
    """

    paper, year, learns = "Silva-Rodríguez et al., CVPR", 2024, "linear probe that starts at the class names"
    mixes_views = True
    official = {
        "data.views": 20,
        "data.batch_size": 256,
        "optim.name": "sgd",
        "optim.lr": 0.1,
        "optim.weight_decay": 0.0,
        "optim.warmup_epochs": 1,
        "train.epochs": 300,
    }

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of zs_lp."""

        @property
        def can(self) -> Can:
            """It reads frozen features only, and its loss is a mean over images."""
            return Can.USE_FROZEN_FEATURES | Can.SPLIT_BATCHES | Can.EXPORT_CLASSES | Can.JOIN_CLASSES

    def build(self) -> None:
        """The weights w, [C, E]."""
        self.w = nn.Parameter(self.raw_text_features().clone())

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """ŵ [C, E]; only for the classes it was fitted on."""
        self.check_classes(class_names)
        return unit(self.w)

    def features_of(self, classes: Tensor | slice, image_features: Tensor | None = None) -> Tensor:
        """Those of the classes compared."""
        return unit(self.w[classes])


@register("clap")
class CLAP(ZSLP):
    """ZS-LP with (1/C) Σ_c λ_c ‖w_c − t_c‖² added to the loss; λ = 0 is ``zs_lp``.

    λ_c is the mean zero-shot probability of c among the views of its images, computed once; it is the others' mean
    for a class without images, where the official code has NaN.
    """

    learns = "linear probe that starts at the class names, and is kept near them"

    @dataclass(frozen=True)
    class Config(ZSLP.Config):
        """Options of clap."""

        weights: Literal["zero-shot", "corrected", "constant", "corrected-constant", "balanced"] = "zero-shot"
        """λ: zero-shot probabilities of the right class, scaled to a mean of 1, their mean for all, or 1 for all."""
        adaptive: bool = False
        """Raise λ_c after each epoch by how far w_c is from t_c, as the official code's outer step does."""
        distance: Literal["l2", "cosine"] = "l2"
        """What is penalised: ‖w − t‖², or 1 − the cosine of both."""

    lam: Tensor
    rho: Tensor

    def build(self) -> None:
        """w, and what holds it back: λ, which is 0 until fitted."""
        super().build()
        self.register_buffer("lam", torch.zeros(len(self.class_names)))
        self.register_buffer("rho", torch.zeros(len(self.class_names)))

    def fit_features(self, features: Tensor, labels: Tensor) -> None:
        """λ, from the zero-shot probabilities of the views [V, n, E]."""
        weights, c = self.config.weights, len(self.class_names)
        lam = torch.ones(c, dtype=features.dtype, device=features.device)
        if weights != "balanced":
            v, y = unit(as_views(features)).flatten(0, -2), labels.repeat(len(as_views(features)))
            right = self.backbone.logits(v, unit(self.raw_text_features())).softmax(-1)[torch.arange(len(y)), y]
            lam = torch.zeros_like(lam).index_add(0, y, right.to(lam.dtype)) / torch.bincount(y, minlength=c)
            lam = torch.where(lam.isnan(), lam.nanmean(), lam)
        if weights.startswith("corrected"):
            lam = lam / lam.mean()
        if weights.endswith("constant"):
            lam = lam.mean().expand(c)
        self.lam.copy_(lam)
        self.rho.zero_()

    def regularisers(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """The distance of the weights from the class names."""
        w, t = self.w, self.raw_text_features()
        apart = (w - t).square().sum(-1) if self.config.distance == "l2" else 1 - cosine_similarity(w, t)
        return {"constraint": (self.lam * apart).mean()}

    def after_epoch(self, epoch: int, epochs: int) -> None:
        """The outer step of an augmented Lagrangian, if the weights are adaptive."""
        if self.config.adaptive:
            moved = (self.w.detach() - self.raw_text_features()).square().sum(-1)
            self.lam.add_(self.rho * moved).clamp_(min=0)
            self.rho.copy_(moved)
