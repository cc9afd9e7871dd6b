"""COMMA: co-articulated multi-modal learning (Hu et al., AAAI 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity

from vlprompt.backbones.backbone import Backbone, unit
from vlprompt.backbones.packing import PackedText, pack
from vlprompt.backbones.towers import Prompts, Tower
from vlprompt.data.batches import Batch
from vlprompt.errors import ConfigError
from vlprompt.methods.base import Can, Count, Output, Weight
from vlprompt.methods.ivlp import deep_context
from vlprompt.methods.maple import MaPLe
from vlprompt.methods.registry import register
from vlprompt.prompting.text import class_tokens, fill
from vlprompt.prompting.visual import CoupledPrompts, check_image_prompts

PAD = 0  # the token that OpenAI's tokenizer fills texts up with


class Generator(nn.Module):
    """The visual tokens of a layer, from those of both towers one layer before: attention, LayerNorm, MLP."""

    def __init__(self, text: int, image: int) -> None:
        super().__init__()
        self.fc, self.ln = nn.Linear(text, image), nn.LayerNorm(image)
        self.mlp = nn.Sequential(nn.Linear(image, image // 4), nn.ReLU(), nn.Linear(image // 4, image))

    def forward(self, visual: Tensor, text: Tensor) -> Tensor:
        """Visual tokens ask text tokens, [M, D] each."""
        keys = self.fc(text)
        affinities = (visual @ keys.T / math.sqrt(keys.shape[-1])).softmax(-1)
        return self.mlp(self.ln(affinities @ keys))


class GeneratedPrompts(CoupledPrompts):
    """Visual prompts: of the first layer a linear map of the text's, of each further one generated; see COMMA."""

    def __init__(self, backbone: Backbone, depth: int, learned: bool) -> None:
        super().__init__(backbone, 1)
        check_image_prompts(backbone, depth)
        widths = backbone.text_tower.config.width, backbone.image_tower.config.width
        self.generators, self.learned = nn.ModuleList(Generator(*widths) for _ in range(depth - 1)), learned
        for part in () if learned else self.generators.modules():
            for name, p in [*part.named_parameters(recurse=False)]:  # buffers are kept, not learned
                delattr(part, name)
                part.register_buffer(name, p.detach())

    def prompts(self, text: Sequence[Tensor], mode: Literal["replace", "add"] = "replace") -> Prompts:
        """Visual prompts [M, D image] of the text prompts [M, D text], layer by layer."""
        layers = list(super().prompts(text[:1], mode).tokens)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.learned):
            for generate, own in zip(self.generators, text[:-1], strict=True):
                layers.append(generate(layers[-1], own))
        return Prompts(layers, mode)


class Runs(nn.Module):
    """A tower that is called as :meth:`Tower.run`, so that it can run on other weights."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, *given: Any) -> Tensor:
        """States of all rows."""
        x, prompts, before_block, texts = given
        return self.tower.run(x, prompts, None, before_block, None, texts)


@register("comma")
class COMMA(MaPLe):
    """Deep prompts in both towers; a layer's visual ones are generated from those of both towers one layer before.

    Loss: cross-entropy + w · (1 − cos) of tuned and frozen states of all places of the class texts, up to the context
    length, after the last text block. Official settings: 2 tokens, depth 9, "a photo of a", w = 1, one last block, SGD
    0.0035, batch 4, 5 epochs (hulianyuyy's COMMA). As published, generated prompts are written past autograd: the
    generators keep their random start; ``generators=learned`` is what the paper describes. Deviation: as in ``maple``.
    """

    paper, year, learns = "Hu et al., AAAI", 2024, "deep text prompts; visual prompts generated from both"

    @dataclass(frozen=True)
    class Config(MaPLe.Config):
        """Options of comma."""

        w: Weight = 1.0
        """Weight of the distance to the frozen states of the class texts."""
        last_blocks: Count = 1
        """Last blocks of the text tower after which states are compared."""
        last: Literal["repeated", "each"] = "repeated"
        """Whether the first of the last blocks stands in for all of them, as in the official code."""
        generators: Literal["frozen", "learned"] = "frozen"
        """Whether what generates visual prompts keeps its random start, as in the official code."""

        @property
        def can(self) -> Can:
            """Its loss reads the texts whole."""
            return super().can & ~Can.SPLIT_TEXTS

    def build(self) -> None:
        """Create the prompts and what generates the visual ones."""
        c, n = self.config, self.backbone.text_tower.config.layers
        if c.last_blocks > n:
            raise ConfigError(f"method.last_blocks = {c.last_blocks} (allowed: 1 to {n}, the text tower's)")
        self.coupled = GeneratedPrompts(self.backbone, c.depth, c.generators == "learned")
        self.context = deep_context(self.backbone, c.n_ctx, c.init, c.depth)
        self.folded: Tensor | None = None
        self._padded: tuple[Any, tuple[PackedText, PackedText, Tensor]] | None = None

    def stand_ins(self, prefix: str = "") -> dict[str, Tensor]:
        """Weights of the blocks that another one stands in for, by name."""
        blocks, first = self.backbone.text_tower.blocks, -self.config.last_blocks
        later = range(len(blocks) + first + 1, len(blocks)) if self.config.last == "repeated" else ()
        return {f"{prefix}blocks.{i}.{name}": p for i in later for name, p in blocks[first].named_parameters()}

    def class_features(self, class_names: Sequence[str], image_features: Tensor | None = None) -> Tensor:
        """[C, E], the same for every image."""
        given = self.context.packed(self.backbone, class_names), self.context.prompts()
        return unit(functional_call(self.backbone.text_tower, self.stand_ins(), given)[0])

    def last_states(self, texts: PackedText, prompts: Prompts | None) -> Tensor:
        """Of padded texts after each of the last blocks: [blocks, C, N, D]."""
        tower, kept = self.backbone.text_tower, list[Tensor]()
        first = tower.config.layers - self.config.last_blocks + 1

        def keep(i: int, x: Tensor) -> Tensor:
            kept.extend([x] * (i >= first))
            return x

        x = functional_call(Runs(tower), self.stand_ins("tower."), (tower.embed(texts), prompts, keep, texts))
        return torch.stack([*kept, x])[:, 0].unflatten(1, (-1, tower.config.context_length))

    def padded(self, names: Sequence[str]) -> tuple[PackedText, PackedText, Tensor]:
        """Texts filled up to the context length, learned and frozen, and where the learned ones end, [C]."""
        key = tuple(names), self.template, self.backbone.device
        if self._padded is None or self._padded[0] != key:
            own = class_tokens(self.backbone, names, self.context.n_ctx, self.context.words)
            given = (own.ids, own.slots), (self.backbone.tokenize(fill(self.template, names)), None)
            filled = (([[*i, *[PAD] * (self.backbone.context_length - len(i))] for i in ids], s) for ids, s in given)
            learned, frozen = (pack(ids, slots, share_prefix=False).to(self.backbone.device) for ids, slots in filled)
            ends = torch.tensor([len(ids) - 1 for ids in own.ids], device=self.backbone.device)
            self._padded = key, (learned, frozen, ends)
        return self._padded[1]

    def forward(self, batch: Batch) -> Output:
        """Class features and the texts' last states from one run of the padded texts."""
        names = self.names_of(batch.compared)
        learned, _, ends = self.padded(names)
        states = self.last_states(learned, self.context.prompts())
        v = self.image_features(batch)
        t = unit(self.backbone.text_tower.read(states[-1][torch.arange(len(names), device=ends.device), ends]))
        return Output(v, t, self.logits(v, t), states)

    def regularisers(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """The distance to the frozen states of the class texts."""
        names = self.names_of(batch.compared)
        _, frozen, _ = self.padded(names)
        key = self.name, names, self.template, self.config.last_blocks, self.config.last
        states0 = self.backbone.remember(key, lambda: self.last_states(frozen, None))
        return {"kg": self.config.w * (1 - cosine_similarity(out.extra, states0, -1).mean())}
