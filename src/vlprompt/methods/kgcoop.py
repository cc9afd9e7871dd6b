"""KgCoOp: knowledge-guided context optimization (Yao et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vlprompt.data.batches import Batch
from vlprompt.methods.base import LEARNS_TEXT, Can, Count, Method, MethodConfig, Output, Weight
from vlprompt.methods.coop import SGD
from vlprompt.methods.registry import register
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.prompting.text import TextContext


@register("kgcoop")
class KgCoOp(Method):
    """CoOp whose class features are kept near those of the data set's hand-written template.

    Loss: cross-entropy + w · (1 − cos(t, t0)) averaged over classes. Official settings: "a photo of a", w = 8,
    SGD 0.002, batch 128, 100 epochs. Deviation: officially the initial words are only a flag and the text is
    "a photo of a" whatever they say; here the words given are used.
    """

    paper, year, learns = "Yao et al., CVPR", 2023, "text context, kept near the hand-written one"
    official = {**SGD, "data.batch_size": 128, "train.epochs": 100}

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of kgcoop."""

        n_ctx: Count = 4
        """Learned context tokens."""
        init: str | None = "a photo of a"
        """Words that initialise the context instead of noise."""
        w: Weight = 8.0
        """Weight of the distance to the frozen class features."""

        @property
        def can(self) -> Can:
            """Everything."""
            return LEARNS_TEXT

    def build(self) -> None:
        """Create the context."""
        self.context = TextContext(self.backbone, self.config.n_ctx, self.config.init)

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E], the same for every image."""
        return self.encode_classes(class_names, self.context)

    def regularisers(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """The distance to the frozen class features."""
        t0 = frozen_class_features(self.backbone, self.class_names, [self.template])[batch.compared]
        return {"kg": self.config.w * (1 - (out.t * t0).sum(-1).mean())}
