"""IVLP: independent vision-language prompting (Rasheed et al., CVPR 2023; baseline of MaPLe and PromptSRC)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Le
from torch import Tensor

from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.towers import Prompts
from vlprompt.errors import ConfigError
from vlprompt.methods.base import LEARNS_PROMPTS, LEARNS_TEXT, Can, Count, Method, MethodConfig
from vlprompt.methods.registry import register
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.prompting.text import TextContext, spaced
from vlprompt.prompting.visual import VisualPrompts

SIZES = ("depth_text", "n_ctx_text", "depth_vision", "n_ctx_vision")
Size = Annotated[int, Ge(0), Le(10_000)]


def deep_context(backbone: Backbone, n_ctx: int, init: str | None, depth: int, **options: Any) -> TextContext:
    """Deep text prompts as MaPLe, IVLP and PromptSRC build them; ``options`` are those of TextContext.

    With fewer learned tokens than initial words the other words stay frozen in the text; with more, the official
    code drops the words and starts at random, and so do we.
    """
    if init and 0 < len(backbone.tokenizer.words(spaced(init))) < n_ctx:
        init = None
    return TextContext(backbone, n_ctx, init, depth=depth, **options)


@dataclass(frozen=True)
class DeepPrompts(MethodConfig):
    """Options of deep prompts in both towers."""

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


@register("ivlp")
class IVLP(Method):
    """Deep prompts in both towers, learned independently of each other.

    Official settings: 4 + 4 tokens, depth 9, SGD 0.0025, batch 4, 20 epochs (muzairkhattak's PromptSRC).
    Language-only with ``depth_vision=0``, vision-only with ``depth_text=0``, which officially is VPT.
    Deviation: the official blocks cast deep prompts to fp16 even at fp32 precision; here they stay fp32.
    """

    paper, year, learns = "Rasheed et al., CVPR", 2023, "deep text and visual prompts"
    reads_template = False
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
    frozen_text: str | None = None
    """The template of a text tower without learned tokens: the initial words, or the data set's own without words."""

    @dataclass(frozen=True)
    class Config(DeepPrompts):
        """Options of ivlp."""

        n_ctx_text: Size = 4
        """Learned tokens in the text tower, at each layer; 0 leaves it frozen, with the words of ``init``."""
        n_ctx_vision: Size = 4
        """Learned tokens in the image tower, at each layer; 0 leaves it frozen."""
        depth_text: Size = 9
        """Layers of the text tower with tokens of their own; 0 leaves it frozen, with the words of ``init``."""
        depth_vision: Size = 9
        """Layers of the image tower with tokens of their own; 0 leaves it frozen."""

        @property
        def learns_text(self) -> bool:
            """Whether the text tower has learned tokens."""
            return self.n_ctx_text > 0 and self.depth_text > 0

        @property
        def learns_images(self) -> bool:
            """Whether the image tower has learned tokens."""
            return self.n_ctx_vision > 0 and self.depth_vision > 0

        @property
        def can(self) -> Can:
            """What learned prompts allow; frozen texts are encoded once."""
            can = LEARNS_PROMPTS if self.learns_images else LEARNS_TEXT
            return can if self.learns_text else can & ~Can.SPLIT_TEXTS

        def unused(self) -> dict[str, str]:
            """The other size of a tower that is left frozen."""
            unused: dict[str, str] = {}
            for tower, learns in (("text", self.learns_text), ("vision", self.learns_images)):
                if not learns:
                    n_ctx, depth = f"n_ctx_{tower}", f"depth_{tower}"
                    unused |= {n_ctx: depth} if getattr(self, depth) == 0 else {depth: n_ctx}
            return unused

    def build(self) -> None:
        """Create the prompts of the towers that learn any."""
        c = self.config
        if not c.learns_text and not c.learns_images:
            nothing = ", ".join(f"method.{f} = {getattr(c, f)}" for f in SIZES)
            raise ConfigError(f"{nothing}: nothing is learned (allowed: one tower without tokens)")
        if c.learns_text:
            self.context = deep_context(self.backbone, c.n_ctx_text, c.init, c.depth_text)
        else:
            self.frozen_text = f"{spaced(c.init)} {{}}." if c.init else self.template
        self.visual = VisualPrompts(self.backbone, c.n_ctx_vision, c.depth_vision) if c.learns_images else None

    def visual_prompts(self) -> Prompts | None:
        """The learned tokens of the image tower."""
        return None if self.visual is None else self.visual.prompts()

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E], the same for every image."""
        if self.frozen_text is not None:
            return frozen_class_features(self.backbone, class_names, [self.frozen_text])
        return self.encode_classes(class_names, self.context)

    def features_of(self, classes: Tensor | slice, image_features: Tensor | None = None) -> Tensor:
        """Frozen ones of all classes are computed once."""
        if self.frozen_text is not None:
            return self.class_features(self.class_names)[classes]
        return super().features_of(classes)
