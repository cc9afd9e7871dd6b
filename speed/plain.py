"""The plain path: what the official implementations compute for the same result, swapped in beneath the methods.

Every text is padded to the context length and no prefix is shared, every block runs for all tokens, QuickGELU is a
product, and a method whose class features depend on the image runs the text tower once for each image. Frozen features
of texts stay remembered: the official code keeps them too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlprompt.backbones.attention import Attention
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.packing import PackedText, pack
from vlprompt.backbones.towers import Block, Prompts, QuickGELU, TextTower

block_forward, text_forward = Block.forward, TextTower.forward


@contextmanager
def plain(backbone: Backbone, longest: bool = False) -> Iterator[None]:
    """Within it, texts are packed and towers run the plain way; build methods inside, as they keep their packed texts.

    Texts are padded to the backbone's context length or, with ``longest``, to the longest of them (DroPLe's code).
    """

    def padded(tokens: Sequence[Sequence[int]], *slots: Any, share_prefix: bool = True, **how: Any) -> PackedText:
        n = max(map(len, tokens)) if longest else backbone.context_length
        if share_prefix:  # any text after its end: a causal tower's end token does not see it
            full = [[*ids, *[0] * (n - len(ids))] for ids in tokens]
            text = pack(full, *slots, share_prefix=False, **how)
            ends = [c * n + len(ids) - 1 for c, ids in enumerate(tokens)]
            return replace(text, pooled=torch.tensor(ends))
        # Who asked for texts that share nothing has an attention function of its own: padding is no text of it.
        text = Padded(**vars(pack(tokens, *slots, share_prefix=False, **how)))
        rows = (0, max(n * len(tokens) - len(text.tokens), 0))
        return replace(text, tokens=pad(text.tokens, rows), positions=pad(text.positions, rows))

    users = ("vlprompt.prompting.text.pack", "vlprompt.methods.dpl.decoupled.pack")
    with (
        patch(users[0], padded),
        patch(users[1], padded),
        patch.object(Block, "forward", every_token),
        patch.object(QuickGELU, "apply", lambda x: x * torch.sigmoid(1.702 * x)),
        patch.object(TextTower, "forward", image_by_image),
    ):
        yield


class Padded(PackedText):
    """Packed texts with padding after them, which is none of their tokens."""

    padding = None

    def texts(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Without the padding."""
        return super().texts(x[:, : sum(g.count * g.length for g in self.groups)])


def every_token(block: Block, x: Tensor, attention: Attention, rows: Tensor | None = None) -> Tensor:
    """A block for all tokens, of which ``rows`` are read; padding unknown to the attention function sees nothing."""

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v)
        return pad(out, (0, 0, 0, q.shape[1] - out.shape[1]))

    x = block_forward(block, x, padded)
    return x if rows is None else x[:, rows]


def image_by_image(tower: TextTower, text: PackedText, prompts: Prompts | None = None, *more: Any) -> Tensor:
    """The text tower, once for each image where prompts depend on it."""
    images = max((len(layer) for layer in prompts.tokens if layer.ndim == 4), default=0) if prompts else 0
    if prompts is None or not images:
        return text_forward(tower, text, prompts, *more)
    each = [
        Prompts([x[b : b + 1] if x is not None and x.ndim == 4 else x for x in prompts.layers], prompts.mode)
        for b in range(images)
    ]
    return torch.cat([text_forward(tower, text, one, *more) for one in each])
