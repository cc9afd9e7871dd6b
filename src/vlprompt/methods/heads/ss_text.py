"""SS-Text (Silva-Rodríguez et al., 2025): class weights in closed form, from image features and class names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlprompt.backbones.backbone import unit
from vlprompt.methods.base import Can, MethodConfig
from vlprompt.methods.heads.common import Head
from vlprompt.methods.registry import register

LEAST = 1e-3
"""What the official code keeps λ above: from 1000 images on, image features weigh no more."""


@register("ss_text")
class SSText(Head):
    """w_c = V_c / (N λ_c) + t_c with V_c = s Σ v of the images of c; logits = s · v̂ · ŵ_c.

    ``ss_text``: λ = 1/N. ``ss_text_plus``: λ_c = 1/n_c, and w_c moves by a unit vector along the mean of the weights
    minus 2 w_c, as the official code does it. A class without images keeps t_c. Official code: jusiro/SS-Text,
    ``solvers/sstext.py``: no steps, no augmentation, no validation images.
    """

    paper, year, learns = "Silva-Rodríguez et al., IPMI", 2025, "class weights, in closed form"
    fixes_views = False

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of ss_text."""

        balanced: bool = True
        """λ is 1/N for all classes instead of 1/n_c."""
        repel: bool = False
        """Whether the weights repel one another at the end."""

        @property
        def can(self) -> Can:
            """There are no steps."""
            return Can.USE_FROZEN_FEATURES | Can.EXPORT_CLASSES | Can.JOIN_CLASSES

    w: Tensor

    def build(self) -> None:
        """The weights w [C, E], those of the class names until fitted."""
        self.register_buffer("w", self.text_features(self.class_names).clone())

    def fit_features(self, features: Tensor, labels: Tensor) -> None:
        """w, from features [n, E] as they are given."""
        n, n_c = len(labels), torch.bincount(labels, minlength=len(self.class_names)).to(features)
        sums = torch.zeros_like(self.w, dtype=features.dtype).index_add(0, labels, features) * self.backbone.logit_scale
        lam = (torch.full_like(n_c, 1 / n) if self.config.balanced else 1 / n_c).clamp(min=LEAST)
        w = sums / (n * lam)[:, None] + self.text_features(self.class_names)
        self.w.copy_(w - unit(2 * w - w.mean(0)) if self.config.repel else w)

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """ŵ [C, E]; only for the classes it was fitted on."""
        self.check_classes(class_names)
        return unit(self.w)


@register("ss_text_plus")
class SSTextPlus(SSText):
    """SS-Text for classes of unlike size; see ``ss_text``."""

    @dataclass(frozen=True)
    class Config(SSText.Config):
        """Options of ss_text_plus."""

        balanced: bool = False
        """λ is 1/N for all classes instead of 1/n_c."""
        repel: bool = True
        """Whether the weights repel one another at the end."""
