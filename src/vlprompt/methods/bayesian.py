"""Bayesian prompt learning (Derakhshani et al., ICCV 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlprompt.data.batches import Batch
from vlprompt.methods.base import LEARNS_TEXT, TEXTS_OF_IMAGES, Can, Count, Method, MethodConfig, Output, Weight
from vlprompt.methods.coop import SGD
from vlprompt.methods.registry import register
from vlprompt.prompting.text import TextContext

L_AND_EPOCHS = {
    "imagenet": (10, 10),
    "caltech101": (20, 20),
    "oxford_pets": (40, 20),
    "stanford_cars": (20, 40),
    "oxford_flowers": (10, 40),
    "food101": (20, 20),
    "fgvc_aircraft": (10, 10),
    "sun397": (20, 10),
    "dtd": (40, 10),
    "eurosat": (20, 60),
    "ucf101": (5, 20),
}
"""Official samples and epochs (base-to-novel), by data set."""


def inference_block(embed: int, width: int) -> nn.Sequential:
    """Three layers from an image feature to one parameter of the posterior."""
    hidden = max(embed // 2, 1)
    layers = nn.Linear(embed, hidden), nn.ELU(), nn.Linear(hidden, hidden), nn.ELU(), nn.Linear(hidden, width)
    return nn.Sequential(*layers)


@register("bayesian")
class Bayesian(Method):
    """A context with a learned distribution: a normal residual, added to all tokens, is sampled L times.

    Probabilities are averaged over samples. Loss: −log of the average + w · KL(posterior ‖ N(0, 1)), the mean over
    the residual's elements. The posterior is free, or conditional: made of the image feature. Official settings: free,
    "a photo of a", L = 10, w = 0.001, SGD 0.002, batch 1, 40 epochs (saic-fi's Bayesian-Prompt-Learning,
    ``vit_b16_c4_ep10_batch1_ctxv1``; L and epochs of its commands by data set are presets). Deviations: the official
    evaluation draws samples anew for every image, here they are the same L whenever the model is asked; a conditional
    posterior takes any batch, where the official one mixes images with tokens unless the batch is 1.
    """

    paper, year, learns = "Derakhshani et al., ICCV", 2023, "text context with a distribution"
    official = {**SGD, "data.batch_size": 1, "train.epochs": 40}
    presets = {
        "cross-dataset": {"train.epochs": 10},
        **{
            f"base-to-novel-{name}": {"method.samples": n, "train.epochs": epochs}
            for name, (n, epochs) in L_AND_EPOCHS.items()
        },
    }
    has_spread = True

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of bayesian."""

        n_ctx: Count = 4
        """Learned context tokens."""
        init: str | None = "a photo of a"
        """Words that initialise the context instead of noise."""
        samples: Count = 10
        """L, residuals drawn in a step and for a prediction."""
        conditional: bool = False
        """Whether the residual's distribution depends on the image."""
        w: Weight = 0.001
        """Weight of the divergence from the prior."""

        @property
        def can(self) -> Can:
            """All but export: an average of probabilities is no product of features."""
            return LEARNS_TEXT & ~Can.EXPORT_CLASSES

    def build(self) -> None:
        """Create the context and its posterior."""
        c, embed, width = self.config, self.backbone.embed_dim, self.backbone.text_tower.config.width
        self.context = TextContext(self.backbone, c.n_ctx, c.init)
        self.drawn: Tensor
        drawn = torch.randn(1, c.samples, width, generator=torch.Generator().manual_seed(0))
        self.register_buffer("drawn", drawn, persistent=False)
        if c.conditional:
            self.blocks = nn.ModuleList(inference_block(embed, width) for _ in range(2))
        else:
            self.mean, self.log_variance = nn.Parameter(torch.zeros(1, width)), nn.Parameter(torch.rand(1, width))

    @property
    def image_dependent(self) -> bool:  # type: ignore[override]
        """With a conditional posterior."""
        return self.config.conditional

    def posterior(self, image_features: Tensor | None) -> tuple[Tensor, Tensor]:
        """μ and log σ² of the residual, [B, D] each, or [1, D] if they are the same for all images."""
        if not self.config.conditional:
            return self.mean, self.log_variance
        assert image_features is not None
        mean, log_variance = self.blocks
        return mean(image_features), log_variance(image_features)

    def noise(self, mu: Tensor) -> Tensor:
        """Standard normal [B, L, D] for μ [B, D]; in evaluation always the same, [1, L, D]."""
        n, width = self.config.samples, mu.shape[-1]
        if self.training:
            return torch.randn(len(mu), n, width, device=mu.device, dtype=mu.dtype)
        return self.drawn.to(mu)

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[L, C, E], or [B, L, C, E] with a conditional posterior."""
        mu, log_variance = self.posterior(image_features)
        residual = mu[:, None] + self.noise(mu) * (log_variance / 2).exp()[:, None]  # [B, L, D]
        t = self.encode_classes(class_names, self.context, bias=residual.flatten(0, 1))
        t = t.unflatten(0, residual.shape[:2])
        return t if self.config.conditional else t[0]

    def log_probabilities(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """Of each sample, [B, L, C]."""
        own = "blce" if class_features.ndim == 4 else "lce"
        cosines = torch.einsum(f"be,{own}->blc", image_features, class_features)
        return (self.backbone.logit_scale * cosines + self.backbone.logit_bias).log_softmax(-1)

    def logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """Logarithms of the probabilities averaged over samples: [B, C]."""
        return self.log_probabilities(image_features, class_features).logsumexp(1) - math.log(self.config.samples)

    def regularisers(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """The divergence of the posterior from the prior."""
        mu, log_variance = self.posterior(out.v)
        kl = 0.5 * (log_variance.exp() + mu**2 - 1 - log_variance)
        return {"kl": self.config.w * kl.mean(-1).mean()}

    @torch.no_grad()
    def spread(self, x: Tensor, class_names: Sequence[str], scale: Tensor | None = None) -> Tensor:
        """[B, C]"""
        names = tuple(class_names)
        v = self.encode_images(x) if x.ndim == 4 else x
        shared = None if self.image_dependent else self.kept_class_features(names)
        each = torch.cat(
            [
                self.log_probabilities(part, self.class_features(names, part) if shared is None else shared)
                for part in v.split(self.images_at_once(names))
            ]
        )
        scaled = each if scale is None else scale.to(each)[:, None, None] * each
        return scaled.softmax(-1).std(1, correction=0)

    def images_at_once(self, class_names: Sequence[str]) -> int:
        """As texts of their own are encoded for each sample too."""
        return max(TEXTS_OF_IMAGES // (len(class_names) * self.config.samples), 1)
