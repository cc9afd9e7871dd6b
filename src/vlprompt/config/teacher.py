"""The online teacher: a larger frozen model that says, during training, what the student's views show."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.lite0 import Lite0
from vlprompt.backbones.load import DTYPES, load_backbone
from vlprompt.config.schema import RunConfig, TeacherConfig
from vlprompt.data.known.table import DEFAULT_TEMPLATE
from vlprompt.data.splits import names_in_file
from vlprompt.errors import ConfigError
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.prompting.text import fill

Precision = Literal["fp32", "bf16", "fp16"]
TeacherModel = Backbone | Lite0
"""What can teach: it encodes images and texts into one space."""


def find_teacher(config: RunConfig, class_names: Sequence[str], template: str, student: Backbone) -> Teacher | None:
    """The configured teacher on the student's device and in its dtype; None if the run needs none, or has its labels.

    It chooses among ``class_names`` with ``template``, those of the data set, unless it has its own. Raises
    ConfigError naming the key if there should be a teacher, and is none.
    """
    if (name := teacher_name(config)) is None:
        return None
    model = load_teacher_model(name).to(student.device, student.dtype)
    return configured_teacher(config.teacher, model, class_names, template, student.logit_scale)


def load_teacher_model(name: str, device: torch.device | str = "cpu", precision: Precision = "fp32") -> TeacherModel:
    """What ``--teacher`` names: the classifier ``efficientnet-lite0``, or a backbone.

    Raises BackboneError as :func:`load_backbone` does, or for a package that is not installed.
    """
    return Lite0(device, DTYPES[precision]) if name == Lite0.name else load_backbone(name, device, precision)


def teacher_name(config: RunConfig) -> str | None:
    """The teacher that a run loads; None if it needs none, or has its labels in a bank.

    Raises ConfigError naming the key if there should be one, and is none.
    """
    if config.data.bank or not config.taught:
        return None
    if config.teacher.backbone is None:
        raise ConfigError(f"teacher.backbone is not given: method '{config.method}' learns from a teacher (--teacher)")
    return config.teacher.backbone


def configured_teacher(
    given: TeacherConfig, model: TeacherModel, class_names: Sequence[str], template: str, logit_scale: float
) -> Teacher:
    """A loaded teacher with the configured classes, template and scale, or else those that are given here.

    A classifier keeps to its own template and scale: it reads names as they are, and its cosines are not CLIP's.
    """
    if given.class_names_file:
        class_names, template = names_in_file(Path(given.class_names_file)), DEFAULT_TEMPLATE
    if isinstance(model, Lite0):
        template, logit_scale = model.template, model.logit_scale
    return Teacher(model, class_names, given.template or template, given.logit_scale or logit_scale)


class Teacher:
    """Zero-shot predictions of a frozen model; its class features are computed once.

    ``template`` is the classes' text, ``logit_scale`` what cosines are multiplied by.
    """

    def __init__(self, backbone: TeacherModel, class_names: Sequence[str], template: str, logit_scale: float) -> None:
        self.backbone, self.class_names, self.template = backbone, tuple(class_names), template
        self.logit_scale = logit_scale
        if isinstance(backbone, Lite0):
            self.class_features = backbone.encode_texts(fill(template, class_names))
        else:
            self.class_features = frozen_class_features(backbone, class_names, [template])
        decides = (backbone.fingerprint, self.class_names, template, logit_scale)
        self.fingerprint = sha256(repr(decides).encode()).hexdigest()
        """SHA-256 over what decides the probabilities."""

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """The softmax of its logits for images [B, 3, S, S], preprocessed for its backbone: [B, C]."""
        return (self.logit_scale * self.backbone.encode_images(images) @ self.class_features.T).softmax(-1)
