"""Optimisers and the official learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from vlprompt.training.config import OptimConfig


def learning_rate(epoch: int, epochs: int, config: OptimConfig) -> float:
    """Rate of ``epoch`` (from 0): constant while warming up, then ½·lr·(1 + cos(π·(epoch − warm-up)/epochs)).

    The cosine is that of the official code: it starts behind the warm-up but spans all epochs, so the last rate
    is a little above zero.
    """
    if epoch < config.warmup_epochs:
        return config.warmup_lr
    return 0.5 * config.lr * (1 + math.cos(math.pi * (epoch - config.warmup_epochs) / epochs))


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW."""
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
