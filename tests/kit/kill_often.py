"""Run as a program: train (or do what argv says) in child processes that are killed with SIGKILL and resumed, until one
is left to finish.

A child is forked with everything imported, so that a death costs no start-up. Argument, as JSON: a list of runs,
each with ``argv``, ``out`` and ``deaths``: the time after which a child is killed, as a share of what the first run
took, or the n-th file that it is killed before (negative: right after) putting into place. Prints as JSON how many
children of each run were killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # what the first optimiser imports

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
    killed, length = [], 0.0
    for run in json.loads(sys.argv[1]):
        out = Path(run["out"])
        killed.append(0)
        began = time.monotonic()
        for death in [*run["deaths"], None]:
            begun = run["argv"][0] != "train" or (out / "config.yaml").exists()
            if out.exists() and not begun:  # it died before it had begun
                for file in out.iterdir():
                    file.unlink()
            killed[-1] += child(run["argv"], out, death * length if isinstance(death, float) else death)
        length = length or time.monotonic() - began
    print(json.dumps(killed))
