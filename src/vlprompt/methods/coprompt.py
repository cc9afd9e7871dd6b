"""CoPrompt: consistency-guided prompt learning (Roy and Etemad, ICLR 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss

from vlprompt.backbones.backbone import unit
from vlprompt.data.batches import Batch
from vlprompt.methods.base import Can, Output, Weight
from vlprompt.methods.maple import MaPLe
from vlprompt.methods.registry import register
from vlprompt.prompting.text import fill

Share = Annotated[float, Ge(0), Le(1)]


class Adapter(nn.Sequential):
    """A bottleneck on features [.., E] that are not normalised; ``share`` of what comes out is its."""

    def __init__(self, width: int, share: float) -> None:
        narrow = max(width // 4, 1)
        down, up = nn.Linear(width, narrow, bias=False), nn.Linear(narrow, width, bias=False)
        super().__init__(down, nn.ReLU(), up, nn.ReLU())
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """m · A(x) + (1 − m) · x, normalised."""
        x = x.to(next(self.parameters()).dtype)
        return unit(self.share * super().forward(x) + (1 - self.share) * x)


@register("coprompt")
class CoPrompt(MaPLe):
    """MaPLe's prompts and an adapter behind each tower, kept near what the frozen model says of another look.

    Loss: CE + 8 · (1 − cos(t, t0) + 1 − cos(v, v0)), means over classes and images. t0: the frozen features of one
    description of each class, the k-th of every class, k drawn anew in every step; v0: those of a second view. Official
    settings: 2 tokens, depth 9, SGD 0.0035, batch 4, 8 epochs. Deviations: the official views are two RandAugments of
    the whole image, here the first is a random crop and the second that crop under a RandAugment; a class with fewer
    descriptions than others begins again at its first, where the official code fails; the official blocks cast deep
    prompts to fp16 even at fp32 precision, here they stay fp32. Without descriptions t0 is that of the data set's
    template.
    """

    paper, year, learns = "Roy and Etemad, ICLR", 2024, "coupled deep prompts, and adapters behind both towers"
    needs = frozenset({"second_view"})
    official = MaPLe.official | {"train.epochs": 8}
    presets = {}
    reads_descriptions = expects_descriptions = True

    @dataclass(frozen=True)
    class Config(MaPLe.Config):
        """Options of coprompt."""

        w: Weight = 8.0
        """Weight of the consistency (the paper's lambda; the published configuration file has 1)."""
        consistency: Literal["cosine", "mse"] = "cosine"
        """How features are compared with the frozen ones: 1 − cosine, or the mean squared difference."""
        image_share: Share = 0.1
        """Share of the image adapter in image features."""
        text_share: Share = 0.2
        """Share of the text adapter in class features."""

        @property
        def can(self) -> Can:
            """Descriptions are drawn from step to step."""
            return super().can & ~Can.REPLAY_STEPS

    def build(self) -> None:
        """Create MaPLe's prompts and the adapters."""
        super().build()
        c, width = self.config, self.backbone.embed_dim
        self.image_adapter, self.text_adapter = Adapter(width, c.image_share), Adapter(width, c.text_share)

    @property
    def patch_size(self) -> int:
        """The second view changes the image as a whole."""
        return self.backbone.image_size

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, E], through the prompted tower and the adapter."""
        return self.image_adapter(self.backbone.image_tower(images.to(self.backbone.device), self.visual_prompts()))

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E], through the prompted tower and the adapter."""
        return self.text_adapter(self.encode_classes(class_names, self.context, normalise=False))

    def draw(self) -> int:
        """Which description of every class a step compares with."""
        return int(torch.randint(max(map(len, self.texts_of(self.class_names))), ()))

    def frozen_texts(self) -> Tensor:
        """t0, [C, E]: of a description of each class, or of the data set's template."""
        if self.descriptions is None:
            return self.backbone.encode_texts(fill(self.template, self.class_names))
        k = self.draw()
        return self.backbone.encode_texts([texts[k % len(texts)] for texts in self.texts_of(self.class_names)])

    def regularisers(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """How far both towers are from the frozen ones, on descriptions and on the second view."""
        assert batch.second_view is not None
        t0, v0 = self.frozen_texts()[batch.compared], self.backbone.encode_images(batch.second_view)
        return {"consistency": self.config.w * (self.distance(out.t, t0) + self.distance(out.v, v0))}

    def distance(self, x: Tensor, x0: Tensor) -> Tensor:
        """Of features [.., E] from frozen ones, a mean."""
        if self.config.consistency == "mse":
            return mse_loss(x, x0)
        return 1 - cosine_similarity(x, x0, eps=1e-7).mean()

    def inference_state(self) -> dict[str, Tensor]:
        """MaPLe's, and the adapters."""
        adapters = {k: v for k, v in self.state_dict().items() if "_adapter." in k}
        return super().inference_state() | adapters
