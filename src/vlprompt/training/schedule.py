"""Optimisers and the official learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from vlprompt.config.schema import OptimConfig
from vlprompt.methods import Method


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


def build_optimizer(method: Method, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum, Adam or AdamW, over groups of parameters with their ``share`` of the learning rate.

    ``floor`` is the share of ``min_lr`` that a group's rate does not fall below.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        own = _by_name(method.rates, name, 1.0), _by_name(method.floors, name, 0.0)
        groups.setdefault(own, []).append(parameter)
    parameters = [{"params": group, "share": share, "floor": floor} for (share, floor), group in groups.items()]
    if config.name != "sgd":
        adam = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
        return adam(parameters, lr=config.lr, eps=config.eps, weight_decay=config.weight_decay)
    decay, nesterov = config.weight_decay, config.nesterov
    return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=decay, nesterov=nesterov)


def _by_name(values: Mapping[str, float], name: str, default: float) -> float:
    return next((value for start, value in values.items() if name.startswith(start)), default)
