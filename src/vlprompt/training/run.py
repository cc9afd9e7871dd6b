"""One run: a configuration in, a run folder with its log, its metrics and the tuned model out."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

import vlprompt
from vlprompt.backbones.backbone import Backbone
from vlprompt.backbones.load import load_backbone
from vlprompt.data.datasets import LoadedDataset, load_dataset
from vlprompt.data.reading import ImageReader
from vlprompt.data.splits import Split, write_split
from vlprompt.data.views import TrainingViews
from vlprompt.errors import ConfigError, DataError, OutputError
from vlprompt.files import cannot_write, write_atomically
from vlprompt.methods import Method, find_method
from vlprompt.training.artefact import save_artefact
from vlprompt.training.config import RunConfig
from vlprompt.training.evaluate import EvaluationImages, evaluate
from vlprompt.training.loop import EpochLog, fit
from vlprompt.training.selection import choose_images


class Progress(Protocol):
    """Told how a run goes; the command line draws it."""

    def start(self, steps: int, epochs: int) -> None:
        """Training begins: ``steps`` in each of ``epochs``."""

    def step(self) -> None:
        """A step is done."""

    def epoch(self, log: EpochLog, val_accuracy: float | None) -> None:
        """An epoch is done."""


class Silent:
    """Progress that nobody watches."""

    def start(self, steps: int, epochs: int) -> None:
        """Training begins."""

    def step(self) -> None:
        """A step is done."""

    def epoch(self, log: EpochLog, val_accuracy: float | None) -> None:
        """An epoch is done."""


@dataclass(frozen=True)
class Result:
    """What a finished run reports."""

    run: str
    epochs: int
    train_accuracy: float
    """Percent, on the whole training images."""
    val_accuracy: float | None
    """Percent; None where there is no val split."""
    trainable_parameters: int
    seconds: float
    skipped: int = 0
    """Images left out because they cannot be read."""


def train(
    config: RunConfig, out: Path, progress: Progress | None = None, say: Callable[[str], None] = lambda text: None
) -> tuple[Method, Result]:
    """Train as configured and write the run folder ``out``.

    Input that cannot be used leaves no folder behind. Raises ConfigError if the folder is already in use, and
    OutputError if it cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"output folder {out} is already in use: choose another with --out")
    with ImageReader(config.data.workers) as reader:
        return _run(config, out, reader, progress or Silent(), say)


def _run(
    config: RunConfig, out: Path, reader: ImageReader, progress: Progress, say: Callable[[str], None]
) -> tuple[Method, Result]:
    began = time.monotonic()
    dataset = load_dataset(config.data.name, config.data.root, config.data.split_file)
    split, skipped = choose_images(config, dataset, reader, say)
    backbone = load_backbone(config.backbone, config.train.device, config.train.precision)
    torch.manual_seed(config.seed)
    method = find_method(config.method)(backbone, split.class_names, config.settings, dataset.template)
    method.to(backbone.device)
    trainable = sum(p.numel() for p in method.parameters() if p.requires_grad)
    images = {part: _images(split, part, reader) for part in ("train", "val")}

    with _run_folder(out):
        say(
            f"{config.method} on {backbone.name}: {len(split.class_names)} classes of {dataset.name}, "
            f"{len(split.train)} training images, {trainable:,} learned parameters"
        )
        write_atomically(out / "config.yaml", config.to_yaml())
        write_atomically(out / "environment.json", json.dumps(environment(backbone), indent=2))
        write_split(split, out / "split.json")
        with (out / "log.jsonl").open("w", encoding="utf-8") as log_file:
            epochs, val_accuracy = _train(config, method, split, images, reader, progress, log_file.write)
        train_accuracy = evaluate(method, images["train"], split.class_names).accuracy
        if val_accuracy is None and split.val:
            val_accuracy = evaluate(method, images["val"], split.class_names).accuracy
        result = Result(str(out), epochs, train_accuracy, val_accuracy, trainable, time.monotonic() - began, skipped)
        write_atomically(out / "metrics.json", json.dumps(vars(result), indent=2))
        save_artefact(method, out, about(config, dataset, result))
    return method.requires_grad_(False), result


@contextmanager
def _run_folder(out: Path) -> Iterator[None]:
    """Make the run folder, which is empty or not there yet; take it away if the run fails before an epoch is done.

    The causes are data that cannot be used (an image that cannot be decoded, a class name that is too long) and a disk
    that cannot be written. What an epoch has learned is kept.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]  # innermost first
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make output folder {out}: {error.strerror}") from None
        yield
    except (DataError, OutputError, OSError) as error:
        log = out / "log.jsonl"
        if not (log.is_file() and log.stat().st_size):
            for path in out.iterdir() if out.is_dir() else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for folder in made:
                with suppress(OSError):  # not made after all, or another run may have begun below it
                    folder.rmdir()
        if isinstance(error, OSError):
            raise cannot_write(Path(error.filename or out), error) from error
        raise


def _train(
    config: RunConfig,
    method: Method,
    split: Split,
    images: dict[str, EvaluationImages],
    reader: ImageReader,
    progress: Progress,
    write: Callable[[str], object],
) -> tuple[int, float | None]:
    """Train by gradient steps, or fit on frozen features; returns epochs and the last val accuracy."""
    if not method.trains:
        method.fit_features(images["train"].frozen(method), images["train"].labels)
        method.eval()
        return 0, None
    views = TrainingViews(
        split.paths("train"),
        [item.label for item in split.train],
        method.backbone.preprocess,
        config.data.batch_size,
        config.seed,
        min_scale=config.data.min_scale,
        reader=reader,
    )
    accuracy: float | None = None

    def after_epoch(log: EpochLog) -> None:
        nonlocal accuracy
        method.eval()
        accuracy = evaluate(method, images["val"], split.class_names).accuracy if split.val else None
        method.train()
        row = {"epoch": log.epoch + 1, "lr": log.lr, **log.losses, "val_accuracy": accuracy}
        write(json.dumps(row) + "\n")
        progress.epoch(log, accuracy)

    progress.start(len(views), config.train.epochs)
    fit(method, views, config.optim, config.train.epochs, progress.step, after_epoch)
    return config.train.epochs, accuracy


def _images(split: Split, part: str, reader: ImageReader) -> EvaluationImages:
    return EvaluationImages(split.paths(part), [item.label for item in split.items(part)], reader=reader)


def environment(backbone: Backbone) -> dict[str, Any]:
    """What a run's result may depend on besides its configuration."""
    return {
        "vlprompt": vlprompt.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if backbone.device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "backbone_fingerprint": backbone.fingerprint,
    }


def about(config: RunConfig, dataset: LoadedDataset, result: Result) -> dict[str, Any]:
    """The rows of the model card."""
    val = "no val split" if result.val_accuracy is None else f"{result.val_accuracy:.1f} %"
    return {
        "data set": f"{dataset.name} ({config.data.classes} classes)",
        "shots": config.data.shots or "all training images",
        "seed": config.seed,
        "epochs": result.epochs,
        "training": f"{config.optim.name}, lr {config.optim.lr:g}, batches of {config.data.batch_size}"
        if result.epochs
        else "no gradient steps",
        "learned parameters": f"{result.trainable_parameters:,}",
        "accuracy on the training images": f"{result.train_accuracy:.1f} %",
        "accuracy on the val images": val,
        "settings": "`" + ", ".join(f"{k}={v}" for k, v in vars(config.settings).items()) + "`",
    }
