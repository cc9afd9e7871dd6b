"""DroPLe: dropout prompt learning (arXiv 2512.07234, AAAI 2026)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, kl_div

from vlprompt.backbones.backbone import unit
from vlprompt.backbones.packing import Attention, packed_attention
from vlprompt.backbones.towers import AfterBlock, plain_attention
from vlprompt.data.batches import Batch
from vlprompt.errors import ConfigError
from vlprompt.methods.base import LEARNS_PROMPTS, Can, Count, Output, Weight
from vlprompt.methods.drople.dropout import SharedTokens, drop, importance, look, scores
from vlprompt.methods.drople.lora import VisualLoRA
from vlprompt.methods.ivlp import IVLP, deep_context
from vlprompt.methods.registry import register
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.prompting.attention import packed_with_maps, with_maps
from vlprompt.prompting.visual import VisualPrompts

LOG_SCALE_MAX = 4.605
"""The logarithm of the logit scale is clamped to [0, 4.605]: scales from 1 to 99.98."""

Probability = Annotated[float, Ge(0), Le(1)]


class BlockDropout(NamedTuple):
    """What dropout does after one block of the image tower; tokens are patches, then visual prompts."""

    importance: Tensor
    """[B, N − 1], 0 to 1."""
    p: Tensor
    """Probability that a token is hit, [B, N − 1]."""
    reach: int
    """How many of the tokens are read by the next block; the prompts after them are replaced there."""


@register("drople")
class DroPLe(IVLP):
    """Deep prompts under token dropout that spares important tokens, kept near frozen CLIP by four terms.

    Official settings: 4 + 4 tokens, text depth 9, visual depth 6, AdamW 2e-4, batch 4, 20 epochs, cosine to 1e-5.
    Deviations: no language-model prior, so t0 is the data set's template alone; adapters (``lora_rank``, 8 in the
    public code) are off, and v0 never passes through them; scores know no padding; prompts stay fp32. The page
    ``docs/methods/drople.md`` has them all.
    """

    paper, year, learns = "arXiv 2512.07234, AAAI", 2026, "deep text and visual prompts under token dropout"
    needs = frozenset({"frozen_image_features", "second_view"})
    official = {
        "optim.name": "adamw",
        "optim.lr": 2e-4,
        "optim.weight_decay": 5e-5,
        "optim.warmup_epochs": 0.1,
        "optim.min_lr": 1e-5,
        "optim.cosine_epochs": 20,
        "data.batch_size": 4,
        "train.epochs": 20,
    }
    presets = {
        "base-to-novel-imagenet": {"train.epochs": 5},
        "cross-dataset": {"train.epochs": 3},
        "few-shot": {"train.epochs": 50},
        "long-tail": {"data.shots": 16, "data.imbalance": 10},
    }
    rates = {"lora.": 0.1}

    @dataclass(frozen=True)
    class Config(IVLP.Config):
        """Options of drople."""

        depth_vision: Count = 6
        """Layers of the image tower with tokens of their own."""
        dropout: Literal["importance", "uniform", "none"] = "importance"
        """Tokens are hit the less the more important they are, all alike at (p_max + p_min) / 2, or not at all."""
        mode: Literal["gaussian", "zero"] = "gaussian"
        """Whether a token that is hit is multiplied by noise around 1, or by zero."""
        p_max: Probability = 0.5
        """Probability that the least important token is hit."""
        p_min: Probability = 0.1
        """Probability that the most important token is hit."""
        sigma: Weight = 0.03
        """Standard deviation of the noise."""
        n_shared: Count = 64
        """Shared tokens, which look at the tokens of both towers."""
        shared_width: Count = 512
        """Width of the shared tokens."""
        label_smoothing: Probability = 0.0
        """Share of the label that all classes get, in the cross-entropy."""
        text_weight: Weight = 25.0
        """Weight of the distance to the frozen class features."""
        image_weight: Weight = 10.0
        """Weight of the distance to the frozen image features."""
        distillation_weight: Weight = 2.5
        """Weight of the KL to the zero-shot prediction."""
        entropy_weight: Weight = 0.05
        """Weight of the residual entropies, which are maximised."""
        lam: Annotated[float, Ge(0), Lt(1)] = 0.1
        """λ₀, how much of the frozen features the residuals leave out."""
        lam_schedule: Literal["rising", "fixed"] = "rising"
        """Whether λ rises from 0 towards λ₀ over the epochs, or is λ₀."""
        alignment_weight: Weight = 30.0
        """Weight of the distance between what the shared tokens see of an image and of its label's text."""
        lora_rank: Annotated[int, Ge(0)] = 0
        """Rank of adapters on queries and values of the image tower's later half, which learn at a tenth of the rate;
        0 for none."""
        lora_alpha: Weight = 16.0
        """Strength of the adapters, which are multiplied by lora_alpha / lora_rank."""
        lora_dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
        """Share of the adapters' input channels that a training step leaves out."""

        @property
        def can(self) -> Can:
            """Dropout reads all texts at once."""
            return LEARNS_PROMPTS & ~Can.SPLIT_TEXTS

        def unused(self) -> dict[str, str]:
            """Settings of a dropout, a noise, residual entropies or adapters that there are not."""
            unused: dict[str, str] = {}
            if self.mode == "zero":
                unused["sigma"] = "mode"
            if self.dropout == "none":
                unused |= dict.fromkeys(("mode", "p_max", "p_min", "sigma"), "dropout")
            if self.entropy_weight == 0:
                unused |= dict.fromkeys(("lam", "lam_schedule"), "entropy_weight")
            if self.lora_rank == 0:
                unused |= dict.fromkeys(("lora_alpha", "lora_dropout"), "lora_rank")
            return unused

    def build(self) -> None:
        """Create prompts, shared tokens, logit scale and, if asked for, adapters."""
        c, b = self.config, self.backbone
        if c.p_min > c.p_max:
            raise ConfigError(f"method.p_min = {c.p_min:g} (allowed: at most method.p_max = {c.p_max:g})")
        self.context = deep_context(b, c.n_ctx_text, c.init, c.depth_text, end="")
        for vectors in () if self.context.deep is None else self.context.deep.data:
            nn.init.kaiming_uniform_(vectors, a=math.sqrt(5))
        self.visual = VisualPrompts(b, c.n_ctx_vision, c.depth_vision)
        self.shared: SharedTokens | None = SharedTokens(b, c.n_shared, c.shared_width)
        self.image_keys: Tensor | None = None
        self.logit_scale = nn.Parameter(torch.tensor([math.log(b.logit_scale)]).clamp(0, LOG_SCALE_MAX))
        self.lora = VisualLoRA(b, c.lora_rank, c.lora_alpha, c.lora_dropout) if c.lora_rank else None
        # Behind the last block stand the pooled tokens alone, which are never hit.
        self.dropped_text = min(c.depth_text, b.text_tower.config.layers - 1)
        self.dropped_vision = min(c.depth_vision, b.image_tower.config.layers - 1)
        self.aligned = min(self.dropped_text, self.dropped_vision)
        self.lam: Tensor
        self.register_buffer("lam", torch.zeros((), dtype=torch.double), persistent=False)
        self._start()

    def _start(self) -> None:
        self.lam.fill_(self.config.lam if self.config.lam_schedule == "fixed" else 0)

    # --- features -----------------------------------------------------------------------------------

    def encode_images(self, images: Tensor) -> Tensor:
        """Normalised features [B, E], without dropout."""
        return self._image_tower(images)

    def _image_tower(
        self,
        images: Tensor,
        attention: Sequence[Attention] | None = None,
        after_block: AfterBlock | None = None,
        drops: bool = False,
    ) -> Tensor:
        """``drops`` says whether the adapters' dropout acts."""
        tower = self.backbone.image_tower
        given = (images.to(self.backbone.device), self.visual_prompts(), attention, after_block)
        if self.lora is None:
            return unit(tower(*given))
        return unit(functional_call(tower, self.lora.weights(tower, drops), given))

    def scale(self) -> Tensor:
        """The logit scale, [1]."""
        return self.logit_scale.clamp(0, LOG_SCALE_MAX).exp()

    def logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """[B, C] under the learned scale."""
        return self.scale() * (image_features @ class_features.T)

    def scale_and_bias(self) -> tuple[Tensor, Tensor]:
        """The learned scale, and no bias."""
        return self.scale().detach()[0], torch.tensor(0.0)

    # --- training -----------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Output:
        """Features and logits under dropout in training mode; ``extra`` is what the shared tokens see."""
        assert batch.second_view is not None
        with torch.no_grad():  # in place: beyond its ends a clamp has no gradient, and would never come back
            self.logit_scale.clamp_(0, LOG_SCALE_MAX)
        v, seen_of_images = self._images(batch.second_view)
        t, seen_of_texts = self._texts(self.names_of(batch.compared), batch.targets)
        return Output(v, t, self.scale() * v @ t.T, list(zip(seen_of_images, seen_of_texts, strict=True)))

    def supervision(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy with smoothed labels, or a teacher's in their place."""
        if batch.teacher_probabilities is not None:
            return super().supervision(out, batch)
        return {"ce": cross_entropy(out.logits, batch.labels, label_smoothing=self.config.label_smoothing)}

    def regularisers(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """The terms of :func:`regularisers`."""
        v0, t0 = batch.frozen_image_features, frozen_class_features(self.backbone, self.class_names, [self.template])
        assert v0 is not None
        return regularisers(out, v0, t0[batch.compared], self.scale(), self.lam, self.config)

    def _images(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Image features [B, E], and what the shared tokens see in each aligned block, [B, R, width]."""
        assert self.shared is not None
        heads, shared = self.backbone.image_tower.config.heads, self.shared
        keys, maps, seen = shared.keys(shared.image), list[Tensor](), list[Tensor]()
        mapped = self.dropped_vision if self._weighs else 0

        def after_block(i: int, x: Tensor) -> Tensor:
            if i >= self.dropped_vision:
                return x
            a = look(keys, x)
            if i < self.aligned:
                seen.append(shared.pool(shared.image, a, x))
            if not self._drops:
                return x
            n = self._reach(i)
            p = self._probabilities(maps.pop() if self._weighs else None, a, 0)[:, :n]
            return drop(x, torch.arange(1, n + 1, device=x.device), p, self.config.mode, self.config.sigma)

        plain, recording = plain_attention(heads), with_maps(heads, maps)
        attentions = [recording if i < mapped else plain for i in range(self.backbone.image_tower.config.layers)]
        return self._image_tower(images, attentions, after_block, self.training), seen

    def _texts(self, class_names: Sequence[str], labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Class features [C, E], and what the shared tokens see of the labels' texts in each aligned block."""
        assert self.shared is not None
        tower, shared = self.backbone.text_tower, self.shared
        text = self.context.packed(self.backbone, class_names, share=False)
        keys, maps, seen = shared.keys(shared.text), list[Tensor](), list[Tensor]()
        rows_of_labels, mask = text.rows(labels)

        def hit(i: int) -> range:
            """Positions that are hit: the context in the last prompted layer, and the start token if by noise."""
            if not self._drops or i >= self.dropped_text:
                return range(0)
            first = 1 if self.config.mode == "zero" else 0
            last = self.config.n_ctx_text if i == self.config.depth_text - 1 else 0
            return range(first, last + 1)

        def after_block(i: int, x: Tensor) -> Tensor:
            if i < self.aligned:
                of_labels = x[0, rows_of_labels]
                seen.append(shared.pool(shared.text, look(keys, of_labels, mask), of_labels))
            if not (positions := hit(i)):
                return x
            ps, rows = [], []
            columns = torch.arange(positions.start, positions.stop, device=x.device)
            for group, tokens in zip(text.groups, text.texts(x.detach())[1], strict=True):
                p = self._probabilities(maps.pop(0) if self._weighs else None, look(keys.detach(), tokens[0]), -1)
                ps.append(p[:, positions.start : positions.stop].flatten())
                starts = group.start + group.length * torch.arange(group.count, device=x.device)
                rows.append((starts[:, None] + columns).flatten())
            return drop(x, torch.cat(rows), torch.cat(ps)[None], self.config.mode, self.config.sigma)

        plain, recording = (
            packed_attention(text, tower.config.heads),
            packed_with_maps(text, tower.config.heads, maps),
        )
        attentions = [recording if self._weighs and hit(i) else plain for i in range(tower.config.layers)]
        return unit(tower(text, self.context.prompts(), attentions, after_block)[0]), seen

    @property
    def _drops(self) -> bool:
        return self.training and self.config.dropout != "none"

    @property
    def _weighs(self) -> bool:
        return self._drops and self.config.dropout == "importance"

    def _reach(self, i: int) -> int:
        """Image tokens after the class token that block i + 1 reads: prompts are replaced, but for the last ones."""
        patches = len(self.backbone.image_tower.positions) - 1
        return patches + self.config.n_ctx_vision * (i == self.config.depth_vision - 1)

    @torch.no_grad()
    def _probabilities(self, maps: Tensor | None, a: Tensor, g: int) -> Tensor:
        """p_j of all tokens but the global one, [B, N − 1], from a block's maps and the shared tokens' weights."""
        c = self.config
        if maps is None:
            return a.new_full((len(a), a.shape[-1] - 1), (c.p_max + c.p_min) / 2)
        return c.p_max - importance(scores(maps, a, g)) * (c.p_max - c.p_min)

    def after_epoch(self, epoch: int, epochs: int) -> None:
        """λ of the next epoch; after the last, a new training starts where this one did."""
        if epoch + 1 == epochs:
            self._start()
        elif self.config.lam_schedule == "rising":
            self.lam.fill_(rising(self.config.lam, epoch + 1, epochs))

    def training_state(self) -> dict[str, Tensor]:
        """λ of this epoch."""
        return {"lam": self.lam.clone()}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue with λ."""
        self.lam.copy_(state["lam"])

    # --- tuned --------------------------------------------------------------------------------------

    def inference_state(self) -> dict[str, Tensor]:
        """All but the shared tokens, of which ``image_keys`` [R, D] are left to explain images by."""
        kept = {k: v for k, v in self.state_dict().items() if not k.startswith("shared.")}
        return kept | {"image_keys": self._keys()}

    def load_inference_state(self, state: Mapping[str, Tensor]) -> None:
        """Prompts, scale, adapters and keys; the shared tokens are gone."""
        keys = torch.zeros_like(self._keys())  # their shape; the values are the state's
        self.shared = None
        del self.image_keys
        self.register_buffer("image_keys", keys)
        self.load_state_dict(state)

    @torch.no_grad()
    def _keys(self) -> Tensor:
        if self.shared is None:
            assert self.image_keys is not None
            return self.image_keys
        return self.shared.keys(self.shared.image)

    @torch.no_grad()
    def explain(self, images: Tensor) -> list[BlockDropout]:
        """What dropout would do to images [B, 3, S, S] in each block where it acts, if the others did nothing."""
        tower, maps, blocks, c = self.backbone.image_tower, list[Tensor](), list[BlockDropout](), self.config

        def after_block(i: int, x: Tensor) -> Tensor:
            if i < self.dropped_vision:
                a, m = look(self._keys(), x), maps.pop()
                p = self._probabilities(m if c.dropout == "importance" else None, a, 0) * (c.dropout != "none")
                blocks.append(BlockDropout(importance(scores(m, a, 0)), p, self._reach(i)))
            return x

        plain, recording = plain_attention(tower.config.heads), with_maps(tower.config.heads, maps)
        attentions = [recording if i < self.dropped_vision else plain for i in range(tower.config.layers)]
        self._image_tower(images, attentions, after_block)
        return blocks


def regularisers(
    out: Output, v0: Tensor, t0: Tensor, scale: Tensor, lam: Tensor, c: DroPLe.Config
) -> dict[str, Tensor]:
    """The loss terms beside the cross-entropy, of learned features and of frozen v0 [B, E] and t0 [C, E].

    ``out.extra`` holds what the shared tokens see of the images and of their labels' texts, [B, R, width] each, layer
    by layer. All terms are weighted; the residual entropies are maximised, so theirs is negative.
    """
    v, t, logits, logits0 = out.v, out.t, out.logits, scale * v0 @ t0.T
    kl = kl_div(logits.log_softmax(-1), logits0.log_softmax(-1), reduction="sum", log_target=True)
    h_v, h_t = entropy(scale * residual(v, v0, lam) @ t0.T), entropy(scale * v0 @ residual(t, t0, lam).T)
    apart = [0.5 * (1 - cosine(of_image, of_text)).mean() for of_image, of_text in out.extra]
    return {
        "text_consistency": c.text_weight * (t - t0).abs().mean(),
        "image_consistency": c.image_weight * (v - v0).abs().mean(),
        "distillation": c.distillation_weight * kl / logits.numel(),
        "residual_entropy": -c.entropy_weight * (h_v + h_t),
        "alignment": c.alignment_weight * torch.stack(apart).mean(),
    }


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of vectors [..., D]; torch's divides both by their norms first, and takes twice as long in the backward pass."""
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (a * b).sum(-1) / norms.clamp_min(1e-8)


def residual(z: Tensor, z0: Tensor, lam: Tensor) -> Tensor:
    """z_r = (z − λ z0) / (1 − λ), the denominator kept 1e-3 away from 0 and 1 as in the public code."""
    rest = 1 - lam
    rest = rest + 1e-3 * ((rest.abs() < 1e-3).to(rest.dtype) - (lam.abs() < 1e-3).to(rest.dtype))
    return (z - lam * z0) / rest


def entropy(logits: Tensor) -> Tensor:
    """Mean over the rows of −Σ p log(p + 1e-5)."""
    p = logits.softmax(-1)
    return -(p * (p + 1e-5).log()).sum(-1).mean()


def rising(lam: float, epoch: int, epochs: int) -> float:
    """λ_e = λ₀ (1 − (1 + 10 e / E)^(−0.75)) of epoch e = 0 … E − 1: from 0 to about 0.83 λ₀."""
    return lam * (1 - (1 + 10 * epoch / epochs) ** -0.75)
