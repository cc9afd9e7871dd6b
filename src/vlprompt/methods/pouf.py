"""POUF: prompt-oriented unsupervised fine-tuning (Tanwisuth et al., ICML 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vlprompt.backbones.backbone import unit
from vlprompt.data.batches import Batch
from vlprompt.errors import DataError
from vlprompt.methods.base import Can, Count, Method, MethodConfig, Output, Weight
from vlprompt.methods.registry import register
from vlprompt.prompting.text import TextContext, fill


@register("pouf")
class POUF(Method):
    """A context, or the class features themselves, and the scale, aligned with images that nobody has labelled.

    Loss: transport between the batch's images and the classes, both ways, + 0.3 · (mean entropy of an image − entropy
    of the mean). Official settings: 4 tokens "a photo of a", SGD with Nesterov's momentum 0.9, decay 1e-3, batch 96;
    rates as they take effect: 0.1 · 0.01 for prompts, 5e-5 · 0.01 for the log of the scale. Deviations: 20 passes with
    a cosine where the official code takes 10,000 steps with (1 + 0.0002 step)^−0.75; the last epoch is kept, where the
    official code chooses one by the labels of its test images; tuning all of CLIP is left out, ``learn=head`` tunes
    the class features alone. An image's own label is never read.
    """

    paper, year, learns = "Tanwisuth et al., ICML", 2023, "text context or class features, and scale, without labels"
    reads_labels = False
    official = {
        "optim.name": "sgd",
        "optim.lr": 1e-3,
        "optim.nesterov": True,
        "optim.weight_decay": 1e-3,
        "optim.warmup_epochs": 0,
        "data.batch_size": 96,
        "train.epochs": 20,
    }
    rates = {"log_scale": 5e-4}

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of pouf."""

        learn: Literal["prompt", "head"] = "prompt"
        """What is learned beside the scale: a context of the text tower, or the class features."""
        n_ctx: Count = 4
        """Learned context tokens, of the prompt."""
        init: str | None = "a photo of a"
        """Words that initialise the context, or make the text whose features the head begins with."""
        transport: Weight = 1.0
        """Weight of the transport."""
        im: Weight = 0.3
        """Weight of the mutual information."""

        @property
        def can(self) -> Can:
            """Images are read as frozen features, and compared within a batch."""
            texts = Can.SPLIT_TEXTS | Can.DROP_ATTENTION if self.learn == "prompt" else Can(0)
            return Can.USE_FROZEN_FEATURES | Can.EXPORT_CLASSES | Can.REPLAY_STEPS | texts

        def unused(self) -> dict[str, str]:
            """Tokens of no prompt."""
            return {} if self.learn == "prompt" else {"n_ctx": "learn"}

    def build(self) -> None:
        """Create the context or the head, and the scale."""
        c = self.config
        self.log_scale = nn.Parameter(torch.tensor(math.log(self.backbone.logit_scale)))
        if c.learn == "prompt":
            self.context = TextContext(self.backbone, c.n_ctx, c.init)
        else:
            texts = fill(f"{c.init} {{}}" if c.init else self.template, self.class_names)
            self.head = nn.Parameter(self.backbone.encode_texts(texts, normalise=False).clone())

    @property
    def takes_new_classes(self) -> bool:
        """A head is of its classes."""
        return self.config.learn == "prompt"

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E], the same for every image."""
        if self.config.learn == "prompt":
            return self.encode_classes(class_names, self.context)
        if tuple(class_names) != self.class_names:
            raise DataError("pouf learned features of each of its classes: it has none for other classes")
        return unit(self.head)

    def logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """With the learned scale."""
        return self.log_scale.exp() * image_features.to(class_features) @ class_features.T + self.backbone.logit_bias

    def scale_and_bias(self) -> tuple[Tensor, Tensor]:
        """The learned scale, and the backbone's bias."""
        return self.log_scale.exp(), torch.tensor(self.backbone.logit_bias)

    def supervision(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """No label's: how images and classes lie to each other. A teacher's word is heard, if there is one."""
        if batch.teacher_probabilities is not None:
            return super().supervision(out, batch)
        return {}

    def regularisers(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """Transport and mutual information."""
        c, cosines = self.config, out.v.to(out.t) @ out.t.T
        return {"transport": c.transport * transport(out.logits, cosines), "im": c.im * mutual_information(out.logits)}


def transport(logits: Tensor, cosines: Tensor) -> Tensor:
    """Cost of leading images to classes and classes to the batch's images, by their softmax: both [B, C], a scalar.

    The plans take gradients as the costs do; no share of the classes enters.
    """
    cost = 1 - cosines
    return (cost * logits.softmax(1)).sum(1).mean() + (cost * logits.softmax(0)).sum(0).mean()


def mutual_information(logits: Tensor) -> Tensor:
    """Mean entropy of an image's classes less that of their mean over the batch [B, C]; epsilons as officially."""
    p = logits.softmax(1)
    mean = p.mean(0)
    return -(p * (p + 1e-5).log()).sum(1).mean() + (mean * (mean + 1e-6).log()).sum()
