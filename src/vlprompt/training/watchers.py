"""Who is told how training goes: a bar, a log, a checkpoint, TensorBoard, Weights & Biases, or the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlprompt.documents import read_sealed, write_sealed
from vlprompt.errors import ConfigError, one_line

if TYPE_CHECKING:
    from vlprompt.training.loop import Training


@dataclass(frozen=True)
class EpochLog:
    """What one epoch gave: the mean of each loss term, the learning rate at its end, and percent on val images."""

    epoch: int
    """From 0."""
    lr: float
    losses: dict[str, float]
    val_accuracy: float | None = None

    def row(self) -> dict[str, Any]:
        """The epoch's line of log.jsonl, where epochs count from 1."""
        return {"epoch": self.epoch + 1, "lr": self.lr, **self.losses, "val_accuracy": self.val_accuracy}


class Watcher:
    """Told how training goes; those who need it save their state in ``epoch``, where training could resume."""

    def view(self, done: int, of: int) -> None:
        """The frozen tower has seen so many of so many random views of every image, before training begins."""

    def start(self, training: Training) -> None:
        """Training begins, or goes on: ``training.epoch`` epochs and ``training.step`` steps are done."""

    def step(self) -> None:
        """A step is done."""

    def epoch(self, log: EpochLog) -> None:
        """An epoch is done."""

    def close(self) -> None:
        """There is no more, whatever the reason."""


class EachEpoch(Watcher):
    """Calls a function with each epoch's log."""

    def __init__(self, function: Callable[[EpochLog], object]) -> None:
        self.function = function

    def epoch(self, log: EpochLog) -> None:
        """Call it."""
        self.function(log)


class TensorBoard(Watcher):
    """Event files in the run folder's ``tensorboard/``; a resumed run hides what it does again."""

    def __init__(self, module: Any, run: Path, config: Mapping[str, Any]) -> None:
        self.module, self.run = module, run
        self.writer: Any = None

    def start(self, training: Training) -> None:
        """Open the file of this part of the run."""
        self.writer = self.module.SummaryWriter(str(self.run / "tensorboard"), purge_step=training.epoch + 1)

    def epoch(self, log: EpochLog) -> None:
        """A point of each curve."""
        for name, value in _curves(log).items():
            self.writer.add_scalar(name, value, log.epoch + 1)

    def close(self) -> None:
        """Write what is left."""
        if self.writer is not None:
            self.writer.close()


class WandB(Watcher):
    """A run of project ``vlprompt``; ``wandb.json`` in the run folder keeps its id for a resumed run."""

    def __init__(self, module: Any, run: Path, config: Mapping[str, Any]) -> None:
        self.module, self.folder, self.config = module, run, config
        self.run: Any = None

    def start(self, training: Training) -> None:
        """Begin the run there, or go on with it."""
        file = self.folder / "wandb.json"
        try:
            known = read_sealed(file, dict[str, str])["id"] if file.is_file() else None
        except (KeyError, ValueError, OSError) as error:
            raise ConfigError(f"cannot read {file}: {one_line(error)}") from None
        name, config = self.folder.name, dict(self.config)
        self.run = self.module.init(
            project="vlprompt", name=name, dir=str(self.folder), config=config, id=known, resume="allow"
        )
        write_sealed(file, {"id": self.run.id})

    def epoch(self, log: EpochLog) -> None:
        """A point of each curve."""
        self.run.log(_curves(log), step=log.epoch + 1)

    def close(self) -> None:
        """Finish the run there."""
        if self.run is not None:
            self.run.finish()


def _curves(log: EpochLog) -> dict[str, float]:
    return {name: value for name, value in log.row().items() if name != "epoch" and value is not None}


SERVICES: dict[str, tuple[str, type[TensorBoard | WandB]]] = {
    "tensorboard": ("torch.utils.tensorboard", TensorBoard),
    "wandb": ("wandb", WandB),
}


def find_service(service: str, run: Path, config: Mapping[str, Any]) -> Watcher:
    """The watcher that reports a run there; ConfigError if it is not installed."""
    name, cls = SERVICES[service]
    try:
        module = import_module(name)
    except ImportError:
        raise ConfigError(
            f"train.report_to = {service}: it is not installed (pip install 'vlprompt[{service}]')"
        ) from None
    return cls(module, run, config)
