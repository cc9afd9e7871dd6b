"""One run: a configuration in, a run folder with its log, its metrics and the tuned model out."""

from __future__ import annotations

import platform
import re
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from vlprompt.artefact.artefact import PROMPTS, load_calibration, save_artefact
from vlprompt.artefact.calibration import Calibration
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import load_backbone
from vlprompt.backbones.names import public_name
from vlprompt.bank.use import read_by, regions_used
from vlprompt.config.images import choose_images, image_notes
from vlprompt.config.schema import DataConfig, RunConfig, TrainConfig, build_config, read_config
from vlprompt.data.datasets import LoadedDataset, check_outside, load_dataset
from vlprompt.data.files import content_hash
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import Split, read_split, split_text, write_split
from vlprompt.documents import read_sealed, write_sealed
from vlprompt.errors import ArtefactError, ConfigError, DataError, Interrupted, OutputError, one_line
from vlprompt.files import held, in_use, write_atomically, write_error
from vlprompt.methods import Method, find_method
from vlprompt.methods.registry import file_fingerprint
from vlprompt.prompting.text import partly_known
from vlprompt.training.calibrate import calibrate_trained
from vlprompt.training.checkpoints import History, Keeper, checkpoint_file, remove_unfinished
from vlprompt.training.distributed import Processes, join_processes
from vlprompt.training.evaluate import EvaluationImages, evaluate, predict_logits, score
from vlprompt.training.interrupt import deferred_interrupt
from vlprompt.training.loop import Training
from vlprompt.training.prepare import Sources, build, describe, find_sources, finish, fit_features, prepare
from vlprompt.training.watchers import Watcher, find_service
from vlprompt.version import __version__

Environment = dict[str, str | int | None]
"""What ``environment.json`` holds, besides its checksum."""


@dataclass(frozen=True)
class Result:
    """What a finished run reports."""

    run: str
    epochs: int
    train_accuracy: float | None
    """Percent, on the whole training images; None where they have no labels."""
    val_accuracy: float | None
    """Percent; None where there is no val split."""
    trainable_parameters: int
    seconds: float
    skipped: int
    """Images left out because they cannot be read (--skip-bad)."""
    teacher: str | None
    """The model that it learned from, if it did not learn from labels."""
    kept_epoch: int | None = None
    """The epoch that is kept, where it was chosen on the val images; otherwise the last one is."""


def train(
    config: RunConfig,
    out: Path,
    watchers: Sequence[Watcher] = (),
    say: Callable[[str], None] = lambda text: None,
    *,
    resume: bool = False,
    decode: Callable[..., Image] | None = None,
    images_of: Callable[..., EvaluationImages] = EvaluationImages,
) -> tuple[Method, Result]:
    """Train as configured and write the run folder ``out``, or ``resume`` the run that is in it.

    A resumed run ends as if it had never stopped (bit by bit on the same machine's CPU). Input that cannot be used
    leaves no new folder behind. Ctrl-C finishes the step, saves a checkpoint and raises Interrupted, which says how
    to resume. ``decode`` opens the images in place of :func:`vlprompt.data.images.load_image`; ``images_of`` holds
    those that accuracy is measured on, in place of :class:`EvaluationImages`. Raises ConfigError if the folder is in
    use, or its run cannot be resumed with this data.
    """
    if not resume and in_use(out):
        raise ConfigError(f"output folder {out} is already in use: choose another with --out, or see --resume")
    began = time.monotonic()
    data = config.data
    with (
        join_processes(config.train.device) as processes,
        ImageReader(data.workers, decode=decode, max_pixels=data.max_pixels) as reader,
    ):
        if not processes.first:
            watchers, say = (), lambda text: None
        with processes.first_alone():
            dataset = _resumed_dataset(config, out) if resume else load_data(config)
            if not resume:
                check_outside(out, dataset)
            split, skipped = choose_images(config, dataset, reader, say)
            template = config.data.template or dataset.template
            backbone = load_backbone(config.backbone, processes.device, config.train.precision)
            sources = find_sources(config, split.class_names, template, backbone)
        method = build(config, sources, backbone, template, split.class_names)
        method.white = reader.white
        describe(method, config, dataset.split.class_names, say)
        images, val = (images_of(split.paths(part), split.labels(part), reader=reader) for part in ("train", "val"))

        predicted: list[Tensor] = []  # the latest logits of the val images

        def val_accuracy() -> float | None:
            predicted[:] = [predict_logits(method, val, split.class_names)] if split.val else []
            return score(predicted[0], val.labels, split.class_names).accuracy if split.val else None

        paths, labels = split.paths("train"), split.labels("train")
        begun = resume and checkpoint_file(out).exists()  # where it began from may be gone since
        ready = replace(config, train=replace(config.train, warm_start=None)) if begun else config
        training = prepare(
            ready,
            sources,
            method,
            paths,
            labels,
            config.seed,
            reader,
            processes=processes,
            validate=val_accuracy,
            whole=images,
        )
        if config.train.select == "val" and not split.val:
            raise ConfigError("train.select = val: there are no val images to select on")
        services = [find_service(s, out, config.to_dict()) for s in [config.train.report_to] if s and processes.first]
        if resume:
            _check_images(out, split)
        processes.wait()  # all have seen that the folder can be used
        with _run_folder(out, resume, processes):
            say(_opening(config, dataset, split, method, processes, sources))
            unread = partly_known(backbone, method.class_names) if method.reads_names else None
            for note in [
                *(image_notes(config, dataset, split, reader) if processes.first else []),
                *([unread] if unread else []),
                *_unused(config),
                *([*_only_warm_up(config), *_no_crops(config), *_measures_all(config, method)] if training else []),
            ]:
                say(note)
            if processes.first:
                _describe(out, config, split, environment(backbone, sources), resume)

            def tell(done: int, of: int) -> None:
                for watcher in watchers:
                    watcher.view(done, of)

            fit_features(config, method, training, images, tell)
            selects = config.train.select == "val" or (method.keeps_best and bool(split.val))
            history = _steps(config, out, training, [*services, *watchers], say, selects) if training else History()
            if chosen := finish(config, method, images, val):
                say(chosen)
            if not training and processes.first:
                write_atomically(out / "log.jsonl", "")
            method.eval()
            if chosen or history.best_epoch not in (0, len(history.rows)):
                predicted.clear()  # they are of other prompts
            last = None if predicted else val_accuracy()
            kept = history.kept["val_accuracy"] if history.kept and not chosen else last
            train_accuracy = None if split.unlabelled else evaluate(method, images, split.class_names).accuracy
            trainable = sum(p.numel() for p in method.learned())
            seconds = time.monotonic() - began + history.earlier
            taught_by = config.teacher.backbone or sources.taught_by if config.taught else None
            best = history.best_epoch if training and selects else None
            epochs = len(history.rows)
            result = Result(str(out), epochs, train_accuracy, kept, trainable, seconds, skipped, taught_by, best)
            if processes.first:
                write_sealed(out / "metrics.json", vars(result), indent=2)
                calibration = _calibration_there(out) or calibrate_trained(
                    method, predicted, val.labels, split.class_names, say
                )
                save_artefact(method, out, about(config, dataset, result, history), calibration)
    return method.requires_grad_(False), result


def _steps(
    config: RunConfig,
    out: Path,
    training: Training,
    watchers: Sequence[Watcher],
    say: Callable[[str], None],
    selects: bool,
) -> History:
    """Train from the run's last checkpoint, or from the start, to the end; Ctrl-C saves and is raised then."""
    keeper = Keeper(out, training, config.fingerprint, selects, training.processes.first)
    if training.epoch or training.step:
        say(f"resumed after epoch {training.epoch}" + f" and {training.step} steps" * (training.step > 0))
    with deferred_interrupt(insist=training.processes.size == 1) as asked:
        if not training.run([keeper, *watchers], asked):
            keeper.save()
            raise KeyboardInterrupt
    if asked():  # during the last validation
        raise KeyboardInterrupt
    if keeper.selects:
        training.method.load_state_dict(keeper.history.best)
    return keeper.history


def saved_config(run: Path) -> RunConfig:
    """The configuration of an earlier run; raises ConfigError if there is none in the folder."""
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"no run to resume in {run}: it has no config.yaml")
    values = read_config(file)
    if not isinstance(values.get("method.name"), str):
        raise ConfigError(f"configuration {file} names no method")
    return build_config(values["method.name"], file=values)


def _opening(
    config: RunConfig,
    dataset: LoadedDataset,
    split: Split,
    method: Method,
    processes: Processes,
    sources: Sources,
) -> str:
    """What is trained, in a few lines: teacher or bank, and the learned parameters by shape, like ones together."""
    together = f" in {processes.size} processes" if processes.size > 1 else ""
    total = sum(p.numel() for p in method.learned())
    like = Counter((re.sub(r"\d+", "*", n), tuple(p.shape)) for n, p in method.named_parameters() if p.requires_grad)
    shapes = (f"{f'{n} × ' if n > 1 else ''}{name} {list(shape)}" for (name, shape), n in like.items())
    lines = [
        f"{method.name} on {method.backbone.name}{together}: {len(split.class_names)} classes of {dataset.name}, "
        f"{len(split.train)} training images",
        f"{total:,} learned parameters" + (f": {', '.join(shapes)}" if total else ""),
    ]
    if teacher := sources.teacher:
        lines.insert(1, f"taught by {teacher.name}: {len(teacher.class_names)} classes, '{teacher.template}'")
    if bank := sources.bank:
        (labels, features), t = read_by(config, bank), bank.settings.teacher
        used, there = regions_used(config.data, bank), bank.settings.regions
        what = [f"{f'{used} of ' if used < there else ''}{there} regions of each image"]
        what += [f"labelled by {t.name} with '{t.template}' and logit scale {t.logit_scale:g}"] if labels and t else []
        what += ["with frozen features"] if features else []
        lines.insert(1, f"{', '.join(what)}, from {bank.folder}")
    return "\n".join(lines)


def _unused(config: RunConfig) -> list[str]:
    """A line for each setting that was changed and has no effect beside the others."""
    options, name, template = config.options, config.method, config.data.template
    changed = {key: value for key, value in vars(options).items() if value != getattr(type(options), key)}
    lines = []
    if template and not config.taught and not find_method(name).reads_template:
        lines.append(f"data.template = {template} has no effect: {name} learns the words around the class name")
    for key, other in options.unused().items():
        if key in changed:
            lines.append(f"method.{key} = {changed[key]} has no effect: method.{other} = {getattr(options, other)}")
    for key, (file, reads) in options.beside.items():
        given = getattr(config.data, file)
        if key in changed and reads != bool(given):
            where = f"beside data.{file} = {given}" if given else f"without data.{file}"
            lines.append(f"method.{key} = {changed[key]} has no effect {where}")
    return lines


def _only_warm_up(config: RunConfig) -> list[str]:
    """A line for a training that ends before its learning rate has risen."""
    optim, epochs = config.optim, config.train.epochs
    return [
        f"train.epochs = {epochs}: all of it is warm-up, at a learning rate of {optim.warmup_lr:g} "
        f"(optim.warmup_epochs = {optim.warmup_epochs:g})"
    ] * (epochs <= optim.warmup_epochs)


def load_data(config: RunConfig) -> LoadedDataset:
    """The configured data set; raises ConfigError for images without labels where labels are what is learned from."""
    data, method = config.data, find_method(config.method)
    reads = (method.reads_labels and not config.taught) or method.fit_features is not Method.fit_features or data.bank
    if data.class_names_file and reads:
        raise ConfigError(
            f"data.class_names_file = {data.class_names_file}: method '{method.name}' learns from labels, or "
            "those of a bank (allowed: a method that reads none, or one with --teacher)"
        )
    return load_dataset(data.name, data.root, data.split_file, data.class_names_file)


def _resumed_dataset(config: RunConfig, out: Path) -> LoadedDataset:
    try:
        return load_data(config)
    except DataError as error:
        command = f"vlprompt train --resume {shlex.quote(str(out))}"
        raise DataError(f"{error}; where the data has moved: {command} DATA, or with --root DIR") from None


def _no_crops(config: RunConfig) -> list[str]:
    """A line for a size of random crops that there are none of."""
    data = config.data
    changed = data.views == "center" and data.min_scale != DataConfig.min_scale
    return [f"data.min_scale = {data.min_scale:g} has no effect: data.views = center"] * changed


def _measures_all(config: RunConfig, method: Method) -> list[str]:
    """A line for an interval of measurements where every epoch is measured."""
    every = config.train.val_every
    why = "train.select = val" if config.train.select == "val" else method.name if method.keeps_best else None
    changed = why and every != TrainConfig.val_every
    return [f"train.val_every = {every} has no effect: {why} measures every epoch"] * bool(changed)


def _calibration_there(out: Path) -> Calibration | None:
    """That of a run which was finished before: it may be of other images than calibrate the end of training."""
    with suppress(ArtefactError):  # not finished, or damaged since
        return load_calibration(out)
    return None


def _check_images(out: Path, split: Split) -> None:
    """Raise ConfigError if the run in ``out`` began with other images or classes."""
    if not (out / "split.json").exists():  # it was stopped before it began
        return
    if split.unlabelled:
        same = (out / "split.json").read_text("utf-8") == split_text(split)
    else:
        before = read_split(out / "split.json", split.root)
        same = (before.class_names, before.train, before.val) == (split.class_names, split.train, split.val)
    if not same:
        raise ConfigError(f"cannot resume {out}: its data set no longer gives the images of its split.json")


def _describe(out: Path, config: RunConfig, split: Split, environment: Environment, resume: bool) -> None:
    file = out / "environment.json"
    # What the run began with: a resumed one refuses other texts by itself, and no longer reads what it began from.
    began = _saved_environment(file) if resume and file.is_file() else files_read(config)
    environment |= {key: began[key] for key in _READ if key in began}
    if not resume:
        write_atomically(out / "config.yaml", config.placed().to_yaml())
    if own := file_fingerprint(config.method):
        environment["method_fingerprint"] = own
    write_sealed(file, environment, indent=2)
    write_split(split, out / "split.json")


@contextmanager
def _run_folder(out: Path, resume: bool, processes: Processes) -> Iterator[None]:
    """Make the run folder, which is empty or not there yet; take it away if the run fails before its first checkpoint.

    The causes are data that cannot be used (an image that cannot be decoded, a class name that is too long) and a disk
    that cannot be written. What a run has trained, an earlier run's folder, and what was there before, stays. Raises
    ConfigError if another process is at work in it.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]  # innermost first
    there: set[Path] | None = None  # what is in the folder before the run; None until it is this run's
    lock = ExitStack()
    try:
        try:
            if processes.first:
                out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make output folder {out}: {error.strerror}") from None
        if processes.first and (not lock.enter_context(held(out)) or (not resume and in_use(out))):
            raise ConfigError(f"output folder {out} is already in use: another process has begun a run there")
        if processes.first:
            remove_unfinished(out)
            there = set(out.iterdir())
        yield
    except (DataError, OutputError, OSError) as error:
        if processes.first and not resume and not checkpoint_file(out).exists():
            for path in set(out.iterdir()) - there if there is not None and out.is_dir() else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for folder in made:
                with suppress(OSError):  # not made after all, or another run may have begun below it
                    folder.rmdir()
        if isinstance(error, OSError):
            raise write_error(Path(error.filename or out), error) from error
        raise
    except KeyboardInterrupt:
        raise Interrupted(f"to continue: vlprompt train --resume {shlex.quote(str(out))}") from None
    finally:
        lock.close()


_READ = tuple(f"{name}_fingerprint" for name in ("descriptions", "prior", "class_names", "warm_start"))


def _saved_environment(file: Path) -> Environment:
    try:
        return read_sealed(file, Environment)
    except (KeyError, OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {one_line(error)}: without that file the run can be resumed") from None


def files_read(config: RunConfig) -> dict[str, str]:
    """Fingerprints of what a run reads beside images and backbones: texts, a prior, and what it begins from."""
    data, start = config.data, config.train.warm_start
    files = data.descriptions, data.prior, config.teacher.class_names_file, start and f"{start}/{PROMPTS}"
    places = {key: Path(file).expanduser() for key, file in zip(_READ, files, strict=True) if file}
    return {key: content_hash(place)[:12] for key, place in places.items() if place.is_file()}


def environment(backbone: Backbone, sources: Sources | None = None) -> Environment:
    """What a run's result may depend on besides its configuration."""
    teacher, bank = (sources.teacher, sources.bank) if sources else (None, None)
    gpu = backbone.device.type == "cuda"
    return {
        "vlprompt": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(backbone.device) if gpu else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "backbone_fingerprint": backbone.fingerprint,
        **({"teacher_fingerprint": teacher.model.fingerprint} if teacher else {}),
        **({"bank_fingerprint": bank.settings.fingerprint} if bank else {}),
    }


def about(config: RunConfig, dataset: LoadedDataset, result: Result, history: History) -> dict[str, Any]:
    """The rows of the model card."""
    views = config.data.views
    regions = "fixed regions" + (f", {views} of each image" if views else "")
    val = "no val split" if result.val_accuracy is None else f"{result.val_accuracy:.1f} %"
    return {
        "data set": f"{dataset.name} ({config.data.classes} classes"
        + (f", task {config.data.task})" if config.data.task else ")"),
        **({"setting": "transductive: unlabelled images of all classes"} if config.options.transductive else {}),
        "shots": config.data.shots or "all training images",
        "seed": config.seed,
        "epochs": f"{result.epochs} (kept: {history.best_epoch}, chosen on the val images)"
        if history.best_epoch
        else result.epochs,
        "training": f"{config.optim.name}, lr {config.optim.lr:g}, batches of {config.data.batch_size}"
        if result.epochs
        else "no gradient steps",
        **{
            what: f"`{Path(file).name}`"
            for what, file in (("class descriptions", config.data.descriptions), ("prior", config.data.prior))
            if file
        },
        **({"teacher": f"`{public_name(result.teacher)}` in place of labels"} if result.teacher else {}),
        **({"views": f"{regions}, of region bank `{Path(config.data.bank).name}`"} if config.data.bank else {}),
        **({"views": "the evaluation crop of each image"} if views == "center" and result.epochs else {}),
        "learned parameters": f"{result.trainable_parameters:,}",
        "accuracy on the training images": "no labels"
        if result.train_accuracy is None
        else f"{result.train_accuracy:.1f} %",
        "accuracy on the val images": val,
        "options": "`" + ", ".join(f"{k}={v}" for k, v in vars(config.options).items()) + "`",
    }
