"""Training on what the frozen image tower says of fixed random views: each is seen by the tower once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from vlprompt.backbones.backbone import unit
from vlprompt.config.schema import DataConfig
from vlprompt.data.batches import Batch, batches_of, epoch_order
from vlprompt.methods import Can, Method
from vlprompt.training.evaluate import Crop, EvaluationImages


class FrozenViews:
    """Batches of frozen features of the first V random views of each image, those of :class:`TrainingViews`.

    An epoch takes each image once, in one view, the next in the next epoch; or, where the method ``mixes_views``, as
    many samples drawn from the V·n of all views together. A view is made when it is first needed.
    """

    fingerprint: str | None = None

    def __init__(
        self,
        images: EvaluationImages,
        method: Method,
        data: DataConfig,
        seed: int,
        extra: Mapping[str, Tensor] | None = None,
    ) -> None:
        assert isinstance(data.views, int)
        self.images, self.method, self.seed, self.extra = images, method, seed, extra or {}
        self.n_views, self.balanced, self.drop_last = data.views, data.balanced, data.drop_last
        self.crop = Crop(seed, data.min_scale, data.flip)
        self.batch_size, self.mixed = data.batch_size, method.mixes_views
        self.labels = images.labels
        self.projected = Can.USE_FROZEN_FEATURES in method.config.can
        self._made: dict[int | None, Tensor] = {}

    def __len__(self) -> int:
        """Batches in an epoch."""
        return batches_of(len(self.labels), self.batch_size, self.drop_last)

    @property
    def images_per_batch(self) -> int:
        """Samples in every batch."""
        return min(self.batch_size, len(self.labels) * (self.n_views if self.mixed else 1))

    def pooled(self, k: int) -> Tensor:
        """What the tower gives of view k before its projection, [n, D]."""
        return self.images.random_view(self.method, k, self.crop)

    def all(self, tell: Callable[[int, int], object]) -> Tensor:
        """Features of all views, not normalised, [V, n, E]; ``tell`` hears how many of how many are there."""
        views = []
        for k in range(self.n_views):
            views.append(self.method.backbone.project(self.pooled(k)))
            tell(k + 1, self.n_views)
        return torch.stack(views)

    def epoch(self, epoch: int, start: int = 0, shard: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Batches of one epoch, from batch ``start`` on; ``shard`` as in :class:`TrainingViews`."""
        features = self._features(epoch)
        labels = self.labels.repeat(len(features) // len(self.labels))
        order, (k, n) = epoch_order(labels, self.seed, epoch, self.balanced), shard
        for i in range(start, len(self)):
            drawn = order[i * self.batch_size : (i + 1) * self.batch_size]
            rows = torch.from_numpy(np.array_split(drawn, n)[k] if k < len(drawn) else drawn[:1])
            read, images = features[rows.to(features.device)], rows % len(self.labels)
            own = {name: values[images] for name, values in self.extra.items()}
            if self.projected:
                yield Batch(None, labels[rows], read, extra=own, whole=len(drawn))
            else:
                yield Batch(None, labels[rows], extra={**own, "pooled": read}, whole=len(drawn))

    def _features(self, epoch: int) -> Tensor:
        """What the method reads of an epoch's view, or of all: normalised features, or those before the projection."""
        key = None if self.mixed else (epoch + self.method.first_view) % self.n_views
        if key not in self._made:
            views = [self.pooled(k) for k in (range(self.n_views) if key is None else [key])]
            read = [unit(self.method.backbone.project(view)) for view in views] if self.projected else views
            self._made[key] = torch.cat(read)
        return self._made[key]
