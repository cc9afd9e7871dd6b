"""KDPL: knowledge distillation prompt learning (Mistretta et al., ECCV 2024), other methods' prompts without labels.

Any method learns from a teacher with ``--teacher``; these are the paper's four, with its settings, which need one.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlprompt.methods.base import Count
from vlprompt.methods.coop import CoOp
from vlprompt.methods.maple import MaPLe
from vlprompt.methods.promptsrc import PromptSRC
from vlprompt.methods.registry import register
from vlprompt.methods.vpt import VPT

TAUGHT = frozenset({"teacher_probabilities"})


@register("kdpl_coop")
class KDPLCoOp(CoOp):
    """CoOp without labels: its context is drawn to what a larger frozen model says about the images.

    Loss: ½·KL(teacher ‖ student) + ½·KL(student ‖ teacher). Official settings: student ViT-B/32, teacher open_clip
    ViT-H-14-quickgelu (dfn5b), "a photo of a", SGD 0.002, batch 32, 50 epochs, for every protocol (miccunifi's KDPL,
    ``vit_b32_ctxv1``). Class-agnostic: ``teacher.class_names_file`` and ``classes_per_batch=1000``.
    """

    paper, year = "Mistretta et al., ECCV", 2024
    needs = TAUGHT
    presets = {}

    @dataclass(frozen=True)
    class Config(CoOp.Config):
        """Options of kdpl_coop."""

        n_ctx: Count = 4
        """Learned context tokens."""
        init: str | None = "a photo of a"
        """Words that initialise the context instead of noise."""


@register("kdpl_vpt")
class KDPLVPT(VPT):
    """VPT without labels: its visual tokens are drawn to what a larger frozen model says about the images.

    Loss and teacher as ``kdpl_coop``; official settings as ``vpt``.
    """

    paper, year = "Mistretta et al., ECCV", 2024
    needs = TAUGHT


@register("kdpl_maple")
class KDPLMaPLe(MaPLe):
    """MaPLe without labels: its prompts are drawn to what a larger frozen model says about the images.

    Loss and teacher as ``kdpl_coop``; official settings as ``maple``, for every protocol.
    """

    paper, year = "Mistretta et al., ECCV", 2024
    needs = TAUGHT
    presets = {}


@register("kdpl_promptsrc")
class KDPLPromptSRC(PromptSRC):
    """PromptSRC without labels: near frozen CLIP, and drawn to what a larger frozen model says about the images.

    Loss: that of ``kdpl_coop`` in place of the cross-entropy, and PromptSRC's three distances; its average too.
    Teacher as ``kdpl_coop``; official settings as ``promptsrc``.
    """

    paper, year = "Mistretta et al., ECCV", 2024
    needs = PromptSRC.needs | TAUGHT
    presets = {"cross-dataset": PromptSRC.presets["cross-dataset"]}
