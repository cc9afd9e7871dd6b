"""DroPLe's loss terms beside the cross-entropy.

Shapes: B images, C classes, R shared tokens, E embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from vlprompt.methods.base import Output
from vlprompt.methods.drople.config import Config


def regularisers(out: Output, v0: Tensor, t0: Tensor, scale: Tensor, lam: Tensor, c: Config) -> dict[str, Tensor]:
    """The loss terms beside the cross-entropy, of learned features and of frozen v0 [B, E] and t0 [C, E].

    ``out.extra`` holds what the shared tokens see of the images and of their labels' texts, [B, R, width] each, layer
    by layer. All terms are weighted; the residual entropies are maximised, so theirs is negative.
    """
    v, t, logits, logits0 = out.v, out.t, out.logits, scale * v0 @ t0.T
    kl = kl_div(logits.log_softmax(-1), logits0.log_softmax(-1), reduction="sum", log_target=True)
    h_v, h_t = entropy(scale * residual(v, v0, lam) @ t0.T), entropy(scale * v0 @ residual(t, t0, lam).T)
    apart = [0.5 * (1 - cosine(of_image, of_text)).mean() for of_image, of_text in out.extra]
    return {
        "text_consistency": c.text_weight * (t - t0).abs().mean(),
        "image_consistency": c.image_weight * (v - v0).abs().mean(),
        "distillation": c.distillation_weight * kl / logits.numel(),
        "residual_entropy": -c.entropy_weight * (h_v + h_t),
        "alignment": c.alignment_weight * torch.stack(apart).mean(),
    }


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of vectors [..., D]; torch's divides both by their norms first, and takes twice as long in the backward pass."""
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (a * b).sum(-1) / norms.clamp_min(1e-8)


def residual(z: Tensor, z0: Tensor, lam: Tensor) -> Tensor:
    """z_r = (z − λ z0) / (1 − λ), the denominator kept 1e-3 away from 0 and 1 as in the public code."""
    rest = 1 - lam
    rest = rest + 1e-3 * ((rest.abs() < 1e-3).to(rest.dtype) - (lam.abs() < 1e-3).to(rest.dtype))
    return (z - lam * z0) / rest


def entropy(logits: Tensor) -> Tensor:
    """Mean over the rows of −Σ p log(p + 1e-5)."""
    p = logits.softmax(-1)
    return -(p * (p + 1e-5).log()).sum(-1).mean()


def rising(lam: float, epoch: int, epochs: int) -> float:
    """λ_e = λ₀ (1 − (1 + 10 e / E)^(−0.75)) of epoch e = 0 … E − 1: from 0 to about 0.83 λ₀."""
    return lam * (1 - (1 + 10 * epoch / epochs) ** -0.75)
