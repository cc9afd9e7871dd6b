"""The configuration of a run: defaults < official < preset < file < command line, checked as a whole."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import numpy as np
import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, ValidationError

from vlprompt.backbones.load import whole_name
from vlprompt.config.presets import presets_of
from vlprompt.data.images import White
from vlprompt.data.known.table import find_dataset
from vlprompt.data.splits import Classes
from vlprompt.documents import check_text, checksum, parse_yaml, read_yaml, reader
from vlprompt.errors import ConfigError, one_line, printable, unknown
from vlprompt.methods import Can, MethodConfig, find_method
from vlprompt.methods.base import Template
from vlprompt.methods.registry import is_file

Many = Annotated[int, Ge(1), Le(1_000_000)]
Rate = Annotated[float, Gt(0), Le(1e4)]
Fraction = Annotated[float, Gt(0), Le(1)]
Folder = Annotated[str, BeforeValidator(lambda path: str(path) if isinstance(path, PathLike) else path)]


def _check_views(value: Any) -> int | str:
    if value in ("random", "center"):
        return value
    if not re.fullmatch("[1-9][0-9]*", str(value)):
        raise ValueError("random, center, or a number from 1 on")
    return int(value)


Views = Annotated[int | Literal["random", "center"], BeforeValidator(_check_views)]


def _check_white(value: Any) -> float | str | None:
    if value is None or value == "auto":
        return value
    try:
        white = float(str(value))
    except ValueError:
        white = 0
    if not 0 < white < math.inf:
        raise ValueError("auto, or a number above 0")
    return white


def _check_task(value: Any) -> str | None:
    found = re.fullmatch("([1-9][0-9]*)/([1-9][0-9]*)", str(value))
    if value is not None and not (found and 2 <= int(found[2]) >= int(found[1])):
        raise ValueError("t/T, one of T tasks from the first, 1/T, to the last, T/T; T is 2 or more")
    return value


Task = Annotated[str | None, BeforeValidator(_check_task)]
WhiteValue = Annotated[White | None, BeforeValidator(_check_white)]


@dataclass(frozen=True)
class DataConfig:
    """Which images of which classes, and how training reads them."""

    name: str = ""
    """A known data set's name, a folder or a CSV file."""
    root: str | None = None
    """Folder that holds the data sets."""
    split_file: str | None = None
    """File that says which images are train, val and test: a run's split.json, CoOp's file, a few-shot list."""
    shots: Many | None = None
    """Training images per class; all if not given."""
    allow_fewer: bool = False
    """Let classes with fewer images than shots use all that they have."""
    imbalance: Annotated[float, Ge(1), Le(1e6)] = 1.0
    """A long tail: images of the most frequent class to those of the rarest, fewer and fewer in between.

    With shots the classes are in their own order; else all training images count, and classes are ranked by them."""
    class_names_file: Folder | None = None
    """File of class names, one per line, where the data set is a folder of images without labels."""
    descriptions: Folder | None = None
    """JSON file of further texts of each class, name to list of texts, for methods that read them."""
    prior: Folder | None = None
    """File of what a language model was asked about each class (vlprompt describe), for drople."""
    val_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of each class's training images that becomes val before shots are drawn, where there is no val split."""
    classes: Classes = "all"
    """First half of the classes, second half, or all."""
    task: Task = None
    """t/T: train on the t-th of T groups of these classes, which arrive in an order by the seed (class-incremental)."""
    template: Template | None = None
    """Text of the classes with {} for the name; the known data set's if not given, or else "a photo of a {}."."""
    batch_size: Many = 32
    """Images in a training step."""
    drop_last: bool = True
    """Leave out the last batch of an epoch where it would be incomplete; with a bank all batches are whole."""
    min_scale: Fraction = 0.08
    """Smallest share of the image that a random crop covers."""
    flip: Annotated[float, Ge(0), Le(1)] = 0.5
    """Probability that a random crop is mirrored; 0 where left and right are different classes."""
    white: WhiteValue = None
    """Value that is white in greys of more than 8 bits, or auto: by the training images; 65535 if not given."""
    max_pixels: Annotated[int, Ge(1), Le(10**9)] | None = None
    """Most pixels of an image, in place of Pillow's limit of about 179 million."""
    balanced: bool = False
    """Draw the classes of a training epoch equally often, however many images they have."""
    workers: Annotated[int, Ge(0), Le(1024)] = 2
    """Threads that decode and crop ahead of the training steps."""
    skip_bad: bool = False
    """Leave out images that cannot be read, and count them, instead of stopping."""
    bank: Folder | None = None
    """Folder of the region bank that views, labels and features come from."""
    views: Views | None = None
    """random: a new crop and flip of each image in every epoch; center: its evaluation crop, of which frozen features
    are computed once; R: the first regions of each image of a bank. All of a bank's if not given, or else random.
    data.augment=none says center, too. For heads and adapters, without a bank: R random views of each image, made
    once."""
    regions_per_image: Many | None = None
    """Regions that a batch holds of each of its images, of a bank; 4, or fewer where that leaves less than 8 images."""


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen model whose predictions replace labels."""

    backbone: str | None = None
    """Frozen model that any method learns from instead of labels, given like the backbone; efficientnet-lite0; or the
    folder of a tuned model."""
    template: Template | None = None
    """Text of the teacher's classes; the data set's if not given, "a photo of a {}." for the classes of a file."""
    logit_scale: Annotated[float, Gt(0), Le(1e6)] | None = None
    """What the teacher's cosines are multiplied by; if not given, the student's scale, as in KDPL."""
    class_names_file: str | None = None
    """File of class names, one per line, that the teacher chooses among instead of the data set's."""
    classes_per_batch: Annotated[int, Ge(2), Le(1_000_000)] | None = None
    """Classes most probable to the teacher in a batch, which alone are compared; all if not given.

    Of one class teacher and student would be equally sure, and nothing learned."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning-rate schedule."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """Optimiser; adam adds the weight decay to the gradient, adamw takes it off the parameters."""
    lr: Rate = 0.002
    """Learning rate after the warm-up."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Whether it looks ahead (Nesterov's); of SGD."""
    weight_decay: Annotated[float, Ge(0), Le(1000)] = 5e-4
    """Weight decay; acts on prompts too, as in the official code."""
    warmup_epochs: Annotated[float, Ge(0), Le(1e6)] = 1
    """Epochs at the warm-up rate before the cosine starts; 0.1 is the first tenth of the first epoch's steps."""
    warmup_lr: Rate = 1e-5
    """Learning rate of the warm-up."""
    min_lr: Annotated[float, Ge(0), Le(1e4)] = 0.0
    """Learning rate that the cosine falls to."""
    cosine_epochs: Many = 1
    """Epochs that the cosine spans, if more than those trained."""
    every_step: bool = False
    """Let the cosine fall at every step, instead of after every epoch."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """What Adam and AdamW add to the divisor."""


@dataclass(frozen=True)
class TrainConfig:
    """Length and numerics of training."""

    epochs: Many = 50
    """Passes over the training images."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32, bf16 or fp16 for the frozen towers; prompts are fp32."""
    accumulate: Many = 1
    """Parts that each batch is computed in, one after the other, to need less memory; the step is the same."""
    text_chunk: Many | None = None
    """Classes whose texts are encoded at once, and again in the backward pass, to save memory; all if not given."""
    graphs: bool = False
    """Whether steps are recorded as CUDA graphs and replayed: the same results, faster where a model is small."""
    logit_adjustment: Annotated[float, Ge(0)] = 0.0
    """Weight of the logarithm of each class's images, added to the logits in training: for a long tail (1)."""
    attention_drop: Literal["mask", "blur", "consistency"] | None = None
    """AttentionDrop in training, reconstructed from its abstract: mask random ones of each query's largest attention
    logits, blur them, or compare two masked passes; in every block that what is learned reaches. None if not given."""
    attention_drop_k: Many = 5
    """Largest logits of a query, any of which may be masked."""
    attention_drop_p: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Probability that one of them is."""
    attention_drop_sigma: Annotated[float, Gt(0), Le(1e3)] = 1.0
    """Largest standard deviation of the blur, in tokens; each attention draws its own below that."""
    attention_drop_weight: Annotated[float, Gt(0), Le(1e6)] = 1.0
    """Weight of the divergence between two passes."""
    select: Literal["last", "val"] = "last"
    """Keep the prompts of the last epoch, or those of the first epoch with the best val accuracy."""
    val_every: Annotated[int, Ge(0)] = 10
    """Measure the val images after every so many epochs, and after the last one; 0 for the last one alone."""
    warm_start: Folder | None = None
    """Tuned model (a run, an artefact or a hub id) whose prompts training begins with."""
    report_to: Literal["tensorboard", "wandb"] | None = None
    """Where each epoch's figures go besides log.jsonl."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result."""

    method: str
    """The method's name, or the file that it lies in."""
    options: MethodConfig
    """The method's own options."""
    backbone: str = "mini"
    """The frozen model: mini, a folder or file, a hub id or ViT-B/16, or open_clip:MODEL/TAG (a checkpoint as TAG)."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 1
    """Decides the few-shot images, the initial prompts, and the order and crops of training images."""
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def taught(self) -> bool:
        """Whether a teacher's predictions, its own or those in a bank, stand in the labels' place."""
        return self.teacher.backbone is not None or "teacher_probabilities" in find_method(self.method).needs

    @property
    def reads_pixels(self) -> bool:
        """Whether training runs the image tower on views, instead of reading frozen features of them."""
        return Can.USE_FROZEN_FEATURES not in self.options.can

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as in the configuration file."""
        d = asdict(self)
        options = d.pop("options")
        return {**d, "method": {"name": self.method, **options}}

    def flat(self) -> dict[str, Any]:
        """The same by full key."""
        return dict(_flatten(self.to_dict()))

    def placed(self) -> RunConfig:
        """The same with whole paths, which are found from any folder."""
        data, teacher = self.data, self.teacher
        name = data.name if find_dataset(data.name) else _whole_path(data.name, data.name)
        folders = {key: _whole_path(getattr(data, key)) for key in FILES}
        names = _whole_path(teacher.class_names_file)
        return replace(
            self,
            backbone=whole_name(self.backbone),
            data=replace(data, name=name, **folders),
            teacher=replace(
                teacher, backbone=teacher.backbone and whole_name(teacher.backbone), class_names_file=names
            ),
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the settings, but for those that only say where something lies or is done, or what is told."""
        return checksum({key: value for key, value in self.flat().items() if key not in PLACES})

    def to_yaml(self) -> str:
        """The configuration as a file that ``--config`` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


PLACES = {
    "method.name", "backbone", "teacher.backbone", "teacher.class_names_file", "data.name", "data.root",
    "data.split_file", "data.bank", "data.workers", "train.device", "train.graphs", "train.report_to",
    "train.val_every",
}  # fmt: skip
"""Settings that say where something lies, which has a fingerprint of its own, or is done, or what is told."""
MOST = 1e9
"""No setting but a seed is larger; most have narrower ranges of their own."""
TOLD = 20
"""Problems that a message lists."""
DECIMAL = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")

OF_ATTENTION_DROP = {
    "attention_drop_k": ("mask", "consistency"),
    "attention_drop_p": ("mask", "consistency"),
    "attention_drop_sigma": ("blur",),
    "attention_drop_weight": ("consistency",),
}
"""Settings of some kinds of AttentionDrop only."""

FILES = ("root", "split_file", "bank", "descriptions", "prior", "class_names_file")
"""What of ``data`` is a place."""

SECTIONS = {"data": DataConfig, "teacher": TeacherConfig, "optim": OptimConfig, "train": TrainConfig}


def read_config(file: Path) -> dict[str, Any]:
    """A YAML file's keys, flattened: ``{"optim.lr": 0.01, …}``."""
    try:
        content = read_yaml(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read configuration {file}: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"configuration {file} must hold keys and values")
    return dict(_flatten(content))


def config_of(values: Mapping[str, Any]) -> RunConfig:
    """The configuration whose :meth:`RunConfig.to_dict` these values are."""
    return build_config(values["method"]["name"], file=dict(_flatten(values)))


def parse_override(text: str) -> tuple[str, Any]:
    """``key=value`` from the command line; the value is read as YAML (``1e-3`` too, which YAML takes for text)."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"'{text}' is not key=value")
    try:
        parsed = parse_yaml(value)
    except ValueError:
        parsed = value
    return key.strip(), parsed if parsed is None or isinstance(parsed, (str, int, float)) else value


def agreed(method: str, settings: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings (KEY=VALUE) and options (by full key) together; raises ConfigError where they contradict each other."""
    known, unclear = _known_keys(find_method(method).Config), list[str]()
    for key, value in settings.items():
        full = _resolve(key, known, unclear)
        if full is not None and full in options and options[full] != value:
            raise ConfigError(
                f"{key} = {value} and {full} = {options[full]} are both given: they contradict each other"
            )
    return {**settings, **options}


def build_config(
    method: str,
    preset: str | None = None,
    file: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Merge and check a run's configuration; keys are flat, ``optim.lr`` or, where it is clear, ``lr``.

    A method's own option comes before a key of the same name elsewhere.

    Raises ConfigError that lists every unknown key and every value out of range at once.
    """
    cls = find_method(method)
    method = str(Path(method).expanduser().resolve()) if is_file(method) else method
    presets = presets_of(cls)
    if preset is not None and preset not in presets:
        if not presets:
            raise ConfigError(f"method '{method}' has no presets (asked for '{preset}')")
        raise ConfigError(unknown(f"preset of {method}", preset, presets))
    known = _known_keys(cls.Config)
    problems: list[str] = []
    merged: dict[str, Any] = {}
    told = [_with_views(layer) for layer in (file or {}, overrides or {})]
    for layer in (cls.official, presets[preset] if preset else {}, *told):
        merged |= {full: v for key, v in layer.items() if (full := _resolve(key, known, problems)) is not None}
    own = {_resolve(key, known, []) for layer in told for key in layer}
    if merged.get("data.bank") is not None and "data.views" not in own:
        merged.pop("data.views", None)  # a bank's regions come in place of a method's official views
    if (named := merged.pop("method.name", method)) != method:
        problems.append(f"method.name = {named}: the command asks for '{method}'")
    nested: dict[str, dict[str, Any]] = {s: {} for s in ("method", *SECTIONS)}
    top: dict[str, Any] = {}
    for key, value in merged.items():
        section, _, name = key.rpartition(".")
        (nested[section] if section else top)[name] = value
    problems += _template_for_all(nested, cls.Config)
    sections = {s: checked(c, nested[s], f"{s}.", problems) for s, c in SECTIONS.items()}
    options = checked(cls.Config, nested["method"], "method.", problems)
    if (optim := sections["optim"]) and optim.nesterov and not (optim.name == "sgd" and optim.momentum):
        problems.append("optim.nesterov = true: it is of sgd with a momentum (optim.name, optim.momentum)")
    top = _checked_top(top, problems)
    problems += [
        f"method.{key} = {value}: words are meant here, and this is a place; --from starts from a tuned model"
        for key, value in (vars(options).items() if options else ())
        if key.startswith("init") and isinstance(value, str) and _is_place(value)
    ]
    data = sections["data"]
    if options and data and options.transductive and data.classes != "all":
        problems.append(
            f"data.classes = {data.classes}: under these options {cls.name} learns from images of all classes, "
            "transductively (allowed: all, or method.setting=inductive)"
        )
    if "teacher_probabilities" not in cls.needs and nested["teacher"].get("backbone") is None:
        given = [f"teacher.{key} = {_shown(value)}" for key, value in nested["teacher"].items() if value is not None]
        problems += [
            f"{key}: method '{cls.name}' learns from labels, unless teacher.backbone is given" for key in given
        ]
    problems += _contradictions(sections)
    if problems:
        keys = f" (allowed keys: {', '.join(known)})" if any("unknown key" in p for p in problems) else ""
        more = f"; and {len(problems) - TOLD} more" if len(problems) > TOLD else ""
        raise ConfigError("; ".join(problems[:TOLD]) + more + keys)
    config = RunConfig(method=method, options=options, **top, **sections)
    check_capabilities(cls.name, config.options.can, config.train, config.teacher.classes_per_batch)
    return config


def _with_views(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which ``data.augment`` is ``data.views``: none of it is the center crop.

    Raises ConfigError where both are given, and contradict each other.
    """
    rest = {key: value for key, value in layer.items() if key not in ("augment", "data.augment")}
    for augment in (value for key, value in layer.items() if key not in rest):
        views = "center" if augment == "none" else augment
        given = next((rest[key] for key in ("views", "data.views") if rest.get(key) is not None), views)
        if given != views:
            raise ConfigError(f"data.augment = {augment} and data.views = {given} contradict each other")
        rest["data.views"] = views
    return rest


def _is_place(text: str) -> bool:
    """Whether text that should be words is a path: that of a file or tuned model, or one that is not there."""
    path = Path(text).expanduser()
    if "/" in text or os.sep in text:
        return " " not in text or path.exists()
    return (path / "config.json").exists() or (path.suffix != "" and path.is_file())


def _template_for_all(nested: dict[str, dict[str, Any]], options: type) -> list[str]:
    """Give the data set's template to a method that has an option for its own; what contradicts, if they differ."""
    given, own = nested["data"].get("template"), nested["method"].get("template")
    if not isinstance(given, str) or "{}" not in given or "template" not in {f.name for f in fields(options)}:
        return []
    nested["method"]["template"] = own or given
    return [f"data.template = {given} and method.template = {own} contradict each other"] * (own not in (None, given))


def check_capabilities(
    name: str, can: Can, train: TrainConfig, classes_per_batch: int | None = None, processes: int = 1
) -> None:
    """Raise ConfigError if training, in so many processes, asks for what a method does not say it ``can``."""
    chosen = "" if classes_per_batch is None else f" (teacher.classes_per_batch = {classes_per_batch})"
    how = how_split(train, processes)
    if how and (Can.SPLIT_BATCHES not in can or chosen):
        raise ConfigError(f"method '{name}' compares the images of a batch{chosen}: it does not allow {how}")
    if train.text_chunk is not None and Can.SPLIT_TEXTS not in can:
        raise ConfigError(f"train.text_chunk: method '{name}' encodes the texts of all classes at once")
    if train.attention_drop is not None and Can.DROP_ATTENTION not in can:
        raise ConfigError(
            f"train.attention_drop = {train.attention_drop}: method '{name}' has no steps that run a tower's attention"
        )
    if train.attention_drop is not None and train.text_chunk is not None:
        raise ConfigError("train.text_chunk: with train.attention_drop the texts of all classes are encoded at once")
    if train.graphs and (Can.REPLAY_STEPS not in can or chosen):
        raise ConfigError(f"train.graphs: method '{name}' does other operations from step to step{chosen}")


def how_split(train: TrainConfig, processes: int) -> str:
    """Among what the images of a batch are divided, in words; empty if they are not."""
    how = [f"{processes} processes"] * (processes > 1)
    return " and ".join(how + [f"train.accumulate = {train.accumulate}"] * (train.accumulate > 1))


def _whole_path(path: Any, unless: Any = None) -> Any:
    """A path from the root on; of what is none, ``unless``."""
    whole = path and Path(path).expanduser().absolute()
    return str(whole) if whole and (unless is None or whole.exists()) else unless


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _known_keys(options: type) -> list[str]:
    keys = ["backbone", "seed", "method.name", *(f"method.{f.name}" for f in fields(options))]
    return keys + [f"{s}.{f.name}" for s, c in SECTIONS.items() for f in fields(c)]


def _resolve(key: str, known: list[str], problems: list[str]) -> str | None:
    """The full key that ``key`` means: itself, or the one key that ends in it."""
    if key in known:
        return key
    ending = [k for k in known if k.rpartition(".")[2] == key]
    ending = [k for k in ending if k.startswith("method.") and key != "name"] or ending
    if len(ending) == 1:
        return ending[0]
    if ending:
        problems.append(f"key '{key}' is not clear (write one of {', '.join(ending)})")
        return None
    if len(problems) >= TOLD:  # looking for what was meant takes a while
        problems.append("unknown key")
        return None
    key = one_line(key, 60)
    name, short = key.rpartition(".")[2], {k.rpartition(".")[2]: k for k in reversed(known)}
    # A name that exists in another section is nearer than any other name in the section given.
    near = [name] if name in short else get_close_matches(key, known, 1, 0.6) or get_close_matches(name, short, 1, 0.6)
    guess = f": did you mean '{short.get(near[0], near[0])}'?" if near else ""
    problems.append(f"unknown key '{key}'{guess}")
    return None


def checked(cls: type, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    """An instance of a configuration dataclass, or None with the problems noted."""
    assert is_dataclass(cls)
    hints = get_type_hints(cls)
    try:
        checked = reader(cls).validate_python({k: _as_written(v, hints[k]) for k, v in values.items()})
    except ValidationError as error:
        problems += _one_line_each(error, prefix)
        return None
    for name, value in vars(checked).items():
        problems += _strange(f"{prefix}{name}", value)
    return checked


def _checked_top(values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    hints, plain = get_type_hints(RunConfig, include_extras=True), get_type_hints(RunConfig)
    checked = {}
    for key, value in values.items():
        try:
            checked[key] = reader(hints[key]).validate_python(_as_written(value, plain[key]))
            problems += _strange(key, checked[key])
        except ValidationError as error:
            problems += _one_line_each(error, key)
    return checked


def _as_written(value: Any, hint: Any) -> Any:
    """In quotes what pydantic takes for a number and people may not: ``true`` (1), ``1_000``, ``010``.

    NumPy's numbers are numbers.
    """
    value = value.item() if isinstance(value, np.generic) else value
    allowed = {*(get_args(hint) or [hint])} - {type(None)}
    if isinstance(value, bool) and bool not in allowed and allowed & {int, float}:
        return str(value).lower()
    if isinstance(value, str) and allowed <= {int, float} and re.search("[0-9]", value):
        return value if DECIMAL.fullmatch(value) else f"'{value}'"
    return value


def _strange(key: str, value: Any) -> list[str]:
    """What no setting may be, whatever its own range."""
    if isinstance(value, str):
        try:
            check_text(value)
        except ValueError as error:
            return [f"{key}: {error}"]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{key} = {value} (allowed: finite number)"]
    if isinstance(value, int | float) and abs(value) > MOST and key.rpartition(".")[2] != "seed":
        return [f"{key} = {value} (allowed: at most {MOST:g})"]
    return []


def _contradictions(sections: Mapping[str, Any]) -> list[str]:
    optim, train, problems = sections["optim"], sections["train"], []
    if optim and optim.min_lr > optim.lr:
        problems.append(f"optim.min_lr = {optim.min_lr:g} (allowed: at most optim.lr = {optim.lr:g})")
    for what, kinds in OF_ATTENTION_DROP.items() if train else ():
        value = getattr(train, what)
        if value != getattr(TrainConfig, what) and train.attention_drop not in kinds:
            problems.append(f"train.{what} = {value}: it is of train.attention_drop={' or '.join(kinds)}")
    return problems


def _one_line_each(error: ValidationError, prefix: str) -> list[str]:
    lines: dict[str, str] = {}
    for e in error.errors():
        key = f"{prefix}{e['loc'][0] if e['loc'] else ''}"
        rule = e["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("a valid ")
        near = ""
        if e["type"] == "literal_error":
            options = [o.strip("'") for o in e["ctx"]["expected"].replace(" or ", ", ").split(", ")]
            match = get_close_matches(str(e["input"]), options, 1, 0.5)
            near = f"; did you mean '{match[0]}'?" if match else ""
        lines.setdefault(key, f"{key} = {_shown(e['input'])} (allowed: {rule[0].lower()}{rule[1:]}{near})")
    return list(lines.values())


def _shown(value: object) -> str:
    try:
        text = printable(one_line(value, None))
    except ValueError:
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else text[:79] + "…"
