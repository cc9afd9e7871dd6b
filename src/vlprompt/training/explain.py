"""Which patches of an image speak for a class, under any method whose logits have a gradient by the image.

Transformers: gradient-weighted attention relevance (Chefer et al., ICCV 2021). In each block, with A its attention and
∇A the gradient of the class's logit, R ← R + mean over heads of (∇A ⊙ A)₊ · R. ResNets: gradient × activation of the
last feature map, summed over channels. Shapes: N tokens of one image, P of them patches, K rows that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import unwrap
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlprompt.artefact.calibration import Calibration, probabilities
from vlprompt.backbones.attention import observed, plain_attention
from vlprompt.backbones.towers import AttentionPool, ImageTower
from vlprompt.errors import ConfigError
from vlprompt.methods import Method

Hooks = list[tuple[Callable[..., Any], Callable[..., Any]]]
"""What registers a hook, and the hook."""


@dataclass(frozen=True)
class Relevance:
    """How much each patch of an image speaks for a class."""

    map: Tensor
    """[grid, grid] on the CPU, 0 or more, row by row; sums to 1, or to 0 where nothing speaks for the class."""
    name: str
    """The class."""
    probability: float
    """What the model gives it, calibrated if a calibration was given."""
    index: int
    """Which of the class names it is."""


@torch.enable_grad()
def relevance(
    method: Method,
    pixels: Tensor,
    class_names: Sequence[str] | None = None,
    class_index: int | None = None,
    calibration: Calibration | None = None,
) -> Relevance:
    """What the patches of a preprocessed image [3, S, S] say for a class; for the most probable one if none is given.

    ``class_names`` are the method's own if not given. Raises ConfigError for an index that no class has, and for a
    method whose logits have no gradient by the image, or that does not run the image tower once.
    """
    names = method.class_names if class_names is None else tuple(class_names)
    if class_index is not None and not 0 <= class_index < len(names):
        raise ConfigError(f"class_index = {class_index} (allowed: 0 to {len(names) - 1}, for {len(names)} classes)")
    images = pixels[None].detach().to(method.backbone.device)
    logits = method.predict(images, names).cpu()  # the method keeps the class features, too: below they have no graph
    p = probabilities(calibration, method, logits, names)[0][0]
    c = int(p.argmax()) if class_index is None else class_index
    column, scored = c, names
    if not method.takes_new_classes:  # names may be some of its own
        column, scored = method.own_classes(names)[c], method.class_names
    images.requires_grad_()
    predict, tower = unwrap(type(method).predict), method.backbone.image_tower

    def logit() -> Tensor:
        value = predict(method, images, scored)[0, column]
        if not value.requires_grad:
            raise ConfigError(
                f"cannot explain method '{method.name}': its logits have no gradient by the image's pixels"
            )
        return value

    of_tower = _of_blocks if hasattr(tower, "blocks") else _of_feature_map
    side = tower.config.image_size // tower.config.patch_size
    found = of_tower(method, tower, logit).detach().float().cpu().reshape(side, side)
    return Relevance(found / (found.sum() or 1), names[c], p[c].item(), c)


def _of_blocks(method: Method, tower: ImageTower, logit: Callable[[], Tensor]) -> Tensor:
    """[P]"""
    maps, inputs, outputs, asked = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor | None]()
    pooled: list[Tensor] = []

    def before(block: nn.Module, given: tuple) -> tuple:
        x, attention, rows = (*given, None)[:3]
        inputs.append(x)
        asked.append(rows)
        return x, observed(attention, tower.config.heads, maps), rows

    def after(block: nn.Module, given: tuple, output: Tensor) -> None:
        outputs.append(output)

    def pool(layer: nn.Module, given: tuple, output: tuple) -> tuple:
        return pool_observed(layer, given[0], given[1], pooled), None

    hooks: Hooks = [(block.register_forward_pre_hook, before) for block in tower.blocks]
    hooks += [(block.register_forward_hook, after) for block in tower.blocks]
    if isinstance(tower.head, AttentionPool):
        hooks.append((tower.head.attention.register_forward_hook, pool))
    with _hooked(hooks):
        value = logit()
    if len(maps) != len(tower.blocks):
        times = len(maps) / len(tower.blocks)
        raise _not_once(method, times)
    *slopes, read = torch.autograd.grad(
        value, [*maps, *pooled, outputs[-1]], retain_graph=True, materialize_grads=True, allow_unused=True
    )
    weights = [(a * slope).clamp(min=0)[0].mean(0) for a, slope in zip([*maps, *pooled], slopes, strict=True)]  # [K, N]
    first, n = 0 if tower.class_token is None else 1, len(tower.positions)
    r = inputs[0].new_zeros(inputs[0].shape[1], n - first)  # [N, P]; a learned token stands for no patch
    r[first:n] = torch.eye(n - first, dtype=r.dtype, device=r.device)
    for i, (x, rows) in enumerate(zip(inputs, asked, strict=True)):
        if i:  # tokens may have joined or taken the place of others: they bring nothing of what came before
            (goes_on,) = torch.autograd.grad(x.sum(), outputs[i - 1], retain_graph=True, allow_unused=True)
            r = r * goes_on[0].ne(0).any(-1, keepdim=True)
            r = F.pad(r, (0, 0, 0, max(x.shape[1] - len(r), 0)))[: x.shape[1]]
        r = (r if rows is None else r[rows]) + weights[i] @ r
    if pooled:
        return (weights[-1] @ r)[0]
    # Which rows are read, and how much each counts: the class token alone, or more (MMRL's representation tokens).
    return read[0].norm(dim=-1) @ r


def pool_observed(layer: Any, query: Tensor, x: Tensor, maps: list[Tensor]) -> Tensor:
    """What a pooling head's attention gives for ``query`` [B, 1, D] and x [B, N, D]; leaves its map in ``maps``."""
    parts = zip((query, x, x), layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True)
    attend = observed(plain_attention(layer.num_heads), layer.num_heads, maps)
    return layer.out_proj(attend(*(F.linear(*part) for part in parts)))


def _of_feature_map(method: Method, tower: ImageTower, logit: Callable[[], Tensor]) -> Tensor:
    """[h, w]"""
    seen: list[Tensor] = []

    def after(layer: nn.Module, given: tuple, output: Tensor) -> None:
        seen.append(output)

    last = getattr(tower, f"layer{len(tower.config.stages)}")
    with _hooked([(last.register_forward_hook, after)]):
        value = logit()
    if len(seen) != 1:
        raise _not_once(method, len(seen))
    (slope,) = torch.autograd.grad(value, seen, materialize_grads=True, allow_unused=True)
    return (slope * seen[0]).sum(1)[0].clamp(min=0)


def _not_once(method: Method, times: float) -> ConfigError:
    return ConfigError(f"cannot explain method '{method.name}': it runs the image tower {times:g} times for an image")


@contextmanager
def _hooked(hooks: Hooks) -> Iterator[None]:
    """Hooks that see what this thread runs, and nothing of others that use the same tower (``vlprompt app``)."""
    own, handles = get_ident(), []

    def mine(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: hook(*given) if get_ident() == own else None

    try:
        for register, hook in hooks:
            handles.append(register(mine(hook)))
        yield
    finally:
        for handle in handles:
            handle.remove()
