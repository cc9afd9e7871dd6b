"""The command line, in this process or in one of its own."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

from tests.kit import REPOSITORY

tree = cache(typer.main.get_command)
"""The commands of an app, which typer would make anew for every call: 45 ms of work."""


class Done(NamedTuple):
    """A command's exit code, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out)


def vlprompt(*given: object) -> Done:
    """Run a command in this process."""
    from vlprompt import cli

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("typer.main.get_command", tree)
        patch.setattr(sys, "argv", ["vlprompt", *map(str, given)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    return Done(end.value.code or 0, out.getvalue(), err.getvalue())  # type: ignore[arg-type]


def environment(**more: str) -> dict[str, str]:
    """For processes: this checkout's vlprompt and kit."""
    path = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    return {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", **more}


def python(*given: object, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own."""
    return subprocess.run(
        [sys.executable, *map(str, given)], cwd=cwd, env=environment(**more), capture_output=True, encoding="utf-8",
        timeout=300,
    )  # fmt: skip


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
