"""What papers report, to stand beside what is measured here in the same setting."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A figure in percent, and the paper that reports it."""

    mean: float | None = None
    source: str = ""

    def __str__(self) -> str:
        return "–" if self.mean is None else f"{self.mean:.2f}"


ELEVEN = frozenset(
    (
        "imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft",
        "sun397", "dtd", "eurosat", "ucf101",
    )
)  # fmt: skip
"""The data sets of base-to-novel averages."""

BASE_TO_NOVEL_HM: dict[str, Published] = {
    "zero_shot": Published(71.70, "Zhou et al., CVPR 2022"),
    "coop": Published(71.66, "Zhou et al., CVPR 2022"),
    "cocoop": Published(75.83, "Zhou et al., CVPR 2022"),
    "prograd": Published(76.16, "Yao et al., CVPR 2023"),
    "vpt": Published(76.68, "Khattak et al., CVPR 2023, as deep vision prompting"),
    "kgcoop": Published(77.00, "Yao et al., CVPR 2023"),
    "ivlp": Published(77.51, "Khattak et al., ICCV 2023"),
    "maple": Published(78.55, "Khattak et al., CVPR 2023"),
    "promptsrc": Published(79.97, "Khattak et al., ICCV 2023"),
    "drople": Published(82.10, "arXiv 2512.07234, with a language-model prior that is not here"),
}
"""Harmonic mean of base and novel accuracy over :data:`ELEVEN`, and who reports it: CLIP ViT-B/16, 16 shots."""

_DROPLE = "arXiv 2512.07234, with a language-model prior that is not here"
DROPLE_BASE_MEAN = Published(86.12, _DROPLE)
DROPLE_BASE: dict[str, Published] = {
    "imagenet": Published(78.24, _DROPLE),
    "caltech101": Published(98.72, _DROPLE),
    "oxford_pets": Published(96.38, _DROPLE),
    "fgvc_aircraft": Published(49.26, _DROPLE),
    "dtd": Published(85.43, _DROPLE),
    "ucf101": Published(88.16, _DROPLE),
}
"""DroPLe's base accuracy on the data sets of which it is known; its mean is over :data:`ELEVEN`."""

SETTING = "Published with OpenAI's CLIP ViT-B/16, 16 shots and the paper's own settings, on test images"
"""What the figures are of; whether a row has the official settings is not known here."""

OPENAI_VIT_B16 = frozenset(
    (
        "openai-clip-vit-base-patch16", "clip-vit-base-patch16", "open_clip-ViT-B-16-openai",
        "open_clip-ViT-B-16-quickgelu-openai",
    )
)  # fmt: skip
"""OpenAI's weights as tables name them: from the hub, in a folder that is called as there, from open_clip."""


def published(
    protocol: str, backbone: str, split: str, shots: int, data: Collection[str]
) -> dict[str, dict[str, Published]]:
    """Figures by column and method for a table of these data sets; none where there are no comparable ones."""
    if (protocol, split, shots) != ("base-to-novel", "test", 16) or backbone not in OPENAI_VIT_B16:
        return {}
    if set(data) == ELEVEN:
        return {"base": {"drople": DROPLE_BASE_MEAN}, "HM": BASE_TO_NOVEL_HM}
    known = DROPLE_BASE.get(next(iter(data))) if len(data) == 1 else None
    return {"base": {"drople": known}} if known else {}
