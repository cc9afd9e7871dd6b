"""Prompt-OT: deep prompts kept near the frozen model by optimal transport (Chen et al., 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlprompt.data.batches import Batch
from vlprompt.methods.base import Can, Output, Weight
from vlprompt.methods.ivlp import IVLP, Size
from vlprompt.methods.registry import register
from vlprompt.methods.templates import IMAGENET_TEMPLATES
from vlprompt.methods.zero_shot import frozen_class_features


@register("promptot")
class PromptOT(IVLP):
    """IVLP prompts; pairs of image and class features stay near the frozen model's as distributions, not one by one.

    Loss: CE + 10 · Σ P ∘ C with costs C_ij = ½ ‖[v_i, t_yi] − [v0_j, t0_yj]‖² over the batch and the exact plan P
    between uniform weights, a permutation divided by B (scipy's assignment). Official settings: 4 + 4 tokens, depth
    12, SGD 0.005, batch 4, 20 epochs. The official list of 60 templates is read, and only its first one used for t0:
    ``ensemble=imagenet`` uses them all. Deviation: the official blocks cast deep prompts to fp16 even at fp32
    precision; here they stay fp32.
    """

    paper, year, learns = "Chen et al., arXiv", 2025, "deep prompts kept near the frozen model by transport"
    needs = frozenset({"frozen_image_features"})
    official = IVLP.official | {"optim.lr": 0.005}
    presets = {}

    @dataclass(frozen=True)
    class Config(IVLP.Config):
        """Options of promptot."""

        depth_text: Size = 12
        """Layers of the text tower with tokens of their own; 0 leaves it frozen, with the words of ``init``."""
        depth_vision: Size = 12
        """Layers of the image tower with tokens of their own; 0 leaves it frozen."""
        w: Weight = 10.0
        """Weight of the transport (the official code's DIV)."""
        eta: Weight = 0.5
        """What squared distances are multiplied by."""
        ensemble: Literal["none", "imagenet"] = "none"
        """The frozen class features are those of "a photo of a {}.", or a mean over ImageNet's first 60 templates."""

        @property
        def can(self) -> Can:
            """A plan compares the images of a batch, and is found outside the GPU."""
            return super().can & ~(Can.SPLIT_BATCHES | Can.REPLAY_STEPS)

    def frozen_classes(self, class_names: Sequence[str]) -> Tensor:
        """t0, [C, E]."""
        templates = IMAGENET_TEMPLATES if self.config.ensemble == "imagenet" else IMAGENET_TEMPLATES[:1]
        return frozen_class_features(self.backbone, class_names, templates, "raw")

    def costs(self, out: Output, batch: Batch) -> Tensor:
        """[B, B], from a tuned pair (row) to a frozen one."""
        v0, y = batch.frozen_image_features, batch.targets
        assert v0 is not None
        t0 = self.frozen_classes(self.class_names)[batch.compared]
        tuned, frozen = torch.cat([out.v, out.t[y]], -1), torch.cat([v0, t0[y]], -1)
        return self.config.eta * (tuned[:, None] - frozen).square().sum(-1)

    def regularisers(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """The transport under the best plan, which takes no gradient."""
        costs = self.costs(out, batch)
        return {"ot": self.config.w * (transport_plan(costs) * costs).sum()}


@torch.no_grad()
def transport_plan(costs: Tensor) -> Tensor:
    """The exact plan [B, B] of least cost between uniform weights; each row and column sums to 1/B.

    Among the plans of least cost there is always a permutation (Birkhoff), so that an assignment solves it.
    """
    from scipy.optimize import linear_sum_assignment  # a fifth of torch's import, for this method alone

    rows, columns = linear_sum_assignment(costs.double().cpu().numpy())
    plan = torch.zeros_like(costs)
    plan[torch.from_numpy(rows), torch.from_numpy(columns)] = 1 / len(costs)
    return plan
