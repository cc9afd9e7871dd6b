"""Task residuals (Yu et al., CVPR 2023): a learned vector added to each frozen class feature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlprompt.backbones.backbone import unit
from vlprompt.methods.base import Can, MethodConfig
from vlprompt.methods.heads.common import Head
from vlprompt.methods.registry import register


@register("task_res")
class TaskRes(Head):
    """w_c = t_c + α x_c with t_c un-normalised and x = 0 at the start; logits = s · v̂ · ŵ_c.

    Official code: geekyutao/TaskRes, ``trainers/taskres.py``, regular base. It draws a new crop of every image in each
    of 200 epochs (100 for 1 to 4 shots); here 20 crops of each take turns, so that the tower sees them once
    (``views=random`` draws new ones). On ImageNet it averages 8 templates; here the data set's one is used.
    """

    paper, year, learns = "Yu et al., CVPR", 2023, "a residual for each class feature"
    official = {
        "data.views": 20,
        "data.batch_size": 256,
        "optim.name": "adam",
        "optim.lr": 2e-3,
        "optim.weight_decay": 5e-4,
        "optim.warmup_epochs": 1,
        "train.epochs": 200,
    }
    presets = {
        "few-shot": {"train.epochs": 100},
        "oxford_flowers": {"method.alpha": 1.0},
        "imagenet": {"optim.lr": 2e-4},
    }

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of task_res."""

        alpha: float = 0.5
        """How far the residuals move the class features."""

        @property
        def can(self) -> Can:
            """It reads frozen features only, and its loss is a mean over images."""
            return Can.USE_FROZEN_FEATURES | Can.SPLIT_BATCHES | Can.EXPORT_CLASSES | Can.JOIN_CLASSES

    def build(self) -> None:
        """The residuals x [C, E], all zero."""
        self.x = nn.Parameter(torch.zeros(len(self.class_names), self.backbone.embed_dim))

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """ŵ [C, E]; only for the classes it was tuned on."""
        self.check_classes(class_names)
        return unit(self.raw_text_features() + self.config.alpha * self.x)
