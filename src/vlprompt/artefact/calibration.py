"""Probabilities that one can act on: a temperature, sets with a coverage, and a threshold for images of no class.

All of it is fitted on logits of held-out images, and kept in the artefact. MAPIE computes the same sets, but predicts
with an object of its own, which has no safe form to store: here it is one order statistic of stored scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vlprompt.documents import reader
from vlprompt.errors import ConfigError
from vlprompt.methods import Method
from vlprompt.methods.zero_shot import frozen_class_features

NEIGHBOURS = 5
"""K of distance-aware calibration."""
SAME = 0.05
"""Text features nearer than this are those of a class that was tuned on."""

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "maximum probability": lambda logits: logits.double().softmax(-1).amax(-1),
    "energy": lambda logits: logits.double().logsumexp(-1),
}
"""How well an image fits any class, [n] of calibrated logits [n, C]: higher is better."""


@dataclass(frozen=True)
class Calibration:
    """What was fitted on held-out images of a model's own classes."""

    temperature: float
    """What logits are divided by."""
    misfit: tuple[tuple[float, ...], ...]
    """1 − the calibrated probability of the right class of each image, sorted, by class: what sets are made from."""
    score: str
    """Which of ``SCORES`` tells images of no class."""
    threshold: float | None
    """An image that scores less is of none of the classes; None where there were too few images for one."""
    kept: float
    """Share of the images of known classes that the threshold leaves, at least."""
    temperature_note: str = ""
    """Why there was no temperature to fit."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0) or self.score not in SCORES:
            raise ValueError(f"calibration with temperature = {self.temperature} and score = '{self.score}'")

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Calibration:
        """The calibration of :meth:`to_dict`; raises ValueError for others."""
        return reader(Calibration).validate_python(dict(values))

    def logits(self, method: Method, logits: Tensor, class_names: Sequence[str]) -> Tensor:
        """Calibrated logits [n, C] in float64: of class names not tuned on too, by distance-aware calibration."""
        return logits.double() * self.scale(method, logits, class_names)[:, None]

    def scale(self, method: Method, logits: Tensor, class_names: Sequence[str]) -> Tensor:
        """What logits [n, C] are multiplied by, [n] in float64."""
        factors = class_factors(method, class_names)
        if factors is None:
            return logits.new_full((len(logits),), 1 / self.temperature, dtype=torch.double)
        return _taken_for(logits, factors.double().cpu()) / self.temperature

    def sets(self, probabilities: Tensor, coverage: float, by_class: bool = False) -> Tensor:
        """Which classes are in each image's set, [n, C]: the right one for a share ``coverage`` of images, at least.

        Split conformal prediction with the score 1 − p (Sadinle et al., JASA 2019): sets are as small as can be, and
        may be empty. ``by_class`` promises the coverage for the images of every class that has images enough; the other
        classes are left at the common quantile. Raises ConfigError for a coverage outside 0–1.
        """
        check_share("coverage", coverage)
        common = quantile([s for scores in self.misfit for s in scores], coverage)
        own = [quantile(scores, coverage) if by_class and enough(len(scores), coverage) else common
               for scores in self.misfit]  # fmt: skip
        # What was stored had been rounded: an image at the quantile itself is in.
        return 1 - probabilities <= torch.tensor(own, dtype=torch.double) + 1e-9

    def none_of_these(self, calibrated: Tensor) -> Tensor | None:
        """Which images are of none of the model's classes, [n] of calibrated logits [n, C]; None without threshold."""
        return None if self.threshold is None else SCORES[self.score](calibrated) < self.threshold


def probabilities(
    calibration: Calibration | None, method: Method, logits: Tensor, class_names: Sequence[str]
) -> tuple[Tensor, Tensor | None]:
    """What a model says of images, in float64: [n, C], calibrated if it is; and which images are of none, [n].

    The second is None without a threshold, and for other classes than the model's own.
    """
    logits = logits.double()
    if calibration is None:
        return logits.softmax(-1), None
    logits = calibration.logits(method, logits, class_names)
    own = tuple(class_names) == method.class_names
    return logits.softmax(-1), calibration.none_of_these(logits) if own else None


def check_share(name: str, value: float) -> None:
    """Raise ConfigError if it is not between 0 and 1."""
    if not 0 < value < 1:
        raise ConfigError(f"{name} = {value:g} (allowed: more than 0 and less than 1)")


def enough(n: int, coverage: float) -> bool:
    """Whether n images are enough for a quantile below which a share ``coverage`` of further images falls."""
    return _rank(n, coverage) <= n


def quantile(scores: Sequence[float], coverage: float) -> float:
    """The ⌈(n + 1) · coverage⌉-th smallest of n scores, which a further one exceeds with 1 − coverage at most."""
    return sorted(scores)[_rank(len(scores), coverage) - 1] if enough(len(scores), coverage) else math.inf


def _rank(n: int, coverage: float) -> int:
    return math.ceil((n + 1) * coverage - 1e-9)  # (9 + 1) · 0.9 is a hair above 9 for some decimals


def fit_temperature(logits: Tensor, labels: Tensor) -> tuple[float, str]:
    """The temperature with the smallest cross-entropy of logits [n, C] (Guo et al., ICML 2017), and why if none has.

    The loss is convex in s = 1 / T, and its slope, the mean of E_p[z] − z_y, rises from its value at s = 0. Where no
    image is told wrongly the temperature is 1; where logits say no more than chance, so high that they decide nothing.
    """
    z = logits.double()
    z = z - z.gather(1, labels[:, None])  # z_y is 0

    def slope(s: float) -> float:
        return ((s * z).softmax(-1) * z).sum(-1).mean().item()

    if bool((z.amax(-1) <= 0).all()):
        return 1.0, "every held-out image is classified right: any lower temperature fits better"
    if slope(0.0) >= 0:
        widest = (z.amax(-1) - z.amin(-1)).max().item()
        return max(100 * widest, 1.0), "the logits say no more than chance: every class is made about as likely"
    low, high = 0.0, 1.0
    while slope(high) < 0:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high), ""


def fit_calibration(
    logits: Tensor, labels: Tensor, kept: float = 0.95, novel: Tensor | None = None
) -> tuple[Calibration, dict[str, float]]:
    """Temperature, sets and threshold from logits [n, C] and labels [n] of held-out images of known classes.

    The score of the threshold is the one that tells images of known classes from others better: from ``novel`` logits
    [m, C], or else from images of each half of the classes when that half is left out. Returns the area under the ROC
    curve of each score too, nothing where there are less than four classes and no novel images.
    """
    check_share("kept", kept)
    temperature, note = fit_temperature(logits, labels)
    z = logits.double() / temperature
    wrong = 1 - z.softmax(-1).gather(1, labels[:, None])[:, 0]
    misfit = tuple(tuple(sorted(round(s, 9) for s in wrong[labels == c].tolist())) for c in range(z.shape[1]))
    areas = novelty_areas(z, labels, None if novel is None else novel.double() / temperature)
    score = max(areas, key=areas.__getitem__) if areas else next(iter(SCORES))
    ranked = sorted(SCORES[score](z).tolist())
    place = math.floor((len(ranked) + 1) * (1 - kept) + 1e-9)
    threshold = ranked[place - 1] if place else None
    return Calibration(temperature, misfit, score, threshold, kept, note), areas


def novelty_areas(logits: Tensor, labels: Tensor, novel: Tensor | None = None) -> dict[str, float]:
    """How well each of ``SCORES`` tells images of known classes from others; see :func:`fit_calibration`."""
    if novel is not None and len(novel):
        return {name: auroc(score(logits), score(novel)) for name, score in SCORES.items()}
    n, half = logits.shape[1], (logits.shape[1] + 1) // 2
    if n < 4:
        return {}
    parts = []
    for left in (torch.arange(n) < half, torch.arange(n) >= half):
        known = left[labels]
        if known.any() and not known.all():
            parts.append((logits[known][:, left], logits[~known][:, left]))
    if not parts:
        return {}
    return {name: sum(auroc(s(known), s(other)) for known, other in parts) / len(parts) for name, s in SCORES.items()}


def auroc(known: Tensor, novel: Tensor) -> float:
    """The chance that one of ``known`` [n] is above one of ``novel`` [m], ties counting half."""
    ranked = known.sort().values
    below = torch.searchsorted(ranked, novel, right=False) + torch.searchsorted(ranked, novel, right=True)
    return 1 - below.double().mean().item() / (2 * len(known))


def dac_factors(base_frozen: Tensor, frozen: Tensor, base_tuned: Tensor, tuned: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """What distance-aware calibration multiplies logits by where a class is predicted, [K].

    From text features of unit length of the classes tuned on, [C, E], and of those scored, [K, E], of the frozen
    backbone and of the tuned model: of a class that tuning moved away from those tuned on, it is less sure. Official
    code: ml-stat-Sustech/CLIP_Calibration (Wang et al., ICML 2024), which divides by k even if there are fewer.
    """

    def nearest(a: Tensor, b: Tensor) -> Tensor:
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").sort(-1).values[:, :k]

    moved = nearest(tuned, base_tuned)
    factors = (-moved.sum(-1) / k).exp() / (-nearest(frozen, base_frozen).sum(-1) / k).exp()
    return torch.where(moved[:, 0] < SAME, 1.0, factors)


def dac(logits: Tensor, factors: Tensor) -> Tensor:
    """All logits [n, K] of an image times the factor [K] of the class that it is taken for."""
    return logits * _taken_for(logits, factors)[:, None]


def _taken_for(logits: Tensor, factors: Tensor) -> Tensor:
    return factors[logits.argmax(-1)]


@torch.no_grad()
def class_factors(method: Method, class_names: Sequence[str]) -> Tensor | None:
    """The factors of class names [K]; None for a model's own, and where its class features are no text features."""
    names = tuple(class_names)
    if names == method.class_names or method.image_dependent or not method.takes_new_classes:
        return None
    tuned, base_tuned = method.kept_class_features(names), method.kept_class_features(method.class_names)
    frozen, base_frozen = (
        frozen_class_features(method.backbone, of, [method.template]) for of in (names, method.class_names)
    )
    if tuned.shape != frozen.shape or not torch.allclose(tuned.norm(dim=-1), tuned.new_ones(len(tuned)), atol=1e-3):
        return None
    return dac_factors(base_frozen, frozen, base_tuned.to(frozen.dtype), tuned.to(frozen.dtype))
