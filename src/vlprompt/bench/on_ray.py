"""Runs as tasks of Ray, on this machine or the machines of a cluster; needs the extra ``ray``."""

from __future__ import annotations

import math
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from vlprompt.bench.pool import Outcome, attempt
from vlprompt.bench.protocols import Run
from vlprompt.data.reading import share_memory
from vlprompt.errors import ConfigError, one_line


@contextmanager
def connected() -> Iterator[None]:
    """Join the cluster that the environment variable RAY_ADDRESS names, or start a Ray of this machine; leave it again.

    Raises ConfigError if Ray is not installed or cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("--engine ray needs Ray: pip install 'vlprompt[ray]'") from None
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


def outcomes(runs: Sequence[Run], out: Path, workers: int | None) -> Iterator[Outcome]:
    """The outcome of each run as it ends; after one that was interrupted no other begins.

    A run takes one CPU, and if it asks for ``cuda`` a GPU or, where ``workers`` are more than GPUs, its share of one.
    At most ``workers`` are at work, or as many as Ray has CPUs (GPUs) for. All machines must see the same files at the
    same places. Raises ConfigError for GPUs by number, or that Ray does not have.
    """
    import ray

    resources = ray.cluster_resources()
    share = _gpu_share(runs, int(resources.get("GPU", 0)), workers)
    at_once = workers or max(1, int(resources.get("GPU" if share else "CPU", 1)))
    return _outcomes(runs, out.absolute(), at_once, share)


def _outcomes(runs: Sequence[Run], out: Path, at_once: int, gpus: float) -> Iterator[Outcome]:
    import ray

    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_task)
    waiting, busy, stopping = list(runs), dict[ray.ObjectRef, Run](), False
    try:
        while True:
            while waiting and not stopping and len(busy) < at_once:
                run = waiting.pop(0)
                busy[task.remote(run, out, Path.cwd(), at_once)] = run
            if not busy:
                break
            try:
                ended, _ = ray.wait(list(busy))
            except KeyboardInterrupt:
                stopping = True
                for reference in busy:  # each saves a checkpoint and says that it was interrupted
                    ray.cancel(reference)
                continue
            for reference in ended:
                outcome = _outcome(reference, busy.pop(reference))
                stopping = stopping or outcome.interrupted
                yield outcome
        if waiting:  # those at work ended before they heard of it
            yield Outcome(waiting[0], interrupted=True)
    finally:
        for reference in busy:
            ray.cancel(reference, force=True)


def _gpu_share(runs: Sequence[Run], gpus: int, workers: int | None) -> float:
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


def _task(run: Run, out: Path, place: Path, at_once: int) -> Outcome:
    """What one of Ray's processes does for a run; ``place`` is the folder that paths of the bench start from."""
    import torch

    torch.set_num_threads(1)
    share_memory(min(at_once, os.cpu_count() or 1))  # a machine has no more of them than CPUs
    try:
        os.chdir(place)
    except OSError as error:
        return Outcome(run, failure=f"{place}: {error.strerror} on machine {socket.gethostname()}")
    return attempt(run, out)


def _outcome(ended: object, run: Run) -> Outcome:
    """What became of a run; of one whose process died, why."""
    import ray

    try:
        return ray.get(ended)
    except ray.exceptions.TaskCancelledError:  # it had not begun
        return Outcome(run, interrupted=True)
    except ray.exceptions.RayError as error:
        reason = one_line(error, 300)
        return Outcome(run, failure=f"its process ended: {type(error).__name__}: {reason}")
