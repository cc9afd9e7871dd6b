"""The fixed regions of a bank: drawn from an image's content, stored in 16 bits, cropped as they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from numpy.typing import NDArray

from vlprompt.data.images import random_regions

_ONE = 65535  # stands for 1 in stored regions

Share = Annotated[float, Gt(0), Le(1)]
Ratio = Annotated[float, Gt(0), Le(1000)]


@dataclass(frozen=True)
class Crops:
    """How the regions of an image are drawn: a random resized crop and a flip (FDBPL's numbers)."""

    min_scale: Share = 0.08
    """Smallest share of the image's area."""
    max_scale: Share = 0.936
    """Largest share of the image's area."""
    min_ratio: Ratio = 3 / 4
    """Smallest width / height."""
    max_ratio: Ratio = 4 / 3
    """Largest width / height."""
    flip: Annotated[float, Ge(0), Le(1)] = 0.5
    """Probability of a horizontal flip."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 1
    """Decides the regions, together with the image's content."""

    def draw(self, content: str, width: int, height: int, n: int) -> NDArray[np.uint16]:
        """The n regions of an image of this content (a hash in hexadecimal) and size in pixels: stored form, [n, 5].

        They depend on nothing else; the first of many are the few.
        """
        rng = np.random.default_rng([self.seed, int(content, 16)])
        scale, ratio = (self.min_scale, self.max_scale), (self.min_ratio, self.max_ratio)
        return stored(random_regions(rng, width, height, n, scale, ratio, self.flip))


def stored(regions: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Regions [n, 5] in 16 bits a number; the whole pixels of a box stay the same in images of less than 65,535."""
    return np.rint(regions * _ONE).astype(np.uint16)


def restored(regions: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Stored regions as :data:`vlprompt.data.images.Region`."""
    return regions / _ONE
