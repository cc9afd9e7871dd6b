"""Train the text tower of ``mini`` to point where the image tower was taught to look.

    python tools/mini/text.py tools/mini/photos.yaml --data pretraining --out pretraining/mini

Texts that pictures show go to their own directions (``Names`` in ``image.py``); every other word and combination of
words goes where the same map sends its sentence embedding. Half of the texts stand in a template, which must not move
them. Reads ``OUT/image.safetensors`` and ``OUT/tokenizer.json``; writes ``OUT/text.safetensors``, and goes on from it.
At the end ``OUT/names.safetensors`` says where the text tower points for every text that pictures show.
"""

from __future__ import annotations

import argparse
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
import yaml
from embed import embed
from image import STATE as IMAGE_STATE
from image import attention_of
from names import Names, kind_embeddings, listed_kinds, read_texts
from safetensors.torch import load_file, save
from steps import EPS, Training, draw_by_weight, noise, part, processes, scaled
from tokenizer import TEMPLATES, counts
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from data import PACKAGES, package_folder
from vlprompt.backbones.load import load_backbone
from vlprompt.backbones.towers import Block, TextConfig, TextTower
from vlprompt.files import write_atomically

STATE, NAMES = "text.safetensors", "names.safetensors"
VALIDATION = 2_000
"""Words that are not trained on, the cosine of which with their directions is printed."""
SAID = ("{}", "a photo of a {}.", "a picture of a {}.")
"""How texts stand when the image tower is turned to where the text tower points."""
CHUNKS = 8
"""Batches drawn at once and sorted by length, so that one batch has texts of nearly one length."""


def encode(tower: TextTower, tokens: Tensor, ends: Tensor) -> Tensor:
    """Features [B, E] of tokens [B, L], which end at ``ends`` [B]; what follows is seen by nobody."""
    n = tokens.shape[1]
    mask = torch.full((n, n), -math.inf, dtype=tower.positions.dtype, device=tokens.device).triu(1)
    attention = attention_of(tower.config.heads, mask)
    x = tower.token_embedding(tokens) + tower.positions[:n]
    for block in tower.blocks:
        x = block(x, attention)
    return tower.projection(tower.ln_final(x[torch.arange(len(x), device=x.device), ends]))


def new_tower(config: TextConfig, tokenizer: Tokenizer, seed: int) -> TextTower:
    """A tower whose whole-word tokens start from the sentence embeddings of their words."""
    torch.manual_seed(seed)
    tower = TextTower(config)
    width = config.width

    whole = {token: i for token, i in sorted(tokenizer.get_vocab().items()) if re.fullmatch("[a-z]{2,}</w>", token)}
    vectors = embed([token.removesuffix("</w>") for token in whole])
    vectors = vectors - vectors.mean(0)
    if len(vectors) >= width:
        vectors = vectors @ torch.linalg.svd(vectors, full_matrices=False)[2][:width].T
    else:  # a vocabulary for a trial
        vectors = vectors[:, :width]
    with torch.no_grad():
        tower.token_embedding.weight.normal_(std=0.3)
        tower.token_embedding.weight[list(whole.values())] = 0.5 * vectors / vectors.std()
        tower.positions.normal_(std=0.1)
        for block in tower.blocks:
            assert isinstance(block, Block)
            q = noise(width, width)
            block.qkv.weight.copy_(torch.cat([0.5 * q, 0.5 * q, 0.5 * noise(width, width) + 0.3 * torch.eye(width)]))
            block.out.weight.copy_(0.3 * noise(width, width))
            block.fc_1.weight.copy_(0.5 * noise(config.mlp_width, width))
            block.fc_2.weight.copy_(0.3 * noise(width, config.mlp_width))
            for layer in (block.qkv, block.out, block.fc_1, block.fc_2):
                layer.bias.zero_()
        assert isinstance(tower.projection, nn.Linear)
        tower.projection.weight.copy_(noise(config.embed_dim, width))
    return tower


def unscaled_tower(tower: TextTower) -> TextTower:
    """A shipped text tower as it was trained, before ``export.py`` made its residual stream smaller."""
    factor = (tower.config.eps / EPS) ** 0.5
    out = TextTower(replace(tower.config, eps=EPS))
    out.load_state_dict(scaled(tower.state_dict(), 1 / factor))
    return out


class Texts:
    """All texts with their directions, and how often each is drawn.

    ``directions`` [texts, E]; ``shown`` [captions + kinds, E], which are told apart from one another; ``which``
    [texts], the place of a text among those, -1 for one that is none of them, or several.
    """

    SHARES = {"other": 0.3, "tags": 0.1, "captions": 0.2, "groups": 0.05, "kinds": 0.3, "glosses": 0.05}
    """Of the texts drawn."""

    def __init__(self, data: Path, names: Names) -> None:
        self.texts, row, embeddings = read_texts(data)
        kinds, unseen = listed_kinds(data)
        with torch.no_grad():
            self.directions = F.normalize(names.mapped(embeddings), dim=-1)
            shown = names()
            hidden = F.normalize(names.mapped(kind_embeddings(unseen, row, embeddings)), dim=-1)
        sort = ["other"] * len(self.texts)
        claims: dict[int, list[Tensor]] = {}  # where pictures say that a text points

        def claim(rows: Sequence[int], directions: Tensor, share: str) -> None:
            for i, direction in zip(rows, directions, strict=True):
                claims.setdefault(i, []).append(direction)
                sort[i] = share

        for name, share in (("tags", "tags"), ("above", "kinds"), ("groups", "groups"), ("classes", "groups")):
            claim(names.parts[name], shown[name], share)
        sure = [(i, i) for i in names.parts["captions"]]
        for at, (kind, direction) in enumerate(zip((*kinds, *unseen), (*shown["kinds"], *hidden), strict=True)):
            said = dict.fromkeys(row[text] for text in (*kind["names"], kind["text"]))
            claim(list(said), direction.expand(len(said), -1), "kinds")
            claim([row[kind["gloss"]]], direction[None], "glosses")
            if at < len(kinds):
                sure += [(i, len(names.parts["captions"]) + at) for i in said]
        # A text may be a tag and a caption at once ("bird"): a tag gives way, all others take equal parts.
        tags = set(names.parts["tags"])
        claim(names.parts["captions"], shown["captions"], "captions")
        for i, directions in claims.items():
            taken = directions[1:] if i in tags and len(directions) > 1 else directions
            self.directions[i] = F.normalize(torch.stack(taken).sum(0), dim=-1)
        self.shown = torch.cat([shown["captions"], shown["kinds"]])
        self.which = torch.full((len(self.texts),), -1)
        often = Counter(i for i, _ in sure)
        for i, place in sure:
            self.which[i] = place if often[i] == 1 else -1

        words = counts(data, package_folder(PACKAGES["words"], data / "packages") / "dict" / "index.sense")
        weights = torch.ones(len(self.texts))
        others = [i for i, share in enumerate(sort) if share == "other"]
        for i in others:
            weights[i] = everyday(self.texts[i], words)
        validation = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[:VALIDATION]
        self.validation = torch.tensor(others)[validation]
        weights[self.validation] = 0
        for share, drawn in self.SHARES.items():
            rows = [i for i, of in enumerate(sort) if of == share]
            weights[rows] *= drawn / max(float(weights[rows].sum()), 1e-9)
        self.ends = weights.double().cumsum(0)


def everyday(text: str, met: Counter[str]) -> float:
    """How often a text that no picture shows is drawn, by the rarest of its words."""
    return 0.2 + math.log1p(min((met[word] for word in re.findall(r"[a-z]+", text.lower())), default=0))


def tokenized(tokenizer: Tokenizer, texts: list[str], context: int) -> list[list[int]]:
    """Each text's tokens, cut to the context with the end kept."""
    out = []
    for encoding in tokenizer.encode_batch(texts):
        ids = encoding.ids if len(encoding.ids) <= context else encoding.ids[: context - 1] + encoding.ids[-1:]
        out.append(ids)
    return out


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens [B, L], filled up with zeros, and the position of each end [B]."""
    longest = max(map(len, rows))
    return torch.tensor([r + [0] * (longest - len(r)) for r in rows]), torch.tensor([len(r) - 1 for r in rows])


def drawn_batches(
    texts: Sequence[str], ends: Tensor, tokenizer: Tokenizer, context: int, size: int, seed: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, ends and indices of ``CHUNKS`` batches, each of texts of nearly one length, half of them in a template.

    ``ends`` are the cumulative weights by which texts are drawn.
    """
    draw = random.Random(seed)
    rows = draw_by_weight(ends, size * CHUNKS, torch.Generator().manual_seed(seed))
    written = [draw.choice(TEMPLATES).format(texts[i]) if draw.random() < 0.5 else texts[i] for i in rows.tolist()]
    tokens = tokenized(tokenizer, written, context)
    order = sorted(range(len(rows)), key=lambda i: len(tokens[i]))
    batches = [order[i * size : (i + 1) * size] for i in range(CHUNKS)]
    draw.shuffle(batches)
    return [(*padded([tokens[i] for i in chosen]), rows[chosen]) for chosen in batches]


def apart(features: Tensor, aims: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Cross entropy of each text's features [B, E] with its own aim [B, E], among those of the batch's other texts."""
    scores = scale * features @ aims.T
    same = labels[:, None] == labels
    scores = scores.masked_fill(same & ~torch.eye(len(same), dtype=torch.bool, device=same.device), -math.inf)
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("settings", type=Path, help="a file such as tools/mini/photos.yaml")
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py and embed.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the image tower's state and the tokenizer")
    parser.add_argument("--begin", help="backbone to begin with, as for --backbone of vlprompt")
    parser.add_argument("--save-every", type=int, default=500, help="steps")
    options = parser.parse_args()
    settings = yaml.safe_load(options.settings.read_text(encoding="utf-8"))
    rank, world, device = processes()
    recipe = settings["text_training"]
    tokenizer = Tokenizer.from_file(str(options.out / "tokenizer.json"))
    config = TextConfig(
        vocab_size=tokenizer.get_vocab_size(), embed_dim=settings["image"]["embed_dim"], **settings["text"]
    )
    names = Names(options.data, config.embed_dim, settings["image"]["width"])
    names.load_state_dict(part(load_file(options.out / IMAGE_STATE), "rest"))
    texts = Texts(options.data, names)
    directions, shown, which = texts.directions.to(device), texts.shown.to(device), texts.which.to(device)
    if options.begin:
        tower = unscaled_tower(load_backbone(options.begin).text_tower)
    else:
        tower = new_tower(config, tokenizer, settings["seed"])
    training = Training(tower.to(device), None, recipe, recipe["steps"])
    size = recipe["batch"] // world

    @lru_cache(1)
    def chunks(number: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        seed = (settings["seed"] * 1_000_003 + number) * 64 + rank
        return drawn_batches(texts.texts, texts.ends, tokenizer, config.context_length, size, seed)

    def batch(step: int) -> Callable[[TextTower], Tensor]:
        ids, ends, labels = (t.to(device) for t in chunks(step // CHUNKS)[step % CHUNKS])

        def loss_of(low: TextTower) -> Tensor:
            features = F.normalize(encode(low, ids, ends).float(), dim=-1)
            aims = directions[labels]
            far = (1 - (features * aims).sum(-1)).mean()
            loss = 4 * far + apart(features, aims, labels, 20)
            place = which[labels]  # names of pictures are told apart from all others, not from those of a batch
            of_all = 50 * features[place >= 0] @ shown.T
            return loss + F.cross_entropy(of_all, place[place >= 0], reduction="sum") / len(labels)

        return loss_of

    def found() -> dict[str, float]:
        return validate(training.tower, tokenizer, texts, names)

    training.run(batch, options.out / STATE, options.save_every, recipe["batch"], found, first=rank == 0)
    if rank == 0:
        said = directions_of(training.tower, tokenizer, texts, names)
        write_atomically(options.out / NAMES, save(said))


@torch.no_grad()
def directions_of(tower: nn.Module, tokenizer: Tokenizer, texts: Texts, names: Names) -> dict[str, Tensor]:
    """Where the text tower points for the texts of each part: [texts, E], the mean over plain text and templates."""
    assert isinstance(tower, TextTower)
    device = tower.positions.device
    out = {}
    for kind, rows in names.parts.items():
        total = torch.zeros(len(rows), tower.config.embed_dim)
        for template in SAID:
            written = [template.format(texts.texts[i]) for i in rows]
            tokens = tokenized(tokenizer, written, tower.config.context_length)
            for start in range(0, len(tokens), 256):
                ids, ends = padded(tokens[start : start + 256])
                features = encode(tower, ids.to(device), ends.to(device))
                total[start : start + 256] += F.normalize(features, dim=-1).cpu()
        out[kind] = F.normalize(total, dim=-1)
    return out


@torch.no_grad()
def validate(tower: nn.Module, tokenizer: Tokenizer, texts: Texts, names: Names) -> dict[str, float]:
    """Mean cosine with the direction: of words never trained on, and of captions and classes."""
    assert isinstance(tower, TextTower)
    device = tower.positions.device
    out = {}
    for kind, rows in {
        "other words": texts.validation.tolist(),
        "captions": names.parts["captions"][:VALIDATION],
        "classes": names.parts["classes"],
        "kinds": names.parts["kinds"],
    }.items():
        tokens = tokenized(tokenizer, [texts.texts[i] for i in rows], tower.config.context_length)
        ids, ends = padded(tokens)
        features = F.normalize(encode(tower, ids.to(device), ends.to(device)), dim=-1).cpu()
        out[kind] = round((features * texts.directions[rows]).sum(-1).mean().item(), 3)
    return out


if __name__ == "__main__":
    main()
