"""CLIP-Adapter (Gao et al., IJCV 2024): a bottleneck on image features, mixed with the features themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le
from torch import Tensor, nn

from vlprompt.backbones.backbone import unit
from vlprompt.methods.base import Can, Count, Method, MethodConfig
from vlprompt.methods.registry import register
from vlprompt.methods.zero_shot import frozen_class_features


@register("clip_adapter")
class CLIPAdapter(Method):
    """v' = r A(v) + (1 − r) v, then normalised; A = ReLU U ReLU D without biases.

    A scales with its input, so that normalised v give what the official code computes of un-normalised ones.
    Official code: gaopengcuhk/CLIP-Adapter, ``clip_adapter.py``, run with CoOp's command for ImageNet, which draws a
    new crop of every image in each epoch; here 20 crops take turns (``views=random`` draws new ones). Few-shot: CoOp's
    number of epochs for 8 and 16 shots. The paper's search of r for each data set is not in its code.
    """

    paper, year, learns = "Gao et al., IJCV", 2024, "a bottleneck on image features"
    learns_prompts = False
    fixes_views = True
    official = {
        "data.views": 20,
        "data.batch_size": 32,
        "optim.lr": 0.002,
        "optim.weight_decay": 5e-4,
        "optim.warmup_epochs": 1,
        "train.epochs": 50,
    }
    presets = {"few-shot": {"train.epochs": 200}}

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of clip_adapter."""

        ratio: Annotated[float, Ge(0), Le(1)] = 0.2
        """Share of the adapter's output in the features."""
        reduction: Count = 4
        """Width of the features over that of the bottleneck."""

        @property
        def can(self) -> Can:
            """It reads frozen features only, and its loss is a mean over images."""
            return Can.USE_FROZEN_FEATURES | Can.SPLIT_BATCHES

    def build(self) -> None:
        """The bottleneck, as nn.Linear starts."""
        e = self.backbone.embed_dim
        narrow = max(e // self.config.reduction, 1)
        self.fc = nn.Sequential(
            nn.Linear(e, narrow, bias=False), nn.ReLU(), nn.Linear(narrow, e, bias=False), nn.ReLU()
        )

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E], of any class names: the adapter is the same for all."""
        return frozen_class_features(self.backbone, class_names, [self.template])

    def adapt(self, image_features: Tensor) -> Tensor:
        """v' [B, E]."""
        v, r = image_features.to(self.get_parameter("fc.0.weight").dtype), self.config.ratio
        return unit(r * self.fc(v) + (1 - r) * v)
