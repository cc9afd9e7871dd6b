"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlprompt.errors import OutputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write a file under another name, then move it into place; its folder is made if need be.

    It is on the disk when this returns: after a power cut the file is the old one or the new one, never an empty one.
    Raises OutputError, and leaves what was there before, if that is not possible (a full disk, no permission).
    """
    unfinished = unfinished_name(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as stream:
                stream.write(content.encode("utf-8") if isinstance(content, str) else content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(unfinished, file)
            sync(file.parent)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(file, error) from error


def sync(path: Path) -> None:
    """Have the system write a file, or what a folder lists, to the disk, where it knows how to."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError:  # nor do some network file systems sync them
        pass
    finally:
        os.close(handle)


def sync_all() -> None:
    """The same for everything that was written, of many files at once."""
    if hasattr(os, "sync"):
        os.sync()


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold the lock file, which is made, against other processes; it is free again when the process ends.

    Where the system or the file system knows no locks, nothing is held.
    """
    if fcntl is None:
        yield
        return
    with lock.open("w") as stream:
        _take(stream.fileno(), fcntl.LOCK_EX)
        yield


@contextmanager
def held(place: Path, shared: bool = False) -> Iterator[bool]:
    """Hold a folder, or a lock file that is made, until the end or until the process ends; False if others hold it.

    With ``shared``, others that share it too do not count. Where the system or the file system knows no locks, nothing
    is held.
    """
    if fcntl is None:
        yield True
        return
    # Network file systems lock only files that can be written.
    handle = os.open(place, os.O_RDONLY if place.is_dir() else os.O_RDWR | os.O_CREAT)
    try:
        yield _take(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    finally:
        os.close(handle)


def _take(handle: int, how: int) -> bool:
    """Take the lock of an open file; False if another process has it and is not waited for."""
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems know no locks
        pass
    return True


def unfinished_name(file: Path) -> Path:
    """Where to write what becomes ``file``: a name that no other process takes, on any machine that sees the folder."""
    return file.with_name(f".{file.name}.vlprompt-{secrets.token_hex(8)}")


def is_unfinished(file: Path) -> bool:
    """Whether it has such a name: a process is writing it, or was killed while it did."""
    return re.fullmatch(r"\..+\.vlprompt-[0-9a-f]{16}", file.name) is not None


def in_use(folder: Path) -> bool:
    """Whether something is there already: a file, or a folder that holds more than killed processes left unfinished."""
    return os.path.exists(folder) and (not folder.is_dir() or not all(map(is_unfinished, folder.iterdir())))


def write_error(place: Path, error: OSError) -> OutputError:
    """The error for an output that the system refuses, with its reason."""
    return OutputError(f"cannot write {place}: {error.strerror or error}")
