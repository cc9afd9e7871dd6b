"""CoOp: context optimization (Zhou et al., IJCV 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlprompt.methods.base import LEARNS_TEXT, Can, Count, Method, MethodConfig
from vlprompt.methods.registry import register
from vlprompt.prompting.text import TextContext

SGD = {"optim.name": "sgd", "optim.lr": 0.002, "optim.warmup_epochs": 1}


@register("coop")
class CoOp(Method):
    """One learned context for all classes, or one for each.

    Official settings: 16 tokens at random, class name at the end, SGD 0.002, batch 32, 50 epochs (KaiyangZhou's
    CoOp, configs ``vit_b16_ep50``; the paper's few-shot results use 200 epochs for 8 and 16 shots, preset
    ``few-shot``, and fewer for fewer shots, presets ``few-shot-4`` to ``few-shot-1``; 50 for any shots of ImageNet,
    ``few-shot-imagenet``). Its figures from base to novel classes and across data sets are the CoCoOp paper's, with 4
    tokens that start as "a photo of a" (configs ``ctxv1``).
    """

    paper, year, learns = "Zhou et al., IJCV", 2022, "text context"
    reads_template = False
    official = {**SGD, "data.batch_size": 32, "train.epochs": 50}
    presets = {
        "few-shot": {"train.epochs": 200},
        "few-shot-4": {"train.epochs": 100},
        "few-shot-2": {"train.epochs": 100},
        "few-shot-1": {"train.epochs": 50},
        "few-shot-imagenet": {"train.epochs": 50},
        "base-to-novel": {"method.n_ctx": 4, "method.init": "a photo of a"},
        "cross-dataset": {"method.n_ctx": 4, "method.init": "a photo of a"},
    }

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of coop."""

        n_ctx: Count = 16
        """Learned context tokens."""
        init: str | None = None
        """Words that initialise the context instead of noise."""
        class_specific: bool = False
        """A context for each class instead of one for all; such a model cannot take new class names."""
        position: Literal["end", "middle", "front"] = "end"
        """Where the class name stands."""

        @property
        def can(self) -> Can:
            """Everything."""
            return LEARNS_TEXT

    def build(self) -> None:
        """Create the context."""
        self.context = self.make_context(self.config.n_ctx, self.config.init)

    def make_context(self, n_ctx: int, init: str | None) -> TextContext:
        """A context where the class name stands as asked, for all classes or for each."""
        c = self.config
        n_classes = len(self.class_names) if c.class_specific else None
        return TextContext(self.backbone, n_ctx, init, position=c.position, n_classes=n_classes)

    @property
    def takes_new_classes(self) -> bool:
        """Not with a context for each class."""
        return not self.config.class_specific

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E], the same for every image."""
        return self.encode_classes(class_names, self.context)
