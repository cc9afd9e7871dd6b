"""Low-rank adapters of a frozen tower (LoRA: Hu et al., ICLR 2022), added to its weights while it is called."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.towers import ImageTower


class VisualLoRA(nn.Module):
    """ΔW = alpha / rank · B A for the queries and values of the image tower's later half; B starts at zero.

    ``a`` [layers, 2, rank, D] and ``b`` [layers, 2, D, rank]. Adapters are folded into the weights, so dropout hits
    input channels of A, the same ones for all tokens of a step.
    """

    def __init__(self, backbone: Backbone, rank: int, alpha: float, p: float) -> None:
        super().__init__()
        c = backbone.image_tower.config
        self.layers = range(c.layers // 2, c.layers)
        self.scale, self.p = alpha / rank, p
        self.a = nn.Parameter(torch.empty(len(self.layers), 2, rank, c.width))
        self.b = nn.Parameter(torch.zeros(len(self.layers), 2, c.width, rank))
        nn.init.uniform_(self.a, -(c.width**-0.5), c.width**-0.5)  # what nn.Linear starts with

    def weights(self, tower: ImageTower, drops: bool = False) -> dict[str, Tensor]:
        """The adapted weights by name, for ``torch.func.functional_call``; the tower itself stays as it is.

        ``drops`` says whether dropout acts, as in a training step.
        """
        a = dropout(torch.ones_like(self.a[:, :, :1]), self.p, drops) * self.a
        q, v = (self.scale * self.b @ a).unbind(1)  # [layers, D, D]
        delta = torch.cat([q, torch.zeros_like(q), v], 1)  # [layers, 3D, D]
        adapted = {}
        for i, d in zip(self.layers, delta, strict=True):
            name = f"blocks.{i}.qkv.weight"
            frozen = tower.get_parameter(name)
            adapted[name] = (frozen + d).to(frozen.dtype)
        return adapted
