"""Optimisers and the official learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlprompt.config.schema import OptimConfig
from vlprompt.methods import Method

BETA1, BETA2 = 0.9, 0.999
"""How much of the running means of gradients and of their squares each step of Adam keeps."""


def learning_rate(epoch: float, epochs: int, config: OptimConfig, steps: int | None = None) -> float:
    """Rate after ``epoch`` epochs (3.5: halfway through the fourth): constant while warming up, then a cosine.

    With w whole epochs of warm-up, ½·lr·(1 + cos(π·(⌊epoch⌋ − w)/epochs)), and never below min_lr. The cosine is that
    of the official code: it starts after the warm-up but spans all epochs, so the last rate is a little above 0. With
    ``steps`` an epoch, a warm-up of a part of an epoch is rounded down to whole steps. With ``every_step``, the
    cosine does not wait for the end of an epoch.
    """
    warming = epoch < config.warmup_epochs
    if steps is not None:  # 0.29 · 100 is 28.999999999999996
        warming = round(epoch * steps) < math.floor(config.warmup_epochs * steps + 1e-9)
    if warming:
        return config.warmup_lr
    whole = (lambda x: x) if config.every_step else math.floor
    done = whole(epoch) - whole(config.warmup_epochs)
    cosine = math.cos(math.pi * done / max(epochs, config.cosine_epochs))
    return max(config.min_lr, 0.5 * config.lr * (1 + cosine))


class Optimizer:
    """SGD with momentum, Adam or AdamW: what ``torch.optim`` computes, to the last bit, and its names of the state.

    Not ``torch.optim`` itself, whose first object imports PyTorch's compiler: that takes as long as importing PyTorch.
    ``param_groups`` hold ``params``, ``lr`` and what :func:`build_optimizer` says of them. A parameter without a
    gradient stays as it is.
    """

    def __init__(self, param_groups: list[dict[str, Any]], config: OptimConfig) -> None:
        self.param_groups, self.config = param_groups, config
        self._state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Move all parameters along their ``grad``, in place."""
        for group in self.param_groups:
            if params := [p for p in group["params"] if p.grad is not None]:
                update = self._sgd if self.config.name == "sgd" else self._adam
                update(params, [p.grad for p in params], group["lr"])

    def _sgd(self, params: list[Tensor], gradients: list[Tensor], lr: float) -> None:
        decay, momentum = self.config.weight_decay, self.config.momentum
        if decay:
            gradients = list(torch._foreach_add(gradients, params, alpha=decay))
        if momentum:
            new = {p: g for p, g in zip(params, gradients, strict=True) if p not in self._state}
            buffers = [new[p].clone() if p in new else self._state[p]["momentum_buffer"] for p in params]
            if begun := [(b, g) for p, b, g in zip(params, buffers, gradients, strict=True) if p not in new]:
                old, more = map(list, zip(*begun, strict=True))
                torch._foreach_mul_(old, momentum)
                torch._foreach_add_(old, more)
            self._state |= {p: {"momentum_buffer": b} for p, b in zip(params, buffers, strict=True)}
            nesterov = self.config.nesterov
            gradients = list(torch._foreach_add(gradients, buffers, alpha=momentum)) if nesterov else buffers
        torch._foreach_add_(params, gradients, alpha=-lr)

    def _adam(self, params: list[Tensor], gradients: list[Tensor], lr: float) -> None:
        decay = self.config.weight_decay
        for p in params:
            if p not in self._state:
                zeros = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
                self._state[p] = {"step": torch.zeros(()), **zeros}
        steps, means, squares = ([self._state[p][k] for p in params] for k in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_add_(steps, 1)
        if decay and self.config.name == "adamw":
            torch._foreach_mul_(params, 1 - lr * decay)
        elif decay:
            gradients = list(torch._foreach_add(gradients, params, alpha=decay))
        torch._foreach_lerp_(means, gradients, 1 - BETA1)
        torch._foreach_mul_(squares, BETA2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - BETA2)
        done = [step.item() for step in steps]
        divisors = list(torch._foreach_sqrt(squares))
        torch._foreach_div_(divisors, [(1 - BETA2**t) ** 0.5 for t in done])
        torch._foreach_add_(divisors, self.config.eps)
        torch._foreach_addcdiv_(params, means, divisors, [-lr / (1 - BETA1**t) for t in done])

    def tensors(self) -> dict[str, Tensor]:
        """The state, as PARAMETER.KEY: parameters are numbered through all groups."""
        return {f"{i}.{k}": t for i, p in self._numbered().items() for k, t in self._state.get(p, {}).items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the state of an earlier one of the same parameters; raises KeyError for others."""
        numbered = self._numbered()
        self._state = {}
        for name, tensor in tensors.items():
            i, _, key = name.partition(".")
            p = numbered[int(i)]
            self._state.setdefault(p, {})[key] = tensor if key == "step" else tensor.to(p)

    def _numbered(self) -> dict[int, Tensor]:
        return dict(enumerate(p for group in self.param_groups for p in group["params"]))


def build_optimizer(method: Method, config: OptimConfig) -> Optimizer:
    """The configured optimiser, over groups of parameters with their ``share`` of the learning rate.

    ``floor`` is the share of ``min_lr`` that a group's rate does not fall below.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        own = _by_name(method.rates, name, 1.0), _by_name(method.floors, name, 0.0)
        groups.setdefault(own, []).append(parameter)
    return Optimizer(
        [{"params": group, "lr": config.lr, "share": share, "floor": f} for (share, f), group in groups.items()],
        config,
    )


def _by_name(values: Mapping[str, float], name: str, default: float) -> float:
    return next((value for start, value in values.items() if name.startswith(start)), default)
