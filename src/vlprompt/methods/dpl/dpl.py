"""DPL: decoupled prompt learning (Xu et al., arXiv 2308.10061, 2023), reconstructed from the abstract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn

from vlprompt.backbones.backbone import unit
from vlprompt.backbones.towers import ImageTower, Prompts, TextTower
from vlprompt.methods.base import LEARNS_PROMPTS, LEARNS_TEXT, Can, Method, Template, Weight
from vlprompt.methods.dpl.decoupled import SentencePrompts, SubProcesses, image_attention, text_attention
from vlprompt.methods.ivlp import IVLP, DeepPrompts, deep_context
from vlprompt.methods.registry import register
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.prompting.text import TextContext, encode_classes
from vlprompt.prompting.visual import VisualPrompts


@register("dpl")
class DPL(Method):
    """Deep prompts whose attention is split into four sub-processes; reconstructed from the abstract.

    Only the abstract is public, without code. From it: attention between prompts and instance (patches, words) as four
    sub-processes, some of which are strengthened; textual prompts conditioned on the text (LCTP); visual, textual or
    both branches; cross-entropy alone. Ours: everything else, above all which weights are strengthened, how, and by how
    much. Exact weights with ``prompt_to_prompt=keep``, ``carry=replace`` and ``text=context`` are IVLP; a ``scale`` of
    0 is the frozen model. The training settings are IVLP's; textual prompts alone learn at 0.002 (preset ``textual``).
    """

    paper, year = "Xu et al., arXiv", 2023
    learns = "deep text and visual prompts under decoupled attention"
    parity = "reconstructed"
    official = IVLP.official
    presets = {"textual": {"method.branches": "textual", "optim.lr": 0.002}}

    @dataclass(frozen=True)
    class Config(DeepPrompts):
        """Options of dpl."""

        branches: Literal["visual", "textual", "both"] = "both"
        """Towers with learned tokens; the other stays frozen."""
        text: Literal["sentence", "read-only", "context"] = "sentence"
        """Text prompts beside the class's whole sentence, read by all its tokens, or by the pooled one alone; or CoOp's
        context in front of the class name."""
        template: Template | None = None
        """The sentence, with {} for the class name; the data set's own if not given."""
        carry: Literal["add", "replace"] = "add"
        """Whether a deeper layer's learned tokens are added to what the prompts have read so far, or replace it."""
        instance_to_prompt: Literal["exact", "scaled", "constant", "learned"] = "constant"
        """Weight λ of the prompts for the instance: the softmax's, with its odds scaled, constant, or with its odds
        scaled by a learned factor for each layer and head."""
        prompt_to_prompt: Literal["keep", "drop", "identity"] = "keep"
        """Prompt tokens that a prompt token sees: all, none, or itself."""
        prompt_to_instance: Literal["exact", "scaled"] = "exact"
        """Weight of the instance for the prompts: the softmax's, or with its odds scaled."""
        scale_vision: Weight = 5.0
        """Factor of the instance→prompt odds in the image tower, if scaled."""
        scale_text: Weight = 1.0
        """Factor of the instance→prompt odds in the text tower, if scaled."""
        weight: Annotated[Weight, Le(1)] = 0.05
        """λ of instance→prompt, if constant."""
        scale_prompts: Annotated[float, Gt(0)] = 2.0
        """Factor of the prompt→instance odds, if scaled."""

        @property
        def can(self) -> Can:
            """Its attention reads all texts at once; images are frozen where it prompts texts alone."""
            return (LEARNS_TEXT if self.branches == "textual" else LEARNS_PROMPTS) & ~Can.SPLIT_TEXTS

        def unused(self) -> dict[str, str]:
            """Settings of a branch that is off, scales of weights that are not scaled, the constant where it is none, a
            sentence that is not there."""
            unused: dict[str, str] = {}
            if self.instance_to_prompt != "scaled":
                unused |= dict.fromkeys(("scale_vision", "scale_text"), "instance_to_prompt")
            if self.instance_to_prompt != "constant":
                unused["weight"] = "instance_to_prompt"
            if self.prompt_to_instance != "scaled":
                unused["scale_prompts"] = "prompt_to_instance"
            if self.text == "context" and self.branches != "visual":
                unused["template"] = "text"
            if self.branches == "visual":
                unused |= dict.fromkeys(("n_ctx_text", "depth_text", "init", "text", "scale_text"), "branches")
            if self.branches == "textual":
                unused |= dict.fromkeys(("n_ctx_vision", "depth_vision", "scale_vision"), "branches")
            return unused

    def build(self) -> None:
        """Create the prompts of the branches, and factors where they are learned."""
        c, b = self.config, self.backbone
        if c.branches != "visual":
            self.context = self._context()
            self.log_odds_text = self._log_odds(b.text_tower)
        if c.branches != "textual":
            self.visual = VisualPrompts(b, c.n_ctx_vision, c.depth_vision, c.carry)
            self.log_odds_vision = self._log_odds(b.image_tower)

    def _context(self) -> TextContext:
        c, b = self.config, self.backbone
        if c.text == "context":
            return deep_context(b, c.n_ctx_text, c.init, c.depth_text, mode=c.carry)
        template, read_only = c.template or self.template, c.text == "read-only"
        return SentencePrompts(b, c.n_ctx_text, template, c.init, depth=c.depth_text, mode=c.carry, read_only=read_only)

    def _log_odds(self, tower: ImageTower | TextTower) -> nn.Parameter | None:
        """ln of the learned factors of each layer and head [L, H]: exact at first."""
        if self.config.instance_to_prompt != "learned":
            return None
        return nn.Parameter(torch.zeros(tower.config.layers, tower.config.heads))

    def _sub_processes(self, scale: float) -> SubProcesses:
        c = self.config
        return SubProcesses(
            c.instance_to_prompt, c.prompt_to_prompt, c.prompt_to_instance, scale, c.weight, c.scale_prompts
        )

    def visual_prompts(self) -> Prompts | None:
        """The learned tokens of the image tower, if it has any."""
        return None if self.config.branches == "textual" else self.visual.prompts()

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, E]"""
        prompts, tower, c = self.visual_prompts(), self.backbone.image_tower, self.config
        if prompts is None:
            return super().encode_images(images)
        attention = image_attention(tower, c.n_ctx_vision, self._sub_processes(c.scale_vision), self.log_odds_vision)
        return unit(tower(images.to(self.backbone.device), prompts, attention))

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E], the same for every image."""
        c, tower = self.config, self.backbone.text_tower
        if c.branches == "visual":
            return frozen_class_features(self.backbone, class_names, [c.template or self.template])
        packed = self.context.packed(self.backbone, class_names, share_prefix=False)
        attention = text_attention(tower, packed, self._sub_processes(c.scale_text), self.log_odds_text)
        return encode_classes(tower, self.context.prompts(), packed, attention=attention)
