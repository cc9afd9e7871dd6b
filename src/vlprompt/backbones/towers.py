"""The two transformers of a vision-language model, each in three open steps: embed, run the blocks, read.

Attention is a function given to the blocks, and one hook, called before each block, may edit tokens. In the last block
only the rows that are read ask, by default the pooled ones: the outputs of the others are read by nobody.
Shapes: B images, C texts, N tokens, T packed tokens, M prompt tokens, D width, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vlprompt.backbones.attention import Attention, packed_attention, plain_attention
from vlprompt.backbones.packing import PackedText
from vlprompt.errors import ConfigError


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
    pool: Literal["cls", "map", "resnet"] = "cls"
    """Class token and projection (CLIP), an attention-pooling head without either (SigLIP), or no tokens at all."""
    stages: tuple[int, ...] = field(default=(), kw_only=True)
    """Bottleneck blocks of each stage of a ResNet, whose first stage has ``width``; none of a transformer."""


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


BeforeBlock = Callable[[int, Tensor], Tensor]
"""Called with a block's index and the tokens [B, N, D] that come to it, before its learned tokens join or replace some.

What it returns goes on: before block i + 1 is after block i.
"""


@dataclass(frozen=True)
class Prompts:
    """Learned tokens of one tower: ``layers[i]`` enters block i, ``None`` leaves the block's tokens as they are.

    Images: [M, D], or [B, M, D] of each image; they stand behind the patches from the first block that has any on.
    Texts: [M, D] shared, [C, M, D] class-specific, [B, 1, M, D] image-dependent; they take the texts' slots.
    ``replace`` overwrites what the previous block made of the tokens, ``add`` adds to it.
    """

    layers: Sequence[Tensor | None]
    mode: Literal["replace", "add"] = "replace"

    @property
    def tokens(self) -> list[Tensor]:
        """The layers that have any."""
        return [layer for layer in self.layers if layer is not None]


def inject(x: Tensor, rows: Tensor, values: Tensor, mode: str) -> Tensor:
    """Put learned tokens ``values`` [1 or B, K, D] at ``rows`` [K] of x [1 or B, N, D]."""
    batch = max(x.shape[0], values.shape[0])
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
        x = self.attention(self.probe.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0]
        return (x + self.fc_2(self.activation(self.fc_1(self.ln(x)))))[:, 0]


class Tower(nn.Module):
    """What both towers are: blocks, between an ``embed`` and a ``read`` of their own."""

    config: ImageConfig | TextConfig
    positions: nn.Parameter
    ln_pre: nn.Module  # of images
    blocks: nn.ModuleList

    def run(
        self,
        x: Tensor,
        prompts: Prompts | None = None,
        attention: Attention | Sequence[Attention] | None = None,
        before_block: BeforeBlock | None = None,
        rows: Tensor | None = None,
        text: PackedText | None = None,
    ) -> Tensor:
        """Embedded images, or packed texts with ``text``, through the blocks: [B, N, D], or the ``rows`` [B, K, D].

        ``attention`` is one function for all blocks, or one a block.
        """
        if (text is None) == isinstance(self.config, TextConfig):
            raise ConfigError("the text tower, and no other, runs with text=…: the packed texts that were embedded")
        layers = () if prompts is None else prompts.layers
        if len(layers) > len(self.blocks):
            raise ConfigError(f"prompts for {len(layers)} blocks (allowed: at most {len(self.blocks)}, the tower's)")
        if attention is None:
            heads = self.config.heads
            attention = plain_attention(heads) if text is None else packed_attention(text, heads)
        attentions = [attention] * len(self.blocks) if callable(attention) else attention
        slots = None if text is None else text.slots
        # Attention among packed texts knows the pooled rows alone; others are picked from all.
        asked = rows if text is None or rows is text.pooled else None
        for i, block in enumerate(self.blocks):
            if before_block is not None:
                x = before_block(i, x)
            if prompts is not None and i < len(layers) and (layer := layers[i]) is not None:
                values = (layer if text is None else _per_slot(layer, text)).to(x.dtype)
                if text is None:
                    values = values.expand(x.shape[0], -1, -1)
                if i == 0:  # as the embedded tokens are: normalised, or with their positions
                    values = (
                        self.ln_pre(values) if text is None else values + self.positions[text.positions[text.slots]]
                    )
                if slots is None:
                    slots = torch.arange(x.shape[1], x.shape[1] + values.shape[1], device=x.device)
                    x = torch.cat([x, values], 1)
                else:
                    x = inject(x, slots, values, prompts.mode if i else "replace")
            x = block(x, attentions[i], asked if i == len(self.blocks) - 1 else None)
        return x if rows is asked else x[:, rows]


class ImageTower(Tower):
    """Vision transformer (Dosovitskiy et al., 2021) as in CLIP or SigLIP."""

    config: ImageConfig

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

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] as tokens [B, N, D]: the class token, if there is one, and the patches row by row."""
        x = self.patches(images.to(self.positions.dtype)).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], 1)
        return self.ln_pre(x + self.positions)

    def read(self, x: Tensor) -> Tensor:
        """Features [B, K, E] of rows [B, K, D] of the last block; a pooling head makes one of all rows, [B, 1, E]."""
        x = self.ln_post(x)
        return self.projection(x) if self.config.pool == "cls" else self.head(x)[:, None]

    def local(self, images: Tensor) -> Tensor:
        """Features of each patch of images [B, 3, S, S], row by row, as a class token is read: [B, P, E]."""
        return self.read(self.run(self.embed(images)))[:, 1:]

    def pool(self, images: Tensor) -> Tensor:
        """What the tower makes of images [B, 3, S, S] before its projection, if it has one: [B, D]."""
        x = self.embed(images)
        if self.class_token is None:
            return self.read(self.run(x))[:, 0]
        return self.ln_post(self.run(x, rows=torch.zeros(1, dtype=torch.long, device=x.device)))[:, 0]

    def forward(
        self,
        images: Tensor,
        prompts: Prompts | None = None,
        attention: Attention | Sequence[Attention] | None = None,
        before_block: BeforeBlock | None = None,
    ) -> Tensor:
        """Features of images [B, 3, S, S], not normalised: [B, E]."""
        x = self.embed(images)
        pooled = None if self.class_token is None else torch.zeros(1, dtype=torch.long, device=x.device)
        return self.read(self.run(x, prompts, attention, before_block, pooled))[:, 0]


class TextTower(Tower):
    """Text transformer as in CLIP (causal) or SigLIP (bidirectional), over packed texts."""

    config: TextConfig

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = c = config
        # Not nn.Embedding(…): its random start makes PyTorch import its compiler on the meta device, a second's work.
        self.token_embedding = nn.Embedding.from_pretrained(torch.zeros(c.vocab_size, c.width), freeze=False)
        self.positions = nn.Parameter(torch.zeros(c.context_length, c.width))
        self.blocks = nn.ModuleList(Block(c.width, c.mlp_width, c.activation, c.eps) for _ in range(c.layers))
        self.ln_final = nn.LayerNorm(c.width, c.eps)
        self.projection = nn.Linear(c.width, c.embed_dim, bias=not c.causal)

    def embed(self, text: PackedText) -> Tensor:
        """Packed texts as tokens [1, T, D]."""
        return (self.token_embedding(text.tokens) + self.positions[text.positions])[None]

    def read(self, x: Tensor) -> Tensor:
        """Features [B, K, E] of rows [B, K, D] of the last block."""
        return self.projection(self.ln_final(x))

    def forward(
        self,
        text: PackedText,
        prompts: Prompts | None = None,
        attention: Attention | Sequence[Attention] | None = None,
        before_block: BeforeBlock | None = None,
    ) -> Tensor:
        """Features of packed texts, not normalised: [1, C, E], or [B, C, E] if the prompts depend on the image."""
        x = self.run(self.embed(text), prompts, attention, before_block, text.pooled, text)
        return self.read(x)[:, text.order]


def _per_slot(prompts: Tensor, text: PackedText) -> Tensor:
    """Learned tokens [M, D], [C, M, D] or [B, 1 or C, M, D] → one for each slot, [1 or B, K, D]."""
    batch = prompts.shape[0] if prompts.ndim == 4 else 1
    vectors = prompts.reshape(batch, -1, prompts.shape[-1])  # M or C·M of them
    if prompts.ndim > 2 and prompts.shape[-3] > 1 and vectors.shape[1] != len(text.slots):
        raise ConfigError(
            f"prompts {[*prompts.shape]} differ between texts that share theirs (pack has class_specific for that)"
        )
    return vectors[:, text.source % vectors.shape[1]]  # c·M + m is m where all texts have the same M tokens
