"""A small training run for the tests of the loop: random pictures, the tiny backbone, the real command line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.kit import REPOSITORY, TINY
from vlprompt.config.schema import RunConfig, build_config
from vlprompt.methods import find_method
from vlprompt.training.watchers import Watcher

TEACHER = "mini"
"""Reads larger images than the tiny backbone, and other ones of the classes' texts."""
RUN_FILES = {
    "config.yaml", "environment.json", "split.json", "log.jsonl", "metrics.json",
    "config.json", "prompts.safetensors", "README.md",
}  # fmt: skip
"""What a finished run holds, besides ``checkpoints`` where there were epochs."""
CLASSES = ("cat", "dog", "sea horse")


def make_pictures(folder: Path, train: int = 4, val: int = 2, size: int = 32) -> Path:
    """``train`` and ``val`` random pictures of each of three classes."""
    rng = np.random.default_rng(0)
    for part, n in (("train", train), ("val", val)):
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder


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


def environment(**more: str) -> dict[str, str]:
    """One thread, and this checkout's vlprompt."""
    path = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def vlprompt(*given: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "vlprompt", *given]
    return subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=120)


def processes(command: list[str], size: int = 2) -> list[tuple[int, str, str]]:
    """Run a Python command in several processes as torchrun starts them: exit code, output and errors of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in map(str, range(size)):
        ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(size), "MASTER_PORT": port}
        env = environment(**ours, MASTER_ADDR="127.0.0.1")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, *command], env=env, text=True, **pipes))
    out = [p.communicate(timeout=120) for p in started]
    return [(p.returncode, *o) for p, o in zip(started, out, strict=True)]


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
