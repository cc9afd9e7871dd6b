"""The time that training takes: measured, and ended when there is none left."""

from __future__ import annotations

import time

from vlprompt.errors import VlpromptError
from vlprompt.training.loop import Training
from vlprompt.training.watchers import Watcher


class Clock(Watcher):
    """When each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def start(self, training: Training) -> None:
        """Steps begin."""
        self.began = time.monotonic()

    def step(self) -> None:
        """One is done."""
        self.times.append(time.monotonic())


class OutOfTimeError(VlpromptError):
    """A method took longer than was estimated."""


class Deadline(Watcher):
    """Stops a run that takes too long; its last checkpoint is where the next comparison goes on."""

    def __init__(self, at: float) -> None:
        self.at = at

    def view(self, done: int, of: int) -> None:
        """The frozen tower has seen a view."""
        self.step()

    def step(self) -> None:
        """A step is done."""
        if time.monotonic() > self.at:
            raise OutOfTimeError("it took longer than was estimated, and was stopped")
