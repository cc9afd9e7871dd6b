"""The embedded backbone on pictures it was never trained on, against the figures of its model card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from tests.kit.marks import slow
from vlprompt import build_method
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import EMBEDDED
from vlprompt.config.schema import build_config
from vlprompt.data.datasets import LoadedDataset, load_dataset
from vlprompt.data.images import load_image
from vlprompt.data.known.openmoji import pictures
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import Split
from vlprompt.methods import Method
from vlprompt.training.evaluate import EvaluationImages, evaluate
from vlprompt.training.run import train


def card(folder: Path) -> dict[str, float]:
    """The figures in the head of a model card."""
    return yaml.safe_load((folder / "README.md").read_text("utf-8").split("---\n")[1])["figures"]


FIGURES = card(EMBEDDED["mini"])


def score(method: Method, split: Split) -> float:
    images = EvaluationImages(split.paths("test"), split.labels("test"), ImageReader(2))
    return evaluate(method, images, split.class_names).accuracy


def accuracy(backbone: Backbone, dataset: LoadedDataset) -> float:
    method = build_method("zero_shot", backbone, list(dataset.split.class_names), template=dataset.template)
    return score(method, dataset.split)


@slow
def test_the_card_tells_the_truth(mini: Backbone, openmoji: LoadedDataset) -> None:
    assert accuracy(mini, openmoji) == pytest.approx(FIGURES["openmoji_classes_test"], abs=0.6)  # two pictures
    assert FIGURES["openmoji_names"] > 35
    # What it was made to reach on what it was never trained on.
    least = {"openmoji_classes": 58, "caltech101": 30, "imagenette": 50, "clothing": 28, "caltech101_base_probe": 75}
    assert {name: FIGURES[name] for name, figure in least.items() if FIGURES[name] < figure} == {}


@slow
def test_it_names_single_pictures(mini: Backbone, openmoji: LoadedDataset) -> None:
    shown = {picture.codepoints: picture.name for picture in pictures()}
    files = openmoji.split.paths("test")
    names = sorted(set(shown.values()))
    pixels = torch.stack([mini.preprocess(load_image(file)) for file in files])
    answers = (mini.encode_images(pixels) @ mini.encode_texts(names).T).argmax(1)
    right = sum(names[a] == shown[Path(file).stem] for a, file in zip(answers.tolist(), files, strict=True))
    assert 100 * right / len(files) > 35


NAMELESS = {"bird": "alpha", "fruit": "bravo", "ground transport": "charlie", "musical instrument": "delta"}


@slow
def test_tuning_teaches_names_it_does_not_know(mini: Backbone, openmoji: LoadedDataset, tmp_path: Path) -> None:
    for picture in pictures():
        if picture.class_name in NAMELESS:
            copy = tmp_path / "photos" / picture.split / NAMELESS[picture.class_name] / f"{picture.codepoints}.png"
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((openmoji.split.root / picture.path).read_bytes())
    nameless = load_dataset(tmp_path / "photos")
    before = accuracy(mini, nameless)
    changes = {"n_ctx": 4, "class_specific": True, "epochs": 6, "batch_size": 8, "warmup_epochs": 0, "min_scale": 0.6}
    config = build_config("coop", overrides={"data.name": str(tmp_path / "photos"), **changes})
    method, _ = train(config, tmp_path / "run")
    assert before < 45, "of four classes whose names say nothing"
    assert score(method, nameless.split) > before + 30


def test_it_is_small_and_deep(mini: Backbone) -> None:
    assert sum(file.stat().st_size for file in EMBEDDED["mini"].iterdir()) < 20e6
    assert mini.image_tower.config.layers == mini.text_tower.config.layers == 12
    assert mini.image_size == 64


def test_its_sources_are_open_and_hold_no_openmoji() -> None:
    lines = (EMBEDDED["mini"] / "sources.tsv").read_text("utf-8").splitlines()
    rows = [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]
    allowed = {"MIT", "Apache-2.0", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "ISC", "OFL-1.1", "Unlicense", "BSD-3-Clause"}
    assert {row["licence"] for row in rows} <= allowed
    assert not any("openmoji" in row["set"] for row in rows)
    assert all(row["author"] for row in rows)
    assert sum(int(row["pictures"]) for row in rows) > 50_000
