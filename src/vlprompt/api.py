"""The Python API: build a method, fit it on images in memory or on disk, evaluate it, keep it, share it.

Images are paths, Pillow images or uint8 arrays [H, W, 3]; labels are class names or indices of them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vlprompt.artefact.artefact import load_calibration, read_artefact_config, save_artefact
from vlprompt.artefact.calibration import Calibration
from vlprompt.artefact.calibration import probabilities as calibrated
from vlprompt.artefact.export import Pixels, export_classes, export_onnx
from vlprompt.artefact.hub import load_model, upload
from vlprompt.backbones.backbone import Backbone
from vlprompt.config.images import set_white
from vlprompt.config.schema import OF_ATTENTION_DROP, OptimConfig, RunConfig, build_config
from vlprompt.config.teacher import Classifier, let_ask_teacher
from vlprompt.data.images import ImageSource
from vlprompt.data.known.table import DEFAULT_TEMPLATE
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import check_class_names
from vlprompt.errors import ConfigError, DataError, one_line, unknown
from vlprompt.methods import Method, find_method
from vlprompt.methods.base import IMAGE_WEIGHT
from vlprompt.methods.registry import source_of
from vlprompt.training import evaluate as evaluation
from vlprompt.training.calibrate import KEPT, Worth
from vlprompt.training.calibrate import calibrate as fit_calibration
from vlprompt.training.evaluate import Evaluation, EvaluationImages
from vlprompt.training.prepare import check_weighs, find_sources, finish, fit_features, prepare
from vlprompt.training.watchers import EachEpoch, EpochLog

Images = Sequence[ImageSource] | NDArray[np.uint8]
Labels = Sequence[str] | Sequence[int] | NDArray[Any] | Tensor

WORKERS = 2
"""Threads that decode images ahead."""
_OF_TRAIN = (
    "epochs", "accumulate", "text_chunk", "graphs", "warm_start", "logit_adjustment",
    "attention_drop", *OF_ATTENTION_DROP,
)  # fmt: skip
_OF_DATA = (
    "batch_size", "drop_last", "min_scale", "flip", "white", "max_pixels", "balanced", "workers",
    "bank", "views", "regions_per_image",
)  # fmt: skip
TRAINING = {
    **{f.name: f"optim.{f.name}" for f in fields(OptimConfig)},
    **{name: f"train.{name}" for name in _OF_TRAIN},
    "teacher": "teacher.backbone",
    "classes_per_batch": "teacher.classes_per_batch",
    **{name: f"data.{name}" for name in _OF_DATA},
}
"""What ``fit`` can be told, and its key in the run configuration."""


def build_method(
    name: str,
    backbone: Backbone,
    class_names: Sequence[str],
    *,
    template: str | None = None,
    seed: int = 1,
    **options: Any,
) -> Method:
    """A method of ``vlprompt list methods``, or of a file (``./my_method.py``), ready to be fitted.

    ``template`` is the data set's text with {} for the class name, "a photo of a {}." if not given; ``options`` are the
    method's own (``n_ctx=4``). ``seed`` decides the initial prompts; the global random
    state stays as it is. Raises ConfigError for what the method does not know and a template without {}, DataError for
    class names without a name or with another's.
    """
    if not isinstance(name, str):
        raise ConfigError(f"method {name!r} (allowed: a name, or a file as text)")
    keys = full_keys(options, method_keys(name), f"setting of {name}") | {"seed": seed, "data.template": template}
    return build_configured(build_config(name, overrides=keys), backbone, class_names)


def method_keys(name: str) -> dict[str, str]:
    """A method's own options, and their keys in the run configuration."""
    return {f.name: f"method.{f.name}" for f in fields(find_method(name).Config)}


def full_keys(settings: Mapping[str, Any], known: Mapping[str, str], what: str) -> dict[str, Any]:
    """Settings by their keys in the run configuration; raises ConfigError for unknown ones, and one given twice."""
    for key in settings:
        if key not in known and key not in known.values():
            raise ConfigError(unknown(what, key, known))
        if known.get(key, key) != key and known[key] in settings:
            raise ConfigError(f"{key} = {one_line(settings[key], 60)}: it is given twice, as {known[key]} too")
    return {known.get(key, key): value for key, value in settings.items()}


def build_configured(config: RunConfig, backbone: Backbone, class_names: Sequence[str]) -> Method:
    """The method of a checked configuration, initialised as ``vlprompt train`` does it."""
    if not isinstance(backbone, Backbone):
        hint = f": load it first, load_backbone({backbone!r})" if isinstance(backbone, (str, os.PathLike)) else ""
        raise ConfigError(f"backbone = {one_line(repr(backbone), 60)} is no loaded backbone{hint}")
    names = _several(_checked_names(class_names))
    template = config.data.template or DEFAULT_TEMPLATE
    with _random_state_kept():
        torch.manual_seed(config.seed)
        method = find_method(config.method)(backbone, names, config.options, template)
    return method.to(backbone.device)


def fit(
    method: Method,
    images: Images,
    labels: Labels,
    *,
    preset: str | None = None,
    seed: int = 1,
    after_epoch: Callable[[EpochLog], None] = lambda log: None,
    teacher: str | Classifier | None = None,
    extra: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> Method:
    """Fit a method on labelled images, as ``vlprompt train`` does: same views, same steps, same prompts.

    Without ``settings`` (``epochs``, ``lr``, ``batch_size``, … as in ``TRAINING``) the method's official ones apply,
    or those of ``preset``. With ``teacher`` it learns from that model instead of the labels: a name that
    ``load_backbone`` takes, ``"efficientnet-lite0"``, the folder of a tuned model, or any
    :class:`~vlprompt.config.teacher.Classifier`. A ``bank``, the folder of a region bank, gives any method its views;
    images then are files. ``extra`` holds tensors [n, …] that a method of one's own ``needs`` of each image, by name.
    ``seed`` decides order and crops. ``after_epoch`` is told the mean loss terms of each epoch. Returns the method.
    Raises ConfigError for unknown settings, a missing teacher, a bank that does not fit and loaded models, DataError
    for images and labels that do not fit together and images that the bank lacks, VlpromptError if a loss is not
    finite.
    """
    if not isinstance(method, Method):
        hint = ": a tuned model is not fitted again" if isinstance(method, PromptedModel) else ""
        raise ConfigError(f"fit takes what build_method gives, not {_kind(method)}{hint}")
    classifier = _classifier(teacher)
    if teacher is not None:
        settings["teacher"] = classifier.name if classifier else teacher
    keys = full_keys(settings, TRAINING, "training setting") | {"seed": seed}
    config = build_config(source_of(method), preset, overrides=keys)
    return fit_configured(method, images, labels, config, after_epoch, extra, classifier)


def fit_configured(
    method: Method,
    images: Images,
    labels: Labels,
    config: RunConfig,
    after_epoch: Callable[[EpochLog], None] = lambda log: None,
    extra: Mapping[str, Tensor] | None = None,
    classifier: Classifier | None = None,
    weights: NDArray[np.float64] | None = None,
) -> Method:
    """Fit under a checked configuration, with ``weights`` [n] of the images, 1 on average; see :func:`fit`."""
    images, indices = _labelled(images, labels, method.class_names)
    for name, values in (extra or {}).items():
        if not isinstance(values, Tensor) or values.shape[:1] != (len(images),):
            raise DataError(f"extra: '{name}' is no tensor with a row for each of {len(images)} images")
    if not method.trains and any(True for _ in method.parameters()):
        raise ConfigError(f"{method.name} is frozen, as loaded models are: build a new one to fit it")
    with ImageReader(config.data.workers, max_pixels=config.data.max_pixels) as reader, _random_state_kept():
        set_white(reader, config.data, images)
        sources = find_sources(config, method.class_names, method.template, method.backbone, classifier)
        weight = None if weights is None else torch.from_numpy(weights)
        if weight is not None:
            check_weighs(method, config.taught)
            extra = {**(extra or {}), IMAGE_WEIGHT: weight.float()}
        method.white = reader.white
        whole = EvaluationImages(images, indices, reader)
        training = prepare(config, sources, method, images, indices, config.seed, reader, extra=extra, whole=whole)
        fit_features(config, method, training, whole, weights=weight)
        if training:
            training.run([EachEpoch(after_epoch)])
        finish(config, method, whole)
        _warn(reader)
    return method.eval()


def evaluate(
    model: Method | PromptedModel, images: Images, labels: Labels, class_names: Sequence[str] | None = None
) -> Evaluation:
    """Accuracy, accuracy per class and calibration error; ``class_names`` need not be those that were trained on.

    Labels are class names or indices of them. Raises DataError for images and labels that do not fit together.
    """
    method = model.method if isinstance(model, PromptedModel) else model
    if not isinstance(method, Method):
        raise ConfigError(f"evaluate takes a method or a PromptedModel, not {_kind(method)}")
    names = _several(_names(method, class_names))
    images, indices = _labelled(images, labels, names)
    with ImageReader(WORKERS, room=0, white=method.white) as reader:
        result = evaluation.evaluate(method, EvaluationImages(images, indices, reader), names)
        _warn(reader)
    return result


class Predictions(NamedTuple):
    """What a model says about n images."""

    names: list[str]
    """The most probable class of each image."""
    probabilities: NDArray[np.float64]
    """[n, C], each row sums to 1."""
    class_names: tuple[str, ...]
    """What the C columns stand for."""
    spread: NDArray[np.float64] | None = None
    """Standard deviation of each probability, [n, C], where a method is not sure of it (bayesian)."""
    none_of_these: NDArray[np.bool_] | None = None
    """Whether each image seems to be of none of them; None without calibration, and for other classes than its own."""
    sets: list[list[str]] | None = None
    """Of each image the classes that hold the right one for the share of images asked for."""


class PromptedModel:
    """A tuned method ready for use: predicts, and lives in a folder or on the hub without its training data."""

    def __init__(
        self, method: Method, about: Mapping[str, Any] | None = None, calibration: Calibration | None = None
    ) -> None:
        """Wrap a fitted method; ``about`` (data, options, metrics) goes into the model card."""
        if not isinstance(method, Method):
            raise ConfigError(f"PromptedModel takes a method, not {_kind(method)}")
        self.method, self.about, self.calibration = method.eval(), dict(about or {}), calibration

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that it was tuned on."""
        return self.method.class_names

    @property
    def backbone(self) -> Backbone:
        """The frozen model."""
        return self.method.backbone

    def __repr__(self) -> str:
        return f"PromptedModel({self.method.name} on {self.backbone.name}, {len(self.class_names)} classes)"

    def logits(self, images: Images, class_names: Sequence[str] | None = None) -> Tensor:
        """Logits for the model's classes, or any others: [n, C], on the CPU.

        Raises DataError for what is no image, for bad class names, and where the method cannot take others.
        """
        names, images = _names(self.method, class_names), _images(images)
        if not images:
            return torch.zeros(0, len(names))
        with _evaluation_images(images, self.method) as unlabelled:
            return evaluation.predict_logits(self.method, unlabelled, names)

    def predict(
        self,
        images: Images,
        class_names: Sequence[str] | None = None,
        *,
        sets: float | None = None,
        by_class: bool = False,
    ) -> Predictions:
        """The most probable class of each image and all probabilities; errors as in ``logits``.

        Of a calibrated model they are calibrated, and ``none_of_these`` is told. ``sets`` asks for sets of classes that
        hold the right one for this share of images (``by_class``: of every class's). Raises ConfigError for sets of a
        model that is not calibrated, and of other classes than its own.
        """
        names, images = _several(_names(self.method, class_names)), _images(images)
        if sets is not None and not (self.calibration and names == self.class_names):
            raise ConfigError(f"sets = {sets:g}: they need a calibrated model, and its own classes")
        with _evaluation_images(images, self.method) as unlabelled:
            logits = evaluation.predict_logits(self.method, unlabelled, names) if images else torch.zeros(0, len(names))
            scale = self.calibration.scale(self.method, logits, names) if self.calibration else None
            spread = evaluation.predict_spread(self.method, unlabelled, names, scale) if images else None
        probabilities, none = calibrated(self.calibration, self.method, logits, names)
        sure, listed = None if spread is None else spread.double().numpy(), None
        if self.calibration and sets is not None:
            inside = self.calibration.sets(probabilities, sets, by_class)
            listed = [[names[c] for c in p.argsort(descending=True).tolist() if i[c]]
                      for p, i in zip(probabilities, inside, strict=True)]  # fmt: skip
        best = probabilities.argmax(-1).tolist()
        outside = None if none is None else none.numpy()
        return Predictions([names[c] for c in best], probabilities.numpy(), names, sure, outside, listed)

    def calibrate(self, images: Images, labels: Labels, *, novel: Images | None = None, kept: float = KEPT) -> Worth:
        """Fit temperature, sets and the threshold of "none of these" on held-out images of the model's own classes.

        ``novel`` images are of no class of its. Returns what that is worth on images not fitted on. Raises DataError
        for images and labels that do not fit together or are too few, ConfigError for a share outside 0–1.
        """
        images, indices = _labelled(images, labels, self.class_names)
        others = [] if novel is None else _images(novel)
        with ImageReader(WORKERS, room=0, white=self.method.white) as reader:
            known, rest = EvaluationImages(images, indices, reader), EvaluationImages(others, [], reader)
            self.calibration, worth = fit_calibration(self.method, known, rest, kept)
        return worth

    def export(
        self,
        file: str | os.PathLike[str],
        class_names: Sequence[str] | None = None,
        pixels: Pixels = "float32",
    ) -> None:
        """One new file for use without vlprompt: the whole model in ``.onnx``, or class features in ``.safetensors``.

        ``pixels`` says what an ONNX file reads. See :func:`vlprompt.artefact.export.onnx_model` and
        :func:`vlprompt.artefact.export.export_classes`, for errors too.
        """
        names, out = _names(self.method, class_names), Path(file)
        if out.suffix == ".safetensors" and pixels == "float32":
            export_classes(self.method, names, out)
        else:
            export_onnx(self.method, names, out, pixels, self.calibration)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write prompts, configuration and model card into a folder, over those of an earlier model."""
        save_artefact(self.method, Path(folder), self.about, self.calibration)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        backbone: str | Backbone | None = None,
        device: str = "cpu",
        precision: str = "fp32",
        revision: str | None = None,
        teacher: str | None = None,
    ) -> PromptedModel:
        """Load a tuned model from a folder, or from a hub repository ``owner/name``.

        ``backbone`` says where its backbone lies if not where it was, or is the loaded one, which several models may
        share (``device`` and ``precision`` are then its own). ``teacher`` says where the teacher is now, of a model
        that asks its own about other classes. Raises ArtefactError if there is no such model, its files are not those
        that were saved, or the backbone is another one.
        """
        if not isinstance(name, (str, os.PathLike)):
            raise ConfigError(f"from_pretrained takes a folder or a hub id, not {_kind(name)}")
        method, folder = load_model(name, backbone, device, precision, revision)
        let_ask_teacher(method, teacher)
        return cls(method, read_artefact_config(folder).get("about"), load_calibration(folder))

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool = False,
        token: str | None = None,
        message: str = "Upload tuned prompts",
    ) -> str:
        """Upload what ``save_pretrained`` writes to the hub repository ``owner/name``; returns its address.

        The repository is made if it is not there. Only prompts go up, not the backbone. Raises ArtefactError with
        the hub's reason.
        """
        with TemporaryDirectory() as folder:
            save_artefact(self.method, Path(folder), self.about, self.calibration, public=True)
            return upload(Path(folder), repo, private=private, token=token, message=message)


def _kind(value: object) -> str:
    """What was given where something else was meant, in a few words."""
    return f"'{one_line(value, 60)}'" if isinstance(value, (str, os.PathLike)) else f"a {type(value).__name__}"


def _classifier(teacher: object) -> Classifier | None:
    """The teacher, if it is a loaded one; raises ConfigError for what is neither that nor a name."""
    if teacher is None or isinstance(teacher, str):
        return None
    if isinstance(teacher, (PromptedModel, Backbone, Method)) or not hasattr(teacher, "probabilities"):
        hint = ", the folder of a tuned model" if isinstance(teacher, (PromptedModel, Method)) else ""
        raise ConfigError(f"teacher: {_kind(teacher)} (allowed: a name{hint}, or a Classifier with probabilities)")
    return cast(Classifier, teacher)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Give PyTorch's random states back at the end, those of all GPUs in use too: ``torch.manual_seed`` sets each."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=gpus):
        yield


@contextmanager
def _evaluation_images(images: list[ImageSource], method: Method) -> Iterator[EvaluationImages]:
    """Unlabelled images; at the end, what the command line says of those that look dark."""
    with ImageReader(WORKERS if len(images) > 1 else 0, room=0, white=method.white) as reader:
        yield EvaluationImages(images, [], reader)
        _warn(reader, 4)


def _warn(reader: ImageReader, level: int = 3) -> None:
    """What the command line says of images that look dark."""
    for note in reader.range_notes():
        warnings.warn(note, stacklevel=level)


def _names(method: Method, class_names: Sequence[str] | None) -> tuple[str, ...]:
    return method.class_names if class_names is None else _checked_names(class_names)


def _several(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(names) == 1:
        raise DataError(f"there is only one class, '{names[0]}': every answer would be right")
    return names


def _checked_names(class_names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(class_names, str):
        raise DataError(f"class names are a list of texts, not one text: '{class_names[:60]}'")
    if isinstance(class_names, (Set, Mapping)) or not isinstance(class_names, Iterable):
        raise DataError(f"class names are a list of texts, in an order, not {_kind(class_names)}")
    names = tuple(class_names)
    if not names:
        raise DataError("class names are a list of one or more texts")
    if other := [name for name in names if not isinstance(name, str)]:
        raise DataError(f"class names are texts: {other[0]!r} is none")
    check_class_names(names, "class names")
    return tuple(map(str, names))  # NumPy's texts print as np.str_


def _images(images: Images) -> list[ImageSource]:
    if isinstance(images, (str, os.PathLike, Image.Image)):
        raise DataError("images are a list: put the one image into brackets, [image]")
    if not isinstance(images, Iterable):
        raise DataError(f"images are a list, not {_kind(images)}")
    if isinstance(images, np.ndarray) and images.ndim != 1 and (images.ndim != 4 or images.shape[-1] != 3):
        raise DataError(f"images as one array are uint8 [n, H, W, 3]; found {images.dtype} {list(images.shape)}")
    return list(images)


def _labelled(images: Images, labels: Labels, class_names: Sequence[str]) -> tuple[list[ImageSource], list[int]]:
    """Images and the indices of their classes."""
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise DataError(f"labels are a list with one for each image, not {_kind(labels)}")
    images, labels = _images(images), labels.tolist() if isinstance(labels, Tensor) else list(labels)
    if len(images) != len(labels) or not images:
        raise DataError(f"every image needs a label: there are {len(images)} images and {len(labels)} labels")
    position = {name: c for c, name in enumerate(class_names)}
    indices = []
    for label in labels:
        if isinstance(label, str):
            if label not in position:
                raise DataError(unknown("label", label, class_names))
            indices.append(position[label])
        elif isinstance(label, (int, np.integer)) and 0 <= label < len(class_names):
            indices.append(int(label))
        else:
            raise DataError(f"label {label!r} is no class name and no index below {len(class_names)}")
    return images, indices
