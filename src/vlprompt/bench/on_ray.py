"""Runs as tasks of Ray, on this machine or the machines of a cluster; needs the extra ``ray``."""

from __future__ import annotations

import math
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from vlprompt.bench.launch import Launch, Outcome, Process
from vlprompt.bench.protocols import Run
from vlprompt.errors import ConfigError, one_line


@contextmanager
def connected() -> Iterator[None]:
    """Join the cluster that the environment variable RAY_ADDRESS names, or start a Ray of this machine; leave it again.

    Raises ConfigError if Ray is not installed or cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("engine = ray needs Ray: pip install 'vlprompt[ray]'") from None
    address = os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray of our own reports to nobody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what later versions of Ray do
    with redirect_stdout(sys.stderr):  # Ray prints messages of its own, and standard output is for results
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # Ray raises many kinds, plain Exception among them
            raise ConfigError(f"cannot use Ray ({address}): {one_line(error)}") from None
        try:
            yield
        finally:
            ray.shutdown()


def launcher(runs: Sequence[Run], out: Path, workers: int | None) -> tuple[Launch, int]:
    """What begins a run on Ray, and how many are at work at once: ``workers``, or as many as there are CPUs (GPUs).

    A run takes one CPU, and if it asks for ``cuda`` a GPU or, where ``workers`` are more than GPUs, its share of one.
    All machines must see the same files at the same places. Raises ConfigError for GPUs by number, or that Ray does not
    have.
    """
    import ray

    resources = ray.cluster_resources()
    gpus = _gpus_of_a_run(runs, int(resources.get("GPU", 0)), workers)
    at_once = workers or max(1, int(resources.get("GPU" if gpus else "CPU", 1)))
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_task)
    given = out.absolute(), Path.cwd(), at_once
    return lambda run, place: Task(task.remote(run.to_json(), *given)), at_once


class Task:
    """A run at work in a process of Ray."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def outcome(self) -> Outcome:
        """What became of the run; of one whose process died, why."""
        import ray

        try:
            return ray.get(self.reference)
        except ray.exceptions.TaskCancelledError:  # it had not begun
            return Outcome(interrupted=True)
        except ray.exceptions.RayError as error:
            failure = f"its process ended: {type(error).__name__}: {one_line(error, 300)}"
            return Outcome(failure=failure, memory_full=isinstance(error, ray.exceptions.OutOfMemoryError))

    def interrupt(self) -> None:
        """Let it save a checkpoint, or not begin."""
        import ray

        ray.cancel(self.reference)

    def kill(self) -> None:
        import ray

        ray.cancel(self.reference, force=True)


def _task(run: str, out: Path, folder: Path, at_once: int) -> Outcome:
    """What one of Ray's processes does: the run in a process of our own; paths of the bench start from ``folder``."""
    if not folder.is_dir():
        return Outcome(failure=f"{folder}: there is no such folder on machine {socket.gethostname()}")
    process = Process(run, out, min(at_once, os.cpu_count() or 1), folder=folder)  # a machine has no more than CPUs
    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(process.outcome)
        while True:
            try:
                return ended.result(timeout=0.5)  # Ray's cancel is heard in between
            except TimeoutError:
                continue
            except KeyboardInterrupt:
                process.interrupt()


def _gpus_of_a_run(runs: Sequence[Run], gpus: int, workers: int | None) -> float:
    """What a run takes of a GPU: all of it, or with more workers than GPUs 1 / (workers of one GPU)."""
    devices = {run.config.train.device for run in runs}
    if numbered := sorted(device for device in devices if device.startswith("cuda:")):
        raise ConfigError(f"train.device = {numbered[0]}: Ray chooses which GPU, write cuda")
    if "cuda" not in devices:
        return 0
    if not gpus:
        raise ConfigError("train.device = cuda: Ray knows no GPU")
    # Ray counts in ten-thousandths; rounded down, so that all fit.
    return math.floor(10_000 / max(1, math.ceil((workers or gpus) / gpus))) / 10_000
