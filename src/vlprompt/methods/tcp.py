"""TCP: textual-based class-aware prompt tuning (Yao et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from vlprompt.backbones.backbone import unit
from vlprompt.backbones.towers import Prompts, quick_gelu
from vlprompt.data.batches import Batch
from vlprompt.errors import ConfigError
from vlprompt.methods.base import LEARNS_TEXT, Can, Count, Method, MethodConfig, Output, Weight
from vlprompt.methods.coop import SGD
from vlprompt.methods.registry import register
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.prompting.text import TextContext, encode_classes, encode_in_parts

REDUCTION = 4  # the hidden layer is the embedding's width over this
MOST = 4  # tokens of a class


@register("tcp")
class TCP(Method):
    """A context, and inside the text tower tokens of each class that two layers make of its frozen feature.

    The class tokens take the context's places before block ``layer``. Loss: cross-entropy + w · (1 − cos(t, t0))
    averaged over classes. Official settings: 4 tokens at random, Adam 0.002, batch 32, 50 epochs (htyao89's TCP,
    ``vit_b16_ep100_ctxv1``); layer 8, weight 1 and w = 8 are fixed in its code, whatever its configuration says.
    Deviations: here they are settings, and what follows the class name is the end of the data set's template, for
    which the official code has a second list of templates.
    The official Adam has eps 1e-3 because its prompts are fp16; ours are fp32, with Adam's own eps.
    """

    paper, year, learns = "Yao et al., CVPR", 2024, "text context and tokens of each class"
    official = {**SGD, "optim.name": "adam", "data.batch_size": 32, "train.epochs": 50}

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of tcp."""

        n_ctx: Count = 4
        """Learned context tokens; as many of each class, at most four, take the places of the first."""
        init: str | None = None
        """Words that initialise the context instead of noise."""
        end: str | None = None
        """What follows the class name; what follows it in the data set's template if not given."""
        layer: Annotated[int, Ge(1)] = 8
        """Blocks of the text tower that read the context; the class tokens take its places after them."""
        weight: Annotated[float, Gt(0), Le(1)] = 1.0
        """Share of the class tokens in these places; the rest is what the blocks made of the context."""
        w: Weight = 8.0
        """Weight of the distance to the frozen class features."""

        @property
        def can(self) -> Can:
            """Everything; but texts are mixed with their class tokens whole."""
            return LEARNS_TEXT & ~Can.SPLIT_TEXTS if self.mixes else LEARNS_TEXT

        @property
        def mixes(self) -> bool:
            """Whether something of the context stays beside the class tokens."""
            return self.weight < 1 or self.n_ctx > MOST

    def build(self) -> None:
        """Create the context, and the two layers from class features to class tokens."""
        c, text, embed = self.config, self.backbone.text_tower.config, self.backbone.embed_dim
        if c.layer >= text.layers:
            raise ConfigError(f"method.layer = {c.layer} (allowed: 1 to {text.layers - 1}, with {text.layers} blocks)")
        end = self.template.partition("{}")[2] if c.end is None else c.end
        self.context = TextContext(self.backbone, c.n_ctx, c.init, end=end)
        hidden = max(embed // REDUCTION, 1)
        self.down, self.up = nn.Linear(embed, hidden), nn.Linear(hidden, min(c.n_ctx, MOST) * text.width)

    def class_tokens(self, class_names: Sequence[str]) -> Tensor:
        """[C, M or 4, D] of the frozen class features."""
        t0 = frozen_class_features(self.backbone, class_names, [self.template]).to(self.down.weight.dtype)
        return self.up(quick_gelu(self.down(t0))).unflatten(-1, (-1, self.backbone.text_tower.config.width))

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E], the same for every image."""
        c, tower, own = self.config, self.backbone.text_tower, self.class_tokens(class_names)
        later, n = [None] * (c.layer - 1), self.text_chunk or len(class_names)
        # Each text has states of its own from the class tokens on, so none are shared.
        parts = self.context.packed_parts(self.backbone, class_names, n, share_prefix=False)
        if c.mixes:
            (texts,) = parts
            taken = texts.slots[texts.source % c.n_ctx < MOST]
            kept = own.new_ones(len(texts.tokens), 1).index_fill(0, taken, 1 - c.weight)
            rest = own.new_zeros(len(own), max(c.n_ctx - MOST, 0), own.shape[-1])
            prompts = Prompts([self.context.vectors, *later, torch.cat([c.weight * own, rest], 1)], "add")
            return unit(tower(texts, prompts, None, lambda i, x: x * kept.to(x.dtype) if i == c.layer else x)[0])
        prompts = Prompts([self.context.vectors, *later, own])
        if len(parts) > 1:
            return encode_in_parts(tower, prompts, parts, n)
        return encode_classes(tower, prompts, parts[0])

    def regularisers(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """The distance to the frozen class features."""
        t0 = frozen_class_features(self.backbone, self.class_names, [self.template])[batch.compared]
        return {"kg": self.config.w * (1 - (out.t * t0).sum(-1).mean())}
