"""The training loop: batches in, the method's named loss terms summed, checked and logged, gradient steps out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlprompt.bank.records import Bank
from vlprompt.bank.use import bank_views
from vlprompt.config.schema import DataConfig, OptimConfig, TrainConfig
from vlprompt.config.teacher import Teacher
from vlprompt.data.images import ImageSource
from vlprompt.data.reading import ImageReader
from vlprompt.data.views import BankViews, TrainingViews, Views
from vlprompt.errors import ConfigError, VlpromptError
from vlprompt.methods import Batch, Method
from vlprompt.training.distributed import Processes
from vlprompt.training.recorded import Gradients, Recorded, Terms
from vlprompt.training.schedule import build_optimizer, learning_rate


@dataclass(frozen=True)
class EpochLog:
    """What one epoch gave: the mean of each loss term, and the learning rate at its end."""

    epoch: int
    lr: float
    losses: dict[str, float]


def training_views(
    method: Method,
    images: Sequence[ImageSource],
    labels: Sequence[int],
    data: DataConfig,
    seed: int,
    reader: ImageReader,
    teacher: Teacher | None = None,
    bank: Bank | None = None,
) -> TrainingViews | BankViews:
    """The views that a method, and its teacher if it has one, are trained on: a region bank's, or else random ones."""
    if bank:
        return bank_views(bank, method, images, labels, data, seed, reader)
    return TrainingViews(
        images,
        labels,
        method.backbone.preprocess,
        data.batch_size,
        seed,
        min_scale=data.min_scale,
        reader=reader,
        teacher=teacher.backbone.preprocess if teacher else None,
        patch_size=method.patch_size,
    )


@dataclass
class LossScale:
    """What losses are multiplied by so that gradients do not vanish in fp16 towers; 1, and fixed, in others.

    The rule and numbers of ``torch.amp.GradScaler``: from 2¹⁶, halved when a gradient overflows (that step is left
    out), doubled after 2000 steps without. Here it acts on gradients before a method combines them.
    """

    value: float = 1.0
    good_steps: int = 0

    def update(self, finite: bool) -> None:
        """A step's gradients were finite, or not."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good_steps == 2000:
            self.value, self.good_steps = self.value * 2, 0


class Training:
    """A method in training: its optimiser, its loss scale, and how far it has come.

    What it does next depends on the parameters, the optimiser's state, the loss scale, ``epoch``, ``step`` and
    ``sums`` alone: random numbers are seeded anew for every step.
    """

    def __init__(
        self,
        method: Method,
        views: TrainingViews | BankViews,
        optim: OptimConfig,
        config: TrainConfig,
        processes: Processes | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.method, self.views, self.optim, self.config = method, views, optim, config
        self.processes, self.teacher = processes or Processes(), teacher
        self.optimizer = build_optimizer(method, optim)
        self.scaled = method.backbone.dtype == torch.float16
        self.scale = LossScale(2.0**16 if self.scaled else 1.0)
        self.recorded = self._recorded() if config.graphs else None
        self.epoch = 0
        """Epochs done."""
        self.step = 0
        """Steps done in the epoch after them."""
        self.sums: dict[str, float] = {}
        """Sums of the loss terms over these steps."""
        self._check_parts()
        if config.text_chunk is not None and method.needs_all_texts:
            raise ConfigError(f"train.text_chunk: method '{method.name}' encodes the texts of all classes at once")
        method.text_chunk = config.text_chunk

    def run(
        self,
        after_step: Callable[[], None] = lambda: None,
        after_epoch: Callable[[EpochLog], None] = lambda log: None,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train to the last epoch; False if asked to stop before (any process may be), after a whole step.

        ``after_epoch`` sees the method as it would be saved then. Raises VlpromptError naming term (or parameter),
        epoch and step if a loss (or gradient) is not finite.
        """
        self.method.train()
        shard = self.processes.rank, self.processes.size
        while self.epoch < self.config.epochs:
            for views in self.views.epoch(self.epoch, self.step, shard):
                self._set_rate()
                stopping = self._step(views, asked_to_stop)
                self.step += 1
                after_step()
                if stopping:
                    return False
            self.method.after_epoch(self.epoch, self.config.epochs)
            lr = learning_rate(self.epoch + 1 - 1 / len(self.views), self.config.epochs, self.optim)
            log = EpochLog(self.epoch, lr, {term: value / len(self.views) for term, value in self.sums.items()})
            self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
            after_epoch(log)
        self.method.eval()
        return True

    def _set_rate(self) -> None:
        lr = learning_rate(self.epoch + self.step / len(self.views), self.config.epochs, self.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["share"]

    def _step(self, views: Views, asked_to_stop: Callable[[], bool]) -> bool:
        """One optimiser step on this process's share of a batch; whether any process was asked to stop."""
        parts, device = self.config.accumulate, self.method.backbone.device
        seed = np.random.SeedSequence([self.views.seed, self.epoch, self.step, self.processes.rank])
        split = [repeat(None, parts) if tensor is None else tensor.to(device).tensor_split(parts) for tensor in views]
        of_parts = [Views._make(part) for part in zip(*split, strict=True)]
        if self.recorded:
            for part in of_parts:
                self.recorded.prepare(part)
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))
        terms: Terms = {}
        gradients: Gradients = {}
        for part in of_parts:
            new_terms, new_gradients = (self.recorded or self._compute)(part)
            for term, value in new_terms.items():
                terms[term] = terms.get(term, 0) + value
            for name, new in new_gradients.items():
                old = gradients.get(name)
                gradients[name] = [a + b for a, b in zip(old, new, strict=True)] if old else new
        stop = torch.tensor(float(asked_to_stop()), dtype=torch.double, device=device)
        sums = torch.stack([*terms.values(), stop])
        self.processes.sum_([sums])
        self.processes.sum_([g for group in gradients.values() for g in group])
        *values, stopping = sums.tolist()
        self._log(dict(zip(terms, values, strict=True)))
        self._apply(gradients)
        return bool(stopping)

    def _compute(self, views: Views) -> tuple[Terms, Gradients]:
        """The loss terms of a part of a batch, weighted by its share of it, and their gradients (scaled in fp16)."""
        backbone = self.method.backbone
        # On a CPU, in bf16, the fused kernel's backward pass takes twice as long as that of plain products.
        slow = backbone.device.type == "cpu" and backbone.dtype == torch.bfloat16
        with sdpa_kernel(SDPBackend.MATH) if slow else nullcontext():
            batch = self._batch(views)
            weight = len(batch.labels) / self.views.images_per_batch
            losses = {term: weight * value for term, value in self.method.losses(batch).items()}
            gradients = self.method.gradients({term: self.scale.value * value for term, value in losses.items()})
        return {term: value.detach().double() for term, value in losses.items()}, gradients

    def _recorded(self) -> Recorded:
        """Raises ConfigError where a step cannot be recorded: it changes, or there is no GPU to record it on."""
        if self.method.backbone.device.type != "cuda":
            raise ConfigError(f"train.graphs needs a GPU (train.device = {self.config.device})")
        if self.scaled:
            raise ConfigError("train.graphs records no fp16 steps, whose loss scale changes (allowed: fp32, bf16)")
        if self.method.changes_texts:
            raise ConfigError(f"train.graphs: method '{self.method.name}' compares other classes in every step")
        return Recorded(self._compute)

    def _batch(self, views: Views) -> Batch:
        """What the method needs about a batch's views: what did not come with them is computed."""
        needs, backbone, images = self.method.needs, self.method.backbone, views.images
        frozen, taught = views.frozen_image_features, views.teacher_probabilities
        if frozen is not None:
            frozen = frozen.to(torch.promote_types(backbone.dtype, frozen.dtype))
        elif "frozen_image_features" in needs and images is not None:
            frozen = backbone.encode_images(images)
        if "teacher_probabilities" in needs and self.teacher and images is not None:
            taught = self.teacher.probabilities(images if views.teacher_images is None else views.teacher_images)
        return Batch(images, views.labels, frozen, taught, views.second_view)

    def _log(self, losses: dict[str, float]) -> None:
        for term, value in losses.items():
            if not math.isfinite(value):
                raise VlpromptError(f"training stopped: loss term '{term}' is {value} in {self._where()}")
            self.sums[term] = self.sums.get(term, 0.0) + value

    def _apply(self, gradients: dict[str, list[Tensor]]) -> None:
        """Step along the combined gradient; in fp16 only if nothing overflowed."""
        bad = self._first_not_finite(gradients)
        if bad and (not self.scaled or self.scale.value < 1):
            raise VlpromptError(f"training stopped: the gradient of '{bad}' is not finite in {self._where()}")
        if not bad:
            unscaled = {name: [g / self.scale.value for g in group] for name, group in gradients.items()}
            for p, g in zip(self.method.learned(), self.method.combine(unscaled), strict=True):
                p.grad = g
            self.optimizer.step()
        if self.scaled:
            self.scale.update(finite=not bad)

    def _first_not_finite(self, gradients: dict[str, list[Tensor]]) -> str | None:
        flat = torch.cat([g.flatten() for group in gradients.values() for g in group])
        if flat.isfinite().all():
            return None
        names = [name for name, p in self.method.named_parameters() if p.requires_grad]
        return next(
            name for group in gradients.values() for name, g in zip(names, group, strict=True) if not g.isfinite().all()
        )

    def _where(self) -> str:
        return f"epoch {self.epoch + 1}, step {self.step + 1}"

    def _check_parts(self) -> None:
        """Every part of a batch must hold an image, and the loss must be a mean over images."""
        size, parts = self.processes.size, self.config.accumulate
        if size * parts == 1:
            return
        how = " and ".join([f"{size} processes"] * (size > 1) + [f"train.accumulate = {parts}"] * (parts > 1))
        if self.method.couples_batch:
            raise ConfigError(f"method '{self.method.name}' compares the images of a batch: it does not allow {how}")
        if self.views.images_per_batch < size * parts:
            raise ConfigError(f"a batch of {self.views.images_per_batch} images is too small for {how}")
