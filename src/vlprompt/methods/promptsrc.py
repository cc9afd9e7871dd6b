"""PromptSRC: self-regulating prompts (Khattak et al., ICCV 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor
from torch.nn.functional import kl_div

from vlprompt.data.batches import Batch
from vlprompt.methods.base import Output, Weight
from vlprompt.methods.ivlp import IVLP
from vlprompt.methods.registry import register
from vlprompt.methods.templates import IMAGENET_TEMPLATES
from vlprompt.methods.zero_shot import frozen_class_features


def gaussian_weights(epochs: int, mean: float, std: float) -> list[float]:
    """Weight of each epoch 1 … E in the average: a Gaussian, scaled to sum to 1."""
    density = [math.exp(-0.5 * ((e - mean) / std) ** 2) for e in range(1, epochs + 1)]
    if not sum(density):
        return [0.0] * (epochs - 1) + [1.0]  # the mean lies out of reach: the last epoch alone
    return [d / sum(density) for d in density]


@register("promptsrc")
class PromptSRC(IVLP):
    """IVLP prompts kept near frozen CLIP, and averaged over the epochs with Gaussian weights.

    Loss: CE + 25·mean|t − t0| + 10·mean|v − v0| + KL(zero-shot ‖ tuned) summed and divided by B·C; t0 is the
    normalised mean of the *un-normalised* text features of 60 templates. Official settings: 4 + 4 tokens, depth 9,
    SGD 0.0025, batch 4, 20 epochs, average with mean 15 and std 1 (cross-dataset: depth 3, 6 and 10; few-shot:
    50 epochs, 30 and 30). With other numbers of epochs give mean and std for them. Deviation: the official blocks
    cast deep prompts to fp16 even at fp32 precision; here they stay fp32.
    """

    paper, year, learns = "Khattak et al., ICCV", 2023, "deep prompts kept near the frozen model, averaged"
    needs = frozenset({"frozen_image_features"})
    presets = {
        "cross-dataset": {
            "method.depth_text": 3,
            "method.depth_vision": 3,
            "method.average_mean": 6,
            "method.average_std": 10,
        },
        "few-shot": {"train.epochs": 50, "method.average_mean": 30, "method.average_std": 30},
    }

    @dataclass(frozen=True)
    class Config(IVLP.Config):
        """Options of promptsrc."""

        text_weight: Weight = 25.0
        """Weight of the distance to the frozen class features."""
        image_weight: Weight = 10.0
        """Weight of the distance to the frozen image features."""
        average_mean: float = 15.0
        """Epoch (from 1) that weighs most in the average of the prompts."""
        average_std: Annotated[float, Gt(0)] = 1.0
        """Width of the average, in epochs."""

    def build(self) -> None:
        """Create the prompts, and an average that starts empty."""
        super().build()
        self.average: dict[str, Tensor] = {}

    def regularisers(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """The three distances to frozen CLIP."""
        v0 = batch.frozen_image_features
        assert v0 is not None
        t0 = frozen_class_features(self.backbone, self.class_names, IMAGENET_TEMPLATES, "raw")[batch.compared]
        logits0 = self.logits(v0, t0)
        kl = kl_div(out.logits.log_softmax(-1), logits0.log_softmax(-1), reduction="sum", log_target=True)
        return {
            "text_l1": self.config.text_weight * (out.t - t0).abs().mean(),
            "image_l1": self.config.image_weight * (out.v - v0).abs().mean(),
            "logits_kl": kl / out.logits.numel(),
        }

    def training_state(self) -> dict[str, Tensor]:
        """The average so far."""
        return dict(self.average)

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from an average."""
        self.average = dict(state)

    @torch.no_grad()
    def after_epoch(self, epoch: int, epochs: int) -> None:
        """Add the prompts to the average; after the last epoch, become the average."""
        weight = gaussian_weights(epochs, self.config.average_mean, self.config.average_std)[epoch]
        for name, p in self.named_parameters():
            self.average[name] = weight * p + (self.average[name] if epoch else 0)
        if epoch == epochs - 1:
            for name, p in self.named_parameters():
                p.copy_(self.average[name])
