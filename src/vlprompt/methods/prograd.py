"""ProGrad: prompt-aligned gradient (Zhu et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from vlprompt.data.batches import Batch
from vlprompt.methods.base import LEARNS_TEXT, Can, Count, Method, MethodConfig, Output, Weight, total
from vlprompt.methods.coop import SGD
from vlprompt.methods.registry import register
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.prompting.text import TextContext


@register("prograd")
class ProGrad(Method):
    """CoOp that does not step against what zero-shot CLIP knows.

    Where the gradient of the cross-entropy opposes that of the "KL" to the zero-shot prediction, its component
    along the latter is removed. As in the official code the KL gradient is never added, it only vetoes; and the
    "KL" is a soft cross-entropy, whose gradient is the same. Official settings: 16 tokens, the last of which
    start as the words of the template and the others at zero, lambda 1, T 1, SGD 0.002, batch 32, 100 epochs.
    Deviation: the official "middle" position is broken; here the class name is always at the end.
    """

    paper, year, learns = "Zhu et al., ICCV", 2023, "text context, never against zero-shot knowledge"
    needs = frozenset({"frozen_image_features"})
    official = {**SGD, "data.batch_size": 32, "train.epochs": 100}

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of prograd."""

        n_ctx: Count = 16
        """Learned context tokens."""
        init: str | None = "a photo of a"
        """Words that initialise the last tokens; the tokens in front of them start at zero."""
        lambda_: Weight = 1.0
        """Share of the opposing component that is removed."""
        temperature: Annotated[float, Gt(0)] = 1.0
        """Softens both predictions in the KL."""

        @property
        def can(self) -> Can:
            """Everything: gradients are added up before one vetoes the other."""
            return LEARNS_TEXT

    def build(self) -> None:
        """Create the context."""
        c = self.config
        self.context = TextContext(self.backbone, c.n_ctx, c.init)
        if c.init:
            n_words = len(self.backbone.tokenizer.words(c.init))
            with torch.no_grad():
                self.context.vectors[: max(c.n_ctx - n_words, 0)] = 0

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E], the same for every image."""
        return self.encode_classes(class_names, self.context)

    def regularisers(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """The soft cross-entropy to the zero-shot prediction (which only vetoes)."""
        t0 = frozen_class_features(self.backbone, self.class_names, [self.template])[batch.compared]
        zero_shot = self.logits(out.v, t0) / self.config.temperature
        kl = -(zero_shot.softmax(-1) * (out.logits / self.config.temperature).log_softmax(-1)).sum(-1).mean()
        return {"kl": kl * self.config.temperature**2}

    def objectives(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The veto and the supervision, each with a gradient of its own."""
        return {"kl": losses["kl"], "supervision": total({k: v for k, v in losses.items() if k != "kl"})}

    def combine(self, gradients: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
        """g_CE, without its component along g_KL where the two oppose each other, parameter by parameter."""
        combined = []
        for ce, kl in zip(gradients["supervision"], gradients["kl"], strict=True):
            n = kl / kl.norm()
            along = (ce * n).sum()
            combined.append(ce - self.config.lambda_ * along * n if along < 0 else ce)
        return combined
