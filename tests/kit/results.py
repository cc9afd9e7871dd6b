"""Made-up results of a bench."""

from __future__ import annotations

from pathlib import Path

from tests.kit import sealed
from vlprompt.bench.figures import FORMAT_VERSION
from vlprompt.bench.results import Row

PLAIN = Row(
    "base-to-novel", "dtd", "coop", "coop", "mini", 16, 1, "dtd", "base", "test",
    10, 50.0, 50.0, 0.1, 5, 8, 1.5, 0.1, "f", "0.1.0+abc",
)  # fmt: skip


def figures(place: Path, name: str, seed: int, accuracy: dict[str, float], backbone: str = "mini") -> None:
    run = place / "base-to-novel" / "dtd" / name / backbone / "shots_16" / f"seed_{seed}"
    run.mkdir(parents=True)
    code = "0.1.0+abc"
    measured = [{"data": "dtd", "classes": "all", "split": "test", "n": 10, "per_class": accuracy, "code": code}]
    measured[0]["seconds"] = 0.1
    content = {"format_version": FORMAT_VERSION, "protocol": "base-to-novel", "data": "dtd", "name": name}
    content |= {"method": name, "backbone": backbone, "shots": 16, "seed": seed, "settings": "f", "code": code}
    content |= {"epochs": 5, "trainable_parameters": 8, "seconds": 1.5}
    sealed.write(run / "figures.json", {**content, "measured": measured})
