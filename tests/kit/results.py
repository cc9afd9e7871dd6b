"""Made-up results of a bench."""

from __future__ import annotations

import json
from pathlib import Path

from vlprompt.bench.results import Row

PLAIN = Row(
    "base-to-novel", "dtd", "coop", "coop", "mini", 16, 1, "dtd", "base", "test",
    10, 50.0, 50.0, 0.1, 5, 8, 1.5, 0.1, "f", "0.1.0+abc",
)  # fmt: skip


def figures(place: Path, name: str, seed: int, accuracy: dict[str, float], backbone: str = "mini") -> None:
    run = place / "base-to-novel" / "dtd" / name / backbone / "shots_16" / f"seed_{seed}"
    run.mkdir(parents=True)
    measured = [{"data": "dtd", "classes": "base", "split": "test", "per_class": accuracy}]
    content = {"format_version": 1, "data": "dtd", "name": name, "measured": measured}
    (run / "figures.json").write_text(json.dumps(content))
