"""Archives from elsewhere, unpacked so that they can do no harm: plain files and folders inside one new folder."""

from __future__ import annotations

import gzip
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import IO, NamedTuple, cast

from vlprompt.errors import DataError
from vlprompt.files import write_error

MEMBERS = 1_000_000
RATIO = 100
"""Pictures hardly compress, lists of names ten times: what unpacks to more than this is made to fill a disk."""
ROOM = 1 << 20  # bytes that even a tiny archive may unpack to

_DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, NotImplementedError, RuntimeError,
    ValueError,
)  # fmt: skip


class _Member(NamedTuple):
    name: str
    folder: bool
    plain: bool
    """Neither a link nor a device."""
    size: int
    open: Callable[[], IO[bytes] | None]


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a ``.zip``, ``.tar`` or ``.tar.gz`` into ``folder``, which must be new; permissions are not taken over.

    Raises DataError, with what was written so far left in ``folder``, for an archive that is damaged, or has paths that
    lead elsewhere, links, a file twice, more than a million members, or more than a hundred times its own size in it,
    and for a zip compressed in another way than deflate; OutputError if the disk does not take it.
    """
    limit = ROOM + RATIO * archive.stat().st_size
    written = 0
    try:
        for n, member in enumerate(_members(archive, limit), 1):
            written += member.size
            if n > MEMBERS:
                raise _archive_error(archive, f"it has more than {MEMBERS} members")
            if written > limit:
                raise _archive_error(archive, f"it unpacks to more than {RATIO} times its size")
            _write(archive, member, folder)
    except _DAMAGED as error:
        raise DataError(f"archive {archive} is damaged: {error}") from error
    except OSError as error:
        raise write_error(folder, error) from error


def _write(archive: Path, member: _Member, folder: Path) -> None:
    # Of all systems Windows splits a name in most places: what stays inside there stays inside everywhere.
    path = PureWindowsPath(member.name)
    if path.anchor or path.drive or ".." in path.parts:
        raise _archive_error(archive, f"'{member.name}' leads out of its folder")
    if not member.plain:
        raise _archive_error(archive, f"'{member.name}' is neither a file nor a folder")
    target = folder.joinpath(*path.parts)
    if member.folder:
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        raise _archive_error(archive, f"'{member.name}' is in it twice")
    content = member.open()
    assert content is not None  # tarfile's answer for what is no file
    with content, target.open("xb") as stream:
        shutil.copyfileobj(content, stream, 1 << 20)


def _members(archive: Path, limit: int) -> Iterator[_Member]:
    with archive.open("rb") as raw:
        start = raw.read(2)
        raw.seek(0)
        if start == b"PK":
            with zipfile.ZipFile(raw) as zipped:
                for info in zipped.infolist():
                    # Of what these give, Python makes no more at once than is asked for, and no more at all than the
                    # directory says; what bzip2 and LZMA give it makes whole, whatever its size.
                    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        raise _archive_error(archive, f"'{info.filename}' is compressed in another way than deflate")
                    plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
                    yield _Member(info.filename, info.is_dir(), plain, info.file_size, partial(zipped.open, info))
            return
        # As a stream, so that headers are counted before they are believed; there is room for them beside the contents.
        with gzip.open(raw) if start == b"\x1f\x8b" else nullcontext(raw) as content:
            stream = cast("IO[bytes]", _Limited(archive, cast("IO[bytes]", content), 2 * limit))
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for entry in tar:
                    plain = entry.isdir() or (entry.isreg() and not entry.issparse())
                    size = entry.size if entry.isreg() else 0
                    yield _Member(entry.name, entry.isdir(), plain, size, partial(tar.extractfile, entry))
            while stream.read(1 << 20):  # to the end, where gzip's checksum stands
                pass


class _Limited:
    """What a stream gives, up to so many bytes."""

    def __init__(self, archive: Path, stream: IO[bytes], limit: int) -> None:
        self.archive, self.stream, self.left = archive, stream, limit

    def read(self, size: int) -> bytes:
        content = self.stream.read(size)
        self.left -= len(content)
        if self.left < 0:
            raise _archive_error(self.archive, f"it unpacks to more than {RATIO} times its size")
        return content


def _archive_error(archive: Path, why: str) -> DataError:
    return DataError(f"archive {archive} is refused: {why}")
