"""One run of a bench: trained or resumed, then measured; its figures lie in its folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import vlprompt
from vlprompt.artefact.artefact import FILES, load_artefact
from vlprompt.bank.manifest import read_manifest
from vlprompt.bench.figures import FIGURES, FORMAT_VERSION, described, read_figures, unreadable_error
from vlprompt.bench.protocols import PROTOCOLS, Measurement, Run, attack_of, seen
from vlprompt.bench.rows import backbone_name, fingerprint, result_settings
from vlprompt.bench.shared import SHARED, SharedImages, decoded_once
from vlprompt.bench.stages import Stage, carried, side_by_side, stages
from vlprompt.config.images import run_split
from vlprompt.config.schema import RunConfig
from vlprompt.data.datasets import LoadedDataset, load_dataset
from vlprompt.data.reading import ImageReader, readable
from vlprompt.data.splits import Split, find_classes, in_order, read_split
from vlprompt.documents import read_sealed, write_sealed
from vlprompt.errors import ConfigError, DataError
from vlprompt.methods import Method, find_method
from vlprompt.training.attack import AttackedImages
from vlprompt.training.checkpoints import checkpoint_file
from vlprompt.training.evaluate import Evaluation, evaluate
from vlprompt.training.prepare import describe_others
from vlprompt.training.run import Environment, Result, files_read, saved_config, train

_OF_TRAINING = ("epochs", "train_accuracy", "val_accuracy", "trainable_parameters", "seconds", "skipped", "kept_epoch")
_COMMON = (
    "train.precision", "data.imbalance", "data.val_fraction", "data.allow_fewer", "data.skip_bad", "data.split_file"
)  # fmt: skip
"""Settings that rows of a table should share: the report says where they do not."""
ADVICE = "choose another folder, or remove it"

T = TypeVar("T")

Load = Callable[[str, str | None, str | None], LoadedDataset]
"""``load_dataset``, or one that remembers."""


@lru_cache(1)
def code_version() -> str:
    """The version, and eight hexadecimal digits that change with any file of the package."""
    place = Path(vlprompt.__file__).parent
    files = sorted(place.rglob("*.py"), key=lambda file: file.relative_to(place).as_posix())
    content = sha256(b"".join(sha256(file.read_bytes()).digest() for file in files))
    return f"{vlprompt.__version__}+{content.hexdigest()[:8]}"


def do_run(run: Run, out: Path) -> dict[str, Any]:
    """Train a run, or resume it, and measure what is not measured yet; returns the content of its figures.json.

    Raises what :func:`vlprompt.training.run.train` raises, and DataError for data that cannot be measured.
    """
    folder, config, load = out / run.folder, run.config, cache(load_dataset)
    figures = read_figures(folder) or {
        "format_version": FORMAT_VERSION,
        "protocol": run.protocol,
        "data": run.data,
        "name": run.name,
        "method": find_method(config.method).name,
        "backbone": backbone_name(config.backbone),
        "shots": config.data.shots,
        "seed": config.seed,
        "settings": fingerprint(config),
        "common": {key: result_settings(config)[key] for key in _COMMON},
        "code": code_version(),
        "measured": [],
    }
    trained: list[Stage] = []
    models: dict[Path, Method] = {}
    done = set(map(_key, figures["measured"]))
    for stage in stages(run, out):
        if not _trained(stage.folder):
            models[stage.folder] = _train(stage, trained[-1] if trained else None, out / SHARED)
        trained.append(stage)
        figures |= _of_training(trained)
        used = [stage] if carried(config) else trained
        for measurement in (m for m in stage.measurements if m.key not in done):
            for place in (s.folder for s in used if s.folder not in models):
                models[place] = load_artefact(place, config.backbone, config.train.device, config.train.precision)
                describe_others(models[place], None, Path(config.data.prior) if config.data.prior else None)
            asked = [models[s.folder] for s in used]
            began = time.monotonic()
            for method in asked:
                method.take_template(measured_dataset(config, measurement, load).template)
                method.eval()
            split = measured_split(config, measurement, load)
            score = measure(asked, config, split, measurement, out / SHARED)
            measured: dict[str, Any] = {**measurement.to_dict(), "code": code_version()}
            measured["seconds"] = time.monotonic() - began
            measured["images_fingerprint"] = images_fingerprint(split, measurement.split)
            groups = PROTOCOLS[run.protocol].groups
            found = described(score, groups) if score else {"n": 0}
            measured["skipped"] = len(split.items(measurement.split)) - found["n"] if score else 0
            figures["measured"].append(measured | found)
            write_sealed(folder / FIGURES, figures)
    return figures


def _train(stage: Stage, before: Stage | None, shared_folder: Path) -> Method:
    """Train a stage, or resume it, from what the one before it learned, if that is carried on."""
    config, begun = stage.config, (stage.folder / "config.yaml").exists()
    images_of = partial(SharedImages, folder=shared_folder)
    if before and carried(config) and _read(before.folder / "metrics.json", Result).trainable_parameters:
        # A checkpoint wants the place as it was written then: the bench folder may have been moved since.
        stepped = checkpoint_file(stage.folder).exists()
        start = saved_config(stage.folder).train.warm_start if stepped else str(before.folder)
        config = replace(config, train=replace(config.train, warm_start=start))
    return train(config, stage.folder, resume=begun, decode=decoded_once(shared_folder), images_of=images_of)[0]


def _of_training(trained: Sequence[Stage]) -> dict[str, Any]:
    """What trainings cost, together, and what the last of them came to; and the weights that it read."""
    metrics = [_read(stage.folder / "metrics.json", Result) for stage in trained]
    figures = {key: getattr(metrics[-1], key) for key in _OF_TRAINING}
    figures["seconds"] = sum(m.seconds for m in metrics)
    if not carried(trained[-1].config):
        figures["trainable_parameters"] = sum(m.trainable_parameters for m in metrics)
    environment = _read(trained[-1].folder / "environment.json", Environment)
    known = {model: environment.get(f"{model}_fingerprint") for model in ("backbone", "teacher")}
    return figures | {"weights": {model: value for model, value in known.items() if value}}


def told(run: Run, figures: Mapping[str, Any]) -> str:
    """What was measured of a run, and how many images could not be read, in a line."""
    names = [(m, m["classes"] if m["data"] == run.data else m["data"]) for m in figures["measured"]]
    skipped = {"training images": figures.get("skipped", 0)}
    skipped |= {f"{m['split']} images of {name}": m.get("skipped", 0) for m, name in names}
    left_out = "".join(f"; {n} {what} left out, unreadable" for what, n in skipped.items() if n)
    return ", ".join(f"{name} {m['accuracy']:.2f} %" if m["n"] else f"{name} –" for m, name in names) + left_out


def measured_dataset(config: RunConfig, measurement: Measurement, load: Load = load_dataset) -> LoadedDataset:
    """The data set that a run is measured on; split file and template are of the one that it is trained on."""
    if measurement.data != config.data.name:
        return load(measurement.data, config.data.root, None)
    dataset = load(measurement.data, config.data.root, config.data.split_file)
    return replace(dataset, template=config.data.template or dataset.template)


def measured_split(config: RunConfig, measurement: Measurement, load: Load = load_dataset) -> Split:
    """The classes and images that a run is measured on; raises DataError if there are none."""
    data, dataset = config.data, measured_dataset(config, measurement, load)
    if place := seen(measurement.classes):
        split = dataset.split.of_task("/".join(map(str, place)), config.seed, seen=True)
    else:
        split = dataset.split.subset(measurement.half)
    if data.val_fraction and not split.val and measurement.split == "val":
        split = split.with_val(data.val_fraction)
    if not split.items(measurement.split):
        raise DataError(f"data set '{dataset.name}' has no {measurement.split} images of {measurement.classes} classes")
    return split


def images_fingerprint(split: Split, part: str) -> str:
    """Twelve hexadecimal digits that stand for a part's images by name, their labels, and the class names."""
    content = json.dumps([split.class_names, [(item.path, item.label) for item in in_order(split.items(part))]])
    return sha256(content.encode()).hexdigest()[:12]


def measure(
    methods: Sequence[Method], config: RunConfig, split: Split, measurement: Measurement, shared_folder: Path
) -> Evaluation | None:
    """Score a tuned model, or several of some classes each, side by side; None where it cannot be asked about other
    classes than its own (a linear probe).
    """
    method, part = methods[0], measurement.split
    names = [name for model in methods for name in model.class_names]
    if not method.takes_new_classes and None in find_classes(split.class_names, names):
        return None
    items, paths = split.items(part), split.paths(part)
    how = config.data.workers, method.white, config.data.max_pixels
    kept = _readable(tuple(paths), *how) if config.data.skip_bad else range(len(paths))
    with ImageReader(config.data.workers, room=0, white=method.white, max_pixels=config.data.max_pixels) as reader:
        labels = [items[i].label for i in kept]
        images = SharedImages([paths[i] for i in kept], labels, reader, folder=shared_folder)
        if len(methods) > 1:
            return side_by_side(methods, images, split.class_names)
        if attack := attack_of(measurement.classes):
            return evaluate(method, AttackedImages(images, attack, split.class_names), split.class_names)
        return evaluate(method, images, split.class_names)


@lru_cache(32)
def _readable(paths: tuple[Path, ...], workers: int, white: float | None, max_pixels: int | None) -> Sequence[int]:
    """Which images can be decoded: all are, so once for the runs of a process."""
    with ImageReader(workers, room=0, white=white, max_pixels=max_pixels) as reader:
        return readable(paths, reader, True, lambda text: None)


def finished(run: Run, out: Path) -> bool:
    """Whether a run is trained, and everything that is asked of it measured."""
    figures = read_figures(out / run.folder)
    trained = all(_trained(stage.folder) for stage in stages(run, out))
    done = set(map(_key, figures["measured"])) if figures and trained else set()
    return done >= {m.key for m in run.measurements}


def check_same(run: Run, out: Path, load: Load = load_dataset) -> None:
    """Raise ConfigError if the run in the folder has other settings or data than are asked for now.

    Images count by name, label and class name, not by their pixels; where a run left out unreadable ones, those that it
    was trained on are not compared. A region bank counts by its settings. Runs that are not trained yet compare their
    images themselves when they are resumed.
    """
    for stage in stages(run, out):
        if (stage.folder / "config.yaml").is_file():
            _check_same(stage, run, load)
    known = {_key(m): m["images_fingerprint"] for m in (read_figures(out / run.folder) or {"measured": []})["measured"]}
    for m in run.measurements:
        if m.key in known and known[m.key] != images_fingerprint(measured_split(run.config, m, load), m.split):
            raise ConfigError(f"{out / run.folder} was measured on other images than {m.key[0]} has now: {ADVICE}")


def _check_same(stage: Stage, run: Run, load: Load) -> None:
    folder, data = stage.folder, stage.config.data
    environment = _read(folder / "environment.json", Environment) if (folder / "environment.json").is_file() else {}
    saved = saved_config(folder)
    before, now = result_settings(saved), result_settings(stage.config.placed())
    if data.task is not None:
        now["train.warm_start"] = before["train.warm_start"]  # the task before, wherever its folder was
    if "method file" in before and "method_fingerprint" in environment:
        before["method file"] = environment["method_fingerprint"]
    before["seed"], now["seed"] = saved.seed, stage.config.seed
    if differ := [f"{k} = {before.get(k)}, now {now.get(k)}" for k in before | now if before.get(k) != now.get(k)]:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise ConfigError(f"{folder} holds results from other settings ({'; '.join(differ[:3])}{more}): {ADVICE}")
    if not _trained(folder):
        return
    if not _read(folder / "metrics.json", Result).skipped and (folder / "split.json").is_file():
        split = run_split(stage.config, load(data.name, data.root, data.split_file))
        then = read_split(folder / "split.json", split.root)
        if (then.class_names, then.train, then.val) != (split.class_names, split.train, split.val):
            raise ConfigError(f"{folder} was trained on other images than {run.data} has now: {ADVICE}")
    now_read = {key: value for key, value in files_read(stage.config).items() if key in environment}
    if data.task is not None:
        now_read.pop("warm_start_fingerprint", None)
    if changed := [key.removesuffix("_fingerprint") for key, value in now_read.items() if environment[key] != value]:
        raise ConfigError(f"{folder} was trained with another content of {', '.join(changed)}: {ADVICE}")
    bank = environment.get("bank_fingerprint")
    if bank and data.bank and bank != read_manifest(Path(data.bank).expanduser()).settings.fingerprint:
        raise ConfigError(f"{folder} was trained on another region bank than {data.bank}: {ADVICE}")


def _trained(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("metrics.json", *FILES))


def _key(measured: Mapping[str, Any]) -> tuple[str, str, str]:
    return measured["data"], measured["classes"], measured["split"]


def _read(file: Path, kind: type[T]) -> T:
    """What a run has written beside its figures."""
    try:
        return read_sealed(file, kind)
    except (KeyError, OSError, ValueError) as error:
        raise unreadable_error(file, error) from None
