"""Photographs for the pretraining of ``mini``, and what a classifier says they show.

    python tools/mini/photos.py --tiny tiny-imagenet-200 --samples imagenet-sample-images --trash dataset-resized \
        --out pretraining

Reads Tiny-ImageNet (120,000 images of 64 px) and, if they are given, one image of each of ImageNet's 1,000 classes, of
which many crops are taken (both under ImageNet's terms: used for training, never shipped), and TrashNet (MIT).
EfficientNet-lite0 (Apache-2.0) gives each photograph probabilities of ImageNet's classes. The ten classes of Imagenette
are taken out of them, and out of the samples, so that ``mini`` never learns those: they measure it. A second call does
only what is missing.

Writes into ``OUT/photos``, for each of the sources ``train``, ``val``, ``test``, ``samples`` and ``trash``

* ``SOURCE-pixels.npy``: [photographs, 64, 64, 3], uint8;
* ``SOURCE-labels.json``: a WordNet id of each, "" where there is none;
* ``SOURCE-top.npy``: [photographs, 20], int16, the classes that the classifier finds likeliest;
* ``SOURCE-chance.npy``: [photographs, 20], float16, their probabilities.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from kinds import UNSEEN
from PIL import Image
from torch.nn import functional as F

from vlprompt.backbones.lite0 import IMAGE_SIZE, kinds, load_classifier
from vlprompt.data.images import pixel_box, random_regions
from vlprompt.files import write_atomically

SIZE, TOP, PART = 64, 20, 1000
CROPS = 32
"""Of each sample, which cover this share of its area or more."""
LEAST = 0.25


def listed(tiny: Path, samples: Path | None, trash: Path | None) -> dict[str, list[tuple[Path, str]]]:
    """The photographs of each source with their labels."""
    annotations = (tiny / "val" / "val_annotations.txt").read_text(encoding="ascii").splitlines()
    found = {
        "train": [(file, file.parts[-3]) for file in sorted((tiny / "train").glob("*/images/*.JPEG"))],
        "val": [(tiny / "val" / "images" / name, id_) for name, id_, *_ in (line.split("\t") for line in annotations)],
        "test": [(file, "") for file in sorted((tiny / "test" / "images").glob("*.JPEG"))],
    }
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


def classified(part: tuple[Path, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The classifier's likeliest classes and their probabilities, of the photographs ``start`` to ``stop``."""
    file, start, stop = part
    torch.set_num_threads(1)
    classifier = load_classifier().to(memory_format=torch.channels_last).to(torch.bfloat16)
    hidden = [at for at, kind in enumerate(kinds()) if kind.id in UNSEEN]
    pixels = np.load(file, mmap_mode="r")[start:stop]
    top, chance = np.zeros((len(pixels), TOP), np.int16), np.zeros((len(pixels), TOP), np.float16)
    for i in range(0, len(pixels), 64):
        images = (torch.from_numpy(pixels[i : i + 64].copy()).permute(0, 3, 1, 2).float() - 127) / 128
        images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
        images = images.clamp(-1, 1).to(torch.bfloat16, memory_format=torch.channels_last)
        with torch.no_grad():
            logits = classifier(images).float()
        logits[:, hidden] = -torch.inf
        best = logits.softmax(-1).topk(TOP, -1)
        top[i : i + 64], chance[i : i + 64] = best.indices.numpy(), best.values.numpy()
    return top, chance


def write_array(file: Path, values: np.ndarray) -> None:
    """An array, whole or not at all."""
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    write_atomically(file, content.getvalue())


def main() -> None:
    """Read and classify."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--tiny", type=Path, required=True, help="folder of Tiny-ImageNet")
    parser.add_argument("--samples", type=Path, help="folder of images n….JPEG, one a class of ImageNet")
    parser.add_argument("--trash", type=Path, help="folder of TrashNet, dataset-resized")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--processes", type=int, help="that classify; default: as many as there are cores")
    options = parser.parse_args()
    for source, photos in listed(options.tiny, options.samples, options.trash).items():
        files = ("pixels.npy", "labels.json", "top.npy", "chance.npy")
        pixels, labels, top, chance = (options.out / "photos" / f"{source}-{file}" for file in files)
        if not pixels.exists():
            crops = CROPS if source == "samples" else 0
            write_atomically(labels, json.dumps([label for _, label in photos for _ in range(crops or 1)]))
            write_array(pixels, np.stack([view for file, _ in photos for view in read(file, crops)]))
            chance.unlink(missing_ok=True)
        n = len(np.load(pixels, mmap_mode="r"))
        print(f"{source}: {n} photographs", flush=True)
        if not chance.exists():
            parts = [(pixels, i, min(i + PART, n)) for i in range(0, n, PART)]
            tops, found = [], []
            with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
                for i, (best, of_best) in enumerate(pool.imap(classified, parts)):
                    tops.append(best)
                    found.append(of_best)
                    print(f"{min((i + 1) * PART, n)} of {n} classified", flush=True)
            write_array(top, np.concatenate(tops))
            write_array(chance, np.concatenate(found))


if __name__ == "__main__":
    main()
