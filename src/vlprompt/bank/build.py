"""Building region banks: what a folder does not have yet, computed and put into it, by one process or several."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from vlprompt.bank.config import BankConfig
from vlprompt.bank.manifest import MANIFEST, BankSettings, Manifest, differences, read_manifest, shard_file
from vlprompt.bank.records import open_shard
from vlprompt.bank.towers import Towers, load_towers
from vlprompt.config.images import choose_images, image_notes
from vlprompt.data.datasets import check_outside, load_dataset
from vlprompt.data.files import content_hash
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import Split
from vlprompt.errors import ConfigError, DataError
from vlprompt.files import alone, is_unfinished, write_atomically, write_error

LOCK = ".lock"


@dataclass(frozen=True)
class Built:
    """What a build has done."""

    bank: str
    finished: bool
    """Whether all parts are there."""
    images: int
    """In the bank."""
    built: int
    """Images whose regions this build computed."""
    bytes_per_image: int
    skipped: int = 0
    """Images left out because they cannot be read (--skip-bad)."""


def build_bank(
    config: BankConfig,
    out: Path,
    say: Callable[[str], object] = lambda text: None,
    progress: Callable[[int, int], object] = lambda done, of: None,
) -> Built:
    """Compute the regions of a data set's training images, or those that ``out`` does not have yet.

    A build that was killed at any point and is begun again ends with the same bytes (on a CPU, with one number of
    threads), in however many parts. Images that the bank does not have are added to it; what an earlier build was to
    add and has not, and these are not, is left out. ``progress`` is told how many of this build's images are done.
    Raises ConfigError saying what differs if the bank was begun with other settings, or if another build changes
    meanwhile what it is to hold.
    """
    _begun(out)  # what cannot be continued is refused before anything is loaded
    with ImageReader(config.data.workers, room=0, max_pixels=config.data.max_pixels) as reader:
        dataset = load_dataset(config.data.name, config.data.root, config.data.split_file)
        check_outside(out, dataset)
        split, skipped = choose_images(config, dataset, reader, say)
        towers = load_towers(config, split, config.data.template or dataset.template)
        for note in image_notes(config, dataset, split, reader):
            say(note)
        built = fill(out, towers, split, reader, config.part, say, progress)
    return replace(built, skipped=skipped)


def fill(
    out: Path,
    towers: Towers,
    split: Split,
    reader: ImageReader,
    part: tuple[int, int] = (1, 1),
    say: Callable[[str], object] = lambda text: None,
    progress: Callable[[int, int], object] = lambda done, of: None,
) -> Built:
    """Compute what the bank in ``out`` does not have of a split's training images; see :func:`build_bank`."""
    (i, n), settings = part, towers.settings
    files = {content_hash(file): file for file in reversed(split.paths("train"))}  # the first of equal ones
    paths = {content: file.relative_to(split.root).as_posix() for content, file in sorted(files.items())}
    _plan(out, settings, paths)  # a command that is refused leaves nothing behind, not even a lock
    with _alone_in(out):
        began, manifest = _plan(out, settings, paths)
        if manifest != began:
            manifest.write(out)
    if began and (gone := len(set(began.images) - set(manifest.images))):
        say(f"{gone} images that {out} was to hold are not among the data any more: they are left out")
    starts = manifest.starts()
    todo = [s for s in range(i - 1, len(manifest.shards), n) if not _there(out, manifest, s)]
    images = [content for s in todo for content, _ in manifest.images[starts[s] : starts[s + 1]]]
    say(_opening(manifest, len(images), part))
    records = towers.records([(content, files[content]) for content in images], reader)
    done, new = 0, []
    for s in todo:
        block = np.empty((manifest.shards[s].images, manifest.settings.regions), manifest.settings.record)
        for k, record in enumerate(islice(records, len(block))):
            block[k] = record
            done += 1
            progress(done, len(images))
        content = io.BytesIO()
        np.save(content, block, allow_pickle=False)
        with _alone_in(out):
            _unchanged(out, manifest)
            if not _there(out, manifest, s):
                write_atomically(shard_file(out, s), content.getvalue())
                new.append(s)
    finished = _finish(out, manifest, new)
    return Built(str(out), finished, len(manifest.images), done, manifest.settings.bytes_per_image)


def _there(out: Path, manifest: Manifest, s: int) -> bool:
    """Whether a file is there, and the whole of it: a power cut may leave an empty one."""
    try:
        open_shard(out, manifest, s)
    except DataError:
        return False
    return True


def _begun(out: Path) -> Manifest | None:
    """What an earlier build has begun in the folder; raises ConfigError if something else is in it."""
    if not out.exists():
        return None
    # First what is in it: another part may be putting its manifest there.
    ours = out.is_dir() and all(is_unfinished(file) or file.name == LOCK for file in out.iterdir())
    if not ours and not (out / MANIFEST).exists():
        raise ConfigError(f"output folder {out} is already in use: choose another with --out")
    return read_manifest(out) if (out / MANIFEST).exists() else None


def _plan(out: Path, settings: BankSettings, paths: Mapping[str, str]) -> tuple[Manifest | None, Manifest]:
    """What is begun in the folder, and what a build with these settings and images (path by content) makes of it.

    Raises ConfigError if other settings have computed something already, and DataError if a file is lost of which
    images are not there.
    """
    began = _begun(out)
    if not began:
        return None, Manifest(settings).with_images(paths, ())
    files = [shard_file(out, s) for s in range(len(began.shards))]
    there = [_there(out, began, s) for s in range(len(files))]
    built = {s for s, shard in enumerate(began.shards) if there[s] or shard.sha256}
    different = differences(asdict(began.settings), asdict(settings))
    if not built:  # it is as good as not begun
        return began, Manifest(settings if different else began.settings).with_images(paths, ())
    if different:
        raise ConfigError(f"{out} cannot be continued: it was begun with {'; '.join(different)}")
    starts = began.starts()
    for s in (s for s in built if not there[s]):
        for content, path in began.images[starts[s] : starts[s + 1]]:
            if content not in paths:
                raise DataError(
                    f"{out} cannot be continued: {files[s].name} is lost, and image {path} of it is not among the "
                    "data, or has changed"
                )
    return began, began.with_images(paths, built)


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Hold a bank's folder, made if need be, against other builds while its manifest is read and something written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with alone(out / LOCK):
            yield
    except OSError as error:
        raise write_error(out, error) from error


def _unchanged(out: Path, manifest: Manifest) -> Manifest:
    """The folder's manifest; raises ConfigError if it is for other settings or images than this one.

    Two builds that differ may have begun at once. Each asks before it puts a file into place, so no bank gets files of
    both.
    """
    now = read_manifest(out)
    if now.plan != manifest.plan:
        raise ConfigError(
            f"{out} cannot be continued: another build has begun there meanwhile, with other images or settings; give "
            "this command again when that one has ended, or choose another --out"
        )
    return now


def _opening(manifest: Manifest, images: int, part: tuple[int, int]) -> str:
    s, all_images = manifest.settings, len(manifest.images)
    t, kept = s.teacher, [f"features of {s.features.name}"] if s.features else []
    if t:
        kept.insert(0, f"the {t.top_k} most probable of {len(t.class_names)} classes to {t.name}")
    which = f" (part {part[0]}/{part[1]})" if part[1] > 1 else ""
    return (
        f"{s.regions} regions of each image: {' and '.join(kept)}; {s.bytes_per_image:,} bytes an image\n"
        f"{images} of {all_images} images to do{which}"
    )


def _finish(out: Path, manifest: Manifest, new: Collection[int]) -> bool:
    """Once every file is there, write their checksums into the manifest; whether it is so.

    ``new`` are the files that this build has written. What killed builds left is removed then.
    """
    files = [shard_file(out, s) for s in range(len(manifest.shards))]
    with _alone_in(out):
        now = _unchanged(out, manifest)
        if not all(_there(out, now, s) for s in range(len(files))):
            return False
        shards = tuple(
            replace(shard, sha256=content_hash(file)) if s in new or not shard.sha256 else shard
            for s, (shard, file) in enumerate(zip(now.shards, files, strict=True))
        )
        if shards != now.shards:
            replace(now, shards=shards).write(out)
        for file in filter(is_unfinished, out.glob(".*")):  # of killed builds: others write only where they are alone
            file.unlink(missing_ok=True)
        (out / LOCK).unlink(missing_ok=True)
    return True
