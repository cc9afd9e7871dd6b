"""Attention between learned tokens P and instance tokens X (patches, words) in four sub-processes (DPL).

With A(Q, K, V) = softmax(QKᵀ/√d)V, softmax attention over both is exactly

    O_X = (1 − λ_X) · A(Q_X, K_X, V_X) + λ_X · A(Q_X, K_P, V_P)      instance→instance, instance→prompt
    O_P = λ_P · A(Q_P, K_P, V_P) + (1 − λ_P) · A(Q_P, K_X, V_X)      prompt→prompt, prompt→instance

where λ is the share of the softmax that falls on prompt keys. ln c added to the logits of some keys multiplies their
odds by c, so every weight but a constant one is one fused attention under an additive bias. Sums run over the keys that
a row sees; where it sees none of a kind, that kind weighs nothing.
Shapes: B images, C texts, N tokens of one sequence, K of them that ask, M prompt tokens, H heads, L layers, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vlprompt.backbones.attention import Attention, attend, merge_heads, split_heads
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.packing import PackedText, pack
from vlprompt.backbones.towers import ImageTower, TextTower
from vlprompt.errors import ConfigError
from vlprompt.prompting.text import TextContext, check_known, fill


@dataclass(frozen=True)
class SubProcesses:
    """What the four sub-processes weigh in one tower; instance→instance is the frozen model's and stays."""

    instance_to_prompt: Literal["exact", "scaled", "constant", "learned"] = "exact"
    """λ_X: the softmax's own; its odds times ``scale``; ``weight``; or its odds times a learned factor."""
    prompt_to_prompt: Literal["keep", "drop", "identity"] = "keep"
    """A prompt token sees all prompt tokens, none, or itself alone."""
    prompt_to_instance: Literal["exact", "scaled"] = "exact"
    """1 − λ_P: the softmax's own, or its odds times ``scale_prompts``."""
    scale: float = 1.0
    weight: float = 0.0
    scale_prompts: float = 1.0

    @property
    def constant(self) -> float | None:
        """λ_X where it is a constant."""
        return self.weight if self.instance_to_prompt == "constant" else None


def attention_bias(visible: Tensor, is_prompt: Tensor, s: SubProcesses) -> Tensor:
    """What is added to attention logits [N, N], in float64: −∞ for what a row does not see, ln c where odds grow by c.

    ``visible`` [N, N] says which keys each row may see, ``is_prompt`` [N] which tokens are prompts.
    """
    asks, answers = is_prompt[:, None], is_prompt[None]  # prompt rows, prompt columns
    bias = torch.zeros(visible.shape, dtype=torch.float64, device=visible.device)
    if s.instance_to_prompt == "scaled":
        bias = bias.masked_fill(~asks & answers, math.log(s.scale) if s.scale else -math.inf)
    if s.prompt_to_instance == "scaled":
        bias = bias.masked_fill(asks & ~answers, math.log(s.scale_prompts))
    if s.prompt_to_prompt != "keep":
        visible = visible & ~(asks & answers)
    if s.prompt_to_prompt == "identity":
        visible = visible | torch.diag(is_prompt)
    return bias.masked_fill(~visible, -math.inf)


def decoupled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    reads: Tensor,
    prompts: Tensor,
    weight: float | None = None,
    log_odds: Tensor | None = None,
) -> Tensor:
    """Attention of q [B, H, K, D/H] to k and v [B, H, N, D/H] under ``bias`` [K, N], shaped like q.

    ``reads`` [K, N] marks instance→prompt, ``prompts`` [M] are the keys of prompts. The weight λ_X is the softmax's own
    under the bias, with ``log_odds`` [H] added to its log-odds; or the constant ``weight``, which is no bias and takes
    a second attention, to the prompts alone.
    """
    if log_odds is not None:
        bias = bias + log_odds[:, None, None] * reads
    bias = bias.to(q.dtype)
    if weight is None:
        return attend(q, k, v, bias)
    seen = (reads & bias.isfinite())[:, prompts]
    some = seen.any(-1, keepdim=True)  # [K, 1]
    instance = attend(q, k, v, bias.masked_fill(reads, -math.inf))
    k, v = k.index_select(2, prompts), v.index_select(2, prompts)
    prompt = attend(q, k, v, seen | ~some)  # no row may see nothing
    return instance.lerp(prompt, weight * some.to(q.dtype))


def image_attention(
    tower: ImageTower, n_ctx: int, s: SubProcesses, log_odds: Tensor | None = None
) -> Attention | list[Attention]:
    """Decoupled attention for an image tower with M learned tokens after the patches; ``log_odds``: [L, H]."""
    n = len(tower.positions)
    is_prompt = torch.arange(n + n_ctx, device=tower.positions.device) >= n
    bias = attention_bias(torch.ones_like(is_prompt).expand(n + n_ctx, -1), is_prompt, s).to(tower.positions.dtype)
    reads, prompts = ~is_prompt[:, None] & is_prompt, torch.arange(n, n + n_ctx, device=is_prompt.device)
    heads = tower.config.heads

    def attention(q: Tensor, k: Tensor, v: Tensor, log_odds: Tensor | None = None) -> Tensor:
        rows = slice(q.shape[1])  # in the last block the class token alone, which stands first
        qh, kh, vh = (split_heads(t[:, None], heads) for t in (q, k, v))
        out = decoupled_attention(qh, kh, vh, bias[rows], reads[rows], prompts, s.constant, log_odds)
        return merge_heads(out, q.shape[0])

    return _per_block(attention, log_odds)


def text_attention(
    tower: TextTower, text: PackedText, s: SubProcesses, log_odds: Tensor | None = None
) -> Attention | list[Attention]:
    """Decoupled attention among packed texts without a shared prefix; ``log_odds``: [L, H].

    A group's mask says who may see whom; texts of one group have their learned tokens at the same places.
    """
    assert not text.prefix
    is_prompt = torch.zeros_like(text.tokens, dtype=torch.bool).index_fill(0, text.slots, True)
    heads = tower.config.heads
    slots = text.slots.unflatten(0, (len(text.order), -1))  # [C, M], in the order of the rows
    groups: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    done = 0
    for group in text.groups:
        own = is_prompt[group.start : group.start + group.length]
        visible = own.new_ones(group.length, group.length) if group.mask is None else group.mask
        bias = attention_bias(visible, own, s).to(tower.positions.dtype)
        prompts, pooled = slots[done] - group.start, text.pooled[done : done + 1] - group.start
        groups.append((bias, ~own[:, None] & own, prompts, pooled))
        done += group.count

    def attention(q: Tensor, k: Tensor, v: Tensor, log_odds: Tensor | None = None) -> Tensor:
        pooled, outputs = q.shape[1] != k.shape[1], []  # pooled: the pooled token of each text alone asks
        queries = text.last(q) if pooled else text.texts(q)[1]
        of_groups = zip(groups, queries, text.texts(k)[1], text.texts(v)[1], strict=True)
        for (bias, reads, prompts, row), *of_group in of_groups:
            qh, kh, vh = (split_heads(t, heads) for t in of_group)
            bias, reads = (bias[row], reads[row]) if pooled else (bias, reads)
            out = decoupled_attention(qh, kh, vh, bias, reads, prompts, s.constant, log_odds)
            outputs.append(merge_heads(out, q.shape[0]))
        return torch.cat(outputs, 1)

    return _per_block(attention, log_odds)


class SentencePrompts(TextContext):
    """Language-conditioned textual prompts: M learned tokens beside each class's whole hand-written sentence.

    They see every token of their sentence, so that a class's prompts are conditioned on its own words. The sentence
    keeps its causal mask; all of its tokens see the prompts, or with ``read_only`` only the pooled one, so that the
    words stay what the frozen model makes of them. The learned tokens take the positions 1 … M, which start with their
    initial ``words``: a position is but a shift of what is learned, and sentences may be as long as ever.
    """

    def __init__(
        self,
        backbone: Backbone,
        n_ctx: int,
        template: str,
        words: str | None = None,
        *,
        depth: int = 1,
        mode: Literal["replace", "add"] = "replace",
        read_only: bool = False,
    ) -> None:
        if n_ctx >= backbone.context_length:
            most = backbone.context_length - 1
            raise ConfigError(f"text prompt tokens = {n_ctx} (allowed: 1 to {most}, the positions after the first)")
        super().__init__(backbone, n_ctx, words, depth=depth, mode=mode)
        self.template, self.read_only = template, read_only

    def pack(self, backbone: Backbone, class_names: Sequence[str], share_prefix: bool = False) -> PackedText:
        """Each class's sentence, and after it its learned tokens; never shared, as these read the whole sentence."""
        check_known(backbone, class_names)
        sentences = backbone.tokenize(fill(self.template, class_names))
        ids = [[*sentence, *[0] * self.n_ctx] for sentence in sentences]
        slots = [list(range(len(sentence), len(sentence) + self.n_ctx)) for sentence in sentences]
        packed = pack(ids, slots, share_prefix=False)
        causal = backbone.text_tower.config.causal
        return replace(
            packed,
            positions=packed.positions.index_copy(0, packed.slots, packed.source % self.n_ctx + 1),
            pooled=packed.pooled - self.n_ctx,
            groups=tuple(replace(g, mask=self._visible(g.length - self.n_ctx, causal)) for g in packed.groups),
        )

    def _visible(self, n: int, causal: bool) -> Tensor:
        """Which of n + M tokens each token sees, [n + M, n + M], in a sentence of n."""
        visible = torch.ones(n + self.n_ctx, n + self.n_ctx, dtype=torch.bool)
        if causal:
            visible[:n, :n] = visible[:n, :n].tril()
        if self.read_only:
            visible[: n - 1, n:] = False
        return visible


def _per_block(attention: Callable[..., Tensor], log_odds: Tensor | None) -> Attention | list[Attention]:
    """One function for all blocks, or one for each with its own log-odds."""
    return attention if log_odds is None else [partial(attention, log_odds=odds) for odds in log_odds]
