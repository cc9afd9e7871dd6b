"""What lies in a data set's folders: which files are images, how they are opened, what is left out; and texts."""

from __future__ import annotations

import codecs
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from errno import ELOOP
from functools import cache
from hashlib import file_digest, sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from vlprompt.errors import DataError, first_few

if TYPE_CHECKING:
    from PIL import Image  # a command's --help does not need it

_HEIF = (".heic", ".heif", ".hif")
_READS_HEIF = find_spec("pillow_heif") is not None
IMAGE_EXTENSIONS = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
    *(_HEIF if _READS_HEIF else ()),
)  # fmt: skip
HEIF_ADVICE = "pip install 'vlprompt[heif]' reads them"
_FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_SHELL = ("/dev/fd/", "/dev/stdin", "/proc/")  # pipes that a shell makes
_MOST = 1 << 26  # bytes of text that are read of what is no plain file
_HEAD = 1 << 14  # bytes by which most files differ


@dataclass
class LeftOut:
    """What is not read of a data set's folders."""

    files: Counter[str] = field(default_factory=Counter)
    """By extension, or what they are."""
    folders: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """The kinds of files with their numbers, most first; empty if there are none."""
        return first_few([f"{n} {what}" for what, n in self.files.most_common()])

    def notes(self, folder: Path) -> tuple[str, ...]:
        """A line for the files, and one for the folders, where there are any."""
        lines = [f"note: left out of {folder}: {self}"] if self.files else []
        return (*lines, *([f"note: ignored in {folder}: {first_few(self.folders)}"] if self.folders else []))


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that images are read in, those that this machine can read."""
    from PIL import Image

    if _READS_HEIF:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def open_image(file: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """Open an image file, or its bytes, in one of :func:`formats`, whatever its name says; the pixels are read later.

    Of all that Pillow knows, others run programs (EPS runs Ghostscript).
    """
    from PIL import Image

    return Image.open(file, formats=formats())


def heif_advice(file: Path) -> str:
    """What reads a file that is HEIF by its name and cannot be read here; empty otherwise."""
    return f" ({HEIF_ADVICE})" if file.suffix.lower() in _HEIF and not _READS_HEIF else ""


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is no part of a data set."""
    return name.startswith(".") or name == "__MACOSX"


def subfolders(folder: Path) -> list[Path]:
    """The visible folders directly inside, in alphabetical order, links to folders too if they do not lead back.

    Raises DataError for a folder that cannot be read.
    """
    here = (os.path.realpath(folder),)
    found = [entry for entry in _entries(folder) if _kind(entry) == "folder"]
    return sorted(
        folder / entry.name
        for entry in found
        if not (entry.is_symlink() and _leads_back(os.path.realpath(entry.path), here))
    )


def image_files(folder: Path, left_out: LeftOut | None = None, deep: bool = True) -> list[Path]:
    """The visible images inside, at any depth if ``deep``: by their extensions, or what they hold where they have none.

    Links are followed, but not back to a folder that they are in. ``left_out`` counts the other files. Raises DataError
    for a folder that cannot be read.
    """
    left_out = LeftOut() if left_out is None else left_out
    found: list[Path] = []
    waiting: list[tuple[Path, tuple[str, ...]]] = [(folder, (os.path.realpath(folder),))]
    while waiting:
        place, chain = waiting.pop()
        for entry in _entries(place):
            path, kind = place / entry.name, _kind(entry)
            if kind == "folder":
                # Real paths, as two links may lead to each other.
                real = os.path.realpath(path) if entry.is_symlink() else os.path.join(chain[-1], entry.name)
                if entry.is_symlink() and _leads_back(real, chain):
                    left_out.files[_CIRCLE] += 1
                elif deep:
                    waiting.append((path, (*chain, real)))
            elif kind != "file":
                left_out.files[kind] += 1
            elif path.suffix.lower() in IMAGE_EXTENSIONS or (not path.suffix and _holds_image(path)):
                found.append(path)
            else:
                left_out.files[(path.suffix.lower()[:20] or "without an extension") + heif_advice(path)] += 1
    return found


_CIRCLE, _DEAD = "links in a circle", "dead links"
LINKS = (_CIRCLE, _DEAD)


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not hidden(entry.name))
    except OSError as error:
        raise DataError(f"cannot read folder {folder}: {error.strerror}") from None


def _kind(entry: os.DirEntry[str]) -> str:
    """folder, file, or what else it is."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError as error:
        if error.errno == ELOOP:
            return _CIRCLE
        raise DataError(f"cannot read {entry.path}: {error.strerror}") from None
    return _DEAD if entry.is_symlink() else "special files"


def _leads_back(real: str, chain: tuple[str, ...]) -> bool:
    return any(place == real or place.startswith(real.rstrip(os.sep) + os.sep) for place in chain)


def _holds_image(file: Path) -> bool:
    try:
        with open_image(file):
            return True
    except Exception:  # Pillow raises almost anything on bytes that are no image
        return False


def same_files(files: list[Path], among: list[Path]) -> list[Path]:
    """Which of ``files`` have the same bytes as one ``among`` the others; those that cannot be read have not.

    Sizes are compared first, then beginnings: whole files are read only where both agree.
    """
    for key in (_size, _head, _content):
        values: dict[Path, object] = {file: key(file) for file in {*files, *among}}
        both = ({values[file] for file in files} & {values[file] for file in among}) - {None}
        files, among = ([file for file in some if values[file] in both] for some in (files, among))
    return files


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size or None
    except OSError:
        return None


def _head(file: Path) -> bytes | None:
    try:
        with file.open("rb") as stream:
            return sha256(stream.read(_HEAD)).digest()
    except OSError:
        return None


def _content(file: Path) -> str | None:
    try:
        return content_hash(file)
    except DataError:
        return None


def content_hash(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal; raises DataError if it cannot be read."""
    try:
        with file.open("rb") as stream:
            return file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        raise missing_error("file", file) from None
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None


def missing_error(what: str, path: Path) -> DataError:
    """The error for a file or folder that is not there, with the nearest name beside it."""
    if os.path.islink(path):
        return DataError(f"{what} {path} does not exist: it is a link to {os.readlink(path)}")
    siblings = [sibling.name for sibling in path.parent.iterdir()] if os.path.isdir(path.parent) else []
    near = get_close_matches(path.name, siblings, n=1, cutoff=0.5)
    return DataError(f"{what} {path} does not exist" + (f": did you mean '{near[0]}'?" if near else ""))


def read_text(file: Path, what: str) -> str:
    """A file of UTF-8 text; raises DataError if it is not there, no plain file, or in another encoding, naming it."""
    if not os.path.exists(file):
        raise missing_error(what, file)
    try:
        if file.is_fifo() and not str(file).startswith(_SHELL):  # it may never get any
            raise ValueError("it is not a plain file")
        with file.open("rb") as stream:
            content = stream.read(-1 if file.is_file() else _MOST + 1)
        if len(content) > _MOST and not file.is_file():  # a device may never end
            raise ValueError("it is not a plain file")
        return _decoded(content)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {what} {file}: {getattr(error, 'strerror', None) or error}") from None


def _decoded(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:1000]:
        raise ValueError("it is UTF-16 text, or none: save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise ValueError(
            f"line {line}: byte 0x{byte:02x} cannot be decoded as UTF-8; it looks like Windows-1252 (cp1252) text: "
            "save it as UTF-8"
        ) from None


def with_slashes(path: str, root: Path) -> str:
    """A relative path as this system writes it: without the backslashes of Windows, where no file is named with one."""
    return path if "\\" not in path or os.path.isfile(root / path) else path.replace("\\", "/")
