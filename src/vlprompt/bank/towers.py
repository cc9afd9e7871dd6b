"""The towers that fill a region bank: what a teacher and a student say about the regions of each image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import load_backbone
from vlprompt.backbones.names import public_name
from vlprompt.bank.config import BankConfig
from vlprompt.bank.manifest import MOST_CLASSES, BankSettings, Features, Labels
from vlprompt.bank.records import top_k
from vlprompt.bank.regions import restored, stored
from vlprompt.config.teacher import Teacher, configured_teacher, load_teacher_model
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import Split
from vlprompt.errors import DataError, VlpromptError


class Towers:
    """A teacher, a student, or both, and what they say about regions."""

    def __init__(self, settings: BankSettings, teacher: Teacher | None, student: Backbone | None) -> None:
        self.settings, self.teacher, self.student = settings, teacher, student
        read: list[Backbone | Teacher] = [model for model in (student, teacher) if model]
        # Where both read the same, the views are made once.
        self.preprocesses = list(dict.fromkeys(model.preprocess for model in read))

    def records(self, files: Sequence[tuple[str, Path]], reader: ImageReader) -> Iterator[NDArray[np.void]]:
        """The regions of each image, given as (content, file): [R] records."""
        s = self.settings

        def batches() -> Iterator[list[tuple[Image.Image, NDArray[np.float64]]]]:
            for content, file in files:
                image = reader.image(file)
                regions = restored(s.crops.draw(content, image.width, image.height, s.regions))
                for i in range(0, s.regions, s.batch_size):  # no batch has two images
                    yield [(image, region) for region in regions[i : i + s.batch_size]]

        done = reader.batches(self._views, batches())
        for _ in files:
            yield np.concatenate([self._seen(*one) for one in islice(done, -(-s.regions // s.batch_size))])

    def _views(self, one: tuple[Image.Image, NDArray[np.float64]]) -> tuple[Tensor, ...]:
        return tuple(preprocess.region(*one) for preprocess in self.preprocesses)

    def _seen(
        self, batch: Sequence[tuple[Image.Image, NDArray[np.float64]]], views: Sequence[Tensor]
    ) -> NDArray[np.void]:
        """What the towers say about regions, as records."""
        records = np.empty(len(batch), self.settings.record)
        records["region"] = stored(np.stack([region for _, region in batch]))
        if self.student:
            records["features"] = self.student.encode_images(views[0]).float().cpu().numpy()
        if self.teacher and self.settings.teacher:
            p = self.teacher.probabilities(views[-1].to(self.teacher.model.device))
            if not p.isfinite().all():
                raise VlpromptError(f"the teacher's probabilities are not finite in {self.settings.precision}")
            best = top_k(p, self.settings.teacher.top_k)
            records["classes"], records["probabilities"], records["rest"] = best
        return records


def load_towers(config: BankConfig, split: Split, template: str) -> Towers:
    """The configured towers, for a split's classes; ``template`` is the data set's."""

    student = load_backbone(config.backbone, config.device, config.precision) if config.backbone else None
    teacher = None
    if config.teacher.backbone:
        model = load_teacher_model(config.teacher.backbone, config.device, config.precision)
        scale = student.logit_scale if student else getattr(model, "logit_scale", 1.0)
        teacher = configured_teacher(config.teacher, model, split.class_names, template, scale)
    return towers_of(config, teacher, student)


def towers_of(config: BankConfig, teacher: Teacher | None, student: Backbone | None) -> Towers:
    """Loaded towers, and the settings of the bank that they fill."""
    labels = features = None
    if student:
        features = Features(public_name(student.name), student.fingerprint, student.embed_dim, config.features)
    if teacher:
        names, model = teacher.class_names, teacher.model
        if len(names) > MOST_CLASSES:
            raise DataError(f"a region bank can tell {MOST_CLASSES} classes apart, not {len(names)}")
        name, k = public_name(model.name), min(config.top_k, len(names))
        labels = Labels(name, model.fingerprint, teacher.template, teacher.logit_scale, names, k)
    settings = BankSettings(config.regions, config.crops, labels, features, config.batch_size, config.precision)
    return Towers(settings, teacher, student)
