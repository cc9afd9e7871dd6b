"""How much packing saves: class features of 100 names, forwards and backwards, packed and in the plain way.

    python tools/bench_text.py [BACKBONE] [--classes 100] [--n-ctx 16] [--depth 1] [--rounds 7]

Plain is what the official implementations do: every text padded to the context length, every token through every
block. Both run in turn in one process on the same prompts; the figure is the median ratio of times.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from vlprompt.backbones.backbone import Backbone, unit
from vlprompt.backbones.load import load_backbone
from vlprompt.backbones.packing import pack, packed_attention
from vlprompt.backbones.towers import _per_row, inject
from vlprompt.prompting.text import TextContext, class_tokens, encode_classes

WORDS = ("golden retriever", "sea horse", "water lily", "anchor", "grand piano", "inline skate", "Boeing 737", "tree")


def names(n: int) -> list[str]:
    """Names of one to three words."""
    return [" ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(1 + i % 3)) for i in range(n)]


def plain(backbone: Backbone, context: TextContext, class_names: list[str]) -> Tensor:
    """The official way: [C, context length] tokens, the end token picked from the last block's output."""
    tower = backbone.text_tower
    texts = class_tokens(backbone, class_names, context.n_ctx, context.words, context.position)
    padded = [ids + [0] * (backbone.context_length - len(ids)) for ids in texts.ids]
    full = pack(padded, texts.slots, share=False)  # no shared prefix, and padding to the end: every token is computed
    x = (tower.token_embedding(full.tokens) + tower.positions[full.positions])[None]

    attention = packed_attention(full, tower.config.heads)
    for i, block in enumerate(tower.blocks):
        if i < len(context.prompts().layers):
            values = _per_row(context.prompts().layers[i], full.source)
            x = inject(x, full.slots, values + tower.positions[full.positions][full.slots] if i == 0 else values)
        x = block(x, attention)
    ends = torch.tensor([c * backbone.context_length + len(ids) - 1 for c, ids in enumerate(texts.ids)])
    return unit(tower.projection(tower.ln_final(x[0, ends])))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", nargs="?", default="mini")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--n-ctx", type=int, default=16)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    backbone = load_backbone(args.backbone)
    context = TextContext(backbone, args.n_ctx, depth=args.depth)
    class_names = names(args.classes)

    def packed() -> Tensor:
        return encode_classes(backbone.text_tower, context.prompts(), context.packed(backbone, class_names))

    ways = {"packed": packed, "plain": lambda: plain(backbone, context, class_names)}
    difference = (ways["packed"]() - ways["plain"]()).abs().max().item()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.rounds):
        for way, compute in ways.items():
            began = time.perf_counter()
            compute().sum().backward()
            seconds[way].append(time.perf_counter() - began)
    ratios = [b / a for a, b in zip(seconds["packed"], seconds["plain"], strict=True)]
    medians = {way: statistics.median(s) for way, s in seconds.items()}
    print(
        f"{args.classes} classes, n_ctx {args.n_ctx}, depth {args.depth}, context {backbone.context_length}:", end=" "
    )
    print(", ".join(f"{way} {1000 * s:.0f} ms" for way, s in medians.items()), end="; ")
    print(f"ratio {statistics.median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f}); differ by {difference:.1g}")


if __name__ == "__main__":
    main()
