"""What a region bank holds and how it was made: its settings, its images and files, and its ``manifest.json``.

A bank is a folder of ``.npy`` files, each with the regions of a few images as [images, regions] records, and the
manifest, which says how they were made and which image is where. Images are known by their content, not by their names.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from hashlib import sha256
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from vlprompt.bank.regions import Crops
from vlprompt.data.files import missing_error
from vlprompt.documents import CHECKSUM, MOST_JSON, fitted, parse_json, read_text, sealed, unsealed
from vlprompt.errors import DataError, one_line
from vlprompt.files import write_atomically

FORMAT_VERSION = 2
"""2 added a checksum over the manifest; version 1, of before any release, is refused."""
MANIFEST = "manifest.json"
SHARD_IMAGES = 8  # images in a file: what a killed build loses at most
MOST_CLASSES = 65536


@dataclass(frozen=True)
class Labels:
    """Who labelled the regions, and with what: what the probabilities depend on."""

    name: str
    fingerprint: str
    template: str
    logit_scale: float
    class_names: tuple[str, ...]
    top_k: Annotated[int, Ge(1)]
    """Classes of each region whose probabilities are kept; the others share what is left."""


@dataclass(frozen=True)
class Features:
    """Whose frozen image features are kept, and how."""

    name: str
    fingerprint: str
    embed_dim: Annotated[int, Ge(1)]
    dtype: Literal["fp32", "fp16"] = "fp32"


@dataclass(frozen=True)
class BankSettings:
    """All that decides a bank's numbers, besides its images."""

    regions: Annotated[int, Ge(1)] = 500
    """R, of each image."""
    crops: Crops = field(default_factory=Crops)
    teacher: Labels | None = None
    features: Features | None = None
    batch_size: Annotated[int, Ge(1)] = 50
    """Regions of one image that the towers read at once: the last bits of their numbers depend on it."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the towers."""

    @property
    def record(self) -> np.dtype:
        """One region with all that is known about it."""
        parts: list[Any] = [("region", "<u2", (5,))]
        if (t := self.teacher) is not None:
            parts.append(("classes", "|u1" if len(t.class_names) <= 256 else "<u2", (t.top_k,)))
            parts += [("probabilities", "<f2", (t.top_k,)), ("rest", "<f2")]
        if (f := self.features) is not None:
            parts.append(("features", "<f4" if f.dtype == "fp32" else "<f2", (f.embed_dim,)))
        return np.dtype(parts)

    @property
    def bytes_per_image(self) -> int:
        """Size of one image's regions on disk."""
        return self.regions * self.record.itemsize

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the settings: with an image's content they decide its numbers. Names of models do not."""
        decides = asdict(self, dict_factory=lambda items: {key: value for key, value in items if key != "name"})
        return sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """One file of a bank."""

    images: Annotated[int, Ge(0)]
    """The next so many of the bank's images; none if they were taken out of the data before they were computed."""
    sha256: str | None = None
    """None while it is not known to be there."""


@dataclass(frozen=True)
class Manifest:
    """What a bank holds."""

    settings: BankSettings
    images: tuple[tuple[str, str], ...] = ()
    """(SHA-256 of the file, path relative to the data set when it was added) of each image, in order."""
    shards: tuple[Shard, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether every file is there."""
        return all(shard.sha256 for shard in self.shards)

    @property
    def plan(self) -> Manifest:
        """What it is to hold, whether that is there or not."""
        return replace(self, shards=tuple(Shard(shard.images) for shard in self.shards))

    def with_images(self, images: Mapping[str, str], built: Container[int]) -> Manifest:
        """With these images (path by content), and those of the files that are ``built``.

        New ones come in files of their own. Others are taken out of the file that they were for, which keeps its
        number.
        """
        rows = [self.images[start:end] for start, end in pairwise(self.starts())]
        kept = [r if i in built else [row for row in r if row[0] in images] for i, r in enumerate(rows)]
        known = {content for r in kept for content, _ in r}
        new = [(content, path) for content, path in images.items() if content not in known]
        shards = [replace(shard, images=len(r)) for shard, r in zip(self.shards, kept, strict=True)]
        shards += [Shard(len(new[i : i + SHARD_IMAGES])) for i in range(0, len(new), SHARD_IMAGES)]
        return Manifest(self.settings, (*chain(*kept), *new), tuple(shards))

    def starts(self) -> NDArray[np.int64]:
        """The first image of each file, and at the end the number of images."""
        return np.cumsum([0, *(shard.images for shard in self.shards)])

    def write(self, folder: Path) -> None:
        """Put it into place as a whole."""
        whole = sealed({"format_version": FORMAT_VERSION, **asdict(self)})
        images, shards = (",".join(f"\n  {_json(row)}" for row in whole[key]) for key in ("images", "shards"))
        settings = json.dumps(whole["settings"], indent=2, ensure_ascii=False)
        head = f'"format_version": {FORMAT_VERSION},\n"settings": {settings}'
        rows = f'"images": [{images}\n],\n"shards": [{shards}\n]'
        write_atomically(folder / MANIFEST, f'{{\n{head},\n{rows},\n"{CHECKSUM}": "{whole[CHECKSUM]}"\n}}\n')


def _json(row: object) -> str:
    """As text to read, unless it stands for bytes that are no UTF-8, as a file's name may."""
    text = json.dumps(row, ensure_ascii=False)
    return json.dumps(row) if any("\ud800" <= letter <= "\udfff" for letter in text) else text


def shard_file(folder: Path, i: int) -> Path:
    """Where the i-th file of a bank lies."""
    return folder / f"regions-{i:05}.npy"


def read_manifest(folder: Path) -> Manifest:
    """What a folder's manifest says; raises DataError if it is no bank, of a newer version, or damaged."""
    file = folder / MANIFEST
    if not folder.is_dir():
        raise missing_error("region bank", folder)
    if not file.is_file():
        raise DataError(f"{folder} is no region bank: it has no {MANIFEST}")
    try:
        content = parse_json(read_text(file, MOST_JSON))
        version = content["format_version"]
        if version > FORMAT_VERSION:
            raise DataError(
                f"{folder} has format_version {version}; this vlprompt reads up to {FORMAT_VERSION}: update it"
            )
        if version < FORMAT_VERSION:
            raise DataError(f"{folder} has format_version {version}, of before 0.1: it has no checksum; build it again")
        content = unsealed(content)
        del content["format_version"]
        manifest = fitted(Manifest, content)
        if manifest.starts()[-1] != len(manifest.images):
            raise ValueError(f"{len(manifest.images)} images, {manifest.starts()[-1]} in its files")
        return manifest
    except KeyError as error:
        raise DataError(f"cannot read {file}: it has no {error}") from None
    except (TypeError, ValueError, OSError) as error:
        raise DataError(f"cannot read {file}: {one_line(error)}") from None


def describe(manifest: Manifest) -> dict[str, Any]:
    """What ``vlprompt bank info`` shows."""
    s = manifest.settings
    bytes_per_image = s.bytes_per_image
    return {
        "format_version": FORMAT_VERSION,
        "finished": manifest.finished,
        "images": len(manifest.images),
        "files": len(manifest.shards),
        "bytes_per_image": bytes_per_image,
        "bytes": bytes_per_image * len(manifest.images),
        "fingerprint": s.fingerprint,
        **asdict(s),
    }


def summary(manifest: Manifest) -> str:
    """The same for people, one line each."""
    s, n = manifest.settings, len(manifest.images)
    missing_files = sum(not shard.sha256 for shard in manifest.shards)
    c, t, f = s.crops, s.teacher, s.features
    lines = {
        "state": f"not finished: {missing_files} of {len(manifest.shards)} files" if missing_files else "finished",
        "images": f"{n}, {s.bytes_per_image:,} bytes each, {s.bytes_per_image * n:,} in all",
        "regions": f"{s.regions} of each image, {c.min_scale:g} to {c.max_scale:g} of its area, width / height "
        f"{c.min_ratio:.2f} to {c.max_ratio:.2f}, flip {c.flip:g}, seed {c.seed}",
        "teacher": f"{t.name} ({t.fingerprint[:12]}…), '{t.template}', logit scale {t.logit_scale:g}" if t else "none",
        "labels": f"the {t.top_k} most probable of {len(t.class_names)} classes" if t else "none",
        "features": f"{f.name} ({f.fingerprint[:12]}…), {f.embed_dim} in {f.dtype}" if f else "none",
        "towers": f"{s.precision}, {s.batch_size} regions at once",
    }
    return "\n".join(f"{key:9} {value}" for key, value in lines.items())


def differences(built: Mapping[str, Any], wanted: Mapping[str, Any], section: str = "") -> list[str]:
    """In what a bank was built otherwise than is ``wanted``, in words; both as ``asdict`` gives settings, or parts.

    Names of models are not compared, their fingerprints are.
    """
    found: list[str] = []
    for key, new in wanted.items():
        old = built[key]
        if new == old or key == "name":
            continue
        if isinstance(new, Mapping) and isinstance(old, Mapping):
            found += differences(old, new, key)
        elif key == "class_names":
            found.append(f"other classes ({_class_difference(old, new)})")
        elif key == "fingerprint":
            found.append(f"{section} '{built['name']}' ({old[:12]}…), not '{wanted['name']}' ({new[:12]}…)")
        else:
            found.append(f"{section and f'{section}.'}{key} = {_shown(old)}, not {_shown(new)}")
    return found


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        value = str(value["name"])
    if isinstance(value, str):
        return f"'{value}'"
    return "none" if value is None else str(value)


def _class_difference(old: Sequence[str], new: Sequence[str]) -> str:
    absent = [name for name in new if name not in old]
    if absent:
        near = get_close_matches(absent[0], old, n=1, cutoff=0.5)
        return f"'{absent[0]}' is not among its {len(old)}" + (f", the nearest is '{near[0]}'" if near else "")
    more = [name for name in old if name not in new]
    if more:
        return f"it has {len(old)}, not {len(new)}: '{more[0]}' is one more"
    return "the same in another order"
