"""Measure a backbone on pictures it was never trained on: OpenMoji, and photographs.

    python tools/mini/evaluate.py mini --photos DATA --card src/vlprompt/backbones/mini/README.md

Zero-shot over the classes of the data set ``openmoji``, over the exact names of its pictures, retrieval both ways;
zero-shot over the classes of ``caltech101``, ``imagenette`` and ``clothing``; a linear probe on 16 images of each of
Caltech-101's base classes, mean of three seeds. With ``--card`` the figures go into the head of that model card, under
``figures``, and into its table, between the marks. ``efficientnet-lite0`` is measured on the photographs, too.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from torch import Tensor

from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.lite0 import Lite0
from vlprompt.config.schema import build_config
from vlprompt.config.teacher import load_teacher_model
from vlprompt.data.datasets import load_dataset
from vlprompt.data.images import load_image
from vlprompt.data.known.openmoji import CLASSES, pictures
from vlprompt.data.reading import ImageReader
from vlprompt.files import write_atomically
from vlprompt.prompting.text import fill
from vlprompt.training.evaluate import EvaluationImages, evaluate
from vlprompt.training.run import train

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


def image_features(backbone: Backbone | Lite0, files: Sequence[Path], batch: int = 128) -> Tensor:
    """[files, E], normalised."""
    return torch.cat(
        [
            backbone.encode_images(torch.stack([backbone.preprocess(load_image(f)) for f in files[i : i + batch]]))
            for i in range(0, len(files), batch)
        ]
    )


def accuracy(features: Tensor, texts: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share, in per cent, of the rows whose label is among the ``k`` best texts."""
    best = (features @ texts.T).topk(k, -1).indices
    return round(100 * (best == labels[:, None]).any(-1).float().mean().item(), 1)


def on_openmoji(backbone: Backbone) -> dict[str, float]:
    """Figures on all pictures of the data set ``openmoji``, and on its test part."""
    data = load_dataset("openmoji")
    split = data.split
    by_code = {picture.codepoints: picture for picture in pictures()}
    files = [split.root / item.path for part in (split.train, split.val, split.test) for item in part]
    shown = [by_code[file.stem] for file in files]
    features = image_features(backbone, files)
    classes = backbone.encode_texts([data.template.format(name) for name in CLASSES])
    labels = torch.tensor([CLASSES.index(picture.class_name) for picture in shown])
    names = list(dict.fromkeys(picture.name for picture in shown))
    named = backbone.encode_texts(names)
    which = torch.tensor([names.index(picture.name) for picture in shown])
    of_name = torch.tensor([[picture.name for picture in shown].index(name) for name in names])
    test = torch.tensor([picture.split == "test" for picture in shown])
    return {
        "openmoji_classes": accuracy(features, classes, labels),
        "openmoji_classes_test": accuracy(features[test], classes, labels[test]),
        "openmoji_names": accuracy(features, named, which),
        "openmoji_names_top5": accuracy(features, named, which, 5),
        "openmoji_text_to_image": accuracy(named, features, of_name),
        "openmoji_text_to_image_top5": accuracy(named, features, of_name, 5),
        "openmoji_pictures": len(shown),
        "openmoji_different_names": len(names),
    }


PHOTOGRAPHS = ("caltech101", "imagenette", "clothing")


def on_photographs(backbone: Backbone | Lite0, root: Path) -> dict[str, float]:
    """Zero-shot accuracy on test images."""
    figures = {}
    for name in PHOTOGRAPHS:
        data = load_dataset(name, root)
        features = image_features(backbone, data.split.paths("test"))
        template = backbone.template if isinstance(backbone, Lite0) else data.template
        texts = backbone.encode_texts(fill(template, data.split.class_names))
        figures[name] = accuracy(features, texts, torch.tensor(data.split.labels("test")))
    return figures


def probe_on_caltech(name: str, root: Path) -> dict[str, float]:
    """A linear probe on 16 images of each base class of Caltech-101: test accuracy, mean of seeds 1-3."""
    found = []
    for seed in (1, 2, 3):
        given = {"data.name": "caltech101", "data.root": str(root), "data.shots": 16, "data.classes": "base"}
        config = build_config("linear_probe", overrides={**given, "backbone": name, "seed": seed})
        with TemporaryDirectory() as folder:
            method, _ = train(config, Path(folder) / "run")
        split = load_dataset("caltech101", root).split.subset("base")
        images = EvaluationImages(split.paths("test"), split.labels("test"), ImageReader(2))
        found.append(evaluate(method, images, split.class_names).accuracy)
    return {"caltech101_base_probe": round(sum(found) / len(found), 1)}


def table(figures: dict[str, float]) -> str:
    """The card's table."""
    pictures_, names = figures.get("openmoji_pictures", 1), figures.get("openmoji_different_names", 1)
    rows = [
        ("OpenMoji, zero-shot over 52 classes", "openmoji_classes", 100 / len(CLASSES)),
        ("the same, test part only", "openmoji_classes_test", 100 / len(CLASSES)),
        (f"OpenMoji, exact name among {names} (image to text)", "openmoji_names", 100 / names),
        ("the same, among the best five", "openmoji_names_top5", 500 / names),
        (f"OpenMoji, picture of a name among {pictures_} (text to image)", "openmoji_text_to_image", 100 / pictures_),
        ("the same, among the best five", "openmoji_text_to_image_top5", 500 / pictures_),
        ("Caltech-101, zero-shot over 100 classes", "caltech101", 1.0),
        ("Imagenette, zero-shot over 10 classes", "imagenette", 10.0),
        ("clothes, zero-shot over 10 classes", "clothing", 10.0),
        ("Caltech-101, linear probe on 16 images of each of 50 classes", "caltech101_base_probe", 2.0),
    ]
    lines = ["| task | accuracy | guessing |", "|---|---|---|"]
    lines += [f"| {task} | {figures[key]:.1f} % | {chance:.1f} % |" for task, key, chance in rows if key in figures]
    return "\n".join(lines)


def into_card(card: Path, figures: dict[str, float]) -> None:
    """Replace the figures in the head and in the table of a model card."""
    _, head, body = card.read_text(encoding="utf-8").split("---\n", 2)
    values = yaml.safe_load(head) | {"figures": figures}
    body = re.sub(f"{BEGIN}.*{END}", f"{BEGIN}\n{table(figures)}\n{END}", body, flags=re.DOTALL)
    write_atomically(card, f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n{body}")


def main() -> None:
    """Measure, print, and write into the card."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("backbone", help="as for --backbone of vlprompt")
    parser.add_argument("--photos", type=Path, metavar="ROOT", help="folder with caltech-101, imagenette and clothing")
    parser.add_argument("--card", type=Path, help="model card to write the figures into")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_teacher_model(options.backbone)
    figures = {} if isinstance(model, Lite0) else on_openmoji(model)
    if options.photos:
        figures |= on_photographs(model, options.photos)
        figures |= {} if isinstance(model, Lite0) else probe_on_caltech(options.backbone, options.photos)
    print(table(figures))
    if options.card:
        into_card(options.card, figures)


if __name__ == "__main__":
    main()
