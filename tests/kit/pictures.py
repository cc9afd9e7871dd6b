"""Small pictures: of noise, or of one colour a class with noise, which a random backbone can tell apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = ("cat", "dog", "sea horse")
"""Those of pictures of noise."""
COLOURS = {"blue boat": (40, 60, 220), "green leaf": (40, 200, 60), "red rose": (220, 40, 60)}
SHADES = {"blue": (30, 30, 220), "green": (30, 200, 30), "red": (220, 30, 30)}


def draw(file: Path, seed: int = 0, width: int = 24, height: int = 20) -> None:
    """A picture of noise, as PNG whatever the suffix says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format="png")


def make_pictures(folder: Path, train: int = 4, val: int = 2, size: int = 32, held_out: str = "val") -> Path:
    """``train`` and ``val`` pictures of noise of each of three classes; the latter are the part ``held_out``."""
    rng = np.random.default_rng(0)
    for part, n in (("train", train), (held_out, val)):
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder


def paint(file: Path, colour: tuple[int, int, int], seed: int, size: int = 32) -> None:
    """A square of one colour with noise."""
    noise = np.random.default_rng(seed).integers(-25, 26, (size, size, 3))
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(file)


def make_photos(folder: Path, train: int = 4, val: int = 2, test: int = 3) -> Path:
    """Coloured squares of three classes that are easy to tell apart."""
    for part, n in (("train", train), ("val", val), ("test", test)):
        for c, (name, colour) in enumerate(SHADES.items()):
            for i in range(n):
                paint(folder / part / name / f"{i}.png", colour, 100 * c + i)
    return folder


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
