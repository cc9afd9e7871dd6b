"""A run's progress on standard error: a bar on a terminal, a line an epoch elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlprompt.training.loop import Training
from vlprompt.training.watchers import EpochLog, Watcher


class Bar(Watcher):
    """Draws a training run."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True)
        self.epochs = 0

    def view(self, done: int, of: int) -> None:
        """The frozen tower has seen a random view of every image."""
        self.console.print(f"frozen features of view {done}/{of}")

    def start(self, training: Training) -> None:
        """Training begins."""
        self.epochs, steps = training.config.epochs, len(training.views)
        self.bar.start()
        done = training.epoch * steps + training.step
        self.task = self.bar.add_task("", total=steps * self.epochs, completed=done)

    def step(self) -> None:
        """A step is done."""
        self.bar.advance(self.task)

    def epoch(self, log: EpochLog) -> None:
        """An epoch is done."""
        terms = "  ".join(f"{term} {value:.3f}" for term, value in log.losses.items())
        val = "" if log.val_accuracy is None else f"  val {log.val_accuracy:.1f} %"
        self.console.print(f"epoch {log.epoch + 1}/{self.epochs}  lr {log.lr:.2g}  {terms}{val}")

    def close(self) -> None:
        """Training is over."""
        self.bar.stop()


class CountBar:
    """Draws a count on a terminal; silent elsewhere."""

    def __init__(self, what: str) -> None:
        self.console = Console(stderr=True)
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True)

    def __enter__(self) -> CountBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        self.bar.stop()

    def __call__(self, done: int, of: int) -> None:
        """So many are done, of so many."""
        if not self.bar.tasks:
            self.bar.start()
            self.bar.add_task("", total=of)
        self.bar.update(self.bar.tasks[0].id, completed=done)
