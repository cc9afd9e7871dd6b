"""Data sets from public mirrors: fetched, compared with checksums, unpacked into CoOp's layout."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from vlprompt.data.known.table import Dataset, Source
from vlprompt.errors import DataError
from vlprompt.files import sync_all, write_error
from vlprompt.provision.unpack import unpack
from vlprompt.version import __version__

DOWNLOADS = ".vlprompt-downloads"
"""Below the root: what is on its way. An archive that was put here by hand is used instead of being fetched."""
TIMEOUT = 60  # seconds without a byte
_CHUNK = 1 << 20

Progress = Callable[[int, int], object]
"""Bytes that are there, of so many."""


def get(
    dataset: Dataset, root: Path, say: Callable[[str], object], progress: Progress = lambda done, of: None
) -> list[str]:
    """Fetch a data set into its folder below ``root``; returns the names of the files fetched.

    What is in its place already is left alone. A download that breaks is continued by the next call. An archive is
    unpacked aside and moved into place whole; then it is removed if it was fetched, also one that is refused, or a file
    of another content than its checksum says. What was put there by hand stays. Raises DataError for those, where there
    is no connection, and at the end for what has to be got by hand; OutputError if the disk does not take it.
    """
    folder, downloads = root / dataset.folder, root / DOWNLOADS
    fetched: list[str] = []
    if dataset.make is not None:
        dataset.make(folder)
        return fetched
    try:
        for source in dataset.sources:
            if all((folder / place).exists() for place in source.moves.values()):
                say(f"{source.name}: {', '.join(source.moves.values())} is in {folder} already")
                _clear(downloads / source.name)
                continue
            downloads.mkdir(parents=True, exist_ok=True)
            file = downloads / source.name
            given = file.is_file() and not _mark(file).exists()
            if file.is_file():
                say(f"{source.name}: found in {downloads}")
            else:
                _download(source, file, progress)
            try:
                _verify(file, source.checksum)
                if not source.checksum:
                    say(f"{source.name}: no checksum is known, so its content is not verified")
                _install(source, file, folder, given)
            except DataError as error:
                if given:
                    raise DataError(f"{error}; remove the file to have it fetched") from None
                _clear(file)
                raise
            _clear(file)
            fetched.append(source.name)
    except OSError as error:
        raise write_error(Path(error.filename or folder), error) from error
    finally:
        with suppress(OSError):
            downloads.rmdir()  # unless something in it is still needed
    if dataset.by_hand and not all((folder / dataset.images / sub).is_dir() for sub in dataset.subfolders):
        raise DataError(f"data set '{dataset.name}': {dataset.by_hand} ({folder}; {dataset.homepage})")
    return fetched


def _download(source: Source, file: Path, progress: Progress) -> None:
    failed = []
    for url in source.urls:
        try:
            _fetch(url, file, bool(source.checksum), progress)
            return
        except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
            failed.append(f"{urlsplit(url).hostname}: {_reason(error)}")
    part = _part(file)
    kept = f"; {part.stat().st_size} bytes are kept, and the same command continues" if part.is_file() else ""
    raise DataError(f"cannot fetch {source.name}: {'; '.join(failed)}{kept}")


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"the server answers {error.code} {error.reason}"
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, OSError):
        return f"no connection ({cause.strerror or cause})"
    return str(cause)


def _fetch(url: str, file: Path, known: bool, progress: Progress) -> None:
    """Fetch ``url`` to ``file``, going on with what came before if it is certain to be of the same content."""
    part = _part(file)
    tag = part.with_suffix(".tag")  # what the server called this version of the file
    came = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": f"vlprompt/{__version__}"}
    if came and (tag.is_file() or known):
        headers["Range"] = f"bytes={came}-"
        if tag.is_file():
            headers["If-Range"] = tag.read_text("latin-1")
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416 or "Range" not in headers:
            raise
        if error.headers.get("Content-Range", "").rpartition("/")[2] != str(came):
            part.unlink()
            return _fetch(url, file, known, progress)
    else:
        with response:
            if response.headers.get_content_type() == "text/html":
                raise HTTPException("a web page came instead of the file")
            if response.status != 206:
                came = 0
            version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            if version and not version.startswith("W/"):
                tag.write_text(version, "latin-1")
            else:
                tag.unlink(missing_ok=True)
            length = response.headers.get("Content-Length")
            total = came + int(length) if length else 0
            with part.open("ab" if came else "wb") as stream:
                while chunk := _read(response):
                    stream.write(chunk)
                    came += len(chunk)
                    progress(came, max(total, came))
            if came < total:
                raise HTTPException(f"it broke off after {came} of {total} bytes")
    os.replace(part, file)
    _mark(file).touch()
    tag.unlink(missing_ok=True)


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK)
    except OSError as error:  # of the network: told from a full disk here
        raise URLError(error) from error


def _part(file: Path) -> Path:
    return file.with_name(f"{file.name}.part")


def _mark(file: Path) -> Path:
    """Beside a file that was fetched, and not put there by hand."""
    return file.with_name(f"{file.name}.fetched")


def _clear(file: Path) -> None:
    """Take away what was fetched or unpacked of a file, by killed processes too; what was put there by hand stays."""
    shutil.rmtree(_aside(file), ignore_errors=True)
    if (mark := _mark(file)).exists():
        mark.unlink()  # first: a mark that stays would give away the next file that is put there by hand
        file.unlink(missing_ok=True)
    for left in (_part(file), _part(file).with_suffix(".tag")):
        left.unlink(missing_ok=True)


def _aside(file: Path) -> Path:
    """Where it is unpacked."""
    return file.with_name(f"{file.name}.unpacking")


def _verify(file: Path, checksum: str) -> None:
    kind, _, expected = checksum.partition(":")
    if not expected:
        return
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
    if found != expected:
        raise DataError(f"{file} is damaged, or another file: its {kind} is {found}, not {expected}")


def _install(source: Source, file: Path, folder: Path, given: bool) -> None:
    """Move what is wanted of the file into ``folder``, each part whole; what was ``given`` by hand is copied."""
    aside = _aside(file)
    if "" in source.moves:
        place = folder / source.moves[""]
        place.parent.mkdir(parents=True, exist_ok=True)
        sync_all()
        os.replace(shutil.copy(file, aside) if given else file, place)
        return
    shutil.rmtree(aside, ignore_errors=True)  # of one that was killed
    try:
        unpack(file, aside / "outer")
        found = aside / "outer"
        if source.inner:
            if not (found / source.inner).is_file():
                raise DataError(f"archive {file} has no '{source.inner}'")
            unpack(found / source.inner, aside / "inner")
            found = aside / "inner"
        for name in source.moves:
            if not (found / name).exists():
                raise DataError(f"archive {file} has no '{name}'")
        sync_all()
        for name, target in source.moves.items():
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            if not (folder / target).exists():
                os.replace(found / name, folder / target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
