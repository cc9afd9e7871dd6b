"""CoCoOp: conditional prompt learning (Zhou et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from vlprompt.methods.base import LEARNS_TEXT, Can, Count, Method, MethodConfig
from vlprompt.methods.coop import SGD
from vlprompt.methods.registry import register
from vlprompt.prompting.text import TextContext

REDUCTION = 16  # the meta-net's hidden layer is the embedding's width over this


@register("cocoop")
class CoCoOp(Method):
    """A context moved by a small network of the image feature: each image has class features of its own.

    Official settings: "a photo of a", SGD 0.002, batch 1, 10 epochs (KaiyangZhou's CoOp,
    ``vit_b16_c4_ep10_batch1_ctxv1``). The meta-net E → E/16 → D reads the normalised image feature.
    """

    paper, year, learns = "Zhou et al., CVPR", 2022, "text context moved by the image"
    official = {**SGD, "data.batch_size": 1, "train.epochs": 10}
    image_dependent = True
    reads_template = False

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of cocoop."""

        n_ctx: Count = 4
        """Learned context tokens."""
        init: str | None = "a photo of a"
        """Words that initialise the context instead of noise."""

        @property
        def can(self) -> Can:
            """All but export: each image has class features of its own."""
            return LEARNS_TEXT & ~Can.EXPORT_CLASSES

    def build(self) -> None:
        """Create context and meta-net."""
        self.context = TextContext(self.backbone, self.config.n_ctx, self.config.init)
        embed, width = self.backbone.embed_dim, self.backbone.text_tower.config.width
        hidden = max(embed // REDUCTION, 1)
        self.meta_net = nn.Sequential(nn.Linear(embed, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[B, C, E], for ``image_features`` [B, E]."""
        assert image_features is not None
        return self.encode_classes(class_names, self.context, bias=self.meta_net(image_features))
