"""Photographs for the pretraining of ``mini``, and what a teacher says they show.

    python tools/mini/photos.py --tiny tiny-imagenet-200 --trash dataset-resized --out pretraining

Reads Tiny-ImageNet (100,000 + 10,000 images of 64 px, ImageNet's terms: used for training, never shipped) and, if
it is given, TrashNet (MIT). EfficientNet-lite0 (Apache-2.0) gives each image probabilities of ImageNet's 1,000
classes. The ten classes of Imagenette are taken out of them, so that ``mini`` never learns those; the photographs of
Imagenette measure it. A second call does only what is missing.

Writes into the folder

* ``photos-64.npy``: [photographs, 64, 64, 3], uint8;
* ``photos.json``: ``kind`` (train, val, trash) and ``label`` (a WordNet id, or TrashNet's word) of each;
* ``photos-top.npy``: [photographs, 20], int16, the classes that the teacher finds likeliest;
* ``photos-chance.npy``: [photographs, 20], float16, their probabilities.
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
from vlprompt.files import write_atomically

SIZE, TOP, PART = 64, 20, 1000
PIXELS, TOPS, CHANCES = f"photos-{SIZE}.npy", "photos-top.npy", "photos-chance.npy"


def listed(tiny: Path, trash: Path | None) -> Iterator[tuple[Path, str, str]]:
    """Each photograph with its kind and its label."""
    for file in sorted((tiny / "train").glob("*/images/*.JPEG")):
        yield file, "train", file.parts[-3]
    annotations = (tiny / "val" / "val_annotations.txt").read_text(encoding="ascii").splitlines()
    for name, label, *_ in (line.split("\t") for line in annotations):
        yield tiny / "val" / "images" / name, "val", label
    for file in sorted(trash.glob("*/*.jpg")) if trash else ():
        yield file, "trash", file.parts[-2]


def read(file: Path) -> np.ndarray:
    """[SIZE, SIZE, 3] uint8: the middle square."""
    with Image.open(file, formats=["JPEG"]) as opened:
        image = opened.convert("RGB")
    if image.size != (SIZE, SIZE):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return np.asarray(image)


def classified(part: tuple[Path, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The classifier's likeliest classes and their probabilities, of the photographs ``start`` to ``stop``."""
    folder, start, stop = part
    torch.set_num_threads(1)
    classifier = load_classifier().to(torch.bfloat16, memory_format=torch.channels_last)
    hidden = [at for at, (id_, _) in enumerate(kinds()) if id_ in UNSEEN]
    pixels = np.load(folder / PIXELS, mmap_mode="r")[start:stop]
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
    parser.add_argument("--trash", type=Path, help="folder of TrashNet, dataset-resized")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    options = parser.parse_args()
    photos = list(listed(options.tiny, options.trash))
    about = [{"kind": kind, "label": label} for _, kind, label in photos]
    pixels, chances = options.out / PIXELS, options.out / CHANCES
    if not pixels.exists():
        write_array(pixels, np.stack([read(file) for file, _, _ in photos]))
        write_atomically(options.out / "photos.json", json.dumps(about, indent=0))
        chances.unlink(missing_ok=True)
    print(f"{len(photos)} photographs")
    if not chances.exists():
        parts = [(options.out, i, min(i + PART, len(photos))) for i in range(0, len(photos), PART)]
        tops, found = [], []
        with multiprocessing.get_context("spawn").Pool() as pool:
            for i, (top, chance) in enumerate(pool.imap(classified, parts)):
                tops.append(top)
                found.append(chance)
                print(f"{min((i + 1) * PART, len(photos))} of {len(photos)} classified", flush=True)
        write_array(options.out / TOPS, np.concatenate(tops))
        write_array(chances, np.concatenate(found))


if __name__ == "__main__":
    main()
