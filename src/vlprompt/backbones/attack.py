"""Adversarial images: projected gradient descent in pixels (Madry et al., ICLR 2018), inside an L∞ ball."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlprompt.data.images import Preprocess
from vlprompt.errors import VlpromptError

LEVEL = 1 / 255
"""A step of an 8-bit pixel, in which attacks are measured."""


@dataclass(frozen=True)
class Pixels:
    """Between preprocessed images and pixels in 0..1, [B, 3, S, S] both."""

    preprocess: Preprocess

    def of(self, images: Tensor) -> Tensor:
        """Pixels of preprocessed images."""
        return images * self._row(self.preprocess.std, images) + self._row(self.preprocess.mean, images)

    def read(self, pixels: Tensor) -> Tensor:
        """What the backbone reads of pixels."""
        return (pixels - self._row(self.preprocess.mean, pixels)) / self._row(self.preprocess.std, pixels)

    @staticmethod
    def _row(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


def pgd(
    pixels: Tensor, loss: Callable[[Tensor], Tensor], delta: Tensor, eps: float, alpha: float, steps: int
) -> Tensor:
    """What to add to ``pixels`` [B, 3, S, S] in 0..1 so that a scalar ``loss`` of them rises: [B, 3, S, S].

    From ``delta``, ``steps`` steps of ``alpha`` along the gradient's sign, none further than ``eps`` or out of 0..1.
    Raises VlpromptError where the loss does not depend on the pixels.
    """

    def inside(delta: Tensor) -> Tensor:
        return (pixels + delta.clamp(-eps, eps)).clamp(0, 1) - pixels

    delta = inside(delta).detach()
    for _ in range(steps):
        delta.requires_grad_()
        with torch.enable_grad():
            value = loss(pixels + delta)
        if not value.requires_grad:
            raise VlpromptError("an attack needs a method whose logits have a gradient by the image's pixels")
        (gradient,) = torch.autograd.grad(value, delta)
        delta = inside(delta.detach() + alpha * gradient.sign())
    return delta
