"""Attention functions beside the fused one; a tower takes one for all blocks, or one a block."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlprompt.backbones.packing import Attention, PackedText


def with_maps(heads: int, maps: list[Tensor], mask: Tensor | None = None) -> Attention:
    """Attention that leaves its weights [B, H, N, N] in ``maps``, without gradient; ``mask`` [N, N] says who sees whom.

    It computes what the fused kernel does not show, so use it only in blocks whose maps are read.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qh, kh, vh = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, H, N, D/H]
        logits = qh / math.sqrt(qh.shape[-1]) @ kh.mT
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        weights = logits.softmax(-1)
        maps.append(weights.detach())
        return (weights @ vh).transpose(1, 2).flatten(2)

    return attention


def packed_with_maps(text: PackedText, heads: int, maps: list[Tensor]) -> Attention:
    """The same among packed texts that share no prefix: the maps [count, H, length, length] of each group, in order."""
    groups = [with_maps(heads, maps, group.mask) for group in text.groups]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        each = [[of_group[0] for of_group in text.texts(t)[1]] for t in (q, k, v)]
        outputs = [attend(*of_group).flatten(0, 1) for attend, *of_group in zip(groups, *each, strict=True)]
        return torch.cat(outputs)[None]

    return attention
