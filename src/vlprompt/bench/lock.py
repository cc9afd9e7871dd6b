"""One bench at a time writes a folder; shards of one and the same bench share it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from vlprompt.errors import ConfigError
from vlprompt.files import write_atomically


@contextmanager
def folder_lock(out: Path, plan: str, shard: str | None) -> Iterator[None]:
    """Hold ``out`` for this process, with a file ``.bench-HOST-PID-WHERE.json`` that names it.

    ``plan`` is one for the shards of one bench, and ``shard`` is "i/n". Files of processes of this machine that have
    ended are taken away. Raises ConfigError if another bench, or the same shard, is at work there.
    """
    host, where = socket.gethostname(), _where()
    own = {"host": host, "where": where, "pid": os.getpid(), "plan": plan, "shard": shard or "1/1"}
    file = out / f".bench-{host}-{os.getpid()}-{where}.json"
    made = not out.exists()
    write_atomically(file, json.dumps(own))
    try:
        # Every bench writes its own file before it looks for others, so of two that start together at least one sees
        # the other.
        for other in sorted(out.glob(".bench-*.json")):
            if other != file:
                _check(other, own)
        yield
    finally:
        file.unlink(missing_ok=True)
        if made:
            with suppress(OSError):  # it holds results now
                out.rmdir()


def _where() -> str:
    """Eight hexadecimal digits that stand for what numbers this process: a start of a machine, a container on it.

    Machines and containers may share a host name, and process numbers mean nothing in another one.
    """
    known = []
    with suppress(OSError):  # what a system does not have is left out
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip())
        known.append(os.readlink("/proc/self/ns/pid"))
    return sha256(json.dumps(known).encode()).hexdigest()[:8]


def _check(other: Path, own: Mapping[str, Any]) -> None:
    plan, shard = own["plan"], own["shard"]
    try:
        held = json.loads(other.read_text("utf-8"))
        host, pid, theirs, their_plan = held["host"], int(held["pid"]), held["shard"], held["plan"]
        here = (host, held.get("where", own["where"])) == (own["host"], own["where"])  # older files do not say where
    except FileNotFoundError:  # it has just ended
        return
    except (ValueError, KeyError, TypeError, OSError):
        raise ConfigError(f"cannot read {other}: remove it if no bench is at work there") from None
    if here and not _alive(pid):
        other.unlink(missing_ok=True)
        return
    if their_plan == plan and theirs != shard and theirs.partition("/")[2] == shard.partition("/")[2]:
        return
    what = "this shard" if their_plan == plan and theirs == shard else "another bench"
    raise ConfigError(
        f"{other.parent} is in use: process {pid} on {host} is at work on {what}; choose another --out, wait, or "
        f"remove {other} if that process is none of vlprompt"
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
