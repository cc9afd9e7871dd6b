"""Photographs for the pretraining of ``mini``, and what a classifier says they show.

    python tools/mini/photos.py --tiny tiny-imagenet-200 --more mini-imagenet --samples imagenet-sample-images \
        --thousand vipriors --trash dataset-resized --out pretraining

Reads Tiny-ImageNet (120,000 images of 64 px) and, if they are given, mini-ImageNet (60,000 of 84 px), one image of each
of ImageNet's 1,000 classes, of which many crops are taken, the subset of ImageNet of the VIPriors challenge, of which a
few are (all four under ImageNet's terms: used for training, never shipped), and TrashNet (MIT).
EfficientNet-lite0 (Apache-2.0) gives each photograph probabilities of ImageNet's classes; it sees the photograph, or
the crop, at its own size, not at the 64 px that ``mini`` sees. The ten classes of Imagenette are taken out of them, and
out of the images, so that ``mini`` never learns those: they measure it. A second call does only what is missing.

Writes into ``OUT/photos``, for each of the sources ``train``, ``val``, ``test``, ``more``, ``samples``, ``thousand``
and ``trash``

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
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kinds import UNSEEN
from PIL import Image
from torch import Tensor

from vlprompt.backbones.lite0 import IMAGE_SIZE, kinds, load_classifier
from vlprompt.data.images import pixel_box, random_regions
from vlprompt.files import write_atomically

SIZE, TOP, PART = 64, 20, 250
AXES, FOR_AXES = 128, 2048
"""Directions of the classifier's features that are kept, and photographs from which those are found."""
CROPS = {"samples": 32, "thousand": 4}
"""Of each photograph, which cover this share of its area or more; of other sources the middle square is taken."""
LEAST = 0.25


def listed(options: argparse.Namespace) -> dict[str, list[tuple[Path, str]]]:
    """The photographs of each source with their labels."""
    tiny: Path = options.tiny
    annotations = (tiny / "val" / "val_annotations.txt").read_text(encoding="ascii").splitlines()
    found = {
        "train": [(file, file.parts[-3]) for file in sorted((tiny / "train").glob("*/images/*.JPEG"))],
        "val": [(tiny / "val" / "images" / name, id_) for name, id_, *_ in (line.split("\t") for line in annotations)],
        "test": [(file, "") for file in sorted((tiny / "test" / "images").glob("*.JPEG"))],
    }
    if options.more:
        found["more"] = [(file, file.parent.name) for file in sorted(options.more.glob("*/n*/*.jpg"))]
    if options.samples:
        files = sorted(options.samples.glob("n*.JPEG"))
        found["samples"] = [(file, file.name.partition("_")[0]) for file in files]
    if options.thousand:
        files = [file for part in ("train", "val") for file in sorted((options.thousand / part).glob("n*/*.JPEG"))]
        found["thousand"] = [(file, file.parent.name) for file in files]
    if options.trash:
        found["trash"] = [(file, "") for file in sorted(options.trash.glob("*/*.jpg"))]
    return {source: [photo for photo in photos if photo[1] not in UNSEEN] for source, photos in found.items()}


def read(file: Path, crops: int, sizes: Sequence[int]) -> Iterator[tuple[np.ndarray, ...]]:
    """The middle square, or so many crops at random: each at these sizes, [size, size, 3] uint8."""
    with Image.open(file, formats=["JPEG"]) as opened:
        image = opened.convert("RGB")
    width, height = image.size
    if crops:
        draw = np.random.default_rng(zlib.crc32(file.name.encode()))
        boxes = [pixel_box(region, width, height) for region in random_regions(draw, width, height, crops, (LEAST, 1))]
    else:
        side = min(image.size)
        left, top = (width - side) // 2, (height - side) // 2
        boxes = [(left, top, left + side, top + side)]
    for box in boxes:
        part = image.crop(box)
        yield tuple(
            np.asarray(part if part.size == (size, size) else part.resize((size, size), Image.Resampling.BICUBIC))
            for size in sizes
        )


def classifier_of_photos() -> tuple[Any, list[int]]:
    """EfficientNet-lite0, and the places of the classes that stay unseen."""
    classifier = load_classifier().to(memory_format=torch.channels_last).to(torch.bfloat16)
    return classifier, [at for at, kind in enumerate(kinds()) if kind.id in UNSEEN]


@torch.no_grad()
def seen(classifier: Any, pixels: Sequence[np.ndarray]) -> Tensor:
    """What the classifier's last convolution sees of B images [IMAGE_SIZE, IMAGE_SIZE, 3]: [B, 1280, 5, 5]."""
    images = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() - 127) / 128
    found: Tensor = classifier.extract_features(images.to(torch.bfloat16, memory_format=torch.channels_last))
    return found


def axes_of(files: Sequence[Path]) -> np.ndarray:
    """Principal directions of the classifier's features, without those by which it knows the unseen classes.

    [1280 + 1, AXES]: a feature times the first rows plus the last has components of -127…127, nearly always.
    """
    classifier, hidden = classifier_of_photos()
    rows = np.sort(np.random.default_rng(0).permutation(len(files))[:FOR_AXES])
    pixels = [view for row in rows for (view,) in read(files[row], 0, (IMAGE_SIZE,))]
    found = [seen(classifier, pixels[i : i + 64]) for i in range(0, len(pixels), 64)]
    x = torch.cat([part.float().permute(0, 2, 3, 1).reshape(-1, part.shape[1]) for part in found])
    known = torch.linalg.qr(classifier._fc.weight[hidden].float().T).Q  # [1280, unseen]
    mean = x.mean(0)
    x = x - mean
    x = x - x @ known @ known.T
    spread, directions = torch.linalg.eigh(x.T @ x / len(x))
    spread, directions = spread[-AXES:].flip(0).sqrt(), directions[:, -AXES:].flip(1)
    axes = directions / spread.clamp(min=1e-6).sqrt() * (32 / spread[0].sqrt())
    return torch.cat([axes, -(mean @ axes)[None]]).numpy()


def looked_at(part: tuple[list[Path], int, Path]) -> tuple[np.ndarray, ...]:
    """Pixels, likeliest classes, their probabilities and what the classifier sees, of all crops of some files."""
    files, crops, axes_file = part
    torch.set_num_threads(1)
    classifier, hidden = classifier_of_photos()
    axes = torch.from_numpy(np.load(axes_file))
    views = [view for file in files for view in read(file, crops, (SIZE, IMAGE_SIZE))]
    tops, chances, grids = [], [], []
    for i in range(0, len(views), 64):
        features = seen(classifier, [large for _, large in views[i : i + 64]])
        with torch.no_grad():
            logits = classifier._fc(features.mean((2, 3))).float()
        logits[:, hidden] = -torch.inf
        best = logits.softmax(-1).topk(TOP, -1)
        tops.append(best.indices.numpy().astype(np.int16))
        chances.append(best.values.numpy().astype(np.float16))
        along = features.float().permute(0, 2, 3, 1) @ axes[:-1] + axes[-1]
        grids.append(along.round().clamp(-127, 127).numpy().astype(np.int8))
    return np.stack([small for small, _ in views]), *(np.concatenate(each) for each in (tops, chances, grids))


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
    parser.add_argument("--thousand", type=Path, help="folder of VIPriors' ImageNet: train/WNID/*.JPEG, val/…")
    parser.add_argument("--trash", type=Path, help="folder of TrashNet, dataset-resized")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--processes", type=int, help="that classify; default: as many as there are cores")
    options = parser.parse_args()
    folder = options.out / "photos"
    axes = folder / "axes.npy"
    for source, photos in listed(options).items():
        labels, *outputs = (
            folder / f"{source}-{file}" for file in ("labels.json", "pixels.npy", "top.npy", "chance.npy", "grid.npy")
        )
        crops = CROPS.get(source, 0)
        print(f"{source}: {len(photos)} photographs", flush=True)
        if not axes.exists():
            write_array(axes, axes_of([file for file, _ in photos]))
        if outputs[-1].exists():
            continue
        write_atomically(labels, json.dumps([label for _, label in photos for _ in range(crops or 1)]))
        files = [file for file, _ in photos]
        parts = [(files[i : i + PART], crops, axes) for i in range(0, len(files), PART)]
        found = []
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            for part in pool.imap(looked_at, parts):
                found.append(part)
                if len(found) % 20 == 0:
                    print(f"{sum(len(of_part[0]) for of_part in found)} views classified", flush=True)
        for file, values in zip(outputs, zip(*found, strict=True), strict=True):
            write_array(file, np.concatenate(values))


if __name__ == "__main__":
    main()
