"""Other looks of the same picture, to measure how a model fares on images unlike those it was tuned on.

Each takes an RGB picture on white and a key, and gives an RGB picture of the same size. What is random about it depends
on the key alone.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps

_SMALL = 0.5  # of the picture's size
_NOISE = 24.0  # standard deviation, of 0 to 255


def grey(image: Image.Image, key: str) -> Image.Image:
    """Without colours."""
    return ImageOps.grayscale(image).convert("RGB")


def edges(image: Image.Image, key: str) -> Image.Image:
    """Outlines only: black where the brightness changes, on white."""
    brightness = np.asarray(ImageOps.grayscale(image).filter(ImageFilter.GaussianBlur(0.7)), dtype=float)
    down, right = np.gradient(brightness)
    strength = np.minimum(4 * np.hypot(down, right), 255).round().astype(np.uint8)
    return ImageOps.invert(Image.fromarray(strength)).convert("RGB")


def dark(image: Image.Image, key: str) -> Image.Image:
    """On black: white and black change places, colours keep their hue."""
    pixels = np.asarray(image).astype(int)
    lightness = pixels.max(-1, keepdims=True) + pixels.min(-1, keepdims=True)  # doubled
    return Image.fromarray((pixels + 255 - lightness).astype(np.uint8))


def small(image: Image.Image, key: str) -> Image.Image:
    """Reduced, somewhere on the sheet, under Gaussian noise."""
    rng, (width, height) = _random(key), image.size
    reduced = image.resize((round(_SMALL * width), round(_SMALL * height)), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", image.size, "white")
    left, top = rng.integers(width - reduced.width + 1), rng.integers(height - reduced.height + 1)
    sheet.paste(reduced, (int(left), int(top)))
    noisy = np.asarray(sheet) + rng.normal(0, _NOISE, (height, width, 3))
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def rotated(image: Image.Image, key: str) -> Image.Image:
    """Turned by 30 to 330 degrees, and reduced so that no corner is cut off."""
    angle = _random(key).uniform(30, 330)
    return _fitting(image.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor="white"), image.size)


def _fitting(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """``image`` without its white margin, centred on a sheet of ``size``; reduced if it is larger than that."""
    image = image.crop(ImageChops.invert(image).getbbox())
    image.thumbnail((size[0] - 4, size[1] - 4), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", size, "white")
    sheet.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return sheet


def _random(key: str) -> np.random.Generator:
    return np.random.default_rng(list(sha256(key.encode()).digest()))


DOMAINS: dict[str, Callable[[Image.Image, str], Image.Image]] = {
    "grey": grey,
    "edges": edges,
    "dark": dark,
    "small": small,
    "rotated": rotated,
}
