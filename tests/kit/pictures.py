"""Small pictures that a random backbone can tell apart: one colour a class, with noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

COLOURS = {"blue boat": (40, 60, 220), "green leaf": (40, 200, 60), "red rose": (220, 40, 60)}


def pictures(n: int, size: int = 32, seed: int = 0) -> tuple[NDArray[np.uint8], list[str]]:
    """n pictures of each class, [3 n, size, size, 3], and their class names."""
    rng = np.random.default_rng(seed)
    names = [name for name in COLOURS for _ in range(n)]
    noise = rng.integers(-30, 30, (len(names), size, size, 3))
    pixels = np.array([COLOURS[name] for name in names])[:, None, None] + noise
    return pixels.clip(0, 255).astype(np.uint8), names


def write_pictures(folder: Path, n: int = 6, size: int = 32) -> Path:
    """A folder of class folders with lossless pictures 0.png, 1.png, …"""
    pixels, names = pictures(n, size)
    for i, (picture, name) in enumerate(zip(pixels, names, strict=True)):
        file = folder / name.replace(" ", "_") / f"{i % n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    return folder
