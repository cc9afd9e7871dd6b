"""FAP: few-shot adversarial prompt learning (Zhou et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div

from vlprompt.backbones.attack import LEVEL, Pixels, pgd
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.towers import Prompts
from vlprompt.data.batches import Batch
from vlprompt.methods.base import Can, Count, Method, MethodConfig, Output, Weight
from vlprompt.methods.ivlp import deep_context
from vlprompt.methods.registry import register
from vlprompt.prompting.text import INIT_STD, encode_classes
from vlprompt.prompting.visual import check_image_prompts


class ImageLed(nn.Module):
    """Deep visual prompts [depth − 1, M, D image] and their maps to text; the first layer's map goes the other way."""

    def __init__(self, backbone: Backbone, n_ctx: int, depth: int) -> None:
        super().__init__()
        check_image_prompts(backbone, depth)
        text, image = backbone.text_tower.config.width, backbone.image_tower.config.width
        self.deep = nn.Parameter(INIT_STD * torch.randn(depth - 1, n_ctx, image)) if depth > 1 else None
        maps = [nn.Linear(text, image), *(nn.Linear(image, text) for _ in range(depth - 1))]
        self.projections = nn.ModuleList(maps)

    def forward(self, context: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Text and visual prompts of each layer, [M, D] each, of a context [M, D text]."""
        first, *others = self.projections
        deep = [] if self.deep is None else list(self.deep)
        text = [context, *(project(x) for project, x in zip(others, deep, strict=True))]
        return text, [first(context), *deep]


@register("fap")
class FAP(Method):
    """Deep visual prompts that lead those of the text, learned on images and on attacks against them.

    Loss: CE + 1.5 · mean_i KL(p_i ‖ p'_i) (cos(v_i, v'_i) + 1); p', v' of an image attacked by two PGD steps of 1/255
    within 1/255 that make KL(p ‖ p') large. Gradients flow through the clean image too. Official settings: 2 tokens,
    depth 9, SGD 0.0035, batch 4; the data set's template with its braces as initial words ("a photo of a {}. cat."),
    ``init`` gives others. Epochs are MaPLe's. The attack is on the pixels that the tower reads.
    """

    paper, year, learns = "Zhou et al., NeurIPS", 2024, "deep visual prompts that lead the text's, under attack"
    official = {
        "optim.name": "sgd",
        "optim.lr": 0.0035,
        "optim.warmup_epochs": 1,
        "data.batch_size": 4,
        "train.epochs": 5,
    }

    @dataclass(frozen=True)
    class Config(MethodConfig):
        """Options of fap."""

        n_ctx: Count = 2
        """Learned tokens at each layer."""
        depth: Count = 9
        """Layers with tokens of their own, in both towers."""
        init: str | None = None
        """Words that initialise the context; if not given, the data set's template with its braces."""
        w: Weight = 1.5
        """Weight of the adversarial term (the official code's LAMBDA_1)."""
        adversarial: Literal["cos", "none"] = "cos"
        """What an image's divergence is multiplied by: 1 + the cosine of its features and the attacked ones, or 1."""
        eps: Annotated[float, Ge(0)] = 1.0
        """How far the attack may change a pixel, in levels of 255."""
        alpha: Annotated[float, Ge(0)] = 1.0
        """A step of the attack, in levels of 255."""
        steps: Count = 2
        """Steps of the attack."""

        @property
        def can(self) -> Can:
            """Its steps run the towers."""
            return Can.DROP_ATTENTION

    folded_text: Tensor
    folded_image: Tensor

    def build(self) -> None:
        """Create context, visual prompts and maps."""
        c = self.config
        self.context = deep_context(self.backbone, c.n_ctx, c.init or self.template, 1)
        self.coupled: ImageLed | None = ImageLed(self.backbone, c.n_ctx, c.depth)

    def both_prompts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of text and images, layer by layer."""
        if self.coupled is None:
            return [self.context.vectors, *self.folded_text], list(self.folded_image)
        return self.coupled(self.context.vectors)

    def visual_prompts(self) -> Prompts:
        """Those that lead, behind the one that follows the context."""
        return Prompts(self.both_prompts()[1])

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E], the same for every image."""
        texts = self.context.packed(self.backbone, class_names)
        return encode_classes(self.backbone.text_tower, Prompts(self.both_prompts()[0]), texts)

    def start(self, pixels: Tensor) -> Tensor:
        """Where the attack begins: noise in −1 … 1 of ``eps``."""
        return 2 * torch.rand_like(pixels) - 1

    def attacked(self, images: Tensor, out: Output) -> Tensor:
        """Images of a batch, changed so that the model says something else."""
        c, pixels = self.config, Pixels(self.backbone.preprocess)
        clean, t, x = out.logits.detach().log_softmax(-1), out.t.detach(), pixels.of(images)

        def divergence(changed: Tensor) -> Tensor:
            logits = self.logits(self.encode_images(pixels.read(changed)), t)
            return kl_div(logits.log_softmax(-1), clean, reduction="batchmean", log_target=True)

        delta = pgd(x, divergence, LEVEL * c.eps * self.start(x), LEVEL * c.eps, LEVEL * c.alpha, c.steps)
        return pixels.read(x + delta)

    def regularisers(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """How far the model's word on attacked images is from that on clean ones."""
        assert batch.images is not None
        v = self.encode_images(self.attacked(batch.images, out))
        changed, clean = self.logits(v, out.t).log_softmax(-1), out.logits.log_softmax(-1)
        divergence = kl_div(changed, clean, reduction="none", log_target=True).sum(-1)
        weight = cosine_similarity(out.v, v) + 1 if self.config.adversarial == "cos" else 1.0
        return {"adversarial": self.config.w * (divergence * weight).mean()}

    def inference_state(self) -> dict[str, Tensor]:
        """The context and both towers' deeper prompts; the maps are left out."""
        (context, *text), image = self.both_prompts()
        deep = torch.stack(text) if text else context.new_zeros(0, *context.shape)
        return {"context.vectors": context, "folded_text": deep.detach(), "folded_image": torch.stack(image).detach()}

    def load_inference_state(self, state: Mapping[str, Tensor]) -> None:
        """Folded prompts; the maps are gone."""
        shapes = {name: tensor for name, tensor in self.inference_state().items() if name != "context.vectors"}
        self.coupled = None
        for name, tensor in shapes.items():
            self.register_buffer(name, torch.zeros_like(tensor))
        self.load_state_dict(state)
