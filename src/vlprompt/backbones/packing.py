"""Texts packed for the text tower: no padding, and the tokens that all texts begin with stored once.

A block works token by token except in attention, so its tokens may lie in any order as long as attention knows
which belong together. One packed row of T tokens holds

    [shared prefix: P tokens][texts of length l1: C1 × (l1 − P)][texts of length l2: C2 × (l2 − P)] …

For a causal tower this is exact: no token sees what follows it, so padding after the end of a text changes
nothing, and a prefix that is the same in all texts has the same states in all of them, at every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Texts of one length: ``count`` texts of ``length`` own tokens each, from row ``start`` on."""

    start: int
    count: int
    length: int
    mask: Tensor | None = field(repr=False)
    """Which of prefix + own tokens each own token sees, [length, P + length]; None where it sees all."""


@dataclass(frozen=True)
class Padding:
    """Texts of all lengths behind the prefix as one group of the longest one's length L, for attention alone."""

    rows: Tensor  # [C·L] the row, behind the prefix, of each token; behind a text's end it is the text's last
    back: Tensor  # [T − P] where each of these rows stands among the C·L
    mask: Tensor  # [L, P + L] which of prefix + own tokens each own token sees
    own: Tensor  # [C, 1, 1, P + L] which of them are the prefix's and the text's, for its last token sees all


@dataclass(frozen=True)
class PackedText:
    """C texts of T packed tokens; see the module's head for the order of the rows."""

    tokens: Tensor  # [T] token ids
    positions: Tensor  # [T] position of each row in its own text
    prefix: int  # P, rows shared by all texts
    groups: tuple[Group, ...]
    pooled: Tensor  # [C] row whose output is the text's feature, in the order of the groups
    order: Tensor  # [C] brings the pooled rows into the order of the texts
    slots: Tensor  # [K] rows that learned tokens take
    source: Tensor  # [K] which learned token goes there: c·M + m for token m of text c

    def to(self, device: torch.device) -> PackedText:
        """The same texts on another device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        groups = tuple(
            Group(g.start, g.count, g.length, None if g.mask is None else g.mask.to(device)) for g in self.groups
        )
        return replace(self, **moved, groups=groups)

    def texts(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Packed tokens [B, T, D] as the shared prefix [B, P, D] and the texts of each group, [B, count, length, D]."""
        # One split, not a slice a group: in the backward pass a slice fills a whole [B, T, D] with zeros.
        prefix, *texts = x.split([self.prefix, *(g.count * g.length for g in self.groups)], 1)
        return prefix, [t.unflatten(1, (g.count, g.length)) for t, g in zip(texts, self.groups, strict=True)]

    def last(self, x: Tensor) -> list[Tensor]:
        """Pooled rows [B, C, D] as one query for each text of a group, [B, count, 1, D]."""
        return [t[:, :, None] for t in x.split([g.count for g in self.groups], 1)]

    @cached_property
    def padding(self) -> Padding | None:
        """All groups as one; None where that is no other than they are, or no token sees only what is before it."""
        mask = self.groups[-1].mask  # the longest texts': those of shorter ones are its upper left corners
        if len(self.groups) == 1 or mask is None:
            return None
        lengths = torch.tensor([g.length for g in self.groups for _ in range(g.count)], device=mask.device)[:, None]
        offsets = torch.arange(len(mask), device=mask.device)
        there = offsets < lengths  # [C, L]
        rows = lengths.cumsum(0) - lengths + offsets.minimum(lengths - 1)
        own = torch.cat([there.new_ones(len(there), self.prefix), there], 1)
        return Padding(rows.flatten(), there.flatten().nonzero()[:, 0], mask, own[:, None, None])

    def rows(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that each of some texts [B] takes, [B, N of the longest], and which of them are its own.

        Without a shared prefix. Behind a text's end its last row is repeated.
        """
        lengths = torch.cat([torch.full_like(self.order[: g.count], g.length) for g in self.groups])[self.order]
        last, length = self.pooled[self.order][texts, None], lengths[texts, None]
        offsets = torch.arange(max(g.length for g in self.groups), device=last.device)
        return torch.minimum(last - length + 1 + offsets, last), offsets < length


def pack(
    tokens: Sequence[Sequence[int]],
    slots: Sequence[Sequence[int]] | None = None,
    *,
    causal: bool = True,
    class_specific: bool = False,
    share_prefix: bool = True,
) -> PackedText:
    """Pack texts, each a list of token ids from its first token to the one that is pooled.

    ``slots[c]`` are the positions of text c where the learned tokens 0 … M−1 stand. ``class_specific`` says that
    every text has learned tokens of its own, so that they cannot be shared. A tower that is not causal reads
    all tokens from every token: its texts come padded to one length, and no prefix is shared.
    """
    where = [dict(zip(s, range(len(s)), strict=True)) for s in slots] if slots else [{} for _ in tokens]
    prefix = _shared_prefix(tokens, where, class_specific) if causal and share_prefix else 0

    # One length a group: its attention is one dense product under one mask, with nothing padded.
    by_length: dict[int, list[int]] = {}
    for c, ids in enumerate(tokens):
        by_length.setdefault(len(ids), []).append(c)

    rows: list[tuple[int, int]] = [(0, j) for j in range(prefix)]  # (text, position) of every packed row
    groups: list[Group] = []
    pooled: list[int] = []
    texts: list[int] = []
    for total, members in sorted(by_length.items()):
        length = total - prefix
        mask = torch.ones(length, total, dtype=torch.bool).tril(prefix) if causal else None
        groups.append(Group(len(rows), len(members), length, mask))
        for c in members:
            rows += [(c, j) for j in range(prefix, total)]
            pooled.append(len(rows) - 1)
            texts.append(c)

    filled = [(row, c, where[c][j]) for row, (c, j) in enumerate(rows) if j in where[c]]
    n_ctx = len(slots[0]) if slots else 0
    return PackedText(
        tokens=torch.tensor([tokens[c][j] for c, j in rows]),
        positions=torch.tensor([j for _, j in rows]),
        prefix=prefix,
        groups=tuple(groups),
        pooled=torch.tensor(pooled),
        order=torch.tensor(texts).argsort(),
        slots=torch.tensor([row for row, _, _ in filled], dtype=torch.long),
        source=torch.tensor([c * n_ctx + m for _, c, m in filled], dtype=torch.long),
    )


def pack_with_room(tokens: Sequence[Sequence[int]], n: int) -> tuple[PackedText, PackedText]:
    """Texts of a causal tower with ``n`` slots behind their first token, for tokens that join inside the tower.

    Packed as attention sees them before those tokens join, when it passes over the slots, and after. Positions do not
    count the slots.
    """
    slots = range(1, 1 + n)
    after = pack([[ids[0]] * (1 + n) + [*ids[1:]] for ids in tokens], [slots] * len(tokens), share_prefix=False)
    after = replace(after, positions=(after.positions - n).clamp(min=0))
    groups = []
    for group in after.groups:
        assert group.mask is not None
        groups.append(replace(group, mask=group.mask.index_fill(1, torch.tensor(slots), value=False)))
    return replace(after, groups=tuple(groups)), after


def _shared_prefix(tokens: Sequence[Sequence[int]], where: list[dict[int, int]], class_specific: bool) -> int:
    """Tokens before the first one that differs between texts; every text keeps its last token for itself."""
    # The last token is the one that is pooled: each text needs a row of its own for it, even if all texts are the same.
    limit = min(len(ids) for ids in tokens) - 1
    for j in range(limit):
        if class_specific and j in where[0]:
            return j
        first = (where[0].get(j), None if j in where[0] else tokens[0][j])
        if any((w.get(j), None if j in w else ids[j]) != first for ids, w in zip(tokens, where, strict=True)):
            return j
    return limit
