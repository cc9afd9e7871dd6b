"""A small training run for the tests of the loop: the tiny backbone, the real command line."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.kit import TINY
from tests.kit.pictures import CLASSES
from vlprompt.config.schema import RunConfig, build_config
from vlprompt.errors import Interrupted
from vlprompt.methods import find_method
from vlprompt.training.run import train
from vlprompt.training.watchers import Watcher

TEACHER = "mini"
"""Reads larger images than the tiny backbone, and other ones of the classes' texts."""
RUN_FILES = {
    "config.yaml", "environment.json", "split.json", "log.jsonl", "metrics.json",
    "config.json", "prompts.safetensors", "README.md",
}  # fmt: skip
"""What a finished run holds, besides ``checkpoints`` where there were epochs."""


def configured(pictures: Path, method: str = "coop", **more: Any) -> RunConfig:
    """A run of three epochs on the tiny backbone, in batches of 4, without warm-up."""
    given = {"data.name": str(pictures), "data.batch_size": 4, "data.workers": 0, "train.epochs": 3}
    given |= {"backbone": str(TINY), "optim.warmup_epochs": 0}
    if "teacher_probabilities" in find_method(method).needs:
        given["teacher.backbone"] = TEACHER
    return build_config(method, overrides={**given, **more})


def arguments(method: str, pictures: Path, out: Path, *more: str) -> list[str]:
    """``vlprompt train`` on the tiny backbone, in batches of 4, without warm-up."""
    given = ["data.batch_size=4", "data.workers=0", "optim.warmup_epochs=0"]
    return ["train", method, str(pictures), "--backbone", str(TINY), "--out", str(out), *given, *more]


def described(folder: Path, **changes: object) -> Path:
    """A file with two descriptions of each class of the pictures."""
    file = folder / "texts.json"
    texts = {name.replace(" ", "_"): [f"{name} is a thing.", f"{name}, seen from far."] for name in CLASSES}
    file.write_text(json.dumps(texts | changes), "utf-8")
    return file


def prompts(run: Path) -> dict[str, Tensor]:
    """The tuned prompts of a finished run."""
    return load_file(run / "prompts.safetensors")


def log(run: Path) -> list[dict]:
    """The rows of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


class StopsAfter(Watcher):
    """Watcher that interrupts as Ctrl-C does, in the n-th step."""

    def __init__(self, n: int) -> None:
        self.n = n

    def start(self, training):
        steps = len(training.views)
        self.started = steps, training.config.epochs, training.epoch * steps + training.step

    def step(self):
        self.n -= 1
        if not self.n:
            signal.raise_signal(signal.SIGINT)


def check_stopped(config: RunConfig, folder: Path, after: int) -> dict[str, Tensor]:
    """A run stopped after so many steps and resumed has the prompts and the log of a whole one: ``folder/whole``.

    The stopped one is ``folder/stopped``; returns the prompts.
    """
    with pytest.raises(Interrupted):
        train(config, folder / "stopped", [StopsAfter(after)])
    train(config, folder / "stopped", resume=True)
    whole, resumed = prompts(folder / "whole"), prompts(folder / "stopped")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert log(folder / "whole") == log(folder / "stopped")
    return whole
