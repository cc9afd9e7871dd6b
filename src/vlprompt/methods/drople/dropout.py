"""Importance-weighted token dropout (DroPLe): how important each token is, and which are hit.

Shapes: B images or texts, N tokens, H heads, R shared tokens. g is the global token's position (class token: 0, end
of text: −1); scores are about the N − 1 others. Rules and numbers are those of DroPLe's public code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlprompt.backbones.backbone import Backbone
from vlprompt.methods.base import TokenMaps
from vlprompt.methods.drople.config import Config

EPS = 1e-8


def content(g: int) -> slice:
    """All tokens but the global one, which stands first (0) or last (−1)."""
    return slice(1, None) if g == 0 else slice(None, -1)


def scores(maps: Tensor, cross: Tensor, g: int) -> Tensor:
    """S_self, S_cls and S_cross of every token, each divided by its sum: [3, B, N − 1].

    ``maps`` [B, H, N, N] are a block's attention weights, ``cross`` [B, R, N] those of the shared tokens.
    """
    others = content(g)
    among = maps[..., others, others]
    itself = torch.eye(among.shape[-1], dtype=torch.bool, device=maps.device)
    s_self = among.masked_fill(itself, 0).amax(-1).to(cross.dtype).mean(1)
    s_cls = maps[:, :, g, others].to(cross.dtype).mean(1)
    s_cross = cross[..., others].amax(1)
    s = torch.stack([s_self, s_cls, s_cross])
    return s / (s.sum(-1, keepdim=True) + EPS)


def importance(scores: Tensor) -> Tensor:
    """The mean of the scores [3, B, N − 1], stretched to reach from 0 to 1 in every image or text: [B, N − 1]."""
    mean = scores.mean(0)
    low, high = mean.aminmax(dim=-1, keepdim=True)
    span = high - low
    return (mean - low) / torch.where(span == 0, 1, span)


def drop(x: Tensor, rows: Tensor, p: Tensor, mode: Literal["gaussian", "zero"], sigma: float) -> Tensor:
    """x [B, N, D] with each token at ``rows`` [K] hit with its probability p [B, K]; nothing is rescaled.

    ``gaussian`` multiplies a token that is hit by 1 + sigma · ε, ε ~ N(0, 1) for each channel; ``zero`` by zero.
    """
    tokens = x[:, rows]
    hit = (torch.rand_like(p) < p)[..., None]
    factor = ~hit if mode == "zero" else 1 + hit * (sigma * torch.randn_like(tokens))
    return x.index_copy(1, rows, tokens * factor)


class SharedTokens(nn.Module):
    """R learned tokens that look at the tokens of both towers: e_r, and maps W_v, W_t (with biases) to their width."""

    def __init__(self, backbone: Backbone, n: int, width: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.tokens = nn.Parameter(torch.empty(n, width))
        nn.init.kaiming_uniform_(self.tokens, a=5**0.5)
        self.image = nn.Linear(backbone.image_tower.config.width, width)
        self.text = nn.Linear(backbone.text_tower.config.width, width)

    def keys(self, to_shared: nn.Linear) -> Tensor:
        """τ·E·W, [R, D]: what a block's tokens are compared with; a bias would change no softmax."""
        return (self.temperature * self.tokens) @ to_shared.weight

    def pool(self, to_shared: nn.Linear, a: Tensor, x: Tensor) -> Tensor:
        """What each shared token sees of x [B, N, D]: f_r = Σ_j a_rj (W x_j + b), [B, R, width]."""
        return to_shared(a @ x.to(a.dtype))  # a sums to 1 over the tokens: pooling first is the same, and cheaper


def look(keys: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """a_rj = softmax over the tokens j of keys_r · x_j, [B, R, N]; τ is in the keys, and there is no 1/√d."""
    logits = keys @ x.to(keys.dtype).mT
    return (logits if mask is None else logits.masked_fill(~mask[:, None], -torch.inf)).softmax(-1)


class BlockDropout(NamedTuple):
    """What dropout does after one block of the image tower; tokens are patches, then visual prompts."""

    importance: Tensor
    """[B, N − 1], 0 to 1."""
    p: Tensor
    """Probability that a token is hit, [B, N − 1]."""
    reach: int
    """How many of the tokens are read by the next block; the prompts after them are replaced there."""


def token_maps(blocks: Sequence[BlockDropout], c: Config, seed: int) -> list[TokenMaps]:
    """What ``vlprompt explain`` draws of the first image: importance, probability, and what one draw hits."""
    generator = torch.Generator().manual_seed(seed)
    p = [block.p[0].cpu() for block in blocks]
    hit = [
        (torch.rand(len(of_block), generator=generator) < of_block)[: block.reach]
        for of_block, block in zip(p, blocks, strict=True)
    ]
    span = {
        "importance": f"from {c.p_min:g} to {c.p_max:g}",
        "uniform": f"{(c.p_min + c.p_max) / 2:g} for all",
        "none": "no dropout",
    }
    action = {"gaussian": f"noise, sigma {c.sigma:g}", "zero": "zeroed"}[c.mode]
    return [
        TokenMaps("importance", "of the patches and,\nbelow, the prompts", [b.importance[0].cpu() for b in blocks]),
        TokenMaps("probability", f"to be hit in training\n{span[c.dropout]}", p),
        TokenMaps("hit", f"in one draw (seed {seed})\n{action}", hit),
    ]
