"""Runs in processes of our own command line, several at once; or one after another in this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vlprompt.bench.protocols import Run
from vlprompt.bench.runs import do_run, told
from vlprompt.data.reading import share_memory
from vlprompt.errors import Interrupted, VlpromptError, memory_is_full, one_line
from vlprompt.training.interrupt import deferred_interrupt

COMMAND = "bench-run"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_LOOK = 0.1  # seconds between two looks for Ctrl-C


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    told: str = ""
    """What was measured, of one that is done."""
    failure: str = ""
    """Of one that is not, in a line."""
    trace: str = ""
    """Where a failure that is no bad input came from."""
    interrupted: bool = False
    memory_full: bool = False
    """It failed for that, or its process was killed, as systems do then."""


class Job(Protocol):
    """A run at work somewhere."""

    def outcome(self) -> Outcome:
        """Wait until it has ended, in a thread of its own."""

    def interrupt(self) -> None:
        """Let it save a checkpoint and end."""

    def kill(self) -> None:
        """End it at once."""


Launch = Callable[[Run, int], Job]
"""Begins a run; the number says which of those at work at once it is, from 0."""


def outcomes(
    launch: Launch, runs: Sequence[Run], at_once: int, say: Callable[[str], None]
) -> Iterator[tuple[Run, Outcome]]:
    """Each run with its outcome, as it ends; after one that was interrupted no other begins.

    A run that runs out of memory begins again, with one run fewer at once from then on; it has failed only if it was
    at work alone.
    """
    waiting, busy, stopping = list(runs), dict[Future[Outcome], tuple[Run, Job, int]](), False
    with ThreadPoolExecutor(at_once) as threads, deferred_interrupt() as asked:
        try:
            while True:
                while waiting and not stopping and len(busy) < at_once:
                    place = min(set(range(at_once)) - {place for _, _, place in busy.values()})
                    run = waiting.pop(0)
                    job = launch(run, place)
                    busy[threads.submit(job.outcome)] = run, job, place
                if not busy:
                    break
                ended, _ = wait(busy, _LOOK, FIRST_COMPLETED)
                if asked() and not stopping:
                    stopping = True
                    for _, job, _ in busy.values():
                        job.interrupt()
                alone = len(busy) == 1
                for future in ended:
                    run, _, _ = busy.pop(future)
                    outcome = future.result()
                    if outcome.memory_full and not alone and not stopping:
                        at_once = max(1, at_once - 1)
                        waiting.insert(0, run)
                        say(f"{run} begins again, with {at_once} at once: {outcome.failure}")
                        continue
                    stopping = stopping or outcome.interrupted
                    yield run, outcome
            if waiting:  # those at work ended before they heard of the interrupt
                yield waiting[0], Outcome(interrupted=True)
        finally:
            for _, job, _ in busy.values():
                job.kill()


def one_by_one(runs: Sequence[Run], out: Path) -> Iterator[tuple[Run, Outcome]]:
    """The same in this process, where nothing has to be started and loaded for each run."""
    for run in runs:

        def known(run: Run = run) -> Run:
            return run

        outcome = attempt(known, out)
        yield run, outcome
        if outcome.interrupted:
            return


def attempt(find: Callable[[], Run], out: Path) -> Outcome:
    """Do a run; what it raises becomes its outcome."""
    try:
        run = find()
        return Outcome(told(run, do_run(run, out)))
    except (KeyboardInterrupt, Interrupted):
        return Outcome(interrupted=True)
    except VlpromptError as error:
        return Outcome(failure=one_line(error, most=None))
    except Exception as error:  # the rest of the sweep goes on whatever happens in one run
        reason = one_line(f"{type(error).__name__}: {error}", most=None)
        if memory_is_full(error):
            return Outcome(failure=reason, memory_full=True)
        return Outcome(failure=reason, trace=traceback.format_exc())


# --- a process for each run -----------------------------------------------------------------------


class Process:
    """``vlprompt bench-run``, which does the ``run`` (as JSON) that it is given; one of ``workers`` on its machine."""

    def __init__(self, run: str, out: Path, workers: int, place: int = 0, folder: Path | None = None) -> None:
        command = [sys.executable, "-m", "vlprompt", COMMAND, str(out), str(workers), str(place)]
        with _interrupts_held():  # the process lets Ctrl-C in when it can answer
            self.process = subprocess.Popen(
                command, cwd=folder, env=os.environ | dict.fromkeys(_THREADS, "1"), stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, text=True,
                start_new_session=True,  # a terminal's Ctrl-C reaches only us, who pass it on once
            )  # fmt: skip
        assert self.process.stdin is not None
        with suppress(OSError):  # it has died: seen when its outcome is asked for
            print(run, file=self.process.stdin, flush=True)  # and left open: it ends with us

    def outcome(self) -> Outcome:
        """What the process says, or how it died."""
        assert self.process.stdout is not None
        with self.process:
            said = self.process.stdout.read()
        code = self.process.returncode
        with suppress(ValueError, TypeError, IndexError):
            return Outcome(**json.loads(said.splitlines()[-1]))
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        full = code == -signal.SIGKILL
        return Outcome(failure=f"its process {how}{': was memory full?' if full else ''}", memory_full=full)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        self.process.kill()


def work(out: Path, workers: int, place: int) -> str:
    """Do the run on standard input; returns its outcome as JSON. The process was started with Ctrl-C held."""
    import torch

    text = sys.stdin.readline()

    def leave_with_parent() -> None:
        os.read(0, 1)
        os._exit(1)  # a new bench may take over the folder: nobody writes to it any more

    threading.Thread(target=leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    share_memory(workers)

    def find() -> Run:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        run = Run.from_json(text)
        spread(run, place)
        return run

    with redirect_stdout(sys.stderr):  # of a library or a method: standard output is for the outcome
        return json.dumps(vars(attempt(find, out)))


def spread(run: Run, place: int) -> None:
    """Let a run that asks for ``cuda`` without a number use this machine's GPU number ``place``, counted round."""
    import torch

    # What "cuda" means in this process: the configuration stays as it was asked for.
    if run.config.train.device == "cuda" and (gpus := torch.cuda.device_count()):
        torch.cuda.set_device(place % gpus)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Inside, Ctrl-C waits until the end, and in processes that are started inside until they let it in."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
