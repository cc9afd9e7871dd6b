"""One run of a bench: trained or resumed, then measured; its figures lie in its folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import vlprompt
from vlprompt.artefact.artefact import FILES, load_artefact
from vlprompt.bank.manifest import read_manifest
from vlprompt.bench.protocols import PROTOCOLS, Measurement, Run, backbone_name, data_name, fingerprint
from vlprompt.bench.protocols import result_settings as settings_of
from vlprompt.bench.shared import SHARED, SharedImages, decoded_once
from vlprompt.config.images import run_split
from vlprompt.config.schema import RunConfig
from vlprompt.data.datasets import LoadedDataset, load_dataset
from vlprompt.data.reading import ImageReader, readable
from vlprompt.data.splits import Split, in_order, read_split
from vlprompt.errors import ConfigError, DataError, one_line
from vlprompt.files import write_atomically
from vlprompt.methods import Method
from vlprompt.training.checkpoints import remove_unfinished
from vlprompt.training.evaluate import Evaluation, evaluate
from vlprompt.training.run import saved_config, train

FORMAT_VERSION = 1
FIGURES = "figures.json"
GROUPS = ("many", "medium", "few")
_OF_TRAINING = ("epochs", "train_accuracy", "val_accuracy", "trainable_parameters", "seconds")
_WEIGHTS = ("backbone", "teacher")

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
    folder, config = out / run.folder, run.config
    figures = read_figures(folder) or {
        "format_version": FORMAT_VERSION,
        "protocol": run.protocol,
        "data": run.data,
        "name": run.name,
        "method": config.method,
        "backbone": backbone_name(config.backbone),
        "shots": config.data.shots,
        "seed": config.seed,
        "settings": fingerprint(config),
        "code": code_version(),
        "measured": [],
    }
    done = {_key(m) for m in figures["measured"]}
    load = cache(load_dataset)
    method: Method | None = None
    if not _trained(folder):
        begun = (folder / "config.yaml").exists()
        if folder.is_dir() and not begun:
            remove_unfinished(folder)  # killed before it wrote anything
        images_of = partial(SharedImages, folder=out / SHARED)
        method, _ = train(config, folder, resume=begun, decode=decoded_once(out / SHARED), images_of=images_of)
    figures |= {k: v for k, v in _read_json(folder / "metrics.json").items() if k in _OF_TRAINING}
    environment = _read_json(folder / "environment.json")
    figures["weights"] = {k: environment[f"{k}_fingerprint"] for k in _WEIGHTS if f"{k}_fingerprint" in environment}
    for measurement in run.measurements:
        wanted = (data_name(measurement.data), measurement.classes, measurement.split)
        if wanted in done:
            continue
        method = method or load_artefact(
            folder, run.config.backbone, run.config.train.device, run.config.train.precision
        )
        began = time.monotonic()
        method.take_template(measured_dataset(config, measurement, load).template)
        split = measured_split(config, measurement, load)
        images = images_fingerprint(split, measurement.split)
        score = measure(method.eval(), config, split, measurement.split, out / SHARED)
        row: dict[str, Any] = dict(zip(("data", "classes", "split"), wanted, strict=True))
        row |= {"code": code_version(), "seconds": time.monotonic() - began, "images_fingerprint": images}
        figures["measured"].append(row | (described(score, PROTOCOLS[run.protocol].groups) if score else {"n": 0}))
        write_atomically(folder / FIGURES, json.dumps(figures))
    return figures


def measured_dataset(config: RunConfig, measurement: Measurement, load: Load = load_dataset) -> LoadedDataset:
    """The data set that a run is measured on; a split file is of the one that it is trained on."""
    own = measurement.data == config.data.name
    return load(measurement.data, config.data.root, config.data.split_file if own else None)


def measured_split(config: RunConfig, measurement: Measurement, load: Load = load_dataset) -> Split:
    """The classes and images that a run is measured on; raises DataError if there are none."""
    data, dataset = config.data, measured_dataset(config, measurement, load)
    split = dataset.split.subset(measurement.classes)
    if data.val_fraction and not split.val and measurement.split == "val":
        split = split.with_val(data.val_fraction)
    if not split.items(measurement.split):
        raise DataError(f"data set '{dataset.name}' has no {measurement.split} images of {measurement.classes} classes")
    return split


def images_fingerprint(split: Split, part: str) -> str:
    """Twelve hexadecimal digits that stand for a part's images by name, their labels, and the class names."""
    content = json.dumps([split.class_names, [(item.path, item.label) for item in in_order(split.items(part))]])
    return sha256(content.encode()).hexdigest()[:12]


def measure(method: Method, config: RunConfig, split: Split, part: str, shared_folder: Path) -> Evaluation | None:
    """Score a tuned model; None where it cannot be asked about other classes than its own (a linear probe)."""
    if split.class_names != method.class_names and not method.takes_new_classes:
        return None
    items, paths = split.items(part), split.paths(part)
    kept = _readable(tuple(paths), config.data.workers) if config.data.skip_bad else range(len(paths))
    labels = [items[i].label for i in kept]
    with ImageReader(config.data.workers, room=0) as reader:
        images = SharedImages([paths[i] for i in kept], labels, reader, folder=shared_folder)
        return evaluate(method, images, split.class_names)


@lru_cache(32)
def _readable(paths: tuple[Path, ...], workers: int) -> Sequence[int]:
    """Which images can be decoded: all are, so once for the runs of a process."""
    with ImageReader(workers, room=0) as reader:
        return readable(paths, reader, True, lambda text: None)


def described(score: Evaluation, groups: bool) -> dict[str, Any]:
    """A measurement's figures as JSON values; with ``groups`` those of many, medium and few training images too."""
    figures = {**score.to_dict(), "macro_accuracy": score.macro_accuracy, "confusion": score.confusion}
    figures["class_names"] = figures.pop("classes")
    if groups:
        figures["groups"] = group_figures(score.confusion, len(score.classes))
    return figures


def group_figures(confusion: Sequence[Sequence[int]], n_classes: int) -> dict[str, dict[str, float]]:
    """Accuracy (percent) of the thirds of the class list, whose first class has most training images in a long tail.

    A group without images is left out.
    """
    seen, right = [0] * n_classes, [0] * n_classes
    for c, predicted, n in confusion:
        seen[c] += n
        right[c] += n * (c == predicted)
    figures = {}
    for g, group in enumerate(GROUPS):
        classes = [c for c in range(n_classes) if 3 * c // n_classes == g and seen[c]]
        if classes:
            n = sum(seen[c] for c in classes)
            figures[group] = {
                "n": n,
                "accuracy": 100 * sum(right[c] for c in classes) / n,
                "macro_accuracy": 100 * sum(right[c] / seen[c] for c in classes) / len(classes),
            }
    return figures


def read_figures(folder: Path) -> dict[str, Any] | None:
    """A run's figures; None if there are none yet. Raises DataError if they cannot be read."""
    file = folder / FIGURES
    if not file.is_file():
        return None
    figures = _read_json(file)
    version = figures.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise DataError(f"{file} has format_version {version}; this vlprompt reads up to {FORMAT_VERSION}: update it")
    try:
        _ = figures["data"], figures["name"], set(map(_key, figures["measured"]))
    except (KeyError, TypeError) as error:
        raise DataError(f"{file} lacks figures: {error}") from None
    return figures


def finished(run: Run, out: Path) -> bool:
    """Whether a run is trained, and everything that is asked of it measured."""
    figures = read_figures(out / run.folder)
    if figures is None or not _trained(out / run.folder):
        return False
    done = {_key(m) for m in figures["measured"]}
    return all((data_name(m.data), m.classes, m.split) in done for m in run.measurements)


def check_same_settings(run: Run, out: Path) -> None:
    """Raise ConfigError if the run in the folder was begun with other settings than are asked for now."""
    folder = out / run.folder
    if not (folder / "config.yaml").is_file():
        return
    saved = saved_config(folder)
    before, now = settings_of(saved), settings_of(run.config)
    before["seed"], now["seed"] = saved.seed, run.config.seed
    differ = [f"{k} = {before.get(k)}, now {now.get(k)}" for k in {**before, **now} if before.get(k) != now.get(k)]
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise ConfigError(
            f"{folder} holds results from other settings ({'; '.join(differ[:3])}{more}): choose another --out, "
            "or remove it"
        )


def check_same_data(run: Run, out: Path, load: Load = load_dataset) -> None:
    """Raise ConfigError if a run in the folder was trained or measured on other images than its data have now.

    Images count by name, label and class name, not by their pixels; where a run left out unreadable ones, those that it
    was trained on are not compared. A region bank counts by its settings. Runs that are not trained yet look themselves
    when they are resumed.
    """
    folder, data = out / run.folder, run.config.data
    if not _trained(folder):
        return
    advice = "has now: choose another --out, or remove it"
    if not _read_json(folder / "metrics.json").get("skipped") and (folder / "split.json").is_file():
        now = run_split(run.config, load(data.name, data.root, data.split_file))
        before = read_split(folder / "split.json", now.root)
        if (before.class_names, before.train, before.val) != (now.class_names, now.train, now.val):
            raise ConfigError(f"{folder} was trained on other images than {run.data} {advice}")
    bank = _read_json(folder / "environment.json").get("bank_fingerprint")
    if bank and data.bank and bank != read_manifest(Path(data.bank).expanduser()).settings.fingerprint:
        raise ConfigError(f"{folder} was trained on another region bank than {data.bank}: choose another --out")
    known = {_key(m): m.get("images_fingerprint") for m in (read_figures(folder) or {"measured": []})["measured"]}
    for m in run.measurements:
        name = data_name(m.data)
        images = known.get((name, m.classes, m.split))
        if images and images != images_fingerprint(measured_split(run.config, m, load), m.split):
            raise ConfigError(f"{folder} was measured on other images than {name} {advice}")


def _trained(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("metrics.json", *FILES))


def _key(measured: Mapping[str, Any]) -> tuple[str, str, str]:
    return measured["data"], measured["classes"], measured["split"]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file} holds no figures")
    return content
