"""A run's training in its folder: log, tracker and checkpoint after each epoch, from wherever the last one left it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Protocol

from vlprompt.bank.records import Bank
from vlprompt.config.schema import RunConfig
from vlprompt.config.teacher import Teacher
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import Split
from vlprompt.errors import ConfigError
from vlprompt.files import write_atomically
from vlprompt.methods import Method
from vlprompt.training.checkpoints import History, load_checkpoint, save_checkpoint
from vlprompt.training.distributed import Processes
from vlprompt.training.evaluate import EvaluationImages, evaluate
from vlprompt.training.interrupt import deferred_interrupt
from vlprompt.training.loop import EpochLog, Training, training_views
from vlprompt.training.trackers import NoTracker, Tracker, find_tracker


class Progress(Protocol):
    """Told how a run goes; the command line draws it."""

    def start(self, steps: int, epochs: int, done: int = 0) -> None:
        """Training begins: ``steps`` in each of ``epochs``, of which ``done`` were done before."""

    def step(self) -> None:
        """A step is done."""

    def epoch(self, log: EpochLog, val_accuracy: float | None) -> None:
        """An epoch is done."""


class Silent:
    """Progress that nobody watches."""

    def start(self, steps: int, epochs: int, done: int = 0) -> None:
        """Training begins."""

    def step(self) -> None:
        """A step is done."""

    def epoch(self, log: EpochLog, val_accuracy: float | None) -> None:
        """An epoch is done."""


class Session:
    """Trains a method by gradient steps; the first of several processes keeps the folder ``run``.

    Raises ConfigError before anything is written if the settings do not fit the data or the processes.
    """

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        method: Method,
        split: Split,
        processes: Processes,
        reader: ImageReader,
        progress: Progress,
        teacher: Teacher | None = None,
        bank: Bank | None = None,
    ) -> None:
        if config.train.select == "val" and not split.val:
            raise ConfigError("train.select = val: there are no val images to select on")
        self.config, self.run, self.method, self.split = config, run, method, split
        self.writes, self.progress = processes.first, progress
        paths, labels = split.paths("train"), split.labels("train")
        views = training_views(method, paths, labels, config.data, config.seed, reader, teacher, bank)
        self.training = Training(method, views, config.optim, config.train, processes, teacher)
        self.val = EvaluationImages(split.paths("val"), [item.label for item in split.val], reader=reader)
        self.open_tracker = find_tracker(config.train.report_to if self.writes else None)
        self.tracker: Tracker = NoTracker()
        self.history = History()
        self.began = time.monotonic()
        self.earlier = 0.0
        """Seconds spent by the run before it was resumed."""

    def train(self, say: Callable[[str], None]) -> History:
        """Train from the run's last checkpoint, or from the start, to the end; Ctrl-C saves and is raised then."""
        training, steps = self.training, len(self.training.views)
        self.history = load_checkpoint(self.run, training)
        self.earlier = self.history.seconds
        self._write_log()
        if training.epoch or training.step:
            say(f"resumed after epoch {training.epoch}" + f" and {training.step} steps" * (training.step > 0))
        self.progress.start(steps, training.config.epochs, training.epoch * steps + training.step)
        if self.writes:
            self.tracker = self.open_tracker(self.run, self.config.to_dict(), training.epoch)
        with closing(self.tracker), deferred_interrupt(insist=training.processes.size == 1) as asked:
            if not training.run(self.progress.step, self._after_epoch, asked):
                self._save()
                raise KeyboardInterrupt
        if asked():  # during the last validation
            raise KeyboardInterrupt
        if self.config.train.select == "val":
            self.method.load_state_dict(self.history.best)
        return self.history

    def _after_epoch(self, log: EpochLog) -> None:
        history, method, accuracy = self.history, self.method, None
        if self.split.val:
            method.eval()
            accuracy = evaluate(method, self.val, self.split.class_names).accuracy
            method.train()
        row = {"epoch": log.epoch + 1, "lr": log.lr, **log.losses, "val_accuracy": accuracy}
        history.rows.append(row)
        if self.config.train.select == "val" and accuracy is not None and accuracy > history.best_accuracy:
            history.best_epoch, history.best_accuracy = log.epoch + 1, accuracy
            history.best = {k: v.detach().clone() for k, v in method.state_dict().items()}
        self._write_log()
        self._save()
        self.tracker.epoch(log.epoch + 1, {k: v for k, v in row.items() if k != "epoch" and v is not None})
        self.progress.epoch(log, accuracy)

    def _write_log(self) -> None:
        if self.writes:
            write_atomically(self.run / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.history.rows))

    def _save(self) -> None:
        self.history.seconds = self.earlier + time.monotonic() - self.began
        if self.writes:
            save_checkpoint(self.run, self.training, self.history)
