"""ProLIP (Fahes et al., 2024): the last projection of the image tower, tuned and kept near itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vlprompt.backbones.backbone import unit
from vlprompt.data.batches import Batch
from vlprompt.errors import BackboneError
from vlprompt.methods.base import Can, Method, MethodConfig, Output, Weight
from vlprompt.methods.registry import register
from vlprompt.methods.zero_shot import frozen_class_features

SCALE = 100.0


@register("prolip")
class ProLIP(Method):
    """v = x W normalised, of what the tower gives before its projection; loss: CE + λ ‖W − W0‖².

    Official code: astra-vision/ProLIP, ``methods/ProLIP.py``. Logits are 100 · v · t whatever the backbone's scale. One
    step an epoch, on all images, in the next of 300 views; the first takes view 1. These are the settings of its
    base-to-new table; ``few-shot`` is one of the learning rates that it reports without validation. λ is 1/shots.
    """

    paper, year, learns = "Fahes et al.", 2024, "the image tower's projection"
    learns_prompts = False
    fixes_views, first_view = True, 1
    official = {
        "data.views": 300,
        "data.min_scale": 0.5,
        "data.batch_size": 1_000_000,
        "optim.name": "adam",
        "optim.lr": 1e-5,
        "optim.eps": 1e-4,
        "optim.weight_decay": 0.0,
        "optim.warmup_epochs": 0,
        "train.epochs": 300,
    }
    presets = {"few-shot": {"optim.lr": 1e-3}, "quick": {"optim.lr": 1e-3, "data.views": 20}}

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of prolip."""

        lam: Weight | Literal["1/shots", "1/shots²"] = "1/shots"
        """Weight λ of the distance from the frozen projection: a number, or from the images of a class, on average."""

        @property
        def can(self) -> Can:
            """It reads what comes before the projection, and its loss is a mean over images."""
            return Can.USE_POOLED_FEATURES | Can.SPLIT_BATCHES

    def build(self) -> None:
        """W [D, E]; raises BackboneError where the tower has no projection."""
        if not isinstance(self.backbone.image_tower.projection, nn.Linear):
            raise BackboneError(f"backbone '{self.backbone.name}' has no projection behind its image tower (prolip)")
        self.w = nn.Parameter(self.frozen().clone())

    def frozen(self) -> Tensor:
        """W0 [D, E], in fp32 at least."""
        w = self.backbone.image_tower.get_parameter("projection.weight").T
        return w.to(torch.promote_types(w.dtype, torch.float32))

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E], of any class names."""
        return frozen_class_features(self.backbone, class_names, [self.template])

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, E]"""
        return self.encode_pooled(self.backbone.pool_images(images))

    def encode_pooled(self, pooled: Tensor) -> Tensor:
        """x W [B, E], normalised; a ResNet's frozen bias is added before that."""
        bias = getattr(self.backbone.image_tower.projection, "bias", None)
        features = pooled.to(self.w.dtype) @ self.w
        return unit(features if bias is None else features + bias.to(features.dtype))

    def logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """100 · v · tᵀ."""
        return SCALE * image_features @ class_features.T

    def regularisers(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """The squared distance from the frozen projection."""
        return {"distance": self.lam * (self.w - self.frozen()).square().sum()}

    @property
    def lam(self) -> float:
        """λ; where it follows from the shots, those of one image a class until training begins."""
        lam, shots = self.config.lam, self.images_per_class
        return lam if isinstance(lam, float) else 1 / shots if lam == "1/shots" else 1 / shots**2
