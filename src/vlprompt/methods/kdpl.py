"""KDPL: knowledge distillation prompt learning (Mistretta et al., ECCV 2024), other methods' prompts without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from vlprompt.errors import ConfigError
from vlprompt.methods.base import Batch, Count, Method, MethodConfig, register, small_backbone
from vlprompt.methods.coop import CoOp
from vlprompt.methods.maple import MaPLe
from vlprompt.methods.promptsrc import PromptSRC
from vlprompt.methods.vpt import VPT


def divergences(logits: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q) and KL(q ‖ p) of each image, [B] each, between p [B, K] and the softmax q of logits [B, K]."""
    log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()  # a probability may be too small for its dtype
    log_q = logits.log_softmax(-1)
    return (p * (log_p - log_q)).sum(-1), (log_q.exp() * (log_q - log_p)).sum(-1)


class Distilled(Method):
    """A student method taught by a larger model: what it learns stays, its labels give way to the teacher's.

    Stands before the student's class among the bases.
    """

    needs = frozenset({"teacher_probabilities"})

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Setting of all distilled methods."""

        classes_per_batch: Annotated[int, Ge(2)] | None = None
        """K, the classes most probable to the teacher in a batch, which alone are compared; all if not given.

        Of one class teacher and student would be equally sure, and nothing learned."""

    def build(self) -> None:
        """Create what the student learns."""
        super().build()
        k = self.config.classes_per_batch
        self.couples_batch = self.couples_batch or k is not None
        self.changes_texts = k is not None
        if k is not None and not self.takes_new_classes:
            raise ConfigError(f"method.classes_per_batch = {k} (allowed with class_specific: none, all are compared)")

    def taught(self, batch: Batch) -> tuple[Tensor | slice, Tensor]:
        """The classes that are compared, all or as indices [K], and the teacher's probabilities among them, [B, K]."""
        p, k = batch.teacher_probabilities, self.config.classes_per_batch
        assert p is not None
        if k is None or k >= len(self.class_names):
            return slice(None), p
        classes = p.mean(0).topk(k).indices.sort().values
        p = p[:, classes].clamp_min(torch.finfo(p.dtype).tiny)
        return classes, p / p.sum(-1, keepdim=True)

    def names_of(self, classes: Tensor | slice) -> tuple[str, ...]:
        """The names of all classes, or of those given as indices [K]."""
        if isinstance(classes, slice):
            return self.class_names[classes]
        return tuple(self.class_names[c] for c in classes.tolist())

    def features_of(self, classes: Tensor | slice) -> Tensor:
        """Features of all classes, or of those given as indices, [K, E]; the other texts are not encoded."""
        return self.class_features(self.names_of(classes))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Both divergences from the teacher."""
        classes, p = self.taught(batch)
        logits = self.logits(self.image_features(batch), self.features_of(classes))
        return symmetric_kl(logits, p)


def symmetric_kl(logits: Tensor, p: Tensor) -> dict[str, Tensor]:
    """KDPL's loss: both divergences between teacher and student, half of each."""
    forward, reverse = divergences(logits, p)
    return {"kl_forward": 0.5 * forward.mean(), "kl_reverse": 0.5 * reverse.mean()}


@register("kdpl_coop")
class KDPLCoOp(Distilled, CoOp):
    """CoOp without labels: its context is drawn to what a larger frozen model says about the images.

    Loss: ½·KL(teacher ‖ student) + ½·KL(student ‖ teacher). Official settings: student ViT-B/32, teacher open_clip
    ViT-H-14-quickgelu (dfn5b), "a photo of a", SGD 0.002, batch 32, 50 epochs, for every protocol (miccunifi's KDPL,
    ``vit_b32_ctxv1``). Class-agnostic: ``teacher.class_names_file`` and ``classes_per_batch=1000``.
    """

    paper, year = "Mistretta et al., ECCV", 2024
    presets = {"mini": small_backbone(lr=0.006, epochs=4, min_scale=0.08, n_ctx=4)}

    @dataclass(frozen=True)
    class Config(Distilled.Config, CoOp.Config):
        """Settings of kdpl_coop."""

        n_ctx: Count = 4
        """Learned context tokens."""
        init: str | None = "a photo of a"
        """Words that initialise the context instead of noise."""


@register("kdpl_vpt")
class KDPLVPT(Distilled, VPT):
    """VPT without labels: its visual tokens are drawn to what a larger frozen model says about the images.

    Loss and teacher as ``kdpl_coop``; official settings as ``vpt``.
    """

    paper, year = "Mistretta et al., ECCV", 2024

    @dataclass(frozen=True)
    class Config(Distilled.Config, VPT.Config):
        """Settings of kdpl_vpt."""

    def features_of(self, classes: Tensor | slice) -> Tensor:
        """Frozen features of all classes are computed once."""
        return self.class_features(self.class_names)[classes]


@register("kdpl_maple")
class KDPLMaPLe(Distilled, MaPLe):
    """MaPLe without labels: its prompts are drawn to what a larger frozen model says about the images.

    Loss and teacher as ``kdpl_coop``; official settings as ``maple``, for every protocol.
    """

    paper, year = "Mistretta et al., ECCV", 2024
    presets = {}

    @dataclass(frozen=True)
    class Config(Distilled.Config, MaPLe.Config):
        """Settings of kdpl_maple."""


@register("kdpl_promptsrc")
class KDPLPromptSRC(Distilled, PromptSRC):
    """PromptSRC without labels: near frozen CLIP, and drawn to what a larger frozen model says about the images.

    Loss: that of ``kdpl_coop`` in place of the cross-entropy, and PromptSRC's three distances; its average too.
    Teacher as ``kdpl_coop``; official settings as ``promptsrc``.
    """

    paper, year = "Mistretta et al., ECCV", 2024
    needs = Distilled.needs | PromptSRC.needs
    presets = {
        "cross-dataset": PromptSRC.presets["cross-dataset"],
        "mini": small_backbone(
            lr=0.025,
            epochs=8,
            min_scale=0.08,
            n_ctx_text=8,
            n_ctx_vision=8,
            depth_text=12,
            depth_vision=12,
            average_mean=6,
        ),
    }

    @dataclass(frozen=True)
    class Config(Distilled.Config, PromptSRC.Config):
        """Settings of kdpl_promptsrc."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Both divergences from the teacher, and the three distances to frozen CLIP."""
        classes, p = self.taught(batch)
        v, t = self.image_features(batch), self.features_of(classes)
        logits = self.logits(v, t)
        return {**symmetric_kl(logits, p), **self.consistency(batch, v, t, logits, classes)}
