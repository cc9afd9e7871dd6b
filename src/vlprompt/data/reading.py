"""Image files read by threads that start once, and decoded once: one reader serves a whole run."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

from PIL import Image
from torch.utils.data import default_collate

from vlprompt.data.images import SIXTEEN_BIT, ImageSource, greatest_grey, load_image, white_above
from vlprompt.errors import DataError, first_few

CACHE_BYTES = 2 << 30  # decoded images kept in memory; the rest is decoded again when it is needed again
AHEAD = 4  # batches being made while one is used

_sharing = 1  # processes that CACHE_BYTES are for


def share_memory(processes: int) -> None:
    """Leave to this process's readers their part of CACHE_BYTES: it is one of so many that read at once."""
    global _sharing
    _sharing = processes


class ImageReader:
    """Decoded images, kept while there is room, and threads that make batches of them ahead of their use.

    Pillow decodes and resizes outside Python's lock, so threads are enough: they start at once and share the decoded
    images. ``workers`` = 0 does all work in the calling thread. ``room`` is in bytes, by default this process's part of
    CACHE_BYTES. ``decode`` replaces :func:`load_image` for files. ``white`` and ``max_pixels`` are as there; a
    ``max_pixels`` lifts Pillow's limit for the whole process until the reader is closed. Close it, or use it in a
    ``with`` statement.
    """

    def __init__(
        self,
        workers: int = 2,
        room: int | None = None,
        decode: Callable[..., Image.Image] | None = None,
        *,
        white: float | None = None,
        max_pixels: int | None = None,
    ) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="vlprompt-images") if workers else None
        self.room = CACHE_BYTES // _sharing if room is None else room
        """Bytes of decoded images that it may still keep."""
        self.white, self._max_pixels = white, max_pixels
        self._pillows_limit = Image.MAX_IMAGE_PIXELS
        if max_pixels is not None:
            Image.MAX_IMAGE_PIXELS = None
        self._full = False
        self._decode = decode
        self._greys: dict[Path | int, float] = {}  # the greatest value of each deep grey
        self._kept: dict[Path, Image.Image] = {}
        self._lock = Lock()

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and forget the images."""
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._max_pixels is not None:
            Image.MAX_IMAGE_PIXELS = self._pillows_limit
        self._kept.clear()

    def image(self, source: ImageSource) -> Image.Image:
        """The decoded image; raises DataError naming the file if it cannot be used."""
        how: dict[str, Any] = {} if self.white is None else {"white": self.white}
        how |= {} if self._max_pixels is None else {"max_pixels": self._max_pixels}
        if not isinstance(source, (str, os.PathLike)):
            image = load_image(source, **how)  # it is in memory already
            if greatest := image.info.get("greatest"):
                self._greys[id(source)] = greatest
            return image
        path = Path(source)
        if path in self._kept:
            return self._kept[path]
        image = (self._decode or load_image)(path, **how)
        if greatest := image.info.get("greatest"):
            self._greys[path] = greatest
        size = 3 * image.width * image.height
        with self._lock:
            self._full = self._full or size > self.room
            if size <= self.room and path not in self._kept:
                self.room -= size
                self._kept[path] = image
        return image

    def find_white(self, images: Sequence[ImageSource]) -> float | None:
        """What is white in the deep greys among these images, by the greatest value of all; None if there are none."""
        chunks = [images[i : i + 64] for i in range(0, len(images), 64)]
        found = [value for _, values in self._ahead(greatest_grey, chunks) for value in values if value]
        return white_above(max(found)) if found else None

    def range_notes(self) -> list[str]:
        """Lines about deep greys read so far that use a small part of their range, or go beyond it."""
        white, greys = self.white or SIXTEEN_BIT, dict(self._greys)
        of, notes = f"of {len(greys)} images of more than 8 bits", []
        if low := [value for value in greys.values() if 4 * value < white]:
            top = max(low)
            notes.append(
                f"note: {len(low)} {of} look dark: they use up to {top:g} of a range of {white:g}; "
                f"data.white={white_above(top):g} mends that, or data.white=auto"
            )
        if high := [value for value in greys.values() if value > white]:
            notes.append(f"note: {len(high)} {of} have values above data.white = {white:g}, up to {max(high):g}")
        return notes

    def batches(
        self,
        make: Callable[[Any], Any],
        batches: Iterable[Any],
        collate: Callable[[list], Any] = default_collate,
    ) -> Iterator[tuple[Any, Any]]:
        """Each batch (of indices, say) with what ``make`` gives for its elements, stacked: one tensor or several."""
        for batch, made in self._ahead(make, batches):
            yield batch, collate(made)

    def unreadable(self, paths: Sequence[Path], everything: bool = True) -> dict[Path, str]:
        """The files that cannot be used, each with the reason, in order.

        Without ``everything``, decoding stops when an image finds no room to be kept, so that a large data set is not
        decoded an extra time: of the other files it is only looked whether they are there, and hold anything.
        """

        def check(path: Path) -> str | None:
            if not everything and self._full and path.is_file() and path.stat().st_size:
                return None
            try:
                self.image(path)
            except DataError as error:
                return str(error)
            return None

        chunks = [paths[i : i + 64] for i in range(0, len(paths), 64)]
        bad: dict[Path, str] = {}
        for chunk, reasons in self._ahead(check, chunks):
            bad.update((path, reason) for path, reason in zip(chunk, reasons, strict=True) if reason)
        return bad

    def _ahead(self, make: Callable, batches: Iterable[Any]) -> Iterator[tuple]:
        """``make`` every element of every batch, some batches ahead of the one that is handed out."""
        if self._pool is None:
            for batch in batches:
                yield batch, [make(x) for x in batch]
            return
        waiting: deque[tuple[Any, list[Future]]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, [self._pool.submit(make, x) for x in batch]))
                if len(waiting) > AHEAD:
                    done, futures = waiting.popleft()
                    yield done, [f.result() for f in futures]
            while waiting:
                done, futures = waiting.popleft()
                yield done, [f.result() for f in futures]
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()


def readable(paths: Sequence[Path], reader: ImageReader, skip_bad: bool, say: Callable[[str], object]) -> list[int]:
    """Which of the images to use: all of them, or with ``skip_bad`` those that can be decoded, the others being named.

    Raises DataError if none is left.
    """
    if not skip_bad:
        return list(range(len(paths)))
    bad = reader.unreadable(paths)
    name_skipped(bad, say)
    if len(bad) == len(set(paths)):
        raise unusable_error(bad, len(paths))
    return [i for i, path in enumerate(paths) if path not in bad]


def name_skipped(bad: Mapping[Path, str], say: Callable[[str], object]) -> None:
    """Say of each unreadable image that it is left out, and why."""
    for reason in bad.values():
        say(f"skipped: {reason}")


def unusable_error(bad: Mapping[Path, str], n: int, hint: str = "") -> DataError:
    """The error for unreadable images among ``n``, naming the first few."""
    reasons = list(bad.values())
    if len(reasons) == 1:
        return DataError(reasons[0] + hint)
    return DataError(f"{len(reasons)} of {n} images: {first_few(reasons, '; ')}{hint}")
