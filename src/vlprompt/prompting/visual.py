"""Learned tokens of the image tower, free or computed from those of the text tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.towers import Prompts
from vlprompt.errors import BackboneError, ConfigError
from vlprompt.prompting.text import INIT_STD


def check_image_prompts(backbone: Backbone, depth: int) -> None:
    """Raise an error if the image tower does not take prompts at ``depth`` layers."""
    config = backbone.image_tower.config
    if config.pool != "cls":
        raise _no_token_error(backbone)
    if not 1 <= depth <= config.layers:
        raise ConfigError(f"visual prompt depth = {depth} (allowed: 1 to {config.layers}, the image tower's layers)")


def check_blocks(backbone: Backbone) -> None:
    """Raise an error if the image tower has no transformer blocks to enter: it is a ResNet."""
    if not hasattr(backbone.image_tower, "blocks"):
        raise _no_token_error(backbone)


def _no_token_error(backbone: Backbone) -> BackboneError:
    return BackboneError(f"backbone '{backbone.name}' has no class token: it serves text-only methods for now")


class VisualPrompts(nn.Module):
    """M learned tokens after the patches at ``depth`` layers of the image tower: ``vectors`` [depth, M, D]."""

    def __init__(
        self,
        backbone: Backbone,
        n_ctx: int,
        depth: int = 1,
        mode: Literal["replace", "add"] = "replace",
    ) -> None:
        super().__init__()
        check_image_prompts(backbone, depth)
        self.mode = mode
        width = backbone.image_tower.config.width
        self.vectors = nn.Parameter(INIT_STD * torch.randn(depth, n_ctx, width))

    def prompts(self) -> Prompts:
        """The learned tokens per layer."""
        return Prompts(list(self.vectors), self.mode)


class CoupledPrompts(nn.Module):
    """Visual prompts as linear maps of the text prompts, one map a layer (MaPLe)."""

    def __init__(self, backbone: Backbone, depth: int) -> None:
        super().__init__()
        check_image_prompts(backbone, depth)
        widths = backbone.text_tower.config.width, backbone.image_tower.config.width
        self.projections = nn.ModuleList(nn.Linear(*widths) for _ in range(depth))

    def prompts(self, text: Sequence[Tensor], mode: Literal["replace", "add"] = "replace") -> Prompts:
        """Visual prompts [M, D image] of the text prompts [M, D text], layer by layer."""
        return Prompts([project(x) for project, x in zip(self.projections, text, strict=True)], mode)
