"""Images of a comparison: what the frozen tower says of one is computed once, whichever folds it is in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vlprompt.bench.shared import SharedImages
from vlprompt.data.batches import evaluation_batches
from vlprompt.data.reading import ImageReader
from vlprompt.methods import Method
from vlprompt.training.evaluate import EvaluationImages


class SeenOnce(SharedImages):
    """Shared images whose features are kept in ``seen``, by model and path."""

    def __init__(
        self,
        images: Sequence[Path],
        labels: Sequence[int],
        reader: ImageReader,
        *,
        seen: dict[str, dict[Path, Tensor]],
        folder: Path,
    ) -> None:
        super().__init__(images, labels, reader, folder=folder)
        self.paths, self.seen = images, seen

    def frozen(self, method: Method) -> Tensor:
        """Normalised features from the frozen image tower, [n, E]; by image, where a bench keeps them by list."""
        return EvaluationImages.frozen(self, method)

    def _once(self, key: str, method: Method, encode: Callable[[Tensor], Tensor]) -> Tensor:
        known = self.seen.setdefault(key, {})
        if missing := [path for path in self.paths if path not in known]:
            batches = evaluation_batches(missing, method.backbone.preprocess, self.reader)
            known.update(zip(missing, torch.cat([encode(images) for images in batches]), strict=True))
        return torch.stack([known[path] for path in self.paths])
