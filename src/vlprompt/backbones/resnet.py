"""CLIP's ResNets (Radford et al., ICML 2021): a stem of three convolutions, anti-aliased strides, an attention pool.

They have no tokens for a method to enter at, so they serve methods that learn on the text side alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlprompt.backbones.attention import Attention, plain_attention
from vlprompt.backbones.towers import BeforeBlock, ImageConfig, ImageTower, Prompts
from vlprompt.errors import BackboneError

EXPANSION = 4
EPS = 1e-5


class FrozenNorm(nn.Module):
    """Batch normalisation by its stored statistics, never a batch's."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, H, W] → the same."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=EPS)


def convolution(before: int, after: int, kernel: int = 1, stride: int = 1) -> nn.Conv2d:
    """Without bias, padded to the same size."""
    return nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut; a stride is an average pool, in both."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = EXPANSION * width
        self.conv1, self.bn1 = convolution(before, width), FrozenNorm(width)
        self.conv2, self.bn2 = convolution(width, width, 3), FrozenNorm(width)
        self.conv3, self.bn3 = convolution(width, after), FrozenNorm(after)
        self.stride = stride
        changes = stride > 1 or before != after
        self.downsample = nn.Sequential(convolution(before, after), FrozenNorm(after)) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, H, W] → [B, 4 · width, H / stride, W / stride]"""
        out = self.bn1(self.conv1(x)).relu()
        out = self._strided(self.bn2(self.conv2(out)).relu())
        shortcut = x if self.downsample is None else self.downsample(self._strided(x))
        return (self.bn3(self.conv3(out)) + shortcut).relu()

    def _strided(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x


class MeanAttention(nn.Module):
    """The mean of all places asks the places and itself."""

    def __init__(self, places: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(places + 1, width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed_dim)
        self.attention = plain_attention(heads)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, H, W] → [B, E]"""
        return self.c_proj(self.pool(x))

    def pool(self, x: Tensor) -> Tensor:
        """[B, D, H, W] → [B, D]"""
        return self.ask(x, 1)[:, 0]

    def ask(self, x: Tensor, n: int | None = None) -> Tensor:
        """What the mean and the places [B, D, H, W] are told, the first ``n`` or all of them: [B, n, D]."""
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding
        return self.attention(self.q_proj(x[:, :n]), self.k_proj(x), self.v_proj(x))


class ResNetTower(ImageTower):
    """An image tower that is not made of tokens and blocks: images in, features out, and nothing to enter."""

    def __init__(self, config: ImageConfig) -> None:
        nn.Module.__init__(self)
        self.config = c = config
        half = c.width // 2
        self.conv1, self.bn1 = convolution(3, half, 3, 2), FrozenNorm(half)
        self.conv2, self.bn2 = convolution(half, half, 3), FrozenNorm(half)
        self.conv3, self.bn3 = convolution(half, c.width, 3), FrozenNorm(c.width)
        before = c.width
        for n, blocks in enumerate(c.stages):
            width, stage = c.width * 2**n, []
            for i in range(blocks):
                stage.append(Bottleneck(before, width, 2 if n and not i else 1))
                before = EXPANSION * width
            self.add_module(f"layer{n + 1}", nn.Sequential(*stage))
        side = c.image_size // c.patch_size
        self.attnpool = MeanAttention(side**2, before, c.heads, c.embed_dim)

    def embed(self, images: Tensor) -> Tensor:
        """Raises BackboneError: there are no tokens."""
        raise BackboneError("the image tower is a ResNet, without tokens: it serves methods that learn of texts alone")

    def forward(
        self,
        images: Tensor,
        prompts: Prompts | None = None,
        attention: Attention | Sequence[Attention] | None = None,
        before_block: BeforeBlock | None = None,
    ) -> Tensor:
        """Features of images [B, 3, S, S], not normalised: [B, E]."""
        if prompts is not None or attention is not None or before_block is not None:
            self.embed(images)
        return self.projection(self.pool(images))

    @property
    def projection(self) -> nn.Linear:  # type: ignore[override]
        """What makes features of pooled places; it has a bias, a transformer's has none."""
        return self.attnpool.c_proj

    def local(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] → [B, P, E], of each place, as it asks the others."""
        return self.projection(self.attnpool.ask(self.places(images))[:, 1:])

    def pool(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] → [B, D], before the projection."""
        return self.attnpool.pool(self.places(images))

    def places(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] → [B, D, H, W], before they are pooled."""
        x = images.to(self.conv1.weight.dtype)
        for n in (1, 2, 3):
            x = getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(x)).relu()
        x = F.avg_pool2d(x, 2)
        for n in range(len(self.config.stages)):
            x = getattr(self, f"layer{n + 1}")(x)
        return x
