"""Where names point in the space that images share with texts, while the image tower of ``mini`` learns."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from photos import AXES
from tokenizer import counts
from torch import Tensor, nn
from torch.nn import functional as F

from data import PACKAGES, package_folder
from vlprompt.backbones.lite0 import Kind, directions
from vlprompt.data.known.openmoji import SUBGROUPS

RARE = 1
"""Words that are met so often in WordNet's tagged texts, or more rarely, are not taken for everyday ones."""
OTHERS = 3072
"""Other words a step that no picture of the batch shows."""
ALIKE = 0.5
"""Cosine of two names' sentence embeddings from which on neither is wrong for the other."""
FEWEST, MOST = 4, 400
"""Kinds below a WordNet noun that is a class of its own."""


def kinds_above(kinds: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Nouns that some but not nearly all kinds are one of → those kinds, without two nouns for the same."""
    below: dict[str, list[int]] = {}
    for i, kind in enumerate(kinds):
        for noun in dict.fromkeys(kind["above"]):
            below.setdefault(noun, []).append(i)
    found: dict[tuple[int, ...], str] = {}
    for noun, members in below.items():
        if FEWEST <= len(members) <= MOST:
            found.setdefault(tuple(members), noun)  # the nearest of a chain without branches
    return {noun: list(members) for members, noun in found.items()}


def listed_kinds(data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The kinds that photographs are told apart by, and those kept unseen; ``at`` is a kind's place among all."""
    listed = json.loads((data / "kinds.json").read_text(encoding="utf-8"))
    placed = [kind | {"at": at} for at, kind in enumerate(listed)]
    return [kind for kind in placed if not kind["unseen"]], [kind for kind in placed if kind["unseen"]]


def read_texts(data: Path) -> tuple[list[str], dict[str, int], Tensor]:
    """What ``embed.py`` wrote: all texts, the first place of each, and their sentence embeddings [texts, 384]."""
    texts: list[str] = json.loads((data / "texts.json").read_text(encoding="utf-8"))
    row = {text: i for i, text in reversed(list(enumerate(texts)))}
    return texts, row, torch.from_numpy(np.load(data / "texts.npy")).float()


def kind_embeddings(kinds: Sequence[dict[str, Any]], row: Mapping[str, int], embeddings: Tensor) -> Tensor:
    """Sentence embeddings of kinds, [kinds, 384], from those of all texts; ``row`` says where a text's is."""
    asked = [Kind(kind["id"], kind["text"], tuple(kind["names"]), kind["gloss"]) for kind in kinds]
    return directions(asked, lambda written: embeddings[[row[text] for text in written]])


class Names(nn.Module):
    """Directions of what drawings show (captions, sub-groups, classes, tags) and photographs (kinds, what is above).

    A text's direction is a linear map of its sentence embedding; texts that pictures show may leave it a little
    (``shift``), for sentences that mean nearly the same (``grinning face``, ``beaming face``) look different.
    Beside names, features and patches (of ``width``) learn to say what a classifier sees (``seen``, ``seen_at``).
    """

    def __init__(self, data: Path, dim: int, width: int) -> None:
        super().__init__()
        captions = json.loads((data / "captions.json").read_text(encoding="utf-8"))
        texts, row, embeddings = read_texts(data)
        unicode_groups = sorted({c["subgroup"] for c in captions if c["subgroup"]})
        class_of = {group: name for name, groups in SUBGROUPS.items() for group in groups}
        tags = sorted({tag for c in captions for tag in c["tags"]})
        kinds, _ = listed_kinds(data)
        above = kinds_above(kinds)
        self.parts = {
            "captions": list(range(len(captions))),
            "groups": [row[group.replace("-", " ")] for group in unicode_groups],
            "classes": [row[name] for name in SUBGROUPS],
            "tags": [row[tag] for tag in tags],
            "kinds": [row[kind["names"][0]] for kind in kinds],
            "above": [row[noun] for noun in above],
        }
        self.embeddings: Tensor
        rows = [i for of_part in self.parts.values() for i in of_part]
        shown = embeddings[rows]
        start = sum(len(self.parts[part]) for part in ("captions", "groups", "classes", "tags"))
        shown[start : start + len(kinds)] = kind_embeddings(kinds, row, embeddings)
        self.register_buffer("embeddings", shown.to(torch.bfloat16), persistent=False)
        self.kind_embeddings: Tensor
        self.register_buffer("kind_embeddings", self.embeddings[start : start + len(kinds)], persistent=False)
        self.map = nn.Linear(embeddings.shape[1], dim)
        centre = shown.mean(0)
        axes = torch.linalg.svd(shown - centre, full_matrices=False)[2][:dim]
        spread = ((shown - centre) @ axes.T).std(0).clamp(min=1e-3)
        with torch.no_grad():  # principal directions, evened out half-way
            self.map.weight.copy_(axes / spread[:, None].sqrt())
            self.map.bias.copy_(-self.map.weight @ centre)
        self.shift = nn.Parameter(torch.zeros(len(rows), dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(16.0)))
        self.seen = nn.Linear(dim, AXES)
        self.seen_at = nn.Linear(width, AXES)

        group_index = {group: i for i, group in enumerate(unicode_groups)}
        class_index = {name: i for i, name in enumerate(SUBGROUPS)}
        group_of = [group_index.get(c["subgroup"], -1) for c in captions]
        class_of_caption = [class_index[class_of[c["subgroup"]]] if c["subgroup"] in class_of else -1 for c in captions]
        tag_index = {tag: i for i, tag in enumerate(tags)}
        has_tag = torch.zeros(len(captions), len(tags))
        for i, caption in enumerate(captions):
            for tag in caption["tags"]:
                has_tag[i, tag_index[tag]] = 1 / len(caption["tags"])
        is_one_of = torch.zeros(len(kinds), len(above))
        for i, members in enumerate(above.values()):
            is_one_of[members, i] = 1
        of_kinds, of_captions = shown[start : start + len(kinds)], shown[: len(captions)]
        self.fixed: dict[str, Tensor] | None = None
        self.has_tag: Tensor
        self.group: Tensor
        self.class_: Tensor
        self.is_one_of: Tensor
        self.alike: Tensor
        self.register_buffer("has_tag", has_tag, persistent=False)
        self.register_buffer("group", torch.tensor(group_of), persistent=False)
        self.register_buffer("class_", torch.tensor(class_of_caption), persistent=False)
        self.register_buffer("is_one_of", is_one_of, persistent=False)
        self.register_buffer("alike", of_kinds @ of_captions.T > ALIKE, persistent=False)  # [kinds, captions]
        taken = set(rows) | {i for i, text in enumerate(texts) if text.count(" ") > 1}
        words = set((data / "words.txt").read_text(encoding="utf-8").splitlines())
        met = counts(data, package_folder(PACKAGES["words"], data / "packages") / "dict" / "index.sense")
        common = [all(met[word] > RARE for word in re.findall(r"[a-z]+", text.lower())) for text in texts]
        others = [i for i, text in enumerate(texts) if i not in taken and text in words and common[i]]
        self.others: Tensor
        self.register_buffer("others", embeddings[others].to(torch.bfloat16), persistent=False)

    def forward(self) -> dict[str, Tensor]:
        """Unit directions of each part, [texts, D]."""
        if self.fixed is not None:
            return self.fixed
        mapped = F.linear(self.embeddings, self.map.weight.to(torch.bfloat16)).float() + self.map.bias
        directions = F.normalize(mapped + self.shift, dim=-1)
        return dict(zip(self.parts, directions.split([len(rows) for rows in self.parts.values()]), strict=True))

    def mapped(self, embeddings: Tensor) -> Tensor:
        """Directions of any sentence embeddings [texts, 384], not normalised: [texts, D]."""
        return F.linear(embeddings, self.map.weight, self.map.bias)

    def fix(self, directions: dict[str, Tensor]) -> None:
        """Take these directions, and learn none."""
        self.fixed = {kind: F.normalize(directions[kind], dim=-1) for kind in self.parts}
        self.map.requires_grad_(False)
        self.shift.requires_grad_(False)

    @torch.no_grad()
    def begin_from(self, features: Tensor) -> None:
        """Point where a text tower does, whose features [texts, D] of all parts in turn these are."""
        x = self.embeddings.float()
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
        found = torch.linalg.solve(x.T @ x + 0.01 * len(x) / 384 * torch.eye(x.shape[1]), x.T @ features)
        self.map.weight.copy_(found[:-1].T)
        self.map.bias.copy_(found[-1])
        self.shift.copy_(0.5 * (features - x @ found))

    def draw_others(self, generator: torch.Generator) -> Tensor:
        """Sentence embeddings of some words that no picture is called by, [OTHERS, 384].

        Without them, names that were never learned would draw pictures of everything: the map knows no better.
        """
        return self.others[torch.randint(len(self.others), (OTHERS,), generator=generator).to(self.others.device)]

    def _wrong(self, scaled: Tensor, meant: Tensor, others: Tensor) -> Tensor:
        """Logits of words that mean something else than embeddings ``meant`` [B, 384]: [B, OTHERS]."""
        low = F.linear(others, self.map.weight.to(others.dtype)).float() + self.map.bias
        return (scaled @ F.normalize(low, dim=-1).T).masked_fill(meant @ others.T > ALIKE, -math.inf)

    def of_drawings(self, features: Tensor, captions: Tensor, others: Tensor) -> Tensor:
        """Cross entropy over captions, sub-groups, classes and tags of unit features [B, D].

        ``others`` are words that stand against the captions, as :meth:`draw_others` gives them.
        """
        names = self()
        scaled = self.log_scale.exp() * features
        kinds = (scaled @ names["kinds"].T).masked_fill(self.alike.T[captions], -math.inf)
        wrong = self._wrong(scaled, self.embeddings[captions], others)
        logits = torch.cat([scaled @ names["captions"].T, kinds, wrong], 1)
        total = F.cross_entropy(logits, captions, label_smoothing=0.0)
        for part, labels, weight in (("groups", self.group, 0.25), ("classes", self.class_, 0.25)):
            label = labels[captions]
            known = label >= 0
            each = F.cross_entropy(scaled @ names[part].T, label.clamp(min=0), reduction="none")
            total = total + weight * (each * known).sum() / len(known)
        tags = self.has_tag[captions]
        return total - 0.25 * (tags * (scaled @ names["tags"].T).log_softmax(-1)).sum(-1).mean()

    def of_photographs(self, features: Tensor, chances: Tensor, others: Tensor) -> Tensor:
        """Cross entropy with chances [B, kinds] of what photographs show, and of what is above those.

        All names stand against each other, those of drawings too, but for captions that mean about the likeliest kind.
        """
        names = self()
        scaled = self.log_scale.exp() * features
        captions = (scaled @ names["captions"].T).masked_fill(self.alike[chances.argmax(-1)], -math.inf)
        kinds = scaled @ names["kinds"].T
        wrong = self._wrong(scaled, self.kind_embeddings[chances.argmax(-1)], others)
        total = torch.logsumexp(torch.cat([kinds, captions, wrong], 1), -1) - (chances * kinds).sum(-1)
        wide = chances @ self.is_one_of
        wide = wide / wide.sum(-1, keepdim=True).clamp(min=1e-6)
        total = total - 0.25 * (wide * (scaled @ names["above"].T).log_softmax(-1)).sum(-1)
        meant = F.normalize(chances @ names["kinds"].detach(), dim=-1)
        return (total + 2 * (1 - (features * meant).sum(-1))).mean()

    def of_seen(self, features: Tensor, tokens: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
        """How far unit features [B, D] are from saying what the classifier sees at all patches, [B, N, K].

        And the ``tokens`` [B, n, W] of the patches ``rows`` [B, n] from saying what it sees there: one minus cosines.
        """
        all_, there = seen.mean(1), seen.gather(1, rows[..., None].expand(-1, -1, seen.shape[-1]))
        tokens = F.linear(F.layer_norm(tokens, tokens.shape[-1:]), self.seen_at.weight.to(tokens.dtype)).float()
        far = 1 - F.cosine_similarity(self.seen(features), all_, dim=-1).mean()
        return 4 * far + 2 * (1 - F.cosine_similarity(tokens + self.seen_at.bias, there, dim=-1).mean())
