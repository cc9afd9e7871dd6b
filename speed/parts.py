"""Where a step's time goes: each tower forwards and backwards, the optimiser, and the machine's own speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import linear

from vlprompt.backbones.attention import padding_that_pays
from vlprompt.backbones.packing import PackedText
from vlprompt.backbones.towers import ImageConfig, ImageTower, Prompts, TextConfig, TextTower
from vlprompt.training.loop import Training

GEMM_ROWS = 8192  # more make no matrix product faster


@dataclass
class Clock:
    """Seconds of wall time, or with ``cpu`` of this process's computing, which other processes do not slow down."""

    device: torch.device
    cpu: bool = False

    def __call__(self) -> float:
        """Now, when all work given to the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.cpu else time.perf_counter()

    def seconds(self, work: Callable[[], Any]) -> float:
        """What some work takes."""
        began = self()
        work()
        return self() - began


@dataclass
class Parts:
    """Seconds and floating-point operations of one step's parts.

    A tower's backward pass begins when the gradient of its output is known, and ends when those of its learned tokens
    are: autograd runs a tower's nodes without others between them, since they were made so.
    """

    clock: Clock
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("image", "text", "optimiser"), 0.0))
    flops: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("image", "text"), 0.0))
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("image", "text"), 0))
    """Tokens that a tower computes at once, at most."""

    @contextmanager
    def watching(self, job: Training, pooled_only: bool) -> Iterator[None]:
        """Within it, towers and optimiser of ``job`` are timed; ``pooled_only`` says what the last block does."""
        backbone = job.method.backbone
        step = job.optimizer.step

        def optimise() -> None:
            self.seconds["optimiser"] += self.clock.seconds(step)

        with ExitStack() as stack:
            for name, tower in (("image", backbone.image_tower), ("text", backbone.text_tower)):
                stack.enter_context(patch.object(tower, "forward", self._timed(name, tower, pooled_only)))
            stack.enter_context(patch.object(job.optimizer, "step", optimise))
            yield

    def _timed(self, name: str, tower: ImageTower | TextTower, pooled_only: bool) -> Callable[..., Tensor]:
        own: Callable[..., Tensor] = type(tower).forward

        def forward(x: Any, prompts: Prompts | None = None, *more: Any) -> Tensor:
            began = self.clock()
            if prompts is not None:
                prompts = replace(prompts, layers=[x if x is None else x.view_as(x) for x in prompts.layers])
            out = own(tower, x, prompts, *more)
            self.seconds[name] += self.clock() - began
            if out.requires_grad:
                assert prompts is not None
                self._watch_backward(name, out, prompts.tokens)
            shape_of: Callable[..., Shape] = text_shape if isinstance(x, PackedText) else image_shape
            shape = shape_of(tower.config, x, prompts)
            self.rows[name] = max(self.rows[name], shape.tokens)
            self.flops[name] += tower_flops(tower.config, shape, pooled_only, out.requires_grad)
            return out

        return forward

    def _watch_backward(self, name: str, out: Tensor, learned: Sequence[Tensor]) -> None:
        last = 0.0

        def begin(_: Tensor) -> None:
            nonlocal last
            last = self.clock()

        def lap(_: Tensor) -> None:
            nonlocal last
            now = self.clock()
            self.seconds[name] += now - last
            last = now

        out.register_hook(begin)
        for tensor in learned:
            if tensor.requires_grad:
                tensor.register_hook(lap)


@dataclass(frozen=True)
class Shape:
    """How many tokens a tower computes, pairs of tokens its attention compares, and outputs it pools."""

    tokens: int
    pairs: int
    pooled: int
    pooled_pairs: int
    patches: int = 0


def image_shape(config: Any, images: Tensor, prompts: Prompts | None) -> Shape:
    """Of images [B, 3, S, S]."""
    patches = (config.image_size // config.patch_size) ** 2
    n, batch = patches + 1 + (len(prompts.tokens[0]) if prompts else 0), len(images)
    return Shape(batch * n, batch * n * n, batch, batch * n, batch * patches)


def text_shape(config: Any, text: PackedText, prompts: Prompts | None) -> Shape:
    """Of packed texts, once for each image where prompts depend on it."""
    batch = max([1, *(len(layer) for layer in prompts.tokens if layer.ndim == 4)] if prompts else [1])
    groups = [(g.count, g.length) for g in text.groups]
    if padding_that_pays(text, batch, config.width, text.tokens.device):
        groups = [(len(text.order), groups[-1][1])]
    pairs = text.prefix**2 + sum(count * length * (text.prefix + length) for count, length in groups)
    pooled_pairs = sum(count * (text.prefix + length) for count, length in groups)
    counts = (len(text.tokens), pairs, len(text.pooled), pooled_pairs)
    return Shape(*(batch * count for count in counts))


def tower_flops(c: ImageConfig | TextConfig, n: Shape, pooled_only: bool, backward: bool) -> float:
    """Operations (two for a multiplication and an addition) of one pass; backwards, towards tokens and not weights."""
    d, f = c.width, c.mlp_width
    last, last_pairs = (n.pooled, n.pooled_pairs) if pooled_only else (n.tokens, n.pairs)
    queries, pairs = (c.layers - 1) * n.tokens + last, (c.layers - 1) * n.pairs + last_pairs
    linears = 2 * queries * (2 * d * d + 2 * d * f) + 2 * c.layers * n.tokens * 2 * d * d
    patches = 2 * n.patches * 3 * c.patch_size**2 * d if isinstance(c, ImageConfig) else 0
    return linears * (1 + backward) + 4 * pairs * d * (1 + 2 * backward) + patches


def matmul_rate(c: ImageConfig | TextConfig, rows: int, clock: Clock, dtype: torch.dtype) -> float:
    """Operations a second of the tower's largest product, [rows, D] × [D, MLP width]."""
    rows = min(rows, GEMM_ROWS)
    x = torch.ones(rows, c.width, device=clock.device, dtype=dtype)
    weight = torch.ones(c.mlp_width, c.width, device=clock.device, dtype=dtype)
    linear(x, weight)
    operations = 2 * rows * c.width * c.mlp_width
    times = max(1, round(2e9 / operations))
    return times * operations / clock.seconds(lambda: [linear(x, weight) for _ in range(times)])
