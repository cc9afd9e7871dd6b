"""DroPLe: dropout prompt learning (arXiv 2512.07234, AAAI 2026)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from vlprompt.backbones.attention import Attention, packed_attention, packed_with_maps, plain_attention, with_maps
from vlprompt.backbones.backbone import unit
from vlprompt.backbones.towers import BeforeBlock
from vlprompt.data.batches import Batch
from vlprompt.documents import checksum
from vlprompt.errors import ConfigError
from vlprompt.methods.base import Output, TokenMaps
from vlprompt.methods.drople import config
from vlprompt.methods.drople.dropout import BlockDropout, SharedTokens, drop, importance, look, scores, token_maps
from vlprompt.methods.drople.lora import VisualLoRA
from vlprompt.methods.drople.losses import regularisers, rising
from vlprompt.methods.drople.prior import LanguagePrior
from vlprompt.methods.ivlp import IVLP, deep_context
from vlprompt.methods.registry import register
from vlprompt.methods.zero_shot import frozen_class_features, mean_features
from vlprompt.prompting.prior import Prior
from vlprompt.prompting.text import fill
from vlprompt.prompting.visual import VisualPrompts

LOG_SCALE_MAX = 4.605
"""The logarithm of the logit scale is clamped to [0, 4.605]: scales from 1 to 99.98."""


@register("drople")
class DroPLe(IVLP):
    """Deep prompts under token dropout that spares important tokens, kept near frozen CLIP by four terms.

    Official settings: 4 + 4 tokens, text depth 9, visual depth 6, AdamW 2e-4, batch 4, 20 epochs, cosine to 1e-5,
    centre crops, of which the learned branch alone sees a changed view.
    Deviations: the language model's prior is there if it is given (``data.prior``); t0 is the data set's template, or
    that with class descriptions; adapters (``lora_rank``, 8 in the public code) are off, and v0 never passes through
    them; scores know no padding; prompts stay fp32. The page ``docs/methods/drople.md`` has them all.
    """

    reads_descriptions = True
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
        "data.views": "center",
        "data.drop_last": False,
        "train.epochs": 20,
    }
    presets = {
        "base-to-novel-imagenet": {"train.epochs": 5},
        "cross-dataset": {"train.epochs": 3},
        "few-shot": {"train.epochs": 50},
        "long-tail": {"data.imbalance": 10},
    }
    rates, floors = {"lora.": 0.1}, {"lora.": 0.5}
    Config = config.Config  # type: ignore[assignment]  # sizes of IVLP's may be 0

    def build(self) -> None:
        """Create prompts, shared tokens, logit scale and, if asked for, adapters."""
        c, b = self.config, self.backbone
        if c.p_min > c.p_max:
            raise ConfigError(f"method.p_min = {c.p_min:g} (allowed: at most method.p_max = {c.p_max:g})")
        self.context = deep_context(b, c.n_ctx_text, c.init, c.depth_text, end="")
        for vectors in () if self.context.deep is None else self.context.deep.data:
            nn.init.kaiming_uniform_(vectors, a=math.sqrt(5))
        self.visual = VisualPrompts(b, c.n_ctx_vision, c.depth_vision)
        nn.init.kaiming_uniform_(self.visual.vectors, a=math.sqrt(5))  # one tensor [depth, M, D]: U(±1/√(M·D))
        self.shared: SharedTokens | None = SharedTokens(b, c.n_shared, c.shared_width, c.temperature)
        self.image_keys: Tensor | None = None
        self.logit_scale = nn.Parameter(torch.tensor([math.log(b.logit_scale)]).clamp(0, LOG_SCALE_MAX))
        self.prior: LanguagePrior | None = None
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

    def take_prior(self, prior: Prior) -> None:
        """Before training, create what learns of it; of a tuned model, ask it about classes not tuned on."""
        c = self.config
        if self.prior is None:
            if self.shared is None:
                raise ConfigError(f"prior {prior.file}: this model was tuned without one")
            begun = LanguagePrior.begin(prior, self.backbone, c.prior_tokens, c.depth_text)
            prior.pasts(self.class_names, self.backbone.device)  # or it says which it has not
            self.prior = begun.to(self.backbone.device)
        self.prior.take(prior)

    @property
    def texts_fingerprint(self) -> str | None:
        """The prior's questions too."""
        texts = super().texts_fingerprint
        return texts if self.prior is None else checksum([texts, self.prior.made_by.tolist()])

    # --- features -----------------------------------------------------------------------------------

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E], or with a prior those of every question, [Q, C, E]."""
        if self.prior is None:
            return super().class_features(class_names)
        return self.prior.class_features(self.backbone, self.context, class_names)

    def encode_images(self, images: Tensor) -> Tensor:
        """Normalised features [B, E], without dropout."""
        return self._image_tower(images)

    def _image_tower(
        self,
        images: Tensor,
        attention: Sequence[Attention] | None = None,
        before_block: BeforeBlock | None = None,
        drops: bool = False,
    ) -> Tensor:
        """``drops`` says whether the adapters' dropout acts."""
        tower = self.backbone.image_tower
        given = (images.to(self.backbone.device), self.visual_prompts(), attention, before_block)
        if self.lora is None:
            return unit(tower(*given))
        return unit(functional_call(tower, self.lora.weights(tower, drops), given))

    def scale(self) -> Tensor:
        """The logit scale, [1]."""
        return self.logit_scale.clamp(0, LOG_SCALE_MAX).exp()

    def logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """[B, C] under the learned scale.

        Several questions are averaged as in the public code, by the softmax of the cosines without the scale, and
        scaled then: of one question these are its logits, but for a number that is the same for all classes.
        """
        if class_features.ndim == 2:
            return self.scale() * (image_features @ class_features.T)
        cosines = torch.einsum("be,qce->bqc", image_features, class_features)
        return self.scale() * (cosines.log_softmax(-1).logsumexp(1) - math.log(len(class_features)))

    def scale_and_bias(self) -> tuple[Tensor, Tensor]:
        """The learned scale, and no bias."""
        return self.scale().detach()[0], torch.tensor(0.0)

    # --- training -----------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Output:
        """Features and logits under dropout in training mode; ``extra`` is what the shared tokens see."""
        assert batch.second_view is not None
        # In place: beyond its ends a clamp has no gradient, and would never come back. Past autograd, which counts
        # changes: a step may have two passes.
        self.logit_scale.data.clamp_(0, LOG_SCALE_MAX)
        v, seen_of_images = self._images(batch.second_view)
        t, seen_of_texts = self._texts(self.names_of(batch.compared), batch.targets)
        return Output(v, t, self.scale() * v @ t.T, list(zip(seen_of_images, seen_of_texts, strict=True)))

    def supervision(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy with smoothed labels, or a teacher's in their place."""
        if batch.teacher_probabilities is not None:
            return super().supervision(out, batch)
        logits, smoothing = self.adjusted(out.logits, batch), self.config.label_smoothing
        return {"ce": cross_entropy(logits, batch.labels, label_smoothing=smoothing)}

    def regularisers(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """The terms of :func:`vlprompt.methods.drople.losses.regularisers`."""
        v0, t0 = batch.frozen_image_features, self.frozen_texts()
        assert v0 is not None
        return regularisers(out, v0, t0[batch.compared], self.scale(), self.lam, self.config)

    def frozen_texts(self) -> Tensor:
        """t0, [C, E]: of the data set's template; with class descriptions the mean of "{template} with {text}"."""
        if self.descriptions is None:
            return frozen_class_features(self.backbone, self.class_names, [self.template])
        named = zip(fill(self.template.rstrip("."), self.class_names), self.texts_of(self.class_names), strict=True)
        return unit(mean_features(self.backbone, [[f"{start} with {text}" for text in own] for start, own in named]))

    def _images(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Image features [B, E], and what the shared tokens see in each aligned block, [B, R, width]."""
        assert self.shared is not None
        shared, seen = self.shared, list[Tensor]()
        keys, maps = shared.keys(shared.image), [list[Tensor]() for _ in range(self.dropped_vision)]

        def before_block(i: int, x: Tensor) -> Tensor:
            i -= 1  # what this block has made is looked at, and hit
            if not 0 <= i < self.dropped_vision:
                return x
            a = look(keys, x)
            if i < self.aligned:
                seen.append(shared.pool(shared.image, a, x))
            if not self._drops:
                return x
            n = self._reach(i)
            p = self._probabilities(maps[i].pop() if self._weighs else None, a, 0)[:, :n]
            return drop(x, torch.arange(1, n + 1, device=x.device), p, self.config.mode, self.config.sigma)

        attentions = self._with_maps(maps if self._weighs else [])
        return self._image_tower(images, attentions, before_block, self.training), seen

    def _with_maps(self, maps: Sequence[list[Tensor]]) -> list[Attention]:
        """Attention for the image tower, whose first blocks leave their maps in a list each."""
        c = self.backbone.image_tower.config
        return [with_maps(c.heads, of_block) for of_block in maps] + [plain_attention(c.heads)] * (c.layers - len(maps))

    def _texts(self, class_names: Sequence[str], labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Class features [C, E], and what the shared tokens see of the labels' texts in each aligned block."""
        assert self.shared is not None
        tower, shared = self.backbone.text_tower, self.shared
        # Without a shared prefix: noise on the start token is each class's own, and so is all that reads it.
        prior, n_prior = self.prior, 0
        if prior is None:
            text, prompts = self.context.packed(self.backbone, class_names, share_prefix=False), self.context.prompts()
        else:
            text, n_prior = prior.packed(self.backbone, self.context, class_names), prior.n_tokens
            prompts = prior.prompts(self.backbone, self.context, class_names, prior.draw())
        c, keys, seen = tower.config, shared.keys(shared.text), list[Tensor]()
        maps = [list[Tensor]() for _ in range(c.layers)]
        rows_of_labels, mask = text.rows(labels)

        def hit(i: int) -> range:
            """Positions that are hit: the context in the last prompted layer, and the start token if by noise."""
            if not self._drops or not 0 <= i < self.dropped_text:
                return range(0)
            # Where the next block has prompts of its own they replace the context, whatever was done to it. The start
            # token is never zeroed: it is the one that all others attend to most.
            first = 1 if self.config.mode == "zero" else 0
            last = self.config.n_ctx_text if i == self.config.depth_text - 1 else 0
            return range(first, last + 1)

        def before_block(i: int, x: Tensor) -> Tensor:
            i -= 1  # what this block has made
            if 0 <= i < self.aligned:
                # An image is aligned with its label's text alone: of the others nothing is pooled. Those have lengths
                # of their own, so here, and only here, there is padding, which the mask keeps out of the softmax.
                of_labels = x[0, rows_of_labels]
                seen.append(shared.pool(shared.text, look(keys, of_labels, mask), of_labels))
            if not (positions := hit(i)):
                return x
            # A group is the texts of one length: no score ever sees padding, the end of text is always the last token
            # (g = −1), and maps are as small as the texts. All groups are hit in one draw, as one call is cheaper.
            ps, rows = [], []
            context = torch.arange(positions.start, positions.stop, device=x.device)
            behind = torch.arange(n_prior if i == self.config.depth_text - 1 else 0, device=x.device)
            of_groups = maps[i] if self._weighs else [None] * len(text.groups)
            for group, tokens, of_group in zip(text.groups, text.texts(x.detach())[1], of_groups, strict=True):
                # Detached: shared tokens learn what to look at from the alignment, not by what is hit.
                p = self._probabilities(of_group, look(keys.detach(), tokens[0]), -1)
                columns = torch.cat([context, group.length - 1 - n_prior + behind])
                ps.append(p[:, columns].flatten())
                starts = group.start + group.length * torch.arange(group.count, device=x.device)
                rows.append((starts[:, None] + columns).flatten())
            maps[i].clear()  # read once; kept, the maps of all layers would be in memory together
            return drop(x, torch.cat(rows), torch.cat(ps)[None], self.config.mode, self.config.sigma)

        # The fused kernel never writes maps out, and is faster: they are made where tokens are hit, and nowhere else.
        plain = packed_attention(text, c.heads)
        attentions = [
            packed_with_maps(text, c.heads, of_block) if self._weighs and hit(i) else plain
            for i, of_block in enumerate(maps)
        ]
        return unit(tower(text, prompts, attentions, before_block)[0]), seen

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
        """All but the shared tokens, of which ``image_keys`` [R, D] are left to explain images by.

        With a prior, class features of its own classes too, which then need no questions.
        """
        kept = {k: v for k, v in self.state_dict().items() if not k.startswith("shared.")}
        if self.prior is not None:
            with torch.no_grad():
                kept["prior.own"] = self.class_features(self.class_names)
        return kept | {"image_keys": self._keys()}

    def load_inference_state(self, state: Mapping[str, Tensor]) -> None:
        """Prompts, scale, adapters and keys; the shared tokens are gone."""
        keys = torch.zeros_like(self._keys())  # their shape; the values are the state's
        self.shared = None
        del self.image_keys
        self.register_buffer("image_keys", keys)
        if prior := {k.removeprefix("prior."): v for k, v in state.items() if k.startswith("prior.")}:
            self.prior = LanguagePrior.tuned(prior, self.class_names)
        self.load_state_dict(state)

    @torch.no_grad()
    def _keys(self) -> Tensor:
        if self.shared is None:
            assert self.image_keys is not None
            return self.image_keys
        return self.shared.keys(self.shared.image)

    @torch.no_grad()
    def dropout_of(self, images: Tensor) -> list[BlockDropout]:
        """What dropout would do to images [B, 3, S, S] after each block where it acts, if the others did nothing."""
        c, keys, blocks = self.config, self._keys(), list[BlockDropout]()
        maps = [list[Tensor]() for _ in range(self.dropped_vision)]

        def before_block(i: int, x: Tensor) -> Tensor:
            if 0 < i <= self.dropped_vision:
                a, m = look(keys, x), maps[i - 1].pop()
                p = self._probabilities(m if c.dropout == "importance" else None, a, 0) * (c.dropout != "none")
                blocks.append(BlockDropout(importance(scores(m, a, 0)), p, self._reach(i - 1)))
            return x

        self._image_tower(images, self._with_maps(maps), before_block)
        return blocks

    def explain(self, images: Tensor, seed: int = 0) -> list[TokenMaps]:
        """Importance, probabilities and one draw of the dropout."""
        return token_maps(self.dropout_of(images), self.config, seed)
