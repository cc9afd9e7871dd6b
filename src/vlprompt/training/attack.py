"""Robust accuracy: of any method, on images that are attacked on their pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from inspect import unwrap

import torch
from torch import Tensor

from vlprompt.backbones.attack import LEVEL, Pixels, pgd
from vlprompt.errors import ConfigError, unknown
from vlprompt.methods import Method
from vlprompt.training.evaluate import EvaluationImages

ATTACKS = ("pgd",)
STEPS = 100


@dataclass(frozen=True)
class Attack:
    """Projected gradient descent on the cross-entropy, from a random start, inside an L∞ ball."""

    name: str = "pgd"
    eps: float = LEVEL
    """How far a pixel of 0 to 1 may change."""
    steps: int = STEPS
    """Of a level of 255 each, or of ``eps`` if that is less."""

    def __str__(self) -> str:
        short = Fraction(self.eps).limit_denominator(10_000)
        return f"{self.name} within {short if float(short) == self.eps else self.eps}, {self.steps} steps"


def find_attack(name: str | None, eps: str | None = None, steps: int | None = None) -> Attack | None:
    """The attack that is asked for; None if none is. ``eps`` is a number or a fraction, ``1/255`` if not given.

    Raises ConfigError for an attack that there is not, values out of range, and values of no attack.
    """
    if name is None:
        if given := [f"--{key}" for key, value in (("eps", eps), ("attack-steps", steps)) if value is not None]:
            raise ConfigError(f"{' and '.join(given)} without --attack (allowed with it: {', '.join(ATTACKS)})")
        return None
    if name not in ATTACKS:
        raise ConfigError(unknown("attack", name, ATTACKS))
    try:
        size = Fraction(eps.strip()) if eps is not None else Fraction(1, 255)
    except (ValueError, ZeroDivisionError):
        size = Fraction(0)
    if not 0 < size <= 1:
        raise ConfigError(f"--eps {eps} (allowed: a number above 0, at most 1, as 0.01 or 1/255)")
    if steps is not None and steps < 1:
        raise ConfigError(f"--attack-steps {steps} (allowed: 1 or more)")
    return Attack(name, float(size), steps or STEPS)


class AttackedImages(EvaluationImages):
    """The images of an evaluation, each changed until the method takes it for another class, if it can be.

    Images that are not told right as they are stay as they are: they count as wrong.
    """

    def __init__(self, images: EvaluationImages, attack: Attack, class_names: Sequence[str]) -> None:
        super().__init__(images.images, images.labels.tolist(), images.reader)
        self.attack, self.class_names = attack, tuple(class_names)

    def read_by(self, method: Method) -> Iterator[Tensor]:
        """Attacked views, a batch at a time, of methods too that read frozen features."""
        start = 0
        for i, x in enumerate(self.views(method)):
            labels = self.labels[start : start + len(x)]
            start += len(x)
            yield attacked(method, x, labels, self.class_names, self.attack, seed=i)


def attacked(
    method: Method, images: Tensor, labels: Tensor, class_names: Sequence[str], attack: Attack, seed: int = 0
) -> Tensor:
    """Preprocessed images [B, 3, S, S] under the attack; raises VlpromptError where they have no gradient."""
    device, names = method.backbone.device, tuple(class_names)
    images, labels = images.to(device), labels.to(device)
    right = method.predict(images, names).argmax(-1) == labels  # keeps the class features, too
    if not right.any() or len(names) == 1:
        return images
    pixels = Pixels(method.backbone.preprocess)
    x, y = pixels.of(images[right]), labels[right]
    with_gradient = unwrap(type(method).predict)  # what a method does to images or logits is attacked as well

    def loss(changed: Tensor) -> Tensor:
        return margins(with_gradient(method, pixels.read(changed), names), y).sum()

    generator = torch.Generator().manual_seed(seed)
    noise = (2 * torch.rand(x.shape, generator=generator) - 1).to(x)
    delta = pgd(x, loss, attack.eps * noise, attack.eps, min(attack.eps, LEVEL), attack.steps)
    changed = images.clone()
    changed[right] = pixels.read(x + delta)
    return changed


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """How far the other classes of logits [B, C] are above the label's, log Σ exp z_k − z_y over k ≠ y: [B].

    The cross-entropy is softplus of it, so that each image's gradient points the same way. But this one stays where the
    cross-entropy's is rounded to 0: with logits some hundred apart, as of ``gda``, a model would look robust (gradient
    masking, Carlini and Wagner, S&P 2017).
    """
    own = labels[:, None]
    others = logits.scatter(1, own, float("-inf")).logsumexp(-1)
    return others - logits.gather(1, own)[:, 0]
