"""APT: additive prompt tuning (Chen et al., ICCV 2025), for CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlprompt.backbones.attention import Attention, Changed, plain_attention
from vlprompt.backbones.backbone import unit
from vlprompt.methods.base import LEARNS_PROMPTS, Can, Count, Method, MethodConfig
from vlprompt.methods.registry import register
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.prompting.text import INIT_STD
from vlprompt.prompting.visual import check_image_prompts


@register("apt")
class APT(Method):
    """In every block of the image tower, a learned vector on the class token's key and one on its value.

    No token is added, so that a step costs what the frozen tower does. Official settings: Adam 0.003 without decay,
    batch 64, 30 epochs (HaoranChen's Additive-Prompt-Tuning, ImageNet-R in ten tasks; presets have its other data
    sets'). Deviations: the official classifier is a LayerNorm and a learned vector of each class, on a plain ViT; here
    it is the frozen features of the class names, so that new names need no new weights. The official code evaluates
    with an average over tasks, 0.8 of the average before and 0.2 of the task's (0.7 for other data sets), and masks
    earlier classes in the loss; here a task begins with the vectors of the one before. Its rate falls as a quarter of
    a cosine, ours as half of one.
    """

    paper, year, learns = "Chen et al., ICCV", 2025, "additions to the class token's keys and values"
    parity = "identity"
    official = {
        "optim.name": "adam",
        "optim.lr": 0.003,
        "optim.weight_decay": 0.0,
        "optim.warmup_epochs": 0,
        "data.batch_size": 64,
        "train.epochs": 30,
    }
    presets = {
        "class-incremental-cifar100": {"optim.lr": 0.004},
        "class-incremental-cub200": {"optim.lr": 0.02, "train.epochs": 25},
        "class-incremental-stanford_cars": {"optim.lr": 0.005, "train.epochs": 50},
    }

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of apt."""

        depth: Count | None = None
        """Blocks, from the first on, that get vectors; all of the image tower's (12 in ViT-B) if not given."""

        @property
        def can(self) -> Can:
            """What learned prompts allow, but for texts: they are frozen, and encoded once."""
            return LEARNS_PROMPTS & ~Can.SPLIT_TEXTS

    def build(self) -> None:
        """Create the vectors: ``keys`` and ``values``, [depth, D] each."""
        tower = self.backbone.image_tower.config
        depth = self.config.depth or tower.layers
        check_image_prompts(self.backbone, depth)
        self.keys, self.values = (
            nn.Parameter(nn.init.trunc_normal_(torch.empty(depth, tower.width), std=INIT_STD)) for _ in range(2)
        )

    def attention(self) -> list[Attention]:
        """Of each block of the image tower."""
        c = self.backbone.image_tower.config
        plain = plain_attention(c.heads)
        own = [_with_additions(plain, k, v) for k, v in zip(self.keys, self.values, strict=True)]
        return own + [plain] * (c.layers - len(own))

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, E]"""
        return unit(self.backbone.image_tower(images.to(self.backbone.device), None, self.attention()))

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E], frozen."""
        return frozen_class_features(self.backbone, class_names, [self.template])

    def features_of(self, classes: Tensor | slice, image_features: Tensor | None = None) -> Tensor:
        """Those of all classes are computed once."""
        return self.class_features(self.class_names)[classes]


def _with_additions(plain: Attention, key: Tensor, value: Tensor) -> Attention:
    """Attention in which the class token, which stands first, has these [D] added to its key and its value."""

    def change(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = (torch.cat([x[:, :1] + own.to(x.dtype), x[:, 1:]], 1) for x, own in ((k, key), (v, value)))
        return q, k, v

    return Changed(plain, change)
