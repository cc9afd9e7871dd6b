"""A frozen vision-language model: two towers, their tokenizer and image preprocessing, and the logit scale."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vlprompt.backbones.packing import pack
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.backbones.towers import ImageTower, TextTower
from vlprompt.data.images import Preprocess
from vlprompt.errors import DataError

TEXTS_AT_ONCE = 512
TEXTS_KEPT, LISTS_KEPT = 1 << 28, 64
"""Bytes of texts' features, and lists of classes, that a backbone remembers, those used last."""


def unit(features: Tensor) -> Tensor:
    """L2-normalised features, in fp32 at least."""
    return normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


@dataclass
class Backbone:
    """Frozen towers in one dtype; see :func:`vlprompt.load_backbone`."""

    name: str
    image_tower: ImageTower
    text_tower: TextTower
    tokenizer: TextTokenizer
    preprocess: Preprocess
    logit_scale: float
    """What cosines are multiplied by (about 100 for CLIP), not its logarithm."""
    logit_bias: float = 0.0
    licence: str | None = None
    fingerprint: str = ""
    """SHA-256 over all weights (rounded to fp16, the coarsest form they are stored in) and what reads them."""
    _texts: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _known: dict[Hashable, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for tower in (self.image_tower, self.text_tower):
            tower.eval().requires_grad_(False)
        if not self.fingerprint:
            self.fingerprint = self._fingerprint()

    def __sklearn_clone__(self) -> Backbone:
        """Copies of a scikit-learn estimator share the frozen model."""
        return self

    @property
    def image_size(self) -> int:
        """Side of the square images that the image tower reads, in pixels."""
        return self.image_tower.config.image_size

    @property
    def context_length(self) -> int:
        """Tokens that the text tower reads at most, special tokens included."""
        return self.text_tower.config.context_length

    @property
    def embed_dim(self) -> int:
        """E, the width that both towers' features share."""
        return self.text_tower.config.embed_dim

    @property
    def device(self) -> torch.device:
        """Where the towers are."""
        return self.text_tower.positions.device

    @property
    def dtype(self) -> torch.dtype:
        """The towers' precision; features and prompts are fp32 at least."""
        return self.text_tower.positions.dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Backbone:
        """Move the towers in place."""
        for tower in (self.image_tower, self.text_tower):
            tower.to(device=device, dtype=dtype)
        self._texts.clear()
        self._known.clear()
        return self

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, special tokens included, without padding where the tower does not read it."""
        return self.tokenizer(texts)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Frozen features of preprocessed images [B, 3, S, S], normalised: [B, E]."""
        return unit(self.image_tower(images.to(self.device)))

    @property
    def pooled_dim(self) -> int:
        """D, the width of what the image tower makes of an image before its projection."""
        projection = self.image_tower.projection
        return projection.in_features if isinstance(projection, nn.Linear) else self.embed_dim

    def pool_images(self, images: Tensor) -> Tensor:
        """What the frozen image tower makes of images [B, 3, S, S] before its projection: [B, D], in fp32 at least."""
        pooled = self.image_tower.pool(images.to(self.device))
        return pooled.to(torch.promote_types(pooled.dtype, torch.float32))

    @torch.no_grad()
    def project(self, pooled: Tensor) -> Tensor:
        """Image features, not normalised, of what :meth:`pool_images` gave: [..., E] of [..., D]."""
        features = self.image_tower.projection(pooled.to(self.dtype))
        return features.to(torch.promote_types(features.dtype, torch.float32))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], normalise: bool = True) -> Tensor:
        """Frozen features of texts, remembered between calls: [len(texts), E], in fp32 at least.

        Raises DataError for one text that is no list of texts.
        """
        if isinstance(texts, str):
            raise DataError(f"texts are a list: put the one text into brackets, ['{texts[:60]}']")
        if not len(texts):
            return torch.zeros(0, self.embed_dim, device=self.device)
        known = {t: self._texts.pop(t) for t in dict.fromkeys(texts) if t in self._texts}
        new = [t for t in dict.fromkeys(texts) if t not in known]
        for start in range(0, len(new), TEXTS_AT_ONCE):
            part = new[start : start + TEXTS_AT_ONCE]
            packed = pack(self.tokenize(part), causal=self.text_tower.config.causal).to(self.device)
            features = self.text_tower(packed)[0]
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            known.update(zip(part, (row.clone() for row in features), strict=True))
        self._texts |= known  # at the end, as those used last
        stacked = torch.stack([self._texts[t] for t in texts])
        while len(self._texts) > TEXTS_KEPT // (4 * self.embed_dim):
            del self._texts[next(iter(self._texts))]
        return unit(stacked) if normalise else stacked

    def remember(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What ``compute`` gave for ``key`` the first time, until the towers move or many other keys were asked for."""
        value = self._known.pop(key) if key in self._known else compute()
        self._known[key] = value
        if len(self._known) > LISTS_KEPT:
            del self._known[next(iter(self._known))]
        return value

    def logits(self, image_features: Tensor, class_features: Tensor) -> Tensor:
        """scale · v · tᵀ (+ bias) of normalised features [B, E] and [C, E] or [B, C, E]: [B, C]."""
        if class_features.ndim == 3:
            cosines = torch.einsum("be,bce->bc", image_features, class_features)
        else:
            cosines = image_features @ class_features.T
        return self.logit_scale * cosines + self.logit_bias

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        reads = (self.image_tower.config, self.text_tower.config, self.preprocess)
        scale_and_bias = torch.tensor([math.log(self.logit_scale), self.logit_bias]).to(torch.float16)
        digest.update(f"({', '.join(map(_described, reads))}, {scale_and_bias.tolist()})".encode())
        digest.update(str(self.tokenizer.tokenizer.get_vocab_size()).encode())
        for tower in (self.image_tower, self.text_tower):
            for name, tensor in sorted(tower.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.to(torch.float16).cpu().contiguous().numpy().data)
        return digest.hexdigest()


def _described(config: Any) -> str:
    """Its ``repr`` without keyword-only fields at their defaults: these came later, and fingerprints stay the same."""
    shown = [f.name for f in fields(config) if not f.kw_only or getattr(config, f.name) != f.default]
    return f"{type(config).__name__}({', '.join(f'{name}={getattr(config, name)!r}' for name in shown)})"
