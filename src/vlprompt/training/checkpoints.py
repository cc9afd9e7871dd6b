"""Checkpoints: everything that a training run needs to continue as if it had never stopped.

One file, ``checkpoints/last.safetensors``, replaced as a whole: tensors, and the numbers as JSON in its header.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vlprompt.documents import parse_json
from vlprompt.errors import ArtefactError, one_line
from vlprompt.files import is_unfinished, write_atomically
from vlprompt.training.loop import LossScale, Training
from vlprompt.training.watchers import EpochLog, Watcher
from vlprompt.version import __version__

FORMAT_VERSION = 3
"""3 added the settings' fingerprint; earlier ones, of before any release, are refused."""
MOST, SELDOM = 50, 10.0
"""Of more epochs than these not each writes a checkpoint, unless seconds lie between: heads have hundreds of them."""


@dataclass
class History:
    """What a run has to show for the epochs it has done."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """The lines of log.jsonl."""
    seconds: float = 0.0
    """Spent until the last checkpoint."""
    earlier: float = 0.0
    """Of these, before the run was last resumed."""
    best_epoch: int = 0
    """Epoch (from 1) with the best val accuracy; 0 while there is none."""
    best_accuracy: float = -1.0
    best: dict[str, Tensor] = field(default_factory=dict)
    """The method's state after the best epoch, if it may be selected."""

    @property
    def kept(self) -> dict[str, Any] | None:
        """The row of the epoch whose prompts are kept: the best if it is selected, or the last."""
        return self.rows[(self.best_epoch or len(self.rows)) - 1] if self.rows else None


class Keeper(Watcher):
    """Keeps a run's folder while it trains: log.jsonl, the checkpoint, and the best epoch's prompts if they count.

    Begins where the run's last checkpoint is. ``settings`` is the configuration's fingerprint; ``writes`` is true in
    the first of several processes.
    """

    def __init__(self, run: Path, training: Training, settings: str, selects: bool, writes: bool) -> None:
        self.run, self.training, self.settings, self.selects, self.writes = run, training, settings, selects, writes
        self.history = load_checkpoint(run, training, settings)
        self.history.earlier, self.began = self.history.seconds, time.monotonic()
        self.written = self.began

    def start(self, training: Training) -> None:
        """The log ends where the checkpoint does."""
        self._write_log()

    def epoch(self, log: EpochLog) -> None:
        """A line in the log, and a checkpoint where one is due."""
        history = self.history
        history.rows.append(log.row())
        if self.selects and log.val_accuracy is not None and log.val_accuracy > history.best_accuracy:
            history.best_epoch, history.best_accuracy = log.epoch + 1, log.val_accuracy
            history.best = {k: v.detach().clone() for k, v in self.training.method.state_dict().items()}
        epochs, done = self.training.config.epochs, log.epoch + 1
        if done % max(epochs // MOST, 1) == 0 or done == epochs or time.monotonic() - self.written > SELDOM:
            self._write_log()
            self.save()

    def save(self) -> None:
        """Write a checkpoint."""
        self.written = time.monotonic()
        self.history.seconds = self.history.earlier + time.monotonic() - self.began
        if self.writes:
            save_checkpoint(self.run, self.training, self.settings, self.history)

    def _write_log(self) -> None:
        if self.writes:
            write_atomically(self.run / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.history.rows))


def checkpoint_file(run: Path) -> Path:
    """Where a run's checkpoint lies."""
    return run / "checkpoints" / "last.safetensors"


def save_checkpoint(run: Path, training: Training, settings: str, history: History) -> None:
    """Write the state of training; the checkpoint before is there until this one is complete."""
    groups = {
        "method": training.method.state_dict(),
        "extra": training.method.training_state(),
        "optimizer": training.optimizer.tensors(),
        "best": history.best,
    }
    tensors = {
        f"{group}.{k}": v.detach().cpu().contiguous() for group, state in groups.items() for k, v in state.items()
    }
    numbers = {
        "format_version": FORMAT_VERSION,
        "vlprompt_version": __version__,
        "settings_fingerprint": settings,
        "backbone_fingerprint": training.method.backbone.fingerprint,
        "teacher_fingerprint": training.teacher and training.teacher.fingerprint,
        "views_fingerprint": training.views.fingerprint,
        "texts_fingerprint": training.method.texts_fingerprint,
        "epoch": training.epoch,
        "step": training.step,
        "sums": training.sums,
        "loss_scale": asdict(training.scale),
        "history": {k: v for k, v in vars(history).items() if k not in ("best", "earlier")},
    }
    text = json.dumps(numbers)
    write_atomically(checkpoint_file(run), save(tensors, {"checkpoint": text, "sha256": _checksum(tensors, text)}))


def load_checkpoint(run: Path, training: Training, settings: str) -> History:
    """Put training where the run's checkpoint says, if there is one; returns the run's history.

    Raises ArtefactError if the checkpoint cannot be read, comes from another version, or does not fit.
    """
    file = checkpoint_file(run)
    if not file.is_file():
        return History()
    method, device = training.method, training.method.backbone.device
    try:
        with safe_open(file, "pt") as f:
            metadata = f.metadata() or {}
            # copies: tensors of an open file would change, or fault, with it
            tensors = {k: f.get_tensor(k).clone() for k in f.keys()}  # noqa: SIM118
        numbers = parse_json(metadata["checkpoint"])
        if numbers["format_version"] > FORMAT_VERSION:
            raise ArtefactError(
                f"{file} has format_version {numbers['format_version']}; "
                f"this vlprompt reads up to {FORMAT_VERSION}: update it"
            )
        if numbers["format_version"] < FORMAT_VERSION:
            raise ArtefactError(
                f"{file} has format_version {numbers['format_version']}, of before 0.1: begin the run anew"
            )
        if metadata["sha256"] != _checksum(tensors, metadata["checkpoint"]):
            raise ArtefactError(f"checkpoint {file} is damaged: its content is not what was saved")
        if numbers["settings_fingerprint"] != settings:
            raise ArtefactError(f"{run} was begun with other settings than its config.yaml has now")
        if numbers["backbone_fingerprint"] != method.backbone.fingerprint:
            raise ArtefactError(f"{run} was begun on other weights than '{method.backbone.name}' has now")
        if (teacher := training.teacher) and numbers["teacher_fingerprint"] != teacher.fingerprint:
            raise ArtefactError(f"{run} was begun with another teacher than '{teacher.name}' is now")
        if numbers.get("views_fingerprint") != training.views.fingerprint:
            raise ArtefactError(f"{run} was begun with another region bank than it has now")
        if numbers.get("texts_fingerprint") != method.texts_fingerprint:
            raise ArtefactError(f"{run} was begun with other class descriptions, or another prior, than it has now")
        method.load_state_dict(_group(tensors, "method"))
        method.load_training_state({k: v.to(device) for k, v in _group(tensors, "extra").items()})
        training.optimizer.load_tensors(_group(tensors, "optimizer"))
        training.epoch, training.step, training.sums = numbers["epoch"], numbers["step"], numbers["sums"]
        training.scale = LossScale(**numbers["loss_scale"])
        return History(**numbers["history"], best=_group(tensors, "best"))
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError, OSError) as error:
        raise ArtefactError(f"cannot read checkpoint {file}: {one_line(error)}") from None


def read_method_state(run: Path) -> dict[str, Tensor]:
    """The method's state in a run's checkpoint: that of the best epoch where it is selected, or else the last.

    Raises ArtefactError if it cannot be read.
    """
    file = checkpoint_file(run)
    try:
        with safe_open(file, "pt") as f:
            metadata = f.metadata() or {}
            tensors = {k: f.get_tensor(k).clone() for k in f.keys()}  # noqa: SIM118
        if metadata["sha256"] != _checksum(tensors, metadata["checkpoint"]):
            raise ArtefactError(f"checkpoint {file} is damaged: its content is not what was saved")
    except (KeyError, SafetensorError, OSError) as error:
        raise ArtefactError(f"cannot read checkpoint {file}: {one_line(error)}") from None
    return _group(tensors, "best") or _group(tensors, "method")


def remove_unfinished(run: Path) -> None:
    """Take away files that a killed process was writing."""
    for folder in (run, run / "checkpoints"):
        for file in filter(is_unfinished, folder.glob(".*")):
            file.unlink(missing_ok=True)


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    """SHA-256 over all that a checkpoint holds."""
    digest = sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _group(tensors: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{group}."): v for k, v in tensors.items() if k.startswith(f"{group}.")}
