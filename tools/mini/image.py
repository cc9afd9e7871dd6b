"""Train the image tower of ``mini`` to point at the names of pictures.

    python tools/mini/image.py tools/mini/photos.yaml --data pretraining --out pretraining/mini
    python -m torch.distributed.run --nproc-per-node=2 tools/mini/image.py …     # one process a core or a GPU

Texts are not run: each caption, tag and sub-group stands for itself in a table of directions, which starts from
sentence embeddings and is learned with the images. The text tower learns the table afterwards (``text.py``).
Every ``--save-every`` steps the state goes to ``OUT/image.safetensors``; after an interruption the same command goes on
from there, with the same views it would have had.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from images import Photographs, Pictures, photo_view, plain, plain_photo, view
from names import Names, listed_kinds
from safetensors.torch import load_file
from steps import Training, noise, part, processes
from torch import Tensor, nn
from torch.nn import functional as F

from vlprompt.backbones.attention import Attention
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import load_backbone
from vlprompt.backbones.towers import Block, ImageConfig, ImageTower

STATE = "image.safetensors"


def attention_of(heads: int, mask: Tensor | None = None) -> Attention:
    """Attention as two products: in bfloat16 on CPUs several times faster than PyTorch's fused kernel."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
        return ((scores if mask is None else scores + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)

    return attention


def encode(
    tower: ImageTower, images: Tensor, blocks: list[int], keep: int | None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Through the ``blocks`` only, from the ``keep`` patches that show most.

    Returns features [B, E], the patches' tokens before the last block [B, n, W], and which patches those are [B, n].
    """
    dtype = tower.positions.dtype
    c = tower.config
    patches = F.unfold(images, c.patch_size, stride=c.patch_size).transpose(1, 2)  # [B, N, 3·P·P]
    x = F.linear(patches.to(dtype), tower.patches.weight.flatten(1)) + tower.positions[1:]
    rows = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    if keep is not None and keep < x.shape[1]:
        shown = patches.std(-1)
        shown = shown + 0.3 * torch.rand(shown.shape, generator=generator, device=shown.device)
        rows = shown.topk(keep, dim=1).indices
        x = x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))
    assert tower.class_token is not None
    first = (tower.class_token + tower.positions[0]).expand(len(x), 1, -1)
    x = tower.ln_pre(torch.cat([first, x], 1))

    attention = attention_of(c.heads)
    pooled = torch.zeros(1, dtype=torch.long, device=x.device)
    for i in blocks[:-1]:
        x = tower.blocks[i](x, attention)
    pooled = tower.blocks[blocks[-1]](x, attention, pooled)
    return tower.read(pooled)[:, 0], x[:, 1:], rows


def new_tower(config: ImageConfig, seed: int) -> ImageTower:
    """A tower with random weights: attention begins as near-identity (Trockman and Kolter, 2023)."""
    torch.manual_seed(seed)
    tower = ImageTower(config)
    width, side = config.width, config.image_size // config.patch_size

    with torch.no_grad():
        for block in tower.blocks:
            assert isinstance(block, Block)
            q = 0.7 * torch.eye(width) + 0.3 * noise(width, width)
            k = q + 0.1 * noise(width, width)
            v = 0.3 * torch.eye(width) + 0.5 * noise(width, width)
            block.qkv.weight.copy_(torch.cat([q, k, v]))
            block.out.weight.copy_(-0.3 * torch.eye(width) + 0.5 * noise(width, width))
            block.fc_1.weight.copy_(0.5 * noise(config.mlp_width, width))
            block.fc_2.weight.copy_(0.5 * noise(width, config.mlp_width))
            for layer in (block.qkv, block.out, block.fc_1, block.fc_2):
                layer.bias.zero_()
        assert tower.class_token is not None
        assert isinstance(tower.projection, nn.Linear)
        tower.positions[1:] = 0.5 * waves(side, width)
        tower.positions[0].zero_()
        tower.class_token.copy_(0.5 * torch.randn(width))
        nn.init.normal_(tower.patches.weight, std=(3 * config.patch_size**2) ** -0.5)
        tower.projection.weight.copy_(noise(config.embed_dim, width))
    return tower


def waves(side: int, width: int) -> Tensor:
    """Sines and cosines of the places on a grid: [side², width]."""
    frequency = 1 / 100 ** (torch.arange(width // 4) / (width // 4))
    place = torch.arange(side)[:, None] * 8 / side * frequency
    wave = torch.cat([place.sin(), place.cos()], -1)  # [side, width/2]
    return torch.cat([wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)], -1).reshape(side**2, width)


def grow(tower: ImageTower, before: list[int], after: list[int]) -> None:
    """Start the blocks that join: weights of the one before, and nothing added yet."""
    for i in after:
        if i not in before:
            nearest = max((b for b in before if b < i), default=before[0])
            block = tower.blocks[i]
            assert isinstance(block, Block)
            block.load_state_dict(tower.blocks[nearest].state_dict())
            for layer in (block.out, block.fc_2):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)


def with_positions(state: dict[str, Tensor], config: ImageConfig) -> dict[str, Tensor]:
    """Weights for another image size: positions are interpolated."""
    positions = state["positions"]
    side, old = config.image_size // config.patch_size, math.isqrt(len(positions) - 1)
    grid = positions[1:].T.unflatten(1, (old, old))[None]
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)[0].flatten(1).T
    return state | {"positions": torch.cat([positions[:1], grid])}


class Stages:
    """Which blocks run at a step, and how many patches."""

    def __init__(self, stages: list[dict[str, int]], layers: int) -> None:
        self.stages, self.layers = stages, layers
        self.total = sum(stage["steps"] for stage in stages)

    def _at(self, step: int) -> dict[str, int]:
        for stage in self.stages:
            if step < stage["steps"]:
                return stage
            step -= stage["steps"]
        return self.stages[-1]

    def blocks(self, step: int) -> list[int]:
        """Evenly spread, the last among them."""
        n = self._at(step)["layers"]
        return [(i + 1) * self.layers // n - 1 for i in range(n)]

    def keep(self, step: int) -> int:
        """Patches."""
        return self._at(step)["keep"]


def begin_from(backbone: Backbone, tower: ImageTower, names: Names, texts: list[str]) -> None:
    """Start where a trained backbone is: with its image tower, and with names where its text tower points."""
    tower.load_state_dict(backbone.image_tower.state_dict())
    written = [texts[row] for rows in names.parts.values() for row in rows]
    templated = [f"a photo of a {text}." for text in written]
    names.begin_from(F.normalize(backbone.encode_texts(written) + backbone.encode_texts(templated), dim=-1))
    with torch.no_grad():
        names.log_scale.fill_(math.log(backbone.logit_scale))


@torch.no_grad()
def validate(
    training: Training, blocks: list[int], pictures: Pictures, photographs: Photographs | None, device: torch.device
) -> dict[str, float]:
    """Accuracy in per cent: among all emoji captions, groups, classes on the drawings that validate; among all kinds
    on one photograph in five of Tiny-ImageNet's val part; there also the mean cosine with what the classifier sees.
    """
    tower, names = training.low, training.rest
    assert isinstance(tower, ImageTower)
    assert isinstance(names, Names)
    tower.load_state_dict(training.tower.state_dict())
    directions = names()
    found = {"captions": 0, "groups": 0, "classes": 0}
    n = dict.fromkeys(found, 0)
    emoji = int((names.group >= 0).sum())  # emoji come first
    for rows in torch.arange(len(pictures.rows)).split(256):
        images = plain(pictures.read(rows).to(device), tower.config.image_size)
        features = encode(tower, images, blocks, None)[0].float()
        captions = pictures.captions[rows].to(device)
        labels = {"captions": captions, "groups": names.group[captions], "classes": names.class_[captions]}
        for kind, label in labels.items():
            answer = (features @ directions[kind][: emoji if kind == "captions" else None].T).argmax(1)
            found[kind] += int(((answer == label) & (label >= 0)).sum())
            n[kind] += int((label >= 0).sum())
    if photographs is not None:
        for rows in torch.arange(0, photographs.size, 5).split(256):
            images = plain_photo(photographs.read(rows).to(device), tower.config.image_size)
            features = F.normalize(encode(tower, images, blocks, None)[0].float(), dim=-1)
            answer = (features @ directions["kinds"].T).argmax(1).cpu()
            alike = F.cosine_similarity(names.seen(features).cpu(), photographs.seen(rows).mean((2, 3)), dim=-1)
            for kind, right in (("kinds", answer == photographs.labels[rows]), ("seen", alike)):
                found[kind] = found.get(kind, 0) + right.sum().item()
                n[kind] = n.get(kind, 0) + len(rows)
    return {kind: round(100 * found[kind] / max(1, n[kind]), 1) for kind in found}


def main() -> None:
    """Train, validate, save."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("settings", type=Path, help="a file such as tools/mini/photos.yaml")
    parser.add_argument("--data", type=Path, required=True, help="folder that data.py and embed.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the state")
    parser.add_argument("--weights", type=Path, help="image.safetensors to begin with, of any image size")
    parser.add_argument("--names", type=Path, help="names.safetensors of a text tower: point where it does")
    parser.add_argument("--begin", help="backbone to begin with, as for --backbone of vlprompt")
    parser.add_argument("--save-every", type=int, default=250, help="steps")
    options = parser.parse_args()
    settings = yaml.safe_load(options.settings.read_text(encoding="utf-8"))
    rank, world, device = processes()

    config = ImageConfig(**settings["image"])
    tower = new_tower(config, settings["seed"]).to(device)
    names = Names(options.data, config.embed_dim, config.width).to(device)
    if options.weights:
        start = load_file(options.weights)
        tower.load_state_dict(with_positions(part(start, "tower"), config))
        names.load_state_dict(part(start, "rest"))
    if options.begin:
        texts = json.loads((options.data / "texts.json").read_text(encoding="utf-8"))
        begin_from(load_backbone(options.begin), tower, names, texts)
    if options.names:
        names.fix({kind: directions.to(device) for kind, directions in load_file(options.names).items()})
    stages = Stages(settings["stages"], config.layers)
    training = Training(tower, names, settings, stages.total, decayed="shift")
    share = settings.get("photographs", 0)
    photographs = held_out_photographs = None
    if share:
        kinds, _ = listed_kinds(options.data)
        of_kinds = [kind["at"] for kind in kinds], [kind["id"] for kind in kinds]
        photographs = Photographs(options.data, *of_kinds)
        held_out_photographs = Photographs(options.data, *of_kinds, validation=True)
    pictures = Pictures(options.data, settings["render"])
    held_out = Pictures(options.data, settings["render"], validation=True)
    captions = json.loads((options.data / "captions.json").read_text(encoding="utf-8"))
    sided = {"left", "right", "leftwards", "rightwards"}
    mirror = torch.tensor([not sided & set(re.split(r"\W", caption["text"].lower())) for caption in captions])

    def batch(step: int) -> Callable[[ImageTower], Tensor]:
        blocks = stages.blocks(step)
        if step and stages.blocks(step - 1) != blocks:
            grow(tower, stages.blocks(step - 1), blocks)
        generator = torch.Generator().manual_seed((settings["seed"] * 1_000_003 + step) * 64 + rank)
        size = settings["batch"] // world
        photos = round(share * size)
        index = pictures.draw(size - photos, generator)
        shown = pictures.captions[index]
        random = torch.Generator(device).manual_seed(generator.initial_seed())
        rgba, mono = pictures.read(index).to(device), pictures.mono[index].to(device)
        images = view(rgba, mono, mirror[shown].to(device), config.image_size, random)
        chances = seen = torch.zeros(0)
        if photographs is not None:
            drawn = photographs.draw(photos, generator)
            read, seen = photographs.read(drawn).to(device), photographs.seen(drawn).to(device)
            read, seen = photo_view(read, seen, config.image_size, config.image_size // config.patch_size, random)
            images, chances = torch.cat([images, read]), photographs.chances(drawn).to(device)

        others = names.draw_others(generator)

        def loss_of(low: ImageTower) -> Tensor:
            features, tokens, rows = encode(low, images, blocks, stages.keep(step), random)
            features, n = F.normalize(features.float(), dim=-1), len(shown)
            loss = names.of_drawings(features[:n], shown.to(device), others) * ((size - photos) / size)
            if photos:
                of_photos = names.of_photographs(features[n:], chances, others)
                of_photos = of_photos + names.of_seen(features[n:], tokens[n:], rows[n:], seen)
                loss = loss + of_photos * (photos / size)
            return loss

        return loss_of

    def found() -> dict[str, float]:
        return validate(training, stages.blocks(training.step - 1), held_out, held_out_photographs, device)

    training.run(batch, options.out / STATE, options.save_every, settings["batch"], found, first=rank == 0)


if __name__ == "__main__":
    main()
