"""The teacher: a frozen model, better than the student, that says what views show, in place of labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vlprompt.artefact.artefact import PROMPTS, load_artefact, read_artefact_config
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.lite0 import Lite0
from vlprompt.backbones.load import DTYPES, check_device, load_backbone
from vlprompt.config.schema import RunConfig, TeacherConfig
from vlprompt.data.images import Preprocess
from vlprompt.data.known.table import DEFAULT_TEMPLATE
from vlprompt.data.splits import find_classes, names_in_file
from vlprompt.errors import ConfigError, VlpromptError
from vlprompt.methods import Method
from vlprompt.methods.base import TeacherEntry
from vlprompt.methods.zero_shot import frozen_class_features
from vlprompt.prompting.text import fill


class Classifier(Protocol):
    """Any model that says how probable each of the given classes is."""

    name: str
    fingerprint: str
    """Of all that decides its probabilities, but the class names."""
    preprocess: Preprocess
    device: torch.device

    def probabilities(self, images: Tensor, class_names: Sequence[str]) -> Tensor:
        """Of preprocessed images [B, 3, S, S]: [B, C], each row a sum of one."""


class Tuned:
    """A tuned model, of a run's folder; it keeps to its own template and scale."""

    def __init__(self, folder: str, device: torch.device | str, precision: str) -> None:
        path = Path(folder).expanduser()
        self.name, self.method = folder, load_artefact(path, device=str(device), precision=precision)
        let_ask_teacher(self.method)
        self.template, self.logit_scale = self.method.template, self.method.backbone.logit_scale
        self.preprocess = self.method.backbone.preprocess
        config = read_artefact_config(path)
        decides: list[object] = [config["method"], config["settings"], config["template"], config["prompts"]]
        decides += [self.method.backbone.fingerprint, config.get("method_file", {}).get("sha256")]
        decides += [config["descriptions"]] if "descriptions" in config else []
        self.fingerprint = sha256(json.dumps(decides).encode()).hexdigest()

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.method.backbone.device

    def to(self, device: torch.device, dtype: torch.dtype) -> Tuned:
        """Move its backbone and its prompts in place, and the backbone into another precision."""
        self.method.backbone.to(device, dtype)
        self.method.to(device)
        return self

    def probabilities(self, images: Tensor, class_names: Sequence[str]) -> Tensor:
        """As :meth:`Classifier.probabilities`."""
        return self.method.predict(images, class_names).softmax(-1)


NamedModel = Backbone | Lite0 | Tuned
"""What ``--teacher`` can name."""
TeacherModel = NamedModel | Classifier
"""What can teach: a backbone or EfficientNet-lite0, asked with texts, or what classifies by itself."""


def find_teacher(config: RunConfig, class_names: Sequence[str], template: str, student: Backbone) -> Teacher | None:
    """The configured teacher on the student's device and in its dtype; None if the run needs none, or has its labels.

    It chooses among ``class_names`` with ``template``, those of the data set, unless it has its own. Raises
    ConfigError naming the key if there should be a teacher, and is none.
    """
    if (name := teacher_name(config)) is None:
        return None
    model = load_teacher_model(name).to(student.device, student.dtype)
    return configured_teacher(config.teacher, model, class_names, template, student.logit_scale)


def load_teacher_model(name: str, device: torch.device | str = "cpu", precision: str = "fp32") -> NamedModel:
    """What ``--teacher`` names: the classifier ``efficientnet-lite0``, a tuned model's folder, or a backbone.

    Raises BackboneError as :func:`load_backbone` does, or for a package that is not installed, and ArtefactError as
    :func:`load_artefact` does.
    """
    check_device(device)
    if name == Lite0.name:
        return Lite0(device, DTYPES[precision])
    if (Path(name).expanduser() / PROMPTS).is_file():
        return Tuned(name, device, precision)
    return load_backbone(name, device, precision)


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

    EfficientNet-lite0 keeps to its own template and scale, unless told others: it reads names as they are, and its
    cosines are not CLIP's. Raises ConfigError for a template or scale of a model that has its own, and for classes
    that a tuned model knows nothing of.
    """
    if given.class_names_file:
        class_names, template = names_in_file(Path(given.class_names_file)), DEFAULT_TEMPLATE
    if isinstance(model, Tuned):
        for key in ("template", "logit_scale"):
            if (value := getattr(given, key)) is not None:
                raise ConfigError(f"teacher.{key} = {value}: {model.name} is a tuned model, which has its own")
        if not model.method.takes_new_classes and None in find_classes(class_names, model.method.class_names):
            raise ConfigError(
                f"teacher.backbone = {model.name}: {model.method.name} knows the classes alone that it was tuned on"
            )
    if isinstance(model, Lite0 | Tuned):
        template, logit_scale = model.template, model.logit_scale
    return Teacher(model, class_names, given.template or template, given.logit_scale or logit_scale)


class Teacher:
    """What a frozen model takes images for; what depends on the classes alone is computed once.

    ``template`` is the classes' text and ``logit_scale`` what cosines are multiplied by, of models asked with texts.
    """

    def __init__(
        self, model: TeacherModel, class_names: Sequence[str], template: str = "{}", logit_scale: float = 1.0
    ) -> None:
        self.model, self.class_names, self.template = model, tuple(class_names), template
        self.logit_scale, self.name, self.preprocess = logit_scale, model.name, model.preprocess
        self.class_features: Tensor | None = None
        if isinstance(model, Lite0):
            self.class_features = model.encode_texts(fill(template, class_names))
        elif isinstance(model, Backbone):
            self.class_features = frozen_class_features(model, class_names, [template])
        decides = (model.fingerprint, self.class_names, template, logit_scale)
        self.fingerprint = sha256(repr(decides).encode()).hexdigest()
        """SHA-256 over what decides the probabilities."""

    @property
    def entry(self) -> TeacherEntry:
        """As a model that it taught names it."""
        return {"name": self.name, "fingerprint": self.model.fingerprint, "template": self.template}

    def class_vectors(self, class_names: Sequence[str]) -> Tensor | None:
        """As the function below."""
        return class_vectors(self.model, class_names, self.template)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Of images [B, 3, S, S], preprocessed for its model: [B, C]."""
        if isinstance(self.model, Backbone | Lite0):
            assert self.class_features is not None
            return (self.logit_scale * self.model.encode_images(images) @ self.class_features.T).softmax(-1)
        return self.model.probabilities(images, self.class_names)


@torch.no_grad()
def class_vectors(model: TeacherModel, class_names: Sequence[str], template: str) -> Tensor | None:
    """A teacher's normalised features [C, E] of classes in its own space; None of what classifies by other means.

    Raises ConfigError for a tuned model whose class features depend on the image, are several of each class, or are no
    directions (a head's rows).
    """
    if isinstance(model, Tuned):
        method = model.method
        found = None if method.image_dependent else method.class_features(tuple(class_names))
        if found is None or found.ndim != 2 or (found.float().norm(dim=-1) - 1).abs().max() > 0.01:
            raise ConfigError(f"teacher.backbone = {model.name}: {method.name} has no class features of its own")
        return found
    if isinstance(model, Lite0):
        return model.encode_texts(fill(template, class_names))
    return frozen_class_features(model, class_names, [template]) if isinstance(model, Backbone) else None


def let_ask_teacher(method: Method, name: str | None = None) -> None:
    """Let a tuned model ask its teacher about other classes than its own; it is loaded when it is first asked.

    ``name`` says where the teacher is, if not where it was. Raises ConfigError for the name of one that is not asked;
    asking raises it where the teacher cannot be loaded, or is another.
    """
    if (entry := method.teacher) is None:
        if name is not None:
            raise ConfigError(f"teacher = {name}: this model, of method '{method.name}', asks no teacher about classes")
        return
    device, dtype = method.backbone.device, method.backbone.dtype

    @cache
    def teacher() -> NamedModel:
        what = f"{method.name} was taught by '{entry['name']}', and asks it about other classes than its own"
        try:
            model = load_teacher_model(name or entry["name"]).to(device, dtype)
        except VlpromptError as error:
            raise ConfigError(f"{what}: {error}; say where it lies with --teacher (in Python: teacher=)") from None
        if model.fingerprint != entry["fingerprint"]:
            raise ConfigError(f"{what}: '{model.name}' is another model (--teacher; in Python: teacher=)")
        return model

    method.ask_teacher = lambda names: class_vectors(teacher(), names, entry["template"])
