"""What papers report (``published.yaml``), to stand beside what is measured here in the same setting."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from vlprompt.documents import parse_yaml

_KNOWN = parse_yaml(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
SETTING: str = _KNOWN["setting"]
"""What the figures are of; whether a row has the official settings is not known here."""
ELEVEN = frozenset(_KNOWN["average"])
"""The data sets of base-to-novel averages."""


@dataclass(frozen=True)
class Published:
    """A figure in percent, and the paper that reports it."""

    mean: float | None = None
    source: str = ""

    def __str__(self) -> str:
        return "–" if self.mean is None else f"{self.mean:.2f}"


def published(
    protocol: str, backbone: str, split: str, shots: int, data: Collection[str]
) -> dict[str, dict[str, Published]]:
    """Figures by column and method for a table of these data sets; none where there are no comparable ones."""
    found: dict[str, dict[str, Published]] = {}
    if (protocol, split, shots) != tuple(map(_KNOWN.get, ("protocol", "split", "shots"))):
        return found
    if backbone not in _KNOWN["backbones"]:
        return found
    shown = "average" if set(data) == ELEVEN else next(iter(data)) if len(data) == 1 else None
    for method, column, on, percent, source in _KNOWN["figures"]:
        if on == shown:
            found.setdefault(column, {})[method] = Published(percent, _KNOWN["sources"][source])
    return found
