"""VPT: visual prompt tuning (Jia et al., ECCV 2022), for CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vlprompt.backbones.towers import Prompts
from vlprompt.methods.base import LEARNS_PROMPTS, Can, Count, Method, MethodConfig, Template
from vlprompt.methods.registry import register
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.prompting.visual import VisualPrompts


@register("vpt")
class VPT(Method):
    """Learned tokens in the image tower; the text is frozen.

    Official settings: 8 tokens, depth 12 (``depth=1`` is VPT-shallow), SGD 0.0025, batch 4, 5 epochs
    (muzairkhattak's MaPLe repository, ``trainers/vpt.py``). The text is always "a photo of a {}.", as there.
    """

    paper, year, learns = "Jia et al., ECCV", 2022, "visual prompts"
    official = {
        "optim.name": "sgd",
        "optim.lr": 0.0025,
        "optim.warmup_epochs": 1,
        "data.batch_size": 4,
        "train.epochs": 5,
    }

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of vpt."""

        n_ctx: Count = 8
        """Learned tokens at each layer."""
        depth: Count | None = None
        """Layers that get tokens of their own; all of the image tower's (12 in ViT-B) if not given."""
        template: Template = "a photo of a {}."
        """Text of the classes."""

        @property
        def can(self) -> Can:
            """What learned prompts allow, but for texts: they are frozen, and encoded once."""
            return LEARNS_PROMPTS & ~Can.SPLIT_TEXTS

    def build(self) -> None:
        """Create the visual prompts."""
        depth = self.config.depth or self.backbone.image_tower.config.layers
        self.visual = VisualPrompts(self.backbone, self.config.n_ctx, depth)

    def visual_prompts(self) -> Prompts:
        """The learned tokens."""
        return self.visual.prompts()

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E], frozen."""
        return frozen_class_features(self.backbone, class_names, [self.config.template])

    def features_of(self, classes: Tensor | slice, image_features: Tensor | None = None) -> Tensor:
        """Those of all classes are computed once."""
        return self.class_features(self.class_names)[classes]
