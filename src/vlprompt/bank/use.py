"""Region banks in a run: whether one fits it, and the views that training reads from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from vlprompt.backbones.names import public_name
from vlprompt.bank.manifest import differences
from vlprompt.bank.records import Bank
from vlprompt.bank.views import BankViews
from vlprompt.config.schema import DataConfig, RunConfig, TeacherConfig
from vlprompt.config.teacher import load_teacher_model
from vlprompt.data.images import ImageSource
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import names_in_file
from vlprompt.errors import ConfigError, DataError
from vlprompt.methods import Method, find_method

REGIONS_PER_IMAGE, IMAGES_AT_LEAST = 4, 8  # of a batch, unless the configuration says otherwise


def find_bank(config: RunConfig, class_names: Sequence[str]) -> Bank | None:
    """The configured bank, if its regions and the labels that the run reads fit; None if the run has none.

    ``class_names`` are the data set's. Raises ConfigError saying what differs, or what the method needs that a bank
    does not have. Features are compared by :func:`bank_views`: whether they are read depends on the built method.
    """
    data, cls = config.data, find_method(config.method)
    if data.bank is None:
        for key, value in (("views", data.views), ("regions_per_image", data.regions_per_image)):
            if value not in (None, "random", "center") and not (key == "views" and cls.fixes_views):
                raise ConfigError(f"data.{key} = {value}: there is no region bank (--bank)")
        return None
    bank = Bank(Path(data.bank).expanduser())
    built = bank.settings
    if data.white is not None:
        raise ConfigError(f"data.white = {data.white}: not with a region bank (--bank), whose regions are made")
    wanted: dict[str, Any] = {"crops": {"min_scale": data.min_scale, "flip": data.flip}}
    if config.taught:
        if not built.teacher:
            raise ConfigError(
                f"region bank {data.bank} has no teacher's labels, which method '{cls.name}' learns from: "
                "build one with --teacher"
            )
        wanted["teacher"] = _wanted_teacher(config.teacher, class_names)
    _compare(bank, wanted)
    m, allowed = data.regions_per_image, _divisors(data, regions_used(data, bank))
    if m is not None and m not in allowed:
        numbers = ", ".join(map(str, allowed))
        raise ConfigError(f"data.regions_per_image = {m} (allowed with batches of {data.batch_size}: {numbers})")
    return bank


def _compare(bank: Bank, wanted: Mapping[str, Any]) -> None:
    if different := differences(asdict(bank.settings), wanted):
        raise ConfigError(f"region bank {bank.folder} does not fit this run: it was built with {'; '.join(different)}")


def _wanted_teacher(given: TeacherConfig, class_names: Sequence[str]) -> dict[str, Any]:
    """What a run says about the teacher whose labels it reads: its classes, and what it names explicitly."""
    names = names_in_file(Path(given.class_names_file)) if given.class_names_file else tuple(class_names)
    wanted: dict[str, Any] = {"class_names": names}
    if given.backbone:
        teacher = load_teacher_model(given.backbone)
        wanted |= {"name": public_name(teacher.name), "fingerprint": teacher.fingerprint}
    return wanted | {k: v for k in ("template", "logit_scale") if (v := getattr(given, k)) is not None}


def regions_used(data: DataConfig, bank: Bank) -> int:
    """How many of each image's regions are trained on, its first ones; raises ConfigError if there are not so many."""
    most = bank.settings.regions
    if data.views is None:
        return most
    if isinstance(data.views, str) or data.views > most:
        raise ConfigError(f"data.views = {data.views} (allowed with region bank {bank.folder}: 1 to {most})")
    return data.views


def _regions_per_image(data: DataConfig, regions: int) -> int:
    """The regions that a batch holds of each of its images: as configured, or by the rule."""
    if data.regions_per_image is not None:
        return data.regions_per_image
    most = max(min(REGIONS_PER_IMAGE, data.batch_size // IMAGES_AT_LEAST), 1)
    return max(d for d in _divisors(data, regions) if d <= most)


def _divisors(data: DataConfig, regions: int) -> list[int]:
    """What ``data.regions_per_image`` may be."""
    return [d for d in range(1, min(data.batch_size, regions) + 1) if data.batch_size % d == 0]


def read_by(config: RunConfig, bank: Bank) -> tuple[bool, bool]:
    """Whether the run reads the bank's labels, and its features."""
    needed = "frozen_image_features" in find_method(config.method).needs or not config.reads_pixels
    return config.taught, needed and bank.settings.features is not None


def bank_views(
    bank: Bank,
    config: RunConfig,
    method: Method,
    images: Sequence[ImageSource],
    labels: Sequence[int],
    seed: int,
    reader: ImageReader,
    extra: Mapping[str, Tensor] | None = None,
) -> BankViews:
    """Training views from a bank; images are decoded only if the method reads more of them than the bank has.

    Raises DataError if images are not files, or the bank does not have them, and ConfigError if the features that the
    method reads are another backbone's.
    """
    files = [Path(image) for image in images if isinstance(image, (str, PathLike))]
    if len(files) < len(images):
        raise DataError(f"region bank {bank.folder} knows images by their files: it has none that are in memory")
    data, (reads_labels, reads_features) = config.data, read_by(config, bank)
    if reads_features:
        student = method.backbone
        _compare(bank, {"features": {"name": public_name(student.name), "fingerprint": student.fingerprint}})
    regions = regions_used(data, bank)
    decodes = config.reads_pixels or not reads_features or method.patch_size is not None
    return BankViews(
        bank,
        files,
        labels,
        method.backbone.preprocess if decodes else None,
        data.batch_size,
        seed,
        regions=regions,
        regions_per_image=_regions_per_image(data, regions),
        features=reads_features,
        probabilities=reads_labels,
        patch_size=method.patch_size,
        reader=reader,
        extra=extra,
    )
