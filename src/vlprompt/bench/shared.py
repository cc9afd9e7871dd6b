"""Images decoded once for all runs of a bench, and their evaluation views and frozen features made once: in files."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from PIL import Image
from torch import Tensor

from vlprompt.data.arrays import head, open_array
from vlprompt.data.batches import evaluation_batches
from vlprompt.data.images import load_image
from vlprompt.data.reading import ImageReader
from vlprompt.files import alone, sync, unfinished_name
from vlprompt.methods import Method
from vlprompt.training.evaluate import Crop, EvaluationImages

SHARED = ".shared"
_FREE = 2  # files are written only where the disk has this many times their size left
_LEFT = 0.1  # and decoded images only where this share of the disk is free


class SharedImages(EvaluationImages):
    """Images to evaluate on, of which whichever process comes first leaves views and frozen features in ``folder``.

    What is read from there equals what would be computed. Where the disk lacks room it is computed each time.
    """

    def __init__(
        self,
        images: Sequence[Path],
        labels: Sequence[int],
        reader: ImageReader,
        *,
        folder: Path,
    ) -> None:
        super().__init__(images, labels, reader)
        self.folder = folder
        self._identity = list(map(_identity, images))

    def views(self, method: Method) -> Iterator[Tensor]:
        """Evaluation views [B, 3, S, S] at a time, from the pixels in the file."""
        preprocess, size = method.backbone.preprocess, method.backbone.preprocess.image_size

        def pixels() -> Iterator[NDArray]:
            whole = evaluation_batches(self.images, lambda image: np.array(preprocess.whole(image)), self.reader)
            yield from (batch.numpy() for batch in whole)

        shape = len(self.images), size, size, 3
        kept = computed_once(self._file("views", asdict(preprocess)), shape, np.uint8, pixels)
        if kept is None:
            yield from super().views(method)
            return
        yield from evaluation_batches(kept, preprocess.tensor, self.reader)

    def frozen(self, method: Method) -> Tensor:
        """Normalised features from the frozen image tower, [n, E], from the file."""
        backbone = method.backbone
        shape = len(self.images), backbone.embed_dim

        def features() -> Iterator[NDArray]:
            for images in self.views(method):
                yield backbone.encode_images(images).cpu().numpy()

        made_by = [backbone.fingerprint, str(backbone.dtype), backbone.device.type]
        kept = computed_once(self._file("features", made_by), shape, np.float32, features)
        return super().frozen(method) if kept is None else torch.from_numpy(np.array(kept)).to(backbone.device)

    def _pooled_view(self, method: Method, k: int, crop: Crop) -> Iterator[Tensor]:
        backbone = method.backbone
        shape = len(self.images), backbone.pooled_dim
        made_by = [backbone.fingerprint, str(backbone.dtype), backbone.device.type, k, *crop]
        computed = super()._pooled_view(method, k, crop)
        kept = computed_once(
            self._file("random", made_by), shape, np.float32, lambda: (x.cpu().numpy() for x in computed)
        )
        yield from computed if kept is None else [torch.from_numpy(np.array(kept)).to(backbone.device)]

    def _file(self, what: str, made_by: object) -> Path:
        white = [] if self.reader.white is None else [self.reader.white]
        return self.folder / f"{what}-{_digest([made_by, self._identity, *white])}.npy"


def decoded_once(folder: Path) -> Callable[..., Image.Image]:
    """A :func:`load_image` for files: the process that comes first leaves the pixels in ``folder`` for the others.

    Two that come at the same moment both decode. Where the disk lacks room an image is decoded each time.
    """

    def decode(path: Path, **how: Any) -> Image.Image:
        file = folder / f"image-{_digest([*_identity(path), *how.items()])}.npy"
        kept = _read(file, np.uint8)
        if kept is not None:
            return Image.fromarray(np.array(kept))
        image = load_image(path, **how)
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            pixels, disk = np.asarray(image), shutil.disk_usage(folder)
            if disk.free - pixels.nbytes > _LEFT * disk.total:
                _write(file, pixels.shape, pixels.dtype, [pixels])
        return image

    return decode


def computed_once(
    file: Path, shape: tuple[int, ...], dtype: DTypeLike, compute: Callable[[], Iterable[NDArray]]
) -> NDArray | None:
    """The array in a file, mapped; the first of several processes computes it, a part at a time, the others wait.

    None if the file cannot be written.
    """
    dtype = np.dtype(dtype)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with alone(file.with_suffix(".lock")):  # without locks, work is done twice at worst
            kept = _read(file, dtype, shape)
            if kept is None:
                if shutil.disk_usage(file.parent).free < _FREE * math.prod(shape) * dtype.itemsize:
                    return None
                _write(file, shape, dtype, compute())
                kept = _read(file, dtype, shape)
        return kept
    except OSError:
        return None


def _read(file: Path, dtype: DTypeLike, shape: tuple[int, ...] | None = None) -> NDArray | None:
    """The array in a file; None if there is none, or not the whole of it, as a machine that went down may leave it."""
    try:
        return open_array(file, dtype, shape)
    except (OSError, ValueError):
        return None


def _write(file: Path, shape: tuple[int, ...], dtype: np.dtype, parts: Iterable[NDArray]) -> None:
    # Not into a mapped file: a disk that fills up would kill the process, where a write raises an error.
    unfinished = unfinished_name(file)
    try:
        with unfinished.open("wb") as stream:
            stream.write(head(dtype, shape))
            for part in parts:
                stream.write(np.ascontiguousarray(part, dtype).data)
            stream.flush()
            os.fsync(stream.fileno())  # after a power cut a file may have its size, and zeros in it
        os.replace(unfinished, file)
        sync(file.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def _digest(content: object) -> str:
    return sha256(json.dumps(content).encode(errors="surrogateescape")).hexdigest()[:16]


def _identity(path: Path) -> list[str | int]:
    """What changes when a file does; one that is missing has only its name, and is told of when it is read."""
    try:
        facts = path.stat()
    except OSError:
        return [str(path)]
    return [str(path), facts.st_size, facts.st_mtime_ns]
