"""Patch-wise RandAugment (after Cubuk et al., 2020): each patch of a picture is changed on its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Operation = Callable[[Image.Image, float], Image.Image]

OPERATIONS: tuple[Operation, ...] = (
    lambda image, factor: image,
    lambda image, factor: ImageOps.autocontrast(image),
    lambda image, factor: ImageOps.equalize(image),
    lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
)
"""Those that leave every pixel in its place; the first changes nothing."""

STRENGTH = 0.9 / 30
"""What one step of magnitude adds to, or takes from, an enhancement factor of 1 (torchvision's scale of 30 steps)."""


def augment_patches(
    image: Image.Image, patch_size: int, rng: np.random.Generator, n: int = 2, magnitude: int = 7
) -> Image.Image:
    """An RGB image whose patches (``patch_size`` pixels a side) are each changed by ``n`` operations in turn.

    Operations and the signs of ``magnitude`` are drawn for every patch from ``rng``. The settings are DroPLe's.
    """
    changed = image.copy()
    boxes = [
        (left, top, min(left + patch_size, image.width), min(top + patch_size, image.height))
        for top in range(0, image.height, patch_size)
        for left in range(0, image.width, patch_size)
    ]
    chosen = rng.integers(len(OPERATIONS), size=(len(boxes), n)).tolist()
    factors = (1 + STRENGTH * magnitude * rng.choice([-1, 1], size=(len(boxes), n))).tolist()
    for box, numbers, strengths in zip(boxes, chosen, factors, strict=True):
        if any(numbers):
            patch = image.crop(box)
            for number, factor in zip(numbers, strengths, strict=True):
                patch = OPERATIONS[number](patch, factor)
            changed.paste(patch, box)
    return changed
