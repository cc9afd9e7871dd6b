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
from vlprompt.bank.regions import content_hash
from vlprompt.data.files import missing_error
from vlprompt.errors import DataError, one_line

SHARDS_OPEN = 256  # files mapped at once, well below what systems allow
FLOOR = 2.0**-25  # what a stored probability of 0 is less than: half the smallest number of fp16


class Bank:
    """A finished region bank, opened for reading; raises DataError if it is not finished or files do not fit."""

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
        for i in range(len(self.manifest.shards)):
            self._shard(i)

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

    def _open(self, i: int) -> NDArray[np.void]:
        file, shape = shard_file(self.folder, i), (self.manifest.shards[i].images, self.settings.regions)
        try:
            records = np.load(file, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise missing_error("file of the region bank", file) from None
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"cannot read {file}: {one_line(error)}") from None
        if records.dtype != self.record or records.shape != shape:
            raise DataError(f"{file} does not hold what {MANIFEST} says: found {list(records.shape)} {records.dtype}")
        return records


def top_k(p: Tensor, k: int) -> tuple[NDArray[np.int64], NDArray[np.float16], NDArray[np.float16]]:
    """The k most probable classes of p [n, C], in falling order, their probabilities, and the sum of the others."""
    ordered, classes = p.float().cpu().sort(descending=True, stable=True)
    rest = ordered[:, k:].sum(-1)
    return classes[:, :k].numpy(), ordered[:, :k].half().numpy(), rest.half().numpy()


def verify(folder: Path, root: Path | None = None) -> Manifest:
    """Compare a bank's files with their checksums and, below ``root``, its images with their contents.

    Raises DataError naming the first file that is missing or has changed.
    """
    manifest = Bank(folder).manifest
    for i, shard in enumerate(manifest.shards):
        if content_hash(shard_file(folder, i)) != shard.sha256:
            raise DataError(f"{shard_file(folder, i)} is damaged: its sha256 is not the one in {MANIFEST}")
    for content, path in manifest.images if root else ():
        assert root is not None
        if content_hash(root / path) != content:
            raise DataError(f"image {root / path} has changed since the region bank {folder} was built")
    return manifest
