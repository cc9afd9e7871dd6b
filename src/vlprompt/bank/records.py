"""The records of a region bank: read from disk as needed, and what their numbers stand for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlprompt.bank.manifest import MANIFEST, Manifest, read_manifest, shard_file
from vlprompt.data.arrays import open_array
from vlprompt.data.files import content_hash, missing_error
from vlprompt.errors import DataError, one_line

SHARDS_OPEN = 256  # files mapped at once, well below what systems allow
SUM = 0.01
"""How far stored probabilities may be from a sum of 1: each is rounded to 11 bits."""
FLOOR = 2.0**-25  # what a stored probability of 0 is less than: half the smallest number of fp16


class Bank:
    """A finished region bank, opened for reading; raises DataError if it is not finished, or files do not fit.

    Each file is compared with its checksum, and its values looked at, when something is first read of it: DataError
    then names one that is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        self.settings, self.record = self.manifest.settings, self.manifest.settings.record
        unfinished = sum(not shard.sha256 for shard in self.manifest.shards)
        if unfinished:
            raise DataError(
                f"region bank {folder} is not finished ({unfinished} of {len(self.manifest.shards)} files): give the "
                "`vlprompt bank build` command that began it again"
            )
        self._starts = self.manifest.starts()
        self._row = {content: row for row, (content, _) in enumerate(self.manifest.images)}
        self._shard = lru_cache(SHARDS_OPEN)(self._open)
        self._verified: set[int] = set()
        for i in range(len(self.manifest.shards)):
            open_shard(folder, self.manifest, i)

    def __len__(self) -> int:
        """Images."""
        return len(self.manifest.images)

    def rows(self, files: Sequence[Path]) -> NDArray[np.int64]:
        """Which of the bank's images these files are; raises DataError naming the first that it does not have."""
        contents = [content_hash(file) for file in files]
        absent = [file for file, content in zip(files, contents, strict=True) if content not in self._row]
        if absent:
            path = absent[0].as_posix()
            known = any(path == old or path.endswith(f"/{old}") for _, old in self.manifest.images)
            why = "its content was another when the bank was built" if known else "it is not among the bank's images"
            raise DataError(
                f"region bank {self.folder} lacks {len(absent)} of the run's {len(files)} training images: "
                f"{absent[0]}: {why}"
            )
        return np.array([self._row[content] for content in contents])

    def read(self, rows: NDArray[np.int64], regions: NDArray[np.int64]) -> NDArray[np.void]:
        """The records of regions [n] of images [n], by their numbers: [n]."""
        records = np.empty(len(rows), self.record)
        shards = np.searchsorted(self._starts, rows, "right") - 1
        for i in np.unique(shards):
            of_this = shards == i
            records[of_this] = self._shard(int(i))[rows[of_this] - self._starts[i], regions[of_this]]
        return records

    def features(self, records: NDArray[np.void]) -> Tensor:
        """Normalised frozen features, [n, E] in fp32."""
        return torch.from_numpy(records["features"].astype(np.float32))

    def probabilities(self, records: NDArray[np.void]) -> Tensor:
        """The teacher's distribution over all its classes, [n, C] in fp32: the classes not kept share the rest."""
        assert self.settings.teacher is not None
        n_classes = len(self.settings.teacher.class_names)
        # Zeros as they were stored: a class's share of the rest may be smaller than any number of fp16.
        kept, rest = (
            torch.from_numpy(records[key].astype(np.float32)).clamp_min(FLOOR) for key in ("probabilities", "rest")
        )
        classes = torch.from_numpy(records["classes"].astype(np.int64))
        share = rest / max(n_classes - kept.shape[1], 1)
        full = share[:, None].repeat(1, n_classes).scatter(1, classes, kept)
        return full / full.sum(-1, keepdim=True)

    def verify(self) -> None:
        """Compare all files with their checksums, and look at their values."""
        for i in range(len(self.manifest.shards)):
            self._shard(i)

    def _open(self, i: int) -> NDArray[np.void]:
        records = open_shard(self.folder, self.manifest, i)
        if i not in self._verified:
            file = shard_file(self.folder, i)
            if content_hash(file) != self.manifest.shards[i].sha256:
                raise DataError(f"{file} is damaged: its sha256 is not the one in {MANIFEST}")
            if wrong := self._wrong(records):
                raise DataError(f"{file} is damaged: {wrong}")
            self._verified.add(i)
        return records

    def _wrong(self, records: NDArray[np.void]) -> str:
        """What no teacher and no tower gives."""
        if (teacher := self.settings.teacher) is not None:
            if (largest := records["classes"].max(initial=0)) >= len(teacher.class_names):
                return f"class {largest} of {len(teacher.class_names)}"
            kept, rest = (records[key].astype(np.float32) for key in ("probabilities", "rest"))
            sums = kept.sum(-1) + rest
            if not (np.minimum(kept.min(-1), rest) >= 0).all() or not (np.abs(sums - 1) <= SUM).all():
                return "probabilities that do not sum to 1"
        if self.settings.features is not None and not np.isfinite(records["features"]).all():
            return "features that are not finite"
        return ""


def open_shard(folder: Path, manifest: Manifest, i: int) -> NDArray[np.void]:
    """The i-th file of a bank, mapped: [images, regions]; raises DataError if it, or a part of it, is not there."""
    file, shape = shard_file(folder, i), (manifest.shards[i].images, manifest.settings.regions)
    try:
        return open_array(file, manifest.settings.record, shape)
    except FileNotFoundError:
        raise missing_error("file of the region bank", file) from None
    except OSError as error:
        raise DataError(f"cannot read {file}: {one_line(error)}") from None
    except ValueError as error:
        raise DataError(f"{file} does not hold what {MANIFEST} says: found {one_line(error)}") from None


def top_k(p: Tensor, k: int) -> tuple[NDArray[np.int64], NDArray[np.float16], NDArray[np.float16]]:
    """The k most probable classes of p [n, C], in falling order, their probabilities, and the sum of the others."""
    ordered, classes = p.float().cpu().sort(descending=True, stable=True)
    rest = ordered[:, k:].sum(-1)
    return classes[:, :k].numpy(), ordered[:, :k].half().numpy(), rest.half().numpy()


def verify(folder: Path, root: Path | None = None) -> Manifest:
    """Compare a bank's files with their checksums and, below ``root``, its images with their contents.

    Raises DataError naming the first file that is missing or has changed.
    """
    bank = Bank(folder)
    bank.verify()
    manifest = bank.manifest
    for content, path in manifest.images if root else ():
        assert root is not None
        if content_hash(root / path) != content:
            raise DataError(f"image {root / path} has changed since the region bank {folder} was built")
    return manifest
