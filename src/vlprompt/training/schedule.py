"""Optimisers and the official learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from vlprompt.config.schema import OptimConfig
from vlprompt.methods import Method


def learning_rate(epoch: float, epochs: int, config: OptimConfig) -> float:
    """Rate after ``epoch`` epochs (3.5: halfway through the fourth): constant while warming up, then a cosine.

    With w whole epochs of warm-up, min_lr + ½·(lr − min_lr)·(1 + cos(π·(⌊epoch⌋ − w)/epochs)). The cosine is that
    of the official code: it starts after the warm-up but spans all epochs, so the last rate is a little above the
    floor.
    """
    if epoch < config.warmup_epochs:
        return config.warmup_lr
    done = math.floor(epoch) - math.floor(config.warmup_epochs)
    cosine = math.cos(math.pi * done / max(epochs, config.cosine_epochs))
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + cosine)


def build_optimizer(method: Method, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum, Adam or AdamW, over groups of parameters with their ``share`` of the learning rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        share = next((share for start, share in method.rates.items() if name.startswith(start)), 1.0)
        groups.setdefault(share, []).append(parameter)
    parameters = [{"params": group, "share": share} for share, group in groups.items()]
    if config.name in ("adam", "adamw"):
        adam = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
        return adam(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
