"""From a configuration and images to training that is ready to run: the one way in, of command line and Python API."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlprompt.backbones.backbone import Backbone
from vlprompt.bank.records import Bank
from vlprompt.bank.use import bank_views, find_bank
from vlprompt.bank.views import BankViews
from vlprompt.config.schema import RunConfig
from vlprompt.config.teacher import Classifier, Teacher, find_teacher, let_ask_teacher
from vlprompt.data.batches import TrainingViews, evaluation_batches
from vlprompt.data.descriptions import check_descriptions, read_descriptions, with_other
from vlprompt.data.images import ImageSource
from vlprompt.data.reading import ImageReader
from vlprompt.errors import ConfigError
from vlprompt.methods import Method, find_method
from vlprompt.methods.base import Support
from vlprompt.prompting.prior import read_prior
from vlprompt.training.distributed import Processes
from vlprompt.training.evaluate import EvaluationImages
from vlprompt.training.frozen import FrozenViews
from vlprompt.training.loop import Training
from vlprompt.training.schedule import build_optimizer
from vlprompt.training.warm_start import start_from

PROVIDED = frozenset({"frozen_image_features", "second_view", "teacher_probabilities"})
"""What a batch can bring without the user's help."""


@dataclass(frozen=True)
class Sources:
    """What a run learns from besides its images: a teacher, a region bank, and whose classes it learns about."""

    teacher: Teacher | None
    bank: Bank | None
    class_names: tuple[str, ...]

    @property
    def taught_by(self) -> str | None:
        """The model that stands in the labels' place, if one does."""
        if self.teacher:
            return self.teacher.name
        return self.bank.settings.teacher.name if self.bank and self.bank.settings.teacher else None


def find_sources(
    config: RunConfig,
    class_names: Sequence[str],
    template: str,
    backbone: Backbone,
    classifier: Classifier | None = None,
) -> Sources:
    """The configured teacher, or the ``classifier``, and bank; raises ConfigError if one lacks or does not fit."""
    if classifier and config.data.bank:
        raise ConfigError(
            f"data.bank = {config.data.bank}: a bank has labels, and '{classifier.name}' was given for them"
        )
    teacher = Teacher(classifier, class_names) if classifier else find_teacher(config, class_names, template, backbone)
    bank = find_bank(config, class_names)
    labels = bank.settings.teacher if bank and config.taught else None
    names = teacher.class_names if teacher else labels.class_names if labels else class_names
    return Sources(teacher, bank, tuple(names))


def build(config: RunConfig, sources: Sources, backbone: Backbone, template: str, own_names: Sequence[str]) -> Method:
    """The configured method, untrained, on the backbone's device; ``own_names`` are the data set's classes."""
    torch.manual_seed(config.seed)
    method = find_method(config.method)(backbone, sources.class_names, config.options, template)
    if sources.class_names != tuple(own_names) and not method.takes_new_classes:
        raise ConfigError("teacher.class_names_file: with class_specific the classes are the data set's own")
    return method.to(backbone.device)


def describe(method: Method, config: RunConfig, known: Sequence[str], say: Callable[[str], None]) -> None:
    """Give a method a language model's prior, and descriptions of its classes, all of which can be encoded.

    ``known`` are the data set's classes, of which a run may have some. Raises ConfigError for a method that reads none.
    """
    file = config.data.descriptions
    if config.data.prior is not None:
        method.take_prior(read_prior(Path(config.data.prior)))
        if config.train.graphs:
            raise ConfigError(f"train.graphs: with data.prior = {config.data.prior} each step asks another question")
    if file is None:
        if method.expects_descriptions:
            template = method.template
            say(f"{method.name} has no class descriptions (data.descriptions), and reads '{template}' in their place")
        return
    if not method.reads_descriptions:
        raise ConfigError(f"data.descriptions = {file}: method '{method.name}' reads no descriptions")
    found, names = read_descriptions(Path(file)), method.described_names
    check_descriptions(found, names, known, f"descriptions {file}", say)
    method.take_descriptions(found)
    method.backbone.encode_texts([text for texts in method.texts_of(names) for text in texts])


def describe_others(method: Method, descriptions: Path | None, prior: Path | None, teacher: str | None = None) -> None:
    """Give a tuned model what it needs for other classes than its own: texts, over those that it has, questions about
    them, and its ``teacher``, if that has moved.

    Raises ConfigError for a model that reads none.
    """
    let_ask_teacher(method, teacher)
    if prior is not None:
        method.take_prior(read_prior(prior))
    if descriptions is None:
        return
    if method.descriptions is None or not method.keeps_descriptions:
        what = "was made without any" if method.keeps_descriptions else "reads none of the classes that it predicts"
        raise ConfigError(f"--descriptions {descriptions}: this model, of method '{method.name}', {what}")
    method.descriptions = with_other(method.descriptions, read_descriptions(descriptions))


def prepare(
    config: RunConfig,
    sources: Sources,
    method: Method,
    images: Sequence[ImageSource],
    labels: Sequence[int],
    seed: int,
    reader: ImageReader,
    *,
    processes: Processes | None = None,
    validate: Callable[[], float | None] = lambda: None,
    extra: Mapping[str, Tensor] | None = None,
    whole: EvaluationImages | None = None,
) -> Training | None:
    """Gradient steps of a method, ready to run; None if it has nothing to learn by steps.

    ``extra`` holds what the method ``needs`` of each image beyond what is found here, [n, …] by name; ``whole`` are
    the same images for evaluation: what the frozen tower has seen of them it need not see again. Raises ConfigError
    before anything is computed if configuration, method, data and processes do not fit.
    """
    name, bank, whole = method.name, sources.bank, whole or EvaluationImages(images, labels, reader)
    if lacking := sorted(method.needs - PROVIDED - set(extra or {})):
        raise ConfigError(f"method '{name}' needs '{lacking[0]}' of every image, which nothing here provides")
    method.images_per_class = len(labels) / len(method.class_names)
    method.in_tasks = config.data.task is not None
    _set_prior(config, method, torch.tensor(labels))
    if sources.teacher:
        method.take_teacher(sources.teacher.class_vectors, sources.teacher.entry)
    if not method.trains:
        if config.data.balanced:
            raise ConfigError(f"method '{name}' takes no training steps: it draws no images (data.balanced)")
        if bank:
            raise ConfigError(f"method '{name}' takes no training steps: it reads no region bank (data.bank)")
        if config.taught:
            raise ConfigError(f"method '{name}' takes no training steps: it learns from no teacher (teacher.backbone)")
        if config.train.warm_start is not None:
            raise ConfigError(
                f"method '{name}' takes no training steps: it begins from no tuned model (train.warm_start)"
            )
        return None
    if config.train.warm_start is not None:
        start_from(method, config.train.warm_start)
    if config.teacher.classes_per_batch is not None and not method.takes_new_classes:
        raise ConfigError(
            f"teacher.classes_per_batch = {config.teacher.classes_per_batch} (allowed where each class has prompts of "
            "its own: none, all are compared)"
        )
    views: TrainingViews | BankViews | FrozenViews
    if bank:
        if config.data.balanced:
            raise ConfigError("data.balanced: a region bank gives every image its turn (data.bank)")
        views = bank_views(bank, config, method, images, labels, seed, reader, extra)
    elif frozen := frozen_views(config, method, whole, seed, extra):
        views = frozen
    else:
        views = TrainingViews(
            images,
            labels,
            method.backbone.preprocess,
            config.data.batch_size,
            seed,
            reader=reader,
            min_scale=config.data.min_scale,
            flip=config.data.flip,
            teacher=sources.teacher.preprocess if sources.teacher else None,
            patch_size=method.patch_size,
            extra=extra,
            balanced=config.data.balanced,
            drop_last=config.data.drop_last,
            **_center(config, sources.teacher, method, whole),
        )
    k = config.teacher.classes_per_batch
    return Training(method, views, config.optim, config.train, processes, sources.teacher, k, validate)


def _center(config: RunConfig, teacher: Teacher | None, method: Method, whole: EvaluationImages) -> dict[str, Any]:
    """What training on the evaluation crops reads of frozen towers: computed once, at the first step."""

    def taught() -> Tensor:
        assert teacher
        device, views = teacher.model.device, evaluation_batches(whole.images, teacher.preprocess, whole.reader)
        return torch.cat([teacher.probabilities(images.to(device)).cpu() for images in views])

    if config.data.views != "center":
        return {}
    constant: dict[str, Callable[[], Tensor]] = {}
    if "frozen_image_features" in method.needs or not config.reads_pixels:
        constant["frozen_image_features"] = lambda: whole.frozen(method).cpu()
    if teacher:
        constant["teacher_probabilities"] = taught
    return {"center": True, "constant": constant, "pixels": config.reads_pixels}


def check_weighs(method: Method, taught: bool) -> None:
    """Raise ConfigError for a method whose loss, or fit on frozen features, knows no weights of images."""
    own = type(method)
    supervises = method.trains and (taught or own.supervision is not Method.supervision)
    fits = own.fit_features is not Method.fit_features and "weights" not in signature(own.fit_features).parameters
    if supervises or fits:
        raise ConfigError(f"method '{method.name}' cannot weigh images (sample_weight, class_weight)")


def frozen_views(
    config: RunConfig,
    method: Method,
    images: EvaluationImages,
    seed: int,
    extra: Mapping[str, Tensor] | None = None,
) -> FrozenViews | None:
    """The fixed random views that the configuration asks for; a teacher, which reads pixels, sees new ones instead."""
    data = config.data
    if not method.fixes_views or data.bank or config.taught or not isinstance(data.views, int):
        return None
    return FrozenViews(images, method, data, seed, extra)


def _set_prior(config: RunConfig, method: Method, labels: Tensor) -> None:
    """Logit adjustment, where it is asked for."""
    tau = config.train.logit_adjustment
    if not tau:
        return
    if config.taught or not method.minimises_a_loss:
        why = "learns from a teacher" if config.taught else "minimises no loss"
        raise ConfigError(f"train.logit_adjustment = {tau:g}: method '{method.name}' {why}")
    counts = torch.bincount(labels, minlength=len(method.class_names))
    method.log_prior = tau * log_prior(counts, 0 if counts.all() else 1).to(method.backbone.device)


def log_prior(counts: Tensor, more: int) -> Tensor:
    """log((n_c + more) / Σ (n + more)) of the images n_c [C] of each class; one more where classes have none."""
    return ((counts + more) / (counts + more).sum()).log()


def fit_features(
    config: RunConfig,
    method: Method,
    training: Training | None,
    images: EvaluationImages,
    tell: Callable[[int, int], object] = lambda done, of: None,
    weights: Tensor | None = None,
) -> None:
    """Let a method that fits on frozen features do so, before any steps; these begin with what it fitted.

    ``tell`` hears how many of how many random views the frozen tower has seen.
    """
    if type(method).fit_features is Method.fit_features:
        return
    fixed = frozen_views(config, method, images, config.seed)
    given = {} if weights is None else {"weights": weights}
    features = fixed.all(tell) if fixed else images.frozen(method)
    method.fit_features(features, images.labels.to(method.backbone.device), **given)
    if training:
        training.optimizer = build_optimizer(method, training.optim)
    elif method.trains:
        raise ConfigError(f"method '{method.name}' learns by steps what only fit_features creates: create it in build")


def finish(
    config: RunConfig, method: Method, images: EvaluationImages, val: EvaluationImages | None = None
) -> str | None:
    """Let a method choose, when its steps are done, on ``val`` images or by cross-validation; what it says it chose."""
    if type(method).finish is Method.finish:
        return None
    fixed, device = frozen_views(config, method, images, config.seed), method.backbone.device
    whole = images.frozen(method)
    views = fixed.all(lambda done, of: None) if fixed else whole[None]
    held_out = (val.frozen(method), val.labels.to(device)) if val and len(val.labels) else None
    return method.finish(Support(views, images.labels.to(device), whole, held_out))
