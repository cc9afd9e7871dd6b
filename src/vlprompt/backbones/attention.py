"""Attention functions: fused, among packed texts, and with maps; a tower takes one for all blocks, or one a block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vlprompt.backbones.packing import PackedText, Padding

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps queries [B, K, D] and keys and values [B, N, D] to outputs shaped like the queries.

K < N in a last block of which K rows are read.
"""
MANY_LENGTHS = 4
"""Texts of fewer lengths gain little by padding (2: 5 %, 3: 10 to 15 % of the text tower's time)."""
WORTH_A_CALL = 8192
"""Numbers that padding may move for each call of the kernel it saves: measured, both cost the same at 11,000 or so."""
Change = Callable[[Tensor], Tensor]
"""Maps attention logits [..., K, N], −∞ where a key is not seen, to others of the same shape."""
_CHANGE: ContextVar[Change | None] = ContextVar("change", default=None)


@contextmanager
def changed_logits(change: Change) -> Iterator[None]:
    """In here attention that a gradient passes through, and no other, is that of changed logits.

    Frozen features, which are remembered, stay what they are. A context, because methods make attention functions too.
    """
    token = _CHANGE.set(change)
    try:
        yield
    finally:
        _CHANGE.reset(token)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of q [..., K, D/H] to k and v [..., N, D/H], by PyTorch's fused kernel unless its logits are changed.

    ``mask`` [K, N] says who sees whom, or is added to the logits.
    """
    if _CHANGE.get() is None or not (q.requires_grad or k.requires_grad):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attention_weights(q, k, mask) @ v


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """The weights that :func:`attend` gives values, [..., K, N]."""
    logits = q / math.sqrt(q.shape[-1]) @ k.mT
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    change = _CHANGE.get()
    return (logits if change is None or not logits.requires_grad else change(logits)).softmax(-1)


def plain_attention(heads: int) -> Attention:
    """Every token sees every token, by PyTorch's fused kernel."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qh, kh, vh = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, H, N, D/H]
        return attend(qh, kh, vh).transpose(1, 2).flatten(2)

    return attention


def packed_attention(text: PackedText, heads: int) -> Attention:
    """Attention among packed tokens [B, T, D]; with fewer queries than keys, the queries are the pooled rows.

    On a CPU, a few small texts of many lengths are padded to one: to the tower it is the same but for roundings.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if padding := padding_that_pays(text, len(k), k.shape[-1], k.device):
            return _padded(text, padding, heads, q, k, v)
        batch, outputs = q.shape[0], list[Tensor]()
        (k_prefix, keys), (v_prefix, values) = text.texts(k), text.texts(v)
        if pooled := q.shape[1] != k.shape[1]:
            queries = text.last(q)
        else:
            q_prefix, queries = text.texts(q)
            if text.prefix:
                outputs.append(_among_prefix(q_prefix, k_prefix, v_prefix, heads))
        for group, own_q, own_k, own_v in zip(text.groups, queries, keys, values, strict=True):
            qh = split_heads(own_q, heads)
            kh, vh = (split_heads(_behind(p, t), heads) for p, t in ((k_prefix, own_k), (v_prefix, own_v)))
            mask = None if pooled else group.mask  # the last token of a text sees all of it
            outputs.append(merge_heads(attend(qh, kh, vh, mask), batch))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    return attention


def padding_that_pays(text: PackedText, batch: int, width: int, device: torch.device) -> Padding | None:
    """The padding to one length that attention of ``batch`` packed rows takes, or None for one call a length."""
    if device.type != "cpu" or len(text.groups) < MANY_LENGTHS or (padding := text.padding) is None:
        return None
    return padding if batch * len(padding.rows) * width <= WORTH_A_CALL * (len(text.groups) - 1) else None


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of tokens to those before them, and themselves; the fused kernel needs no mask for that."""
    if _CHANGE.get() is None:
        return scaled_dot_product_attention(q, k, v, is_causal=True)
    n = q.shape[-2]
    return attend(q, k, v, torch.ones(n, n, dtype=torch.bool, device=q.device).tril())


def _padded(text: PackedText, padding: Padding, heads: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, parts = q.shape[0], [text.prefix, len(padding.back)]
    (k_prefix, own_k), (v_prefix, own_v) = k.split(parts, 1), v.split(parts, 1)

    def texts(x: Tensor) -> Tensor:
        return x.index_select(1, padding.rows).unflatten(1, (len(padding.own), -1))  # [B, C, L, D]

    kh, vh = (split_heads(_behind(p, texts(t)), heads) for p, t in ((k_prefix, own_k), (v_prefix, own_v)))
    if q.shape[1] != k.shape[1]:
        qh, own = split_heads(q[:, :, None], heads), padding.own.repeat(batch, 1, 1, 1)
        return merge_heads(attend(qh, kh, vh, own), batch)
    q_prefix, own_q = q.split(parts, 1)
    output = attend(split_heads(texts(own_q), heads), kh, vh, padding.mask)
    output = merge_heads(output, batch).index_select(1, padding.back)
    return torch.cat([_among_prefix(q_prefix, k_prefix, v_prefix, heads), output], 1) if text.prefix else output


def _among_prefix(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The shared prefix [B, P, D], whose tokens see those before them."""
    qh, kh, vh = (split_heads(t[:, None], heads) for t in (q, k, v))
    return merge_heads(_causal(qh, kh, vh), q.shape[0])


def _behind(prefix: Tensor, texts: Tensor) -> Tensor:
    """A group's texts [B, count, length, D] with the prefix [B, P, D] in front of each: [B, count, P + length, D]."""
    if not prefix.shape[1]:
        return texts
    return torch.cat([prefix[:, None].expand(-1, texts.shape[1], -1, -1), texts], 2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, C, N, D] → [B·C, H, N, D/H]"""
    return x.unflatten(-1, (heads, -1)).transpose(2, 3).flatten(0, 1)


def merge_heads(x: Tensor, batch: int) -> Tensor:
    """[B·C, H, N, D/H] → [B, C·N, D]"""
    return x.transpose(1, 2).flatten(2).reshape(batch, -1, x.shape[1] * x.shape[3])


def with_maps(heads: int, maps: list[Tensor], mask: Tensor | None = None) -> Attention:
    """Attention that leaves its weights [B, H, N, N] in ``maps``, without gradient; ``mask`` [N, N] says who sees whom.

    It computes what the fused kernel does not show, so use it only in blocks whose maps are read.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qh, kh, vh = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, H, N, D/H]
        weights = attention_weights(qh, kh, mask)
        maps.append(weights.detach())
        return (weights @ vh).transpose(1, 2).flatten(2)

    return attention


@dataclass(frozen=True)
class Changed:
    """Attention of other queries, keys and values: what ``change`` makes of the block's."""

    attention: Attention
    change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """That of what they become."""
        return self.attention(*self.change(q, k, v))


def observed(attention: Attention, heads: int, maps: list[Tensor]) -> Attention:
    """The same attention, which also leaves its weights [B, H, K, N] in ``maps``, with their gradient.

    It is asked about unit vectors, so that weights are seen whatever makes them: it must be linear in the values, but
    for what a :class:`Changed` does to them.
    """
    if isinstance(attention, Changed):
        return replace(attention, attention=observed(attention.attention, heads, maps))

    def attention_observed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = k.shape[1]
        each_token = torch.eye(n, dtype=v.dtype, device=v.device).repeat(1, heads).expand(len(v), -1, -1)  # [B, N, H·N]
        weights = attention(q, k, each_token).unflatten(-1, (heads, n)).transpose(1, 2)
        maps.append(weights)
        return (weights @ v.unflatten(-1, (heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)

    return attention_observed


def packed_with_maps(text: PackedText, heads: int, maps: list[Tensor]) -> Attention:
    """The same among packed texts that share no prefix: the maps [count, H, length, length] of each group, in order."""
    groups = [with_maps(heads, maps, group.mask) for group in text.groups]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Not of_group[0], whose backward pass fills a tensor with zeros first.
        each = [[of_group.squeeze(0) for of_group in text.texts(t)[1]] for t in (q, k, v)]
        outputs = [attend(*of_group).flatten(0, 1) for attend, *of_group in zip(groups, *each, strict=True)]
        return torch.cat(outputs)[None]

    return attention
