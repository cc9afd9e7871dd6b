"""Class features alone, forwards and backwards: packed, and the plain way.

Both run in turn in one process on the same prompts; the figure is the median ratio of times.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from speed.inputs import load, machine, names
from speed.parts import Clock
from speed.plain import plain
from speed.step import hardware
from vlprompt.prompting.text import TextContext, encode_classes


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("backbone", nargs="?", default="mini")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--n-ctx", type=int, default=16)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    hardware(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure."""
    backbone = load(args.backbone, args.device, args.precision)
    clock, class_names = Clock(backbone.device, args.clock == "cpu"), names(args.classes)
    ways: dict[str, Callable[[], AbstractContextManager]]
    ways = {"packed": nullcontext, "plain": lambda: plain(backbone)}
    contexts = {}
    for way in ways:  # each keeps the texts that it packs
        torch.manual_seed(1)
        contexts[way] = TextContext(backbone, args.n_ctx, depth=args.depth).to(backbone.device)

    def features(way: str) -> Tensor:
        with ways[way]():
            context = contexts[way]
            return encode_classes(backbone.text_tower, context.prompts(), context.packed(backbone, class_names))

    def step(way: str) -> None:
        out = features(way)
        with ways[way]():
            out.sum().backward()

    difference = (features("packed") - features("plain")).abs().max().item()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.rounds):
        for way in ways:
            seconds[way].append(clock.seconds(lambda way=way: step(way)))  # type: ignore[misc]
    ratios = [b / a for a, b in zip(seconds["packed"], seconds["plain"], strict=True)]
    row = {
        "backbone": args.backbone,
        "classes": args.classes,
        "n_ctx": args.n_ctx,
        "depth": args.depth,
        "context_length": backbone.context_length,
        "median_s": {way: statistics.median(s) for way, s in seconds.items()},
        "ratio": {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)]},
        "difference": difference,
        "seconds": seconds,
    }
    return {"environment": machine(backbone), "rows": [row]}


def table(result: dict[str, Any]) -> str:
    """A line for each row."""
    lines = [
        "| backbone | context length | classes | prompts | plain, ms | packed, ms | plain ÷ packed | differ by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        low, high = r["ratio"]["range"]
        lines.append(
            f"| {r['backbone']} | {r['context_length']} | {r['classes']} | {r['n_ctx']} tokens, depth {r['depth']} | "
            f"{1000 * r['median_s']['plain']:.0f} | {1000 * r['median_s']['packed']:.0f} | "
            f"{r['ratio']['median']:.1f} ({low:.1f}–{high:.1f}) | {r['difference']:.1g} |"
        )
    return "\n".join(lines)
