"""Tuning pays in the demo; a file of its own, as the other demo tests show it fewer classes and fewer epochs."""

from pathlib import Path

from tests.kit.marks import slow
from vlprompt.config.schema import build_config
from vlprompt.data.datasets import load_dataset
from vlprompt.data.reading import ImageReader
from vlprompt.demo import demo
from vlprompt.training.evaluate import EvaluationImages, evaluate
from vlprompt.training.run import train


@slow
def test_tuning_pays_on_photographs(tmp_path: Path):
    """On the test photographs, with the demo's own seed: what the demo is there to show."""
    data = "clothing-demo"
    split, show = load_dataset(data).split, demo.SHOWS[data]
    halves = {half: split.subset(half) for half in ("base", "novel")}
    images = {
        half: EvaluationImages(part.paths("test"), part.labels("test"), ImageReader(0)) for half, part in halves.items()
    }

    def accuracies(name: str) -> dict[str, float]:
        given = {"data.name": data, "data.classes": "base", "data.shots": show.shots, "data.workers": 0}
        method, _ = train(build_config(name, overrides={**given, **show.methods[name]}), tmp_path / name)
        return {half: evaluate(method, images[half], part.class_names).accuracy for half, part in halves.items()}

    before, after = accuracies(demo.BEFORE), accuracies("promptsrc")
    gain = {half: after[half] - before[half] for half in halves}
    assert gain["base"] >= 15, gain
    assert gain["novel"] >= -3, gain
