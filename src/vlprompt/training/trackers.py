"""Each epoch's figures to TensorBoard or Weights & Biases, for those who have them installed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from vlprompt.errors import ConfigError
from vlprompt.files import write_atomically


class Tracker(Protocol):
    """Takes the figures of a run's epochs."""

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Figures of ``epoch`` (from 1) by name."""

    def close(self) -> None:
        """There are no more."""


class NoTracker:
    """For runs that report to none."""

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class TensorBoard:
    """Event files in the run folder's ``tensorboard/``; a resumed run hides what it does again."""

    def __init__(self, module: Any, run: Path, config: Mapping[str, Any], done: int) -> None:
        self.writer = module.SummaryWriter(str(run / "tensorboard"), purge_step=done + 1)

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """A point of each curve."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class WandB:
    """A run of project ``vlprompt``; ``wandb.json`` in the run folder keeps its id for a resumed run."""

    def __init__(self, module: Any, run: Path, config: Mapping[str, Any], done: int) -> None:
        file = run / "wandb.json"
        known = json.loads(file.read_text("utf-8"))["id"] if file.is_file() else None
        self.run = module.init(
            project="vlprompt", name=run.name, dir=str(run), config=dict(config), id=known, resume="allow"
        )
        write_atomically(file, json.dumps({"id": self.run.id}))

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """A point of each curve."""
        self.run.log(dict(values), step=epoch)

    def close(self) -> None:
        """Finish the run there."""
        self.run.finish()


SERVICES: dict[str, tuple[str, type[TensorBoard | WandB]]] = {
    "tensorboard": ("torch.utils.tensorboard", TensorBoard),
    "wandb": ("wandb", WandB),
}


def find_tracker(service: str | None) -> Callable[[Path, Mapping[str, Any], int], Tracker]:
    """What opens a tracker for (run folder, configuration, epochs done); ConfigError if it is not installed."""
    if service is None:
        return lambda run, config, done: NoTracker()
    name, cls = SERVICES[service]
    try:
        module = import_module(name)
    except ImportError:
        raise ConfigError(
            f"train.report_to = {service}: it is not installed (pip install 'vlprompt[{service}]')"
        ) from None
    return lambda run, config, done: cls(module, run, config, done)
