"""ProGrad: prompt-aligned gradient (Zhu et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt
from torch import Tensor

from vlprompt.data.batches import Batch
from vlprompt.methods.base import Output, Template, Weight, total
from vlprompt.methods.coop import SGD, CoOp
from vlprompt.methods.registry import register
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.prompting.text import spaced


@register("prograd")
class ProGrad(CoOp):
    """CoOp that does not step against what zero-shot CLIP knows.

    Where the gradient of the cross-entropy opposes that of the "KL" to the zero-shot prediction, its component
    along the latter is removed. As in the official code the KL gradient is never added, it only vetoes; and the
    "KL" is a soft cross-entropy, whose gradient is the same. Official settings: 16 tokens, the last of which
    start as the words of the template and the others at zero, lambda 1, T 1, SGD 0.002, batch 32, 100 epochs.
    Deviations: the official "middle" position is broken, and here is CoOp's; officially the words are those of the
    template, and make one context for all classes.
    """

    paper, year, learns = "Zhu et al., ICCV", 2023, "text context, never against zero-shot knowledge"
    needs = frozenset({"frozen_image_features"})
    official = {**SGD, "data.batch_size": 32, "train.epochs": 100}
    presets = {}

    @dataclass(frozen=True)
    class Config(CoOp.Config):
        """Options of prograd."""

        init: str | None = "a photo of a"
        """Words that initialise the last tokens; the tokens in front of them start at zero."""
        template: Template | None = None
        """Text with {} that the zero-shot prediction reads; the data set's own if not given."""
        lambda_: Weight = 1.0
        """Share of the opposing component that is removed."""
        temperature: Annotated[float, Gt(0)] = 1.0
        """Softens both predictions in the KL."""

    def build(self) -> None:
        """Create the context."""
        n_ctx, words = self.config.n_ctx, spaced(self.config.init or "")
        # The official code counts words, not tokens: of "a type of flower, a photo of a" the last one stays frozen.
        known = min(len(words.split()), len(self.backbone.tokenizer.words(words)))
        free = max(n_ctx - known, 0) if known else 0
        self.context = self.make_context(n_ctx, " ".join(["X"] * free + [words]))
        self.context.vectors.data[..., :free, :] = 0

    def regularisers(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """The soft cross-entropy to the zero-shot prediction (which only vetoes)."""
        template = self.config.template or self.template
        t0 = frozen_class_features(self.backbone, self.class_names, [template])[batch.compared]
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
