"""The two transformers of a vision-language model, with every block open.

Learned tokens enter through :func:`inject` alone, attention is a function given to the blocks, and in the last
block only the token that is pooled asks: the outputs of the others are read by nobody.
Shapes: B images, C texts, N tokens, T packed tokens, M prompt tokens, D width, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vlprompt.backbones.packing import Attention, PackedText, packed_attention


class QuickGELU(torch.autograd.Function):
    """x · σ(1.702 x), with nothing but 1.702 x kept for the backward pass: its slope is that of SiLU there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scaled = 1.702 * x
        ctx.save_for_backward(scaled)
        return scaled.sigmoid().mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.ops.aten.silu_backward(gradient, *ctx.saved_tensors)


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""
    return QuickGELU.apply(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (SigLIP)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": gelu_tanh,
}


@dataclass(frozen=True)
class ImageConfig:
    """Architecture of an image tower; sizes in pixels and channels."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    embed_dim: int
    activation: str = "quick_gelu"
    eps: float = 1e-5
    pool: Literal["cls", "map"] = "cls"
    """Class token and projection (CLIP), or an attention-pooling head without either (SigLIP)."""


@dataclass(frozen=True)
class TextConfig:
    """Architecture of a text tower."""

    vocab_size: int
    context_length: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    embed_dim: int
    activation: str = "quick_gelu"
    eps: float = 1e-5
    causal: bool = True
    """Causal, pooled at the end of the text (CLIP); or padded, bidirectional, pooled at the last position (SigLIP)."""


AfterBlock = Callable[[int, Tensor], Tensor]
"""Called with a block's index and its output [B, N, D]; what it returns goes on to the next block."""


@dataclass(frozen=True)
class Prompts:
    """Learned tokens of one tower: ``layers[i]`` enters block i.

    Images: [M, D]. Texts: [M, D] shared, [C, M, D] class-specific, [B, 1, M, D] image-dependent.
    ``replace`` overwrites what the previous block made of the tokens, ``add`` adds to it.
    """

    layers: Sequence[Tensor]
    mode: Literal["replace", "add"] = "replace"


def inject(x: Tensor, rows: Tensor, values: Tensor, mode: str = "replace") -> Tensor:
    """Put learned tokens ``values`` [K, D] or [B, K, D] at ``rows`` [K] of x [B, N, D]."""
    values = values.to(x.dtype)
    if values.ndim == 2:
        values = values[None]
    batch = max(len(x), len(values))
    x, values = x.expand(batch, -1, -1), values.expand(batch, -1, -1)
    return x.index_add(1, rows, values) if mode == "add" else x.index_copy(1, rows, values)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a two-layer MLP."""

    def __init__(self, width: int, mlp_width: int, activation: str, eps: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width, eps)
        self.fc_1 = nn.Linear(width, mlp_width)
        self.fc_2 = nn.Linear(mlp_width, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor, attention: Attention, rows: Tensor | None = None) -> Tensor:
        """x: [B, N, D] → [B, N, D], or [B, K, D] for the K ``rows`` only (every token is still attended to)."""
        h = self.ln_1(x)
        if rows is None:
            q, k, v = self.qkv(h).chunk(3, -1)
        else:
            d = x.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(h[:, rows], weight[:d], bias[:d])
            k, v = F.linear(h, weight[d:], bias[d:]).chunk(2, -1)
            x = x[:, rows]
        x = x + self.out(attention(q, k, v))
        return x + self.fc_2(self.activation(self.fc_1(self.ln_2(x))))


def plain_attention(heads: int) -> Attention:
    """Every token sees every token, by PyTorch's fused kernel."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qh, kh, vh = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, H, N, D/H]
        return F.scaled_dot_product_attention(qh, kh, vh).transpose(1, 2).flatten(2)

    return attention


def _per_block(attention: Attention | Sequence[Attention], blocks: int) -> Sequence[Attention]:
    """One attention function a block, where one was given for all."""
    return [attention] * blocks if callable(attention) else attention


class AttentionPool(nn.Module):
    """SigLIP's head: one learned query reads all tokens."""

    def __init__(self, c: ImageConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, c.width))
        self.attention = nn.MultiheadAttention(c.width, c.heads, batch_first=True)
        self.ln = nn.LayerNorm(c.width, c.eps)
        self.fc_1 = nn.Linear(c.width, c.mlp_width)
        self.fc_2 = nn.Linear(c.mlp_width, c.width)
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] → [B, D]"""
        x = self.attention(self.probe.expand(len(x), -1, -1), x, x, need_weights=False)[0]
        return (x + self.fc_2(self.activation(self.fc_1(self.ln(x)))))[:, 0]


class ImageTower(nn.Module):
    """Vision transformer (Dosovitskiy et al., 2021) as in CLIP or SigLIP."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = c = config
        cls = c.pool == "cls"
        self.patches = nn.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=not cls)
        self.class_token = nn.Parameter(torch.zeros(c.width)) if cls else None
        n_tokens = (c.image_size // c.patch_size) ** 2 + cls
        self.positions = nn.Parameter(torch.zeros(n_tokens, c.width))
        self.ln_pre = nn.LayerNorm(c.width, c.eps) if cls else nn.Identity()
        self.blocks = nn.ModuleList(Block(c.width, c.mlp_width, c.activation, c.eps) for _ in range(c.layers))
        self.ln_post = nn.LayerNorm(c.width, c.eps)
        self.projection = nn.Linear(c.width, c.embed_dim, bias=False) if cls else nn.Identity()
        self.head = nn.Identity() if cls else AttentionPool(c)

    def forward(
        self,
        images: Tensor,
        prompts: Prompts | None = None,
        attention: Attention | Sequence[Attention] | None = None,
        after_block: AfterBlock | None = None,
    ) -> Tensor:
        """Features of images [B, 3, S, S], not normalised: [B, E]. Prompts stand after the patches.

        ``attention`` is one function for all blocks, or one a block. The last block's output is the pooled token alone.
        """
        x = self.patches(images.to(self.positions.dtype)).flatten(2).transpose(1, 2)  # [B, N, D]
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], 1)
        x = x + self.positions
        rows = torch.arange(0, device=x.device)
        if prompts is not None:
            first = prompts.layers[0].to(x.dtype)
            rows = torch.arange(x.shape[1], x.shape[1] + len(first), device=x.device)
            x = torch.cat([x, first.expand(len(x), -1, -1)], 1)
        x = self.ln_pre(x)
        attentions = _per_block(attention or plain_attention(self.config.heads), len(self.blocks))
        cls_row = None if self.class_token is None else torch.zeros(1, dtype=torch.long, device=x.device)
        for i, block in enumerate(self.blocks):
            if prompts is not None and 0 < i < len(prompts.layers):
                x = inject(x, rows, prompts.layers[i], prompts.mode)
            x = block(x, attentions[i], cls_row if i == len(self.blocks) - 1 else None)
            if after_block is not None:
                x = after_block(i, x)
        x = self.ln_post(x)
        return self.projection(x[:, 0]) if self.config.pool == "cls" else self.head(x)


class TextTower(nn.Module):
    """Text transformer as in CLIP (causal) or SigLIP (bidirectional), over packed texts."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = c = config
        # Not nn.Embedding(…): its random start makes PyTorch import its compiler on the meta device, a second's work.
        self.token_embedding = nn.Embedding.from_pretrained(torch.zeros(c.vocab_size, c.width), freeze=False)
        self.positions = nn.Parameter(torch.zeros(c.context_length, c.width))
        self.blocks = nn.ModuleList(Block(c.width, c.mlp_width, c.activation, c.eps) for _ in range(c.layers))
        self.ln_final = nn.LayerNorm(c.width, c.eps)
        self.projection = nn.Linear(c.width, c.embed_dim, bias=not c.causal)

    def forward(
        self,
        text: PackedText,
        prompts: Prompts | None = None,
        attention: Attention | Sequence[Attention] | None = None,
        after_block: AfterBlock | None = None,
    ) -> Tensor:
        """Features of packed texts, not normalised: [1, C, E], or [B, C, E] if the prompts depend on the image.

        ``attention`` is one function for all blocks, or one a block. The last block's output is the pooled rows alone.
        """
        positions = self.positions[text.positions]
        x = (self.token_embedding(text.tokens) + positions)[None]  # [1, T, D]
        attentions = _per_block(attention or packed_attention(text, self.config.heads), len(self.blocks))
        for i, block in enumerate(self.blocks):
            if prompts is not None and i < len(prompts.layers):
                values = _per_row(prompts.layers[i], text.source)
                if i == 0:
                    x = inject(x, text.slots, values.to(x.dtype) + positions[text.slots])
                else:
                    x = inject(x, text.slots, values, prompts.mode)
            x = block(x, attentions[i], text.pooled if i == len(self.blocks) - 1 else None)
            if after_block is not None:
                x = after_block(i, x)
        return self.projection(self.ln_final(x))[:, text.order]


def _per_row(prompts: Tensor, source: Tensor) -> Tensor:
    """Learned tokens [M, D], [C, M, D] or [B, 1 or C, M, D] → one for each slot, [1 or B, K, D]."""
    batch = len(prompts) if prompts.ndim == 4 else 1
    vectors = prompts.reshape(batch, -1, prompts.shape[-1])  # M or C·M of them
    return vectors[:, source % vectors.shape[1]]  # c·M + m is m where all texts share the M tokens
