"""IVLP: independent vision-language prompting (Rasheed et al., CVPR 2023; baseline of MaPLe and PromptSRC)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.towers import Prompts
from vlprompt.methods.base import LEARNS_PROMPTS, Can, Count, Method, MethodConfig
from vlprompt.methods.registry import register
from vlprompt.prompting.text import TextContext, spaced
from vlprompt.prompting.visual import VisualPrompts


def deep_context(backbone: Backbone, n_ctx: int, init: str | None, depth: int, **options: Any) -> TextContext:
    """Deep text prompts as MaPLe, IVLP and PromptSRC build them; ``options`` are those of TextContext.

    With fewer learned tokens than initial words the other words stay frozen in the text; with more, the official
    code drops the words and starts at random, and so do we.
    """
    if init and 0 < len(backbone.tokenizer.words(spaced(init))) < n_ctx:
        init = None
    return TextContext(backbone, n_ctx, init, depth=depth, **options)


@register("ivlp")
class IVLP(Method):
    """Deep prompts in both towers, learned independently of each other.

    Official settings: 4 + 4 tokens, depth 9, SGD 0.0025, batch 4, 20 epochs (muzairkhattak's PromptSRC).
    Deviation: the official blocks cast deep prompts to fp16 even at fp32 precision; here they stay fp32.
    """

    paper, year, learns = "Rasheed et al., CVPR", 2023, "deep text and visual prompts"
    official = {
        "optim.name": "sgd",
        "optim.lr": 0.0025,
        "optim.warmup_epochs": 1,
        "data.batch_size": 4,
        "train.epochs": 20,
    }
    presets = {
        "cross-dataset": {"method.depth_text": 3, "method.depth_vision": 3},
        "few-shot": {"train.epochs": 50},
    }

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of ivlp."""

        n_ctx_text: Count = 4
        """Learned tokens in the text tower, at each layer."""
        n_ctx_vision: Count = 4
        """Learned tokens in the image tower, at each layer."""
        depth_text: Count = 9
        """Layers of the text tower with tokens of their own."""
        depth_vision: Count = 9
        """Layers of the image tower with tokens of their own."""
        init: str | None = "a photo of a"
        """Words that initialise the text tokens of the first layer."""

        @property
        def can(self) -> Can:
            """What learned prompts allow."""
            return LEARNS_PROMPTS

    def build(self) -> None:
        """Create the prompts of both towers."""
        c = self.config
        self.context = deep_context(self.backbone, c.n_ctx_text, c.init, c.depth_text)
        self.visual = VisualPrompts(self.backbone, c.n_ctx_vision, c.depth_vision)

    def visual_prompts(self) -> Prompts:
        """The learned tokens of the image tower."""
        return self.visual.prompts()

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E], the same for every image."""
        return self.encode_classes(class_names, self.context)
