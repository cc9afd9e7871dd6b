"""PLOT: prompt learning with optimal transport (Chen et al., ICLR 2023)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from vlprompt.backbones.backbone import unit
from vlprompt.errors import BackboneError
from vlprompt.methods.base import Can, Count, Method, MethodConfig
from vlprompt.methods.coop import SGD
from vlprompt.methods.registry import register
from vlprompt.prompting.text import TextContext

PAIRS_AT_ONCE = 20_000
"""Images times classes that are scored together where no gradient asks for all of them."""


@register("plot")
class PLOT(Method):
    """N contexts of a class, which transport leads to an image's patches; a class's score is what arrives there.

    logit = s · Σ_pn T_pn cos(v_p, t_n), with the plan T of Sinkhorn's algorithm for the costs 1 − cos between uniform
    weights, which takes no gradient. The loss is cross-entropy. Official settings: N = 4 contexts of 16 tokens at
    random, eps 0.1, at most 100 iterations, fewer where the scaling of patches changes by less than 0.01 on average,
    SGD 0.002, batch 128 (32 for small data sets), 50 epochs (CHENGY12's PLOT, ``plot-coop``, on ResNet-50). Deviations:
    officially all pairs of a batch and its classes stop together, so that an image's logits depend on the images beside
    it; here each pair stops by itself. A ViT's patches are read where its class token is. ``transport=unbalanced`` is
    Dude's, reconstructed: only its description was known.
    """

    paper, year, learns = "Chen et al., ICLR", 2023, "several text contexts, led to patches by transport"
    parity = "identity"
    reads_template = False
    official = {**SGD, "data.batch_size": 128, "train.epochs": 50}
    presets = {"few-shot-fgvc_aircraft": {"data.batch_size": 32}}

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of plot."""

        n_contexts: Count = 4
        """N, contexts of each class, all learned apart."""
        n_ctx: Count = 16
        """Learned tokens of each context."""
        eps: Annotated[float, Ge(0.03), Le(1e3)] = 0.1
        """Weight of the plan's entropy; below 0.03 kernels vanish in fp32."""
        iterations: Count = 100
        """Sinkhorn's iterations at most."""
        stop: Annotated[float, Ge(0), Le(1)] = 0.01
        """Mean change of the patches' scaling below which a pair's iterations end."""
        transport: Literal["balanced", "unbalanced"] = "balanced"
        """Whether all of the weights is led somewhere, or what pays (as in Dude; reconstructed)."""
        rho: Annotated[float, Gt(0), Le(1e6)] = 1.0
        """Unbalanced: weight of the divergence of what is led from the weights; the larger, the more balanced."""

        @property
        def can(self) -> Can:
            """Its loss is a mean over images, texts may be encoded in parts; how long it iterates depends on both."""
            return Can.SPLIT_BATCHES | Can.SPLIT_TEXTS | Can.DROP_ATTENTION

        def unused(self) -> dict[str, str]:
            """The weight of a divergence that is zero."""
            return {} if self.transport == "unbalanced" else {"rho": "transport"}

    def build(self) -> None:
        """Create the contexts; raises BackboneError where patches have no features of their own."""
        if self.backbone.image_tower.config.pool == "map":
            raise BackboneError(
                f"backbone '{self.backbone.name}' pools all patches into one feature: plot needs those of each patch"
            )
        self.contexts = nn.ModuleList(
            TextContext(self.backbone, self.config.n_ctx) for _ in range(self.config.n_contexts)
        )

    def encode_images(self, images: Tensor) -> Tensor:
        """Normalised frozen features of each patch, [B, P, E]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            return unit(self.backbone.image_tower.local(images.to(self.backbone.device)))

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[N, C, E], the same for every image."""
        contexts: Iterable[Any] = self.contexts
        return torch.stack([self.encode_classes(class_names, context) for context in contexts])

    def logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """[B, C]"""
        at_once = max(PAIRS_AT_ONCE // class_features.shape[1], 1)
        if not torch.is_grad_enabled() and len(image_features) > at_once:
            return torch.cat([self.logits(part, class_features) for part in image_features.split(at_once)])
        c = self.config
        cosines = torch.einsum("bpe,nce->bcpn", image_features.to(class_features), class_features)
        power = c.rho / (c.rho + c.eps) if c.transport == "unbalanced" else 1.0
        plan = sinkhorn(1 - cosines, c.eps, c.iterations, c.stop, power)
        return self.backbone.logit_scale * (plan * cosines).sum((-2, -1)) + self.backbone.logit_bias


@torch.no_grad()
def sinkhorn(costs: Tensor, eps: float, iterations: int = 100, stop: float = 0.0, power: float = 1.0) -> Tensor:
    """Plans [..., P, N] of least cost − eps · entropy between uniform weights (Cuturi, NeurIPS 2013).

    Each ends by itself where its rows' scaling changes by less than ``stop`` on average. With a ``power`` below 1,
    ρ / (ρ + eps), its sums may differ from the weights, at ρ times their divergence (Chizat et al., 2018).
    """
    kernel, (p, n) = (-costs / eps).exp(), costs.shape[-2:]
    r, c = torch.ones_like(costs[..., :1]), torch.ones_like(costs[..., :1, :])
    ended = torch.zeros_like(r[..., :1, :], dtype=torch.bool)
    for _ in range(iterations):
        rows = (1 / p / (kernel @ c.transpose(-1, -2))) ** power
        columns = (1 / n / (rows.transpose(-1, -2) @ kernel)) ** power
        change = (rows - r).abs().mean(-2, keepdim=True)
        r, c = torch.where(ended, r, rows), torch.where(ended, c, columns)
        ended = ended | (change < stop)
        # An exported graph has all iterations: which of them is the last depends on the images.
        if not torch.onnx.is_in_onnx_export() and ended.all():
            break
    return r * kernel * c
