"""DroPLe's language-model prior (LLaMP, CVPR 2024): prompt tokens that the last layer of a frozen model decodes.

Shapes: C classes, Q questions, P prompt tokens, L prompted layers, W the language model's width, D the text tower's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.packing import PackedText, pack
from vlprompt.backbones.towers import Prompts
from vlprompt.data.splits import find_classes
from vlprompt.errors import ConfigError, DataError, first_few
from vlprompt.prompting.prior import NORM, NORM_1, NORM_2, O, Prior, Q, decode
from vlprompt.prompting.text import LISTS_KEPT, TextContext, class_tokens, encode_classes

TRAINED = {
    "q": Q, "q_bias": Q.replace("weight", "bias"), "o": O, "o_bias": O.replace("weight", "bias"),
    "norm_1": NORM_1, "norm_2": NORM_2, "norm": NORM,
}  # fmt: skip
"""What learns of the layer, from its frozen tensors on: query and output projections, and the norms."""


class LanguagePrior(nn.Module):
    """Learned tokens [P, W] behind the questions about each class, decoded and mapped into every prompted layer.

    ``maps`` [L, D, W] have no bias; ``biases`` are [L, P, D].
    """

    own: Tensor | None
    made_by: Tensor

    def __init__(
        self, tensors: Mapping[str, Tensor], made_by: Tensor, own: Tensor | None = None, names: Sequence[str] = ()
    ) -> None:
        """``made_by`` is the prior's fingerprint [32] in bytes, ``own`` a tuned model's features of ``names``."""
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))
        self.register_buffer("made_by", made_by)
        self.register_buffer("own", own)
        self.own_names = tuple(names)
        self.source: Prior | None = None
        self._packed: dict[tuple[str, ...], PackedText] = {}

    @classmethod
    def begin(cls, prior: Prior, backbone: Backbone, n_tokens: int, depth: int) -> LanguagePrior:
        """Before training: tokens, maps and biases from Kaiming's uniform distribution, the rest from the layer.

        Raises ConfigError for a text tower that is not causal.
        """
        width = backbone.text_tower.config.width
        if not backbone.text_tower.config.causal:
            raise ConfigError(
                f"data.prior = {prior.file}: '{backbone.name}' reads texts of one length: no room behind the class "
                "name (allowed: a causal text tower, as CLIP's)"
            )
        tokens, maps = torch.empty(n_tokens, prior.width), torch.empty(depth, width, prior.width)
        biases = torch.empty(depth, n_tokens, width)
        for matrix in (tokens, *maps, *biases):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        layer = {name: prior.layer[key].float().clone() for name, key in TRAINED.items() if key in prior.layer}
        return cls({"tokens": tokens, "maps": maps, "biases": biases, **layer}, _bytes(prior))

    @classmethod
    def tuned(cls, state: Mapping[str, Tensor], class_names: Sequence[str]) -> LanguagePrior:
        """Of a tuned model's tensors."""
        rest = {name: t for name, t in state.items() if name not in ("made_by", "own")}
        return cls(rest, state["made_by"].to(torch.uint8), state["own"], class_names)

    def take(self, prior: Prior) -> None:
        """Read questions from here; raises ConfigError for those of another model, or other questions."""
        if not torch.equal(_bytes(prior), self.made_by.cpu()):
            raise ConfigError(f"prior {prior.file} is of another language model or other questions than was tuned with")
        self.source = prior

    @property
    def n_tokens(self) -> int:
        """P"""
        return len(self.get_parameter("tokens"))

    def draw(self) -> int:
        """Which question a step asks."""
        assert self.source is not None
        return int(torch.randint(len(self.source.questions), ()))

    def tokens_of(self, class_names: Sequence[str], k: int) -> list[Tensor]:
        """What enters each prompted layer for question k, [C, P, D] each."""
        assert self.source is not None
        own, x = dict(self.named_parameters()), self.get_parameter("tokens")
        past = self.source.pasts(class_names, x.device)[k]
        past = past._replace(keys=past.keys.to(x.dtype), values=past.values.to(x.dtype))
        layer = self.source.layer_for(x) | {key: own[name] for name, key in TRAINED.items() if name in own}
        h = decode(x[None], layer, past, self.source.eps, self.source.scaling)
        return [h @ m.T + b for m, b in zip(own["maps"], own["biases"], strict=True)]

    def packed(self, backbone: Backbone, context: TextContext, class_names: Sequence[str]) -> PackedText:
        """Texts "{context} {class} {P tokens}", packed without a shared prefix.

        As in the public code the end token keeps the position that it has without the tokens, which have none.
        """
        key = (*class_names, str(backbone.device))
        if key not in self._packed:
            if len(self._packed) == LISTS_KEPT:
                del self._packed[next(iter(self._packed))]
            n, words = self.n_tokens, (context.words, context.position, context.end)
            texts = class_tokens(backbone, class_names, context.n_ctx, *words)
            ids = [[*own[:-1], *own[:1] * n, own[-1]] for own in texts.ids]
            ends = [len(own) - 1 for own in texts.ids]
            slots = [[*before, *range(end, end + n)] for before, end in zip(texts.slots, ends, strict=True)]
            text = pack(ids, slots, class_specific=True, share_prefix=False)
            at_most = torch.cat([torch.full((g.count * g.length,), g.length - 1 - n) for g in text.groups])
            self._packed[key] = replace(text, positions=text.positions.minimum(at_most)).to(backbone.device)
        return self._packed[key]

    def prompts(self, backbone: Backbone, context: TextContext, class_names: Sequence[str], k: int) -> Prompts:
        """The context's tokens and those of question k, by layer, [C, M + P, D] each."""
        text, own = self.packed(backbone, context, class_names), self.tokens_of(class_names, k)
        # The tower adds positions to what enters its first block: here that of the end token, which is taken off again.
        own[0] = own[0] - backbone.text_tower.positions[text.positions[text.pooled[text.order]], None].to(own[0].dtype)
        both = zip(context.prompts().tokens, own, strict=True)
        return Prompts([torch.cat([x.expand(len(more), -1, -1), more], 1) for x, more in both], context.mode)

    def class_features(self, backbone: Backbone, context: TextContext, class_names: Sequence[str]) -> Tensor:
        """Of every question, [Q, C, E]; a tuned model's own classes need no questions.

        Raises DataError, naming them, for classes that nothing was asked about.
        """
        known = [None] * len(class_names) if self.own is None else find_classes(class_names, self.own_names)
        new = [name for name, c in zip(class_names, known, strict=True) if c is None]
        if new and self.source is None:
            raise DataError(
                f"drople's language prior has no questions about {first_few([repr(name) for name in new])}, which it "
                "was not tuned on: make them with `vlprompt describe`, and give the file (--prior FILE)"
            )
        fresh = self.asked(backbone, context, new).unbind(1) if new else ()
        if self.own is None:
            return torch.stack(fresh, 1)
        rest, own = iter(fresh), self.own
        return torch.stack([next(rest) if c is None else own[:, c] for c in known], 1)

    def asked(self, backbone: Backbone, context: TextContext, class_names: Sequence[str]) -> Tensor:
        """Of every question, [Q, C, E], computed from the questions."""
        assert self.source is not None
        text, tower = self.packed(backbone, context, class_names), backbone.text_tower
        every = range(len(self.source.questions))
        return torch.stack(
            [encode_classes(tower, self.prompts(backbone, context, class_names, k), text) for k in every]
        )


def _bytes(prior: Prior) -> Tensor:
    return torch.tensor(list(bytes.fromhex(prior.fingerprint)), dtype=torch.uint8)
