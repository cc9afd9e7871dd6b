"""Patch-wise RandAugment (DroPLe's, after Cubuk et al., 2020): each patch of a picture is changed on its own.

All patches that draw the same operation are changed at once. Operations, order of arithmetic and roundings are those of
DroPLe's public code, odd as some are, so that the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Patches = NDArray[np.uint8]
"""[K, side, side, 3]"""
GREY = np.array([0.114, 0.587, 0.299])
"""Weights of a patch's red, green and blue: those of blue, green and red, which the public code gives to RGB."""
STRONGEST = 10
"""The magnitudes' scale."""


def _same(x: Patches, factor: float) -> Patches:
    return x


def _autocontrast(x: Patches, factor: float) -> Patches:
    """Each channel stretched to reach from 0 to 255, unless it has one level only."""
    channels = _channels(x)
    low, high = (level[:, None, None] for level in (channels.min(2), channels.max(2)))
    scale = np.where(high > low, 255 / np.maximum(high - low, 1), 1)
    return _bytes(x * scale - np.where(high > low, low, 0) * scale)


def _equalize(x: Patches, factor: float) -> Patches:
    """Pillow's rule for each channel: (step // 2 + pixels that are darker) // step, or nothing where the step is 0."""
    n, side = len(x), x.shape[1]
    channels = _channels(x).reshape(3 * n, -1)
    # All pixels but those of the brightest level: of 256 pixels it is 0 unless one alone is that bright.
    steps = (channels != channels.max(1, keepdims=True)).sum(1) // 255
    if len(which := steps.nonzero()[0]):
        step, levels = steps[which, None], channels[which] + 256 * np.arange(len(which))[:, None]
        histogram = np.bincount(levels.ravel(), minlength=256 * len(which)).reshape(-1, 256)
        table = (step // 2 + histogram.cumsum(1) - histogram) // step
        channels[which] = table.clip(0, 255).astype(np.uint8).ravel()[levels]
    return channels.reshape(n, 3, side, side).transpose(0, 2, 3, 1)


def _channels(x: Patches) -> NDArray[np.uint8]:
    """A copy, [K, 3, side · side]."""
    return x.reshape(len(x), -1, 3).transpose(0, 2, 1).copy()


def _brightness(x: Patches, factor: float) -> Patches:
    return _bytes(x * np.float32(factor))


def _contrast(x: Patches, factor: float) -> Patches:
    mean = (x.mean((1, 2)) * GREY).sum(-1)[:, None, None, None]
    return _bytes((x - mean) * factor + mean)


def _color(x: Patches, factor: float) -> Patches:
    grey = GREY[:, None]
    return _bytes(x @ ((np.eye(3) - grey).astype(np.float32) * np.float32(factor) + grey.astype(np.float32)))


def _sharpness(x: Patches, factor: float) -> Patches:
    """Away from a blurred patch, whose pixels are (eight neighbours + 5 × the pixel) / 13; its border stays."""
    wide = x.astype(np.int32)
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    inner = wide[:, 1:-1, 1:-1]
    blurred = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * inner
    soft = ((2 * blurred + 13) // 26).astype(np.float32)
    out = x.copy()
    # Not clipped: what leaves 0 to 255 comes in again at the other end, as where the public code casts it.
    out[:, 1:-1, 1:-1] = (soft + np.float32(factor) * (inner.astype(np.float32) - soft)).astype(np.int32) & 255
    return out


def _bytes(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    return values.clip(0, 255).astype(np.uint8)  # towards zero


OPERATIONS: tuple[Callable[[Patches, float], Patches], ...] = (
    _same,
    _autocontrast,
    _equalize,
    _brightness,
    _contrast,
    _color,
    _sharpness,
)
"""Those that leave every pixel in its place; the first changes nothing."""


def augment_patches(
    image: Image.Image, patch_size: int, rng: np.random.Generator, n: int = 2, magnitude: int = 7
) -> Image.Image:
    """An RGB image whose patches (``patch_size`` pixels a side) are each changed by ``n`` operations in turn.

    Operations are drawn for every patch from ``rng``, with replacement; the strength of the enhancements is
    0.1 + 1.8 · ``magnitude`` / 10, always above 1 with DroPLe's 7. What is left of the image at its right and lower
    ends, less than a patch, stays as it is.
    """
    factor = magnitude / STRONGEST * 1.8 + 0.1
    pixels, side = np.array(image), patch_size
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    whole = pixels[: rows * side, : columns * side]
    patches = whole.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    chosen = rng.integers(len(OPERATIONS), size=(len(patches), n))
    for turn in chosen.T:
        for number, operation in enumerate(OPERATIONS[1:], 1):
            if len(which := (turn == number).nonzero()[0]):
                patches[which] = operation(patches[which], factor)
    whole[:] = patches.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(whole.shape)
    return Image.fromarray(pixels)
