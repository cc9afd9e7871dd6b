"""Run as a program: train in child processes that are killed with SIGKILL and resumed, until one is left to finish.

A child is forked with everything imported, so that a death costs no start-up. Arguments, as JSON: ``argv`` of the
run, ``out``, ``deaths``: each a number of seconds after which a child is killed, or the n-th file that it is killed
before (negative: right after) putting into place. Prints as JSON how many children were killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

import vlprompt.training.run  # noqa: F401
from vlprompt import cli


def die_at_file(n: int) -> None:
    """Kill this process when it puts its n-th file into place."""
    replace, count = os.replace, 0

    def counted(*given, **named):  # type: ignore[no-untyped-def]
        nonlocal count
        count += 1
        if n > 0 and count == n:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*given, **named)
        if n < 0 and count == -n:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted


def child(argv: list[str], out: Path, death: float | None) -> int:
    """One life of the run; whether it was killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            begun = (out / "config.yaml").exists()
            sys.argv = ["vlprompt", *(["train", "--resume", str(out)] if begun else argv)]
            if isinstance(death, int):
                die_at_file(death)
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    if isinstance(death, float):
        time.sleep(death)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.waitstatus_to_exitcode(status):
        sys.exit("the run failed")
    return False


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = json.loads(sys.argv[1])
    killed = 0
    for death in [*given["deaths"], None]:
        if death is not None and not (Path(given["out"]) / "config.yaml").exists() and Path(given["out"]).exists():
            for file in Path(given["out"]).iterdir():  # it died before it had begun
                file.unlink()
        killed += child(given["argv"], Path(given["out"]), death)
    print(json.dumps({"killed": killed}))
