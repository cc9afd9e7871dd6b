"""The online teacher: a larger frozen model that says, during training, what the student's views show."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import load_backbone
from vlprompt.data.benchmarks.table import DEFAULT_TEMPLATE
from vlprompt.data.splits import names_in_file
from vlprompt.errors import ConfigError
from vlprompt.methods import find_method
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.training.config import RunConfig, TeacherConfig


def find_teacher(config: RunConfig, class_names: Sequence[str], template: str, student: Backbone) -> Teacher | None:
    """The configured teacher on the student's device and in its dtype; None if the run needs none, or has its labels.

    It chooses among ``class_names`` with ``template``, those of the data set, unless it has its own. Raises
    ConfigError naming the key if there should be a teacher, and is none.
    """
    if (name := teacher_name(config)) is None:
        return None
    backbone = load_backbone(name).to(student.device, student.dtype)
    return configured_teacher(config.teacher, backbone, class_names, template, student.logit_scale)


def teacher_name(config: RunConfig) -> str | None:
    """The teacher that a run loads; None if it needs none, or has its labels in a bank.

    Raises ConfigError naming the key if there should be one, and is none.
    """
    if config.data.bank or "teacher_probabilities" not in find_method(config.method).needs:
        return None
    if config.teacher.backbone is None:
        raise ConfigError(f"teacher.backbone is not given: method '{config.method}' learns from a teacher (--teacher)")
    return config.teacher.backbone


def configured_teacher(
    given: TeacherConfig, backbone: Backbone, class_names: Sequence[str], template: str, logit_scale: float
) -> Teacher:
    """A loaded teacher with the configured classes, template and scale, or else those that are given here."""
    if given.class_names_file:
        class_names, template = names_in_file(Path(given.class_names_file)), DEFAULT_TEMPLATE
    return Teacher(backbone, class_names, given.template or template, given.logit_scale or logit_scale)


class Teacher:
    """Zero-shot predictions of a frozen backbone; its class features are computed once.

    ``template`` is the classes' text, ``logit_scale`` what cosines are multiplied by.
    """

    def __init__(self, backbone: Backbone, class_names: Sequence[str], template: str, logit_scale: float) -> None:
        self.backbone, self.class_names, self.template = backbone, tuple(class_names), template
        self.logit_scale = logit_scale
        self.class_features = frozen_class_features(backbone, class_names, [template])
        decides = (backbone.fingerprint, self.class_names, template, logit_scale)
        self.fingerprint = sha256(repr(decides).encode()).hexdigest()
        """SHA-256 over what decides the probabilities."""

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """The softmax of its logits for images [B, 3, S, S], preprocessed for its backbone: [B, C]."""
        return (self.logit_scale * self.backbone.encode_images(images) @ self.class_features.T).softmax(-1)
