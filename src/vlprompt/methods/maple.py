"""MaPLe: multi-modal prompt learning (Khattak et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlprompt.backbones.towers import Prompts
from vlprompt.methods.base import LEARNS_PROMPTS, Can, Count, Method, MethodConfig
from vlprompt.methods.ivlp import deep_context
from vlprompt.methods.registry import register
from vlprompt.prompting.visual import CoupledPrompts


@register("maple")
class MaPLe(Method):
    """Deep text prompts, and visual prompts that are linear maps of them, layer by layer.

    Official settings: 2 tokens, depth 9, "a photo of a" (its "of a" stays frozen in the text), SGD 0.0035,
    batch 4, 5 epochs. Deviation: the official blocks cast deep prompts to fp16 even at fp32 precision; here they
    stay fp32. A saved model holds the mapped visual prompts, not the maps.
    """

    paper, year, learns = "Khattak et al., CVPR", 2023, "deep text prompts coupled to visual prompts"
    reads_template = False
    official = {
        "optim.name": "sgd",
        "optim.lr": 0.0035,
        "optim.warmup_epochs": 1,
        "data.batch_size": 4,
        "train.epochs": 5,
    }
    presets = {"cross-dataset": {"optim.lr": 0.0026, "train.epochs": 2, "method.depth": 3}}

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of maple."""

        n_ctx: Count = 2
        """Learned tokens at each layer."""
        depth: Count = 9
        """Layers with tokens of their own, in both towers."""
        init: str | None = "a photo of a"
        """Words that initialise the text tokens of the first layer."""

        @property
        def can(self) -> Can:
            """What learned prompts allow."""
            return LEARNS_PROMPTS

    def build(self) -> None:
        """Create text prompts and the maps to visual prompts."""
        c = self.config
        self.coupled: CoupledPrompts | None = CoupledPrompts(self.backbone, c.depth)
        self.context = deep_context(self.backbone, c.n_ctx, c.init, c.depth)
        self.folded: Tensor | None = None

    def visual_prompts(self) -> Prompts:
        """Visual prompts of the current text prompts."""
        if self.coupled is None:
            assert self.folded is not None
            return Prompts(list(self.folded))
        return self.coupled.prompts(self.context.prompts().tokens)

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E], the same for every image."""
        return self.encode_classes(class_names, self.context)

    def inference_state(self) -> dict[str, Tensor]:
        """Text prompts and the visual prompts they map to, [depth, M, D]."""
        context = {k: v for k, v in self.state_dict().items() if k.startswith("context.")}
        return context | {"folded": torch.stack(self.visual_prompts().tokens).detach()}

    def load_inference_state(self, state: Mapping[str, Tensor]) -> None:
        """Text prompts and folded visual prompts; the maps are gone."""
        folded = torch.stack(self.visual_prompts().tokens).detach()  # its shape; the values are the state's
        self.coupled = None
        del self.folded
        self.register_buffer("folded", torch.zeros_like(folded))
        self.load_state_dict(state)
