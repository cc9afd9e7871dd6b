"""Photographs for the pretraining of ``mini``, and what a classifier says they show.

    python tools/mini/photos.py --tiny tiny-imagenet-200 --more mini-imagenet --samples imagenet-sample-images \
        --trash dataset-resized --out pretraining

Reads Tiny-ImageNet (120,000 images of 64 px) and, if they are given, mini-ImageNet (60,000 of 84 px), one image of each
of ImageNet's 1,000 classes, of which many crops are taken (all three under ImageNet's terms: used for training, never
shipped), and TrashNet (MIT).
EfficientNet-lite0 (Apache-2.0) gives each photograph probabilities of ImageNet's classes. The ten classes of Imagenette
are taken out of them, and out of the images, so that ``mini`` never learns those: they measure it. A second call does
only what is missing.

Writes into ``OUT/photos``, for each of the sources ``train``, ``val``, ``test``, ``more``, ``samples`` and ``trash``

* ``SOURCE-pixels.npy``: [photographs, 64, 64, 3], uint8;
* ``SOURCE-labels.json``: a WordNet id of each, "" where there is none;
* ``SOURCE-top.npy``: [photographs, 20], int16, the classes that the classifier finds likeliest;
* ``SOURCE-chance.npy``: [photographs, 20], float16, their probabilities;
* ``SOURCE-grid.npy``: [photographs, 5, 5, 128], int8, what the classifier sees where, along ``axes.npy`` [1281, 128]:
  principal directions of its features, evened out half-way, and in the last row what is added.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kinds import UNSEEN
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vlprompt.backbones.lite0 import IMAGE_SIZE, kinds, load_classifier
from vlprompt.data.images import pixel_box, random_regions
from vlprompt.files import write_atomically

SIZE, TOP, PART = 64, 20, 1000
AXES, FOR_AXES = 128, 2048
"""Directions of the classifier's features that are kept, and photographs from which those are found."""
CROPS = 32
"""Of each sample, which cover this share of its area or more."""
LEAST = 0.25


def listed(
    tiny: Path, more: Path | None, samples: Path | None, trash: Path | None
) -> dict[str, list[tuple[Path, str]]]:
    """The photographs of each source with their labels."""
    annotations = (tiny / "val" / "val_annotations.txt").read_text(encoding="ascii").splitlines()
    found = {
        "train": [(file, file.parts[-3]) for file in sorted((tiny / "train").glob("*/images/*.JPEG"))],
        "val": [(tiny / "val" / "images" / name, id_) for name, id_, *_ in (line.split("\t") for line in annotations)],
        "test": [(file, "") for file in sorted((tiny / "test" / "images").glob("*.JPEG"))],
    }
    if more:
        found["more"] = [
            (file, file.parent.name) for file in sorted(more.glob("*/n*/*.jpg")) if file.parent.name not in UNSEEN
        ]
    if samples:
        named = [(file, file.name.partition("_")[0]) for file in sorted(samples.glob("n*.JPEG"))]
        found["samples"] = [(file, id_) for file, id_ in named if id_ not in UNSEEN]
    if trash:
        found["trash"] = [(file, "") for file in sorted(trash.glob("*/*.jpg"))]
    return found


def read(file: Path, crops: int) -> Iterator[np.ndarray]:
    """[SIZE, SIZE, 3] uint8: the middle square, or so many crops at random."""
    with Image.open(file, formats=["JPEG"]) as opened:
        image = opened.convert("RGB")
    width, height = image.size
    if crops:
        draw = np.random.default_rng(int.from_bytes(file.name.encode()[:8]))
        boxes = [pixel_box(region, width, height) for region in random_regions(draw, width, height, crops, (LEAST, 1))]
    else:
        side = min(image.size)
        left, top = (width - side) // 2, (height - side) // 2
        boxes = [(left, top, left + side, top + side)]
    for box in boxes:
        part = image.crop(box)
        yield np.asarray(part if part.size == (SIZE, SIZE) else part.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def classifier_of_photos() -> tuple[Any, list[int]]:
    """EfficientNet-lite0, and the places of the classes that stay unseen."""
    classifier = load_classifier().to(memory_format=torch.channels_last).to(torch.bfloat16)
    return classifier, [at for at, kind in enumerate(kinds()) if kind.id in UNSEEN]


@torch.no_grad()
def seen(classifier: Any, pixels: np.ndarray) -> Tensor:
    """What the classifier's last convolution sees of [B, 64, 64, 3]: [B, 1280, 5, 5]."""
    images = (torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() - 127) / 128
    images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
    found: Tensor = classifier.extract_features(
        images.clamp(-1, 1).to(torch.bfloat16, memory_format=torch.channels_last)
    )
    return found


def axes_of(pixels: np.ndarray) -> np.ndarray:
    """Principal directions of the classifier's features, without those by which it knows the unseen classes.

    [1280 + 1, AXES]: a feature times the first rows plus the last has components of -127…127, nearly always.
    """
    classifier, hidden = classifier_of_photos()
    rows = np.random.default_rng(0).permutation(len(pixels))[:FOR_AXES]
    found = [seen(classifier, pixels[np.sort(rows[i : i + 64])]) for i in range(0, len(rows), 64)]
    x = torch.cat([part.float().permute(0, 2, 3, 1).reshape(-1, part.shape[1]) for part in found])
    known = torch.linalg.qr(classifier._fc.weight[hidden].float().T).Q  # [1280, unseen]
    mean = x.mean(0)
    x = x - mean
    x = x - x @ known @ known.T
    spread, directions = torch.linalg.eigh(x.T @ x / len(x))
    spread, directions = spread[-AXES:].flip(0).sqrt(), directions[:, -AXES:].flip(1)
    axes = directions / spread.clamp(min=1e-6).sqrt() * (32 / spread[0].sqrt())
    return torch.cat([axes, -(mean @ axes)[None]]).numpy()


def classified(part: tuple[Path, Path, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Likeliest classes, their probabilities and what the classifier sees, of the photographs ``start`` to ``stop``."""
    file, axes_file, start, stop = part
    torch.set_num_threads(1)
    classifier, hidden = classifier_of_photos()
    axes = torch.from_numpy(np.load(axes_file))
    pixels = np.load(file, mmap_mode="r")[start:stop]
    top, chance = np.zeros((len(pixels), TOP), np.int16), np.zeros((len(pixels), TOP), np.float16)
    grid = np.zeros((len(pixels), 5, 5, AXES), np.int8)
    for i in range(0, len(pixels), 64):
        features = seen(classifier, pixels[i : i + 64])
        with torch.no_grad():
            logits = classifier._fc(features.mean((2, 3))).float()
        logits[:, hidden] = -torch.inf
        best = logits.softmax(-1).topk(TOP, -1)
        top[i : i + 64], chance[i : i + 64] = best.indices.numpy(), best.values.numpy()
        along = features.float().permute(0, 2, 3, 1) @ axes[:-1] + axes[-1]
        grid[i : i + 64] = along.round().clamp(-127, 127).numpy()
    return top, chance, grid


def write_array(file: Path, values: np.ndarray) -> None:
    """An array, whole or not at all."""
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    write_atomically(file, content.getvalue())


def main() -> None:
    """Read and classify."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--tiny", type=Path, required=True, help="folder of Tiny-ImageNet")
    parser.add_argument("--more", type=Path, help="folder of mini-ImageNet, with train/WNID/*.jpg, val/WNID/*.jpg")
    parser.add_argument("--samples", type=Path, help="folder of images n….JPEG, one a class of ImageNet")
    parser.add_argument("--trash", type=Path, help="folder of TrashNet, dataset-resized")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--processes", type=int, help="that classify; default: as many as there are cores")
    options = parser.parse_args()
    folder = options.out / "photos"
    axes = folder / "axes.npy"
    for source, photos in listed(options.tiny, options.more, options.samples, options.trash).items():
        files = ("pixels.npy", "labels.json", "top.npy", "chance.npy", "grid.npy")
        pixels, labels, *outputs = (folder / f"{source}-{file}" for file in files)
        if not pixels.exists():
            crops = CROPS if source == "samples" else 0
            write_atomically(labels, json.dumps([label for _, label in photos for _ in range(crops or 1)]))
            write_array(pixels, np.stack([view for file, _ in photos for view in read(file, crops)]))
            outputs[-1].unlink(missing_ok=True)
        shown = np.load(pixels, mmap_mode="r")
        print(f"{source}: {len(shown)} photographs", flush=True)
        if not axes.exists():
            write_array(axes, axes_of(shown))
        if not outputs[-1].exists():
            parts = [(pixels, axes, i, min(i + PART, len(shown))) for i in range(0, len(shown), PART)]
            found = []
            with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
                for part in pool.imap(classified, parts):
                    found.append(part)
                    print(f"{sum(len(of_part[0]) for of_part in found)} of {len(shown)} classified", flush=True)
            for file, values in zip(outputs, zip(*found, strict=True), strict=True):
                write_array(file, np.concatenate(values))


if __name__ == "__main__":
    main()
