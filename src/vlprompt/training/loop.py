"""The training loop: named loss terms in, tuned prompts out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vlprompt.data.views import TrainingViews
from vlprompt.errors import VlpromptError
from vlprompt.methods import Batch, Method
from vlprompt.training.config import OptimConfig
from vlprompt.training.schedule import build_optimizer, learning_rate


@dataclass(frozen=True)
class EpochLog:
    """What one epoch gave: the mean of each loss term, and the learning rate it ran at."""

    epoch: int
    lr: float
    losses: dict[str, float]


def fit(
    method: Method,
    views: TrainingViews,
    optim: OptimConfig,
    epochs: int,
    after_step: Callable[[], None] = lambda: None,
    after_epoch: Callable[[EpochLog], None] = lambda log: None,
) -> None:
    """Train a method's parameters for ``epochs`` passes over the views.

    ``after_step`` and ``after_epoch`` are told about progress; ``after_epoch`` sees the method as it would be
    saved then. Raises VlpromptError naming term, epoch and step if a loss is not finite.
    """
    device = method.backbone.device
    method.train()
    optimizer = build_optimizer(method.parameters(), optim)
    for epoch in range(epochs):
        lr = learning_rate(epoch, epochs, optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums: dict[str, float] = {}
        for step, (images, labels) in enumerate(views.epoch(epoch)):
            images, labels = images.to(device), labels.to(device)
            frozen = method.backbone.encode_images(images) if "frozen_image_features" in method.needs else None
            optimizer.zero_grad()
            losses = method.losses(Batch(images, labels, frozen))
            for term, value in losses.items():
                if not torch.isfinite(value):
                    raise VlpromptError(
                        f"training stopped: loss term '{term}' is {value.item()} in epoch {epoch + 1}, step {step + 1}"
                    )
                sums[term] = sums.get(term, 0.0) + value.item()
            method.backward(losses)
            optimizer.step()
            after_step()
        method.after_epoch(epoch, epochs)
        after_epoch(EpochLog(epoch, lr, {term: value / len(views) for term, value in sums.items()}))
    method.eval()
