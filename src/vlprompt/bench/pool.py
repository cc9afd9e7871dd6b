"""Runs one after another in this process, or several at once in processes of one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from vlprompt.bench.protocols import Run
from vlprompt.bench.runs import do_run
from vlprompt.data.reading import share_memory
from vlprompt.errors import Interrupted, VlpromptError, one_line


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run: Run
    figures: dict[str, Any] | None = None
    """Of one that is done."""
    failure: str = ""
    """Of one that is not, in a line."""
    trace: str = ""
    """Where a failure that is no bad input came from."""
    interrupted: bool = False
    memory_full: bool = False
    """It failed for that, or its process was killed, as systems do then."""


def attempt(run: Run, out: Path) -> Outcome:
    """Do a run; what it raises becomes its outcome."""
    try:
        return Outcome(run, do_run(run, out))
    except (KeyboardInterrupt, Interrupted):
        return Outcome(run, interrupted=True)
    except VlpromptError as error:
        return Outcome(run, failure=one_line(error, most=None))
    except Exception as error:  # the rest of the sweep goes on whatever happens in one run
        reason = one_line(f"{type(error).__name__}: {error}", most=None)
        if _says_memory_is_full(error):
            return Outcome(run, failure=reason, memory_full=True)
        return Outcome(run, failure=reason, trace=traceback.format_exc())


def _says_memory_is_full(error: Exception) -> bool:
    import torch

    known = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
    return known or "DefaultCPUAllocator" in str(error)  # for which PyTorch has no type


def outcomes(
    runs: Sequence[Run], out: Path, workers: int, say: Callable[[str], None] = lambda text: None
) -> Iterator[Outcome]:
    """The outcome of each run as it ends; after one that was interrupted no other begins.

    A run for which memory does not do begins again, with one run fewer at once from then on; only where it was at work
    alone has it failed.
    """
    if workers == 1 or len(runs) < 2:
        for run in runs:
            outcome = attempt(run, out)
            yield outcome
            if outcome.interrupted:
                return
        return
    yield from _in_processes(runs, out, min(workers, len(runs)), say)


class _Worker:
    """A process that does one run after another, each as it is told to; number ``place`` of ``workers``, from 0."""

    def __init__(self, out: Path, place: int, workers: int) -> None:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(theirs, out, place, workers), daemon=True)
        with _one_thread(), _interrupts_held():
            self.process.start()
        theirs.close()
        self.run: Run | None = None

    def give(self, run: Run) -> None:
        """Begin a run."""
        self.run = run
        with suppress(OSError):  # it has died: seen when its outcome is asked for
            self.connection.send(run)

    def outcome(self) -> Outcome:
        """What became of the run, once the process has said so or has died."""
        run, self.run = self.run, None
        assert run is not None
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
            full = code == -signal.SIGKILL
            return Outcome(run, failure=f"its process {how}{': was memory full?' if full else ''}", memory_full=full)

    def end(self) -> None:
        """Let the process end; it has no run."""
        self.connection.close()
        self.process.join()


def _in_processes(runs: Sequence[Run], out: Path, workers: int, say: Callable[[str], None]) -> Iterator[Outcome]:
    waiting, stopping = list(runs), False
    pool = [_Worker(out, place, workers) for place in range(workers)]
    try:
        while True:
            for place, worker in enumerate(pool):
                if worker.run is None and waiting and not stopping:
                    if not worker.process.is_alive():
                        worker = pool[place] = _Worker(out, place, workers)
                    worker.give(waiting.pop(0))
            busy = {worker.connection: worker for worker in pool if worker.run is not None}
            if not busy:
                if waiting:  # those at work ended before they heard of it
                    yield Outcome(waiting[0], interrupted=True)
                return
            try:
                ready = wait(list(busy))
            except KeyboardInterrupt:
                stopping = True
                for worker in busy.values():  # each saves a checkpoint and says that it was interrupted
                    assert worker.process.pid is not None  # 0 would be our own process group
                    with suppress(OSError):
                        os.kill(worker.process.pid, signal.SIGINT)
                continue
            for connection in ready:
                assert isinstance(connection, Connection)
                worker = busy[connection]
                outcome = worker.outcome()
                if outcome.memory_full and len(busy) > 1 and not stopping:
                    worker.end()  # and give back what it holds; the only one is replaced
                    if len(pool) > 1:
                        pool.remove(worker)
                    waiting.insert(0, outcome.run)
                    say(f"{outcome.run} begins again, with {len(pool)} at once: {outcome.failure}")
                    continue
                stopping = stopping or outcome.interrupted
                yield outcome
    finally:
        for worker in pool:
            if worker.run is not None:
                worker.process.terminate()
            worker.end()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes that are started inside use one thread each in the libraries that read their number at the start."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Inside, Ctrl-C waits until the end, and in processes that are started inside until they let it come."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # before a first process Python starts it, and lets Ctrl-C come then
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _interrupts_let_in() -> Iterator[None]:
    """Inside, Ctrl-C comes: at once, if it has waited."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])


def spread(run: Run, place: int) -> None:
    """Let a run that asks for ``cuda`` without a number use this machine's GPU number ``place``, counted round."""
    import torch

    # What "cuda" means in this process: the configuration stays as it was asked for.
    if run.config.train.device == "cuda" and (gpus := torch.cuda.device_count()):
        torch.cuda.set_device(place % gpus)


def _work(connection: Connection, out: Path, place: int, workers: int) -> None:
    """What a worker's process does until its parent hangs up. It is started with Ctrl-C held."""
    import torch

    if hasattr(os, "setpgrp"):
        os.setpgrp()  # a terminal's Ctrl-C reaches the parent only, which passes it on once
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)  # a new bench may take over the folder: nobody writes to it any more

    threading.Thread(target=leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    share_memory(workers)
    with suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            run = connection.recv()
            spread(run, place)
            connection.send(_attempt_interruptibly(run, out))


def _attempt_interruptibly(run: Run, out: Path) -> Outcome:
    try:
        with _interrupts_let_in():
            return attempt(run, out)
    except KeyboardInterrupt:  # before the run began, or after it had ended
        return Outcome(run, interrupted=True)
