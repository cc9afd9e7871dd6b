"""Learned tokens of the text tower, and class names to class features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlprompt.backbones.attention import Attention, packed_attention
from vlprompt.backbones.backbone import Backbone, unit
from vlprompt.backbones.packing import PackedText, pack, pack_with_room
from vlprompt.backbones.towers import Prompts, TextTower
from vlprompt.errors import ConfigError, DataError, first_few

INIT_STD = 0.02
"""Standard deviation of randomly initialised tokens in every official implementation."""

LISTS_KEPT = 8
"""Lists of class names whose packed texts a context keeps; methods may use other classes in every step."""

Position = Literal["end", "middle", "front"]


@dataclass(frozen=True)
class ClassTokens:
    """The texts of C classes: token ids from the start to the end token, and where the learned tokens stand.

    ``ids`` holds any token at the positions in ``slots`` ([C][M]); learned vectors replace it.
    """

    ids: list[list[int]]
    slots: list[list[int]]


def class_tokens(
    backbone: Backbone,
    class_names: Sequence[str],
    n_ctx: int,
    words: str | None = None,
    position: Position = "end",
    end: str = ".",
) -> ClassTokens:
    """Texts "{context} {class}." with M learned tokens; underscores are read as spaces.

    The first M tokens of the context's ``words`` are learned and the rest of them stays frozen (MaPLe: 2 of
    "a photo of a"). More learned tokens than words stand in front of the words (ProGrad), and without words
    all M are free. ``position`` puts the class name at the end, after the first ⌊M/2⌋ tokens, or in front;
    ``end`` takes the place of the full stop.
    Raises DataError naming the class whose text is longer than the backbone reads.
    """
    tokenizer = backbone.tokenizer
    words = spaced(words or "")
    n_words = len(tokenizer.words(words)) if words else 0
    lead = " ".join(["X"] * max(n_ctx - n_words, 0) + ([words] if words else []))
    n_lead = max(n_ctx, n_words)
    start = len(tokenizer.start)
    check_known(backbone, class_names)
    all_ids, slots = [], []
    for class_name in class_names:
        name = spaced(class_name)
        sentence = tokenizer.words(f"{lead} {name}{end}")
        context, rest = sentence[:n_lead], sentence[n_lead:]
        n_name = len(tokenizer.words(name))
        label, tail = rest[:n_name], rest[n_name:]
        if position == "end":
            before, ids = n_ctx, context + label + tail
        else:
            before = n_ctx // 2 if position == "middle" else 0
            ids = context[:before] + label + context[before:] + tail
        all_ids.append(tokenizer.finish(ids, class_name))
        slots.append([start + m + (len(label) if m >= before else 0) for m in range(n_ctx)])
    return ClassTokens(all_ids, slots)


def spaced(text: str) -> str:
    """A class name, or CoOp's ``a_photo_of_a``, with spaces between its words."""
    return text.replace("_", " ")


def fill(template: str, class_names: Sequence[str]) -> list[str]:
    """A template's text for each class; underscores in class names are read as spaces."""
    return [template.replace("{}", spaced(name)) for name in class_names]


def check_known(backbone: Backbone, class_names: Sequence[str]) -> None:
    """Raise DataError for a class name of which the backbone's vocabulary knows nothing, or two that it reads alike.

    Names that are the same to the letter are not its affair: a split file may have them.
    """
    read: dict[tuple[int, ...], str] = {}
    for name in class_names:
        text = spaced(name)
        if not backbone.tokenizer.reads(text)[0]:
            raise DataError(f"class name '{name}' has no token that the backbone knows")
        other = read.setdefault(tuple(backbone.tokenizer.words(text)), name)
        if other != name:
            raise DataError(
                f"classes '{other}' and '{name}' are the same tokens for backbone '{backbone.name}', which cannot tell "
                "them apart: write one of them in other words"
            )


def partly_known(backbone: Backbone, class_names: Sequence[str]) -> str | None:
    """A line that names the classes whose names have letters or signs that the backbone does not know, if any do."""
    names = [f"'{name}'" for name in class_names if not backbone.tokenizer.reads(spaced(name))[1]]
    return f"backbone '{backbone.name}' does not know all letters of {first_few(names)}" if names else None


class TextContext(nn.Module):
    """M learned tokens in the text of every class, and at ``depth`` layers of the text tower.

    ``vectors``: [M, D], or [C, M, D] class-specific. ``deep``: [depth − 1, M, D], at the inputs of the blocks
    after the first. Deeper tokens stand where the first ones do and replace (or are added to) their outputs.
    """

    def __init__(
        self,
        backbone: Backbone,
        n_ctx: int,
        words: str | None = None,
        *,
        position: Position = "end",
        depth: int = 1,
        mode: Literal["replace", "add"] = "replace",
        n_classes: int | None = None,
        end: str = ".",
    ) -> None:
        super().__init__()
        width, layers = backbone.text_tower.config.width, backbone.text_tower.config.layers
        if not 1 <= depth <= layers:
            raise ConfigError(f"text prompt depth = {depth} (allowed: 1 to {layers}, the text tower's layers)")
        self.n_ctx, self.words, self.position, self.mode = n_ctx, words, position, mode
        self.class_specific, self.end = n_classes is not None, end
        shape = (n_ctx, width) if n_classes is None else (n_classes, n_ctx, width)
        vectors = INIT_STD * torch.randn(shape)
        if words:
            known = word_vectors(backbone, words)[:n_ctx]  # the words stand last if there are more tokens
            vectors[..., n_ctx - len(known) :, :] = known
        self.vectors = nn.Parameter(vectors)
        deep = INIT_STD * torch.randn(depth - 1, n_ctx, width)
        self.deep = nn.Parameter(deep) if depth > 1 else None
        self._packed: dict[tuple[tuple[str, ...], int, bool, torch.device], list[PackedText]] = {}

    def prompts(self, bias: Tensor | None = None) -> Prompts:
        """The learned tokens per layer; ``bias`` [B, D] moves those of the first layer per image (CoCoOp)."""
        first = self.vectors if bias is None else self.vectors + bias[:, None, None]
        return Prompts([first, *(() if self.deep is None else self.deep)], self.mode)

    def packed(self, backbone: Backbone, class_names: Sequence[str], share_prefix: bool = True) -> PackedText:
        """The classes' texts, tokenised and packed once for each of the last few lists of names.

        Without ``share_prefix`` every text has tokens of its own from the first on: for states that differ between
        texts, and attention functions that know of no shared prefix.
        """
        return self.packed_parts(backbone, class_names, len(class_names), share_prefix)[0]

    def packed_parts(
        self, backbone: Backbone, class_names: Sequence[str], at_once: int, share_prefix: bool = True
    ) -> list[PackedText]:
        """The same in parts of ``at_once`` classes, the last of which may hold fewer."""
        key = tuple(class_names), at_once, share_prefix, backbone.device
        if key not in self._packed:
            if len(self._packed) == LISTS_KEPT:
                del self._packed[next(iter(self._packed))]
            parts = [class_names[i : i + at_once] for i in range(0, len(class_names), at_once)]
            self._packed[key] = [self.pack(backbone, part, share_prefix).to(backbone.device) for part in parts]
        return self._packed[key]

    def pack(self, backbone: Backbone, class_names: Sequence[str], share_prefix: bool) -> PackedText:
        """The classes' texts, packed anew."""
        tokens = class_tokens(backbone, class_names, self.n_ctx, self.words, self.position, self.end)
        causal, specific = backbone.text_tower.config.causal, self.class_specific
        return pack(tokens.ids, tokens.slots, causal=causal, class_specific=specific, share_prefix=share_prefix)


class JoiningTexts:
    """Hand-written texts of a causal tower, with M learned tokens behind the first from a later block on (MMRL)."""

    def __init__(self, backbone: Backbone, n_tokens: int) -> None:
        self.backbone, self.n_tokens = backbone, n_tokens
        self._packed: tuple[Any, list[PackedText]] | None = None

    def packed(self, class_names: Sequence[str], template: str) -> list[PackedText]:
        """As blocks see them before the tokens join, and after; the last list of names is kept."""
        key = tuple(class_names), template, self.backbone.device
        if self._packed is None or self._packed[0] != key:
            check_known(self.backbone, class_names)
            both = pack_with_room(self.backbone.tokenize(fill(template, class_names)), self.n_tokens)
            self._packed = key, [text.to(self.backbone.device) for text in both]
        return self._packed[1]

    def encode(self, class_names: Sequence[str], template: str, tokens: Mapping[int, Tensor]) -> Tensor:
        """Normalised class features [C, E]; ``tokens`` [M, D] by block: they join at the first."""
        tower, first = self.backbone.text_tower, min(tokens)
        before, text = self.packed(class_names, template)

        def join(i: int, x: Tensor) -> Tensor:
            own = tokens[i].to(x.dtype)[None, text.source % self.n_tokens] if i in tokens else None
            return x if own is None else x.index_copy(1, text.slots, own)

        early, late = (packed_attention(t, tower.config.heads) for t in (before, text))
        attention = [early if i < first else late for i in range(len(tower.blocks))]
        return unit(tower(text, None, attention, join)[0])


def word_vectors(backbone: Backbone, words: str) -> Tensor:
    """Token embeddings of words, in fp32 at least: [tokens, D]. Raises ConfigError where there are none."""
    embedding = backbone.text_tower.token_embedding
    ids = backbone.tokenizer.words(spaced(words))
    if not ids:
        raise ConfigError(f"initial words '{words}' have no token that the backbone knows")
    vectors = embedding(torch.tensor(ids, device=embedding.weight.device))
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32)).cpu()


def encode_classes(
    text_tower: TextTower,
    prompts: Prompts | None,
    class_tokens: PackedText,
    normalise: bool = True,
    attention: Attention | Sequence[Attention] | None = None,
) -> Tensor:
    """Class features of packed texts: [C, E], or [B, C, E] where the prompts depend on the image.

    No padding is computed, the prefix shared by all classes is computed once, and the last block runs for the
    pooled tokens only: exact, forwards and backwards, for every causal tower (see ``backbones/packing.py``).
    """
    features = text_tower(class_tokens, prompts, attention)
    features = features if len(features) > 1 or _per_image(prompts) else features[0]
    return unit(features) if normalise else features


def encode_in_parts(
    text_tower: TextTower, prompts: Prompts, parts: Sequence[PackedText], at_once: int, normalise: bool = True
) -> Tensor:
    """:func:`encode_classes` of parts of ``at_once`` classes, each computed again in the backward pass.

    Exact, and no more than one part's states are in memory; the forward pass is computed twice.
    """

    def encode(part: PackedText, *layers: Tensor | None) -> Tensor:
        return encode_classes(text_tower, Prompts(layers, prompts.mode), part, normalise)

    features = []
    for i, part in enumerate(parts):
        own = slice(i * at_once, (i + 1) * at_once)  # of the classes, where each has learned tokens of its own
        layers = [layer[own] if layer is not None and layer.ndim == 3 else layer for layer in prompts.layers]
        features.append(checkpoint(encode, part, *layers, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(features, -2)


def _per_image(prompts: Prompts | None) -> bool:
    return prompts is not None and any(layer.ndim == 4 for layer in prompts.tokens)
