"""The training loop: batches in, the method's named loss terms summed, checked and logged, gradient steps out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlprompt.bank.views import BankViews
from vlprompt.config.schema import OptimConfig, TrainConfig, check_capabilities, how_split
from vlprompt.config.teacher import Teacher
from vlprompt.data.batches import Batch, TrainingViews
from vlprompt.errors import ConfigError, VlpromptError
from vlprompt.methods import Method
from vlprompt.training.attention_drop import check_attention, losses_of
from vlprompt.training.distributed import Processes
from vlprompt.training.frozen import FrozenViews
from vlprompt.training.graphs import Gradients, Graphs, Terms
from vlprompt.training.schedule import build_optimizer, learning_rate
from vlprompt.training.watchers import EpochLog, Watcher


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
        views: TrainingViews | BankViews | FrozenViews,
        optim: OptimConfig,
        config: TrainConfig,
        processes: Processes | None = None,
        teacher: Teacher | None = None,
        classes_per_batch: int | None = None,
        validate: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.method, self.views, self.optim, self.config = method, views, optim, config
        self.processes, self.teacher = processes or Processes(), teacher
        self.classes_per_batch, self.validate = classes_per_batch, validate
        self.optimizer = build_optimizer(method, optim)
        self.scaled = method.backbone.dtype == torch.float16
        self.scale = LossScale(2.0**16 if self.scaled else 1.0)
        self.graphs = self._graphs() if config.graphs else None
        self.epoch = 0
        """Epochs done."""
        self.step = 0
        """Steps done in the epoch after them."""
        self.sums: dict[str, float] = {}
        """Sums of the loss terms over these steps."""
        check_capabilities(method.name, method.config.can, config, classes_per_batch, self.processes.size)
        check_attention(method, config)
        self._check_size()
        method.text_chunk = config.text_chunk

    def run(self, watchers: Sequence[Watcher] = (), asked_to_stop: Callable[[], bool] = lambda: False) -> bool:
        """Train to the last epoch; False if asked to stop before (any process may be), after a whole step.

        ``watchers`` see the method as it would be saved then. Raises VlpromptError naming term (or parameter), epoch
        and step if a loss (or gradient) is not finite.
        """
        with ExitStack() as stack:
            for watcher in watchers:
                stack.callback(watcher.close)
                watcher.start(self)
            return self._run(watchers, asked_to_stop)

    def _run(self, watchers: Sequence[Watcher], asked_to_stop: Callable[[], bool]) -> bool:
        self.method.train()
        shard = self.processes.rank, self.processes.size
        while self.epoch < self.config.epochs:
            for batch in self.views.epoch(self.epoch, self.step, shard):
                self._set_rate()
                stopping = self._step(batch, asked_to_stop)
                self.step += 1
                for watcher in watchers:
                    watcher.step()
                if stopping:
                    return False
            self.method.after_epoch(self.epoch, self.config.epochs)
            lr = self._rate(self.epoch + 1 - 1 / len(self.views))
            losses = {term: value / len(self.views) for term, value in self.sums.items()}
            self.method.eval()
            log = EpochLog(self.epoch, lr, losses, self.validate() if self._validates() else None)
            self.method.train()
            self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
            for watcher in watchers:
                watcher.epoch(log)
        self.method.eval()
        return True

    def _validates(self) -> bool:
        """Whether this epoch is measured on the val images: each is where one is chosen on them."""
        config, done = self.config, self.epoch + 1
        every = 1 if config.select == "val" or self.method.keeps_best else config.val_every
        return done == config.epochs or (every > 0 and done % every == 0)

    def _rate(self, epoch: float) -> float:
        return learning_rate(epoch, self.config.epochs, self.optim, len(self.views))

    def _set_rate(self) -> None:
        lr = self._rate(self.epoch + self.step / len(self.views))
        for group in self.optimizer.param_groups:
            group["lr"] = max(lr * group["share"], self.optim.min_lr * group["floor"])

    def _step(self, batch: Batch, asked_to_stop: Callable[[], bool]) -> bool:
        """One optimiser step on this process's share of a batch; whether any process was asked to stop."""
        parts, device = self.config.accumulate, self.method.backbone.device
        # Not carried from step to step: a run that goes on from a checkpoint draws what it would have drawn.
        seed = np.random.SeedSequence([self.views.seed, self.epoch, self.step, self.processes.rank])
        of_parts = [part for part in batch.map(lambda t: t.to(device)).parts(parts) if len(part.labels)]
        if self.graphs:
            for part in of_parts:
                self.graphs.prepare(part)
        # Not torch.manual_seed: where no GPU is used it formats a traceback, at every step, for one that may come.
        torch.default_generator.manual_seed(drawn := int(seed.generate_state(1, np.uint64)[0]))
        if device.type == "cuda":
            torch.cuda.manual_seed_all(drawn)
        terms: Terms = {}
        gradients: Gradients = {}
        for part in of_parts:
            new_terms, new_gradients = (self.graphs or self._compute)(part)
            for term, value in new_terms.items():
                terms[term] = terms.get(term, 0) + value
            for name, new in new_gradients.items():
                old = gradients.get(name)
                gradients[name] = [a + b for a, b in zip(old, new, strict=True)] if old else new
        # Who was asked to stop says so with the losses: all processes stop after the same step.
        stop = torch.tensor(float(asked_to_stop()), dtype=torch.double, device=device)
        sums = torch.stack([*terms.values(), stop])
        self.processes.sum_([sums])
        self.processes.sum_([g for group in gradients.values() for g in group])
        *values, stopping = sums.tolist()
        self._log(dict(zip(terms, values, strict=True)))
        self._apply(gradients)
        return bool(stopping)

    def _compute(self, views: Batch) -> tuple[Terms, Gradients]:
        """The loss terms of a part of a batch, weighted by its share of it, and their gradients (scaled in fp16)."""
        backbone = self.method.backbone
        # On a CPU, in bf16, the fused kernel's backward pass takes twice as long as that of plain products.
        slow = backbone.device.type == "cpu" and backbone.dtype == torch.bfloat16
        with sdpa_kernel(SDPBackend.MATH) if slow else nullcontext():
            batch = self._batch(views)
            whole = batch.whole or self.views.images_per_batch
            # A process that has no image of a last, incomplete batch was given one to compute with: it counts nothing.
            weight = len(batch.labels) / whole * (self.processes.rank < whole)
            losses = {term: weight * value for term, value in losses_of(self.method, batch, self.config).items()}
            gradients = self.method.gradients({term: self.scale.value * value for term, value in losses.items()})
        return {term: value.detach().double() for term, value in losses.items()}, gradients

    def _graphs(self) -> Graphs:
        """Raises ConfigError where a step cannot be recorded: it changes, or there is no GPU to record it on."""
        if self.method.backbone.device.type != "cuda":
            raise ConfigError(f"train.graphs needs a GPU (train.device = {self.config.device})")
        if self.scaled:
            raise ConfigError("train.graphs records no fp16 steps, whose loss scale changes (allowed: fp32, bf16)")
        return Graphs(self._compute)

    def _batch(self, views: Batch) -> Batch:
        """The views with what the method needs about them: what did not come with them is computed."""
        needs, backbone, images = self.method.needs, self.method.backbone, views.images
        frozen, taught = views.frozen_image_features, views.teacher_probabilities
        if frozen is not None:
            frozen = frozen.to(torch.promote_types(backbone.dtype, frozen.dtype))
        elif "frozen_image_features" in needs and images is not None:
            frozen = backbone.encode_images(images)
        if self.teacher and taught is None and images is not None:
            taught = self.teacher.probabilities(images if views.teacher_images is None else views.teacher_images)
        batch = replace(views, frozen_image_features=frozen, teacher_probabilities=taught)
        return batch.comparing(self.classes_per_batch)

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

    def _check_size(self) -> None:
        """Every part of a batch must hold an image."""
        n, size = self.views.images_per_batch, self.processes.size
        if n < size * self.config.accumulate:
            raise ConfigError(f"a batch of {n} images is too small for {how_split(self.config, size)}")
